"""What else is done with models: convert, refine, inspect, collect."""
