"""Rollouts in, scores out."""
