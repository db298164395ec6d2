"""Quantized tensors and their grids."""
