"""Benchmarks: commands that print results together with the conditions under which they were measured."""
