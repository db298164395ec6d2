"""Any decoder that transformers runs."""
