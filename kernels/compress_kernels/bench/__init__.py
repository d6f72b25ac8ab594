"""Benchmarks: commands that print a table and its conditions."""
