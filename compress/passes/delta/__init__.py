"""Passes made for the difference of two models, though they accept any dense weight: one file for each paper."""
