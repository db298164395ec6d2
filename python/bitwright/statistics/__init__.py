"""Statistics and inputs of layers in files."""
