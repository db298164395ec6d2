"""A float model through a method into a format, block by block."""
