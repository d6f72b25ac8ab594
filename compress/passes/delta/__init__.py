"""Passes made for differences of two models, though they take any dense weight."""
