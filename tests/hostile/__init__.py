"""Files from strangers: sound ones, changes of them, what reads them, and what must hold.

Shared by test_hostile.py, which draws changes with hypothesis, and fuzz.py, in which atheris guides them by
what they reach.
"""
