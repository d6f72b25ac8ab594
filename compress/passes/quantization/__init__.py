"""Quantization: grid x rounding; one file for each paper."""
