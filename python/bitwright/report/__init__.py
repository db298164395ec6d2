"""Records as tables for terminals."""
