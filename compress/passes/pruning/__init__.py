"""Pruning: score x pattern; one file for each paper."""
