"""What every long run has: a budget, hidden states on disk, a journal, progress."""
