"""Pruning: score x pattern; one file, one paper."""
