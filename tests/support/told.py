"""The files of an output that tell of the command or call, so that they differ where that does."""

TOLD = ("README.md", "report.json", "bitwright.yaml")
