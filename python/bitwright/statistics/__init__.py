"""Statistics of layers' inputs, or the inputs themselves, in files."""
