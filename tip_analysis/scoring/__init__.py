"""Scoring: two models over rollouts, in one process, in two phases, or over Ray actors."""
