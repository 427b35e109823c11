"""Weights of 4 bits in groups, activations of 16."""
