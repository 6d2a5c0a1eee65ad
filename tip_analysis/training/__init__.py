"""Masked on-policy distillation: students, rollouts, selection, loss, optimizer, checkpoints."""
