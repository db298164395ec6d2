"""A checkpoint as a decoder."""
