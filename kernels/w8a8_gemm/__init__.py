"""Weights and activations of 8 bits."""
