"""Kernels for compressed linear maps: tensors in, tensors out; torch only, triton loaded when a GPU needs it."""
