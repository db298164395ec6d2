"""This process: its processors, memory, signals and streams."""
