"""One decoder block on its way: inputs gathered, scales folded, drift corrected."""
