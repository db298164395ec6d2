"""What is known of a run in the end: figures, model card, plots."""
