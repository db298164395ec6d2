"""The records of a run: figures, model card, plots."""
