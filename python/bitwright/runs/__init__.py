"""The parts of every long run: a memory budget, hidden states on disk, a journal, progress."""
