"""Quantization: grid x rounding; one file, one paper."""
