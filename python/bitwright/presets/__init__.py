"""Whole recipes of how to quantize a model."""
