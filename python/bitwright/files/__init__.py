"""Paths, links and single files."""
