"""Text from a decoder: weights in memory as they are stored, its past in a cache, choices and streams."""
