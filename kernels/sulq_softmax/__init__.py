"""Softmax with weights quantized by their logarithm."""
