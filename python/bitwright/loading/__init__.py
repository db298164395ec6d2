"""A checkpoint, in float or quantized, as a decoder."""
