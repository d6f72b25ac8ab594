"""Passes that belong to no one family: they serve pruning and quantization alike."""
