"""Operations on models beside quantizing: convert, refine, inspect, collect."""
