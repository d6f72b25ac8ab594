"""Kernels for compressed linear layers, as functions of tensors; need torch, and Triton only when a GPU is used."""
