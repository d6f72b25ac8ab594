"""Benchmarks Compress against other tools on the same jobs and machine: time, memory, and remaining model quality."""
