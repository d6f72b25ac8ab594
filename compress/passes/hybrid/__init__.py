"""Passes that belong to no single family: they serve both pruning and quantization."""
