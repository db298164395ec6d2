"""Mixed precision: sensitivities, allocation of bits, recipes."""
