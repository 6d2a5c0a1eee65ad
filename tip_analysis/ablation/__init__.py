"""Ablations: every rule and retention ratio trained under every seed, and what the paper's own experiments were."""
