"""Passes made for the difference of two models, though they take any dense weight: one file = one paper."""
