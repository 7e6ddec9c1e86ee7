"""Shortest paths on a random graph, learned from a reward alone."""
