"""The ``bitwright`` command."""
