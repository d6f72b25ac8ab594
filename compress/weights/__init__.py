"""Weight expressions, patterns, grids and their stored form."""

from compress.weights.claims import check_claims, nodes
from compress.weights.expr import Masked, Product, Sum, Weight
from compress.weights.grid import Grid
from compress.weights.inputs import INPUTS, input_transform, rounded_for, rounded_inputs
from compress.weights.leaves import (
    BOOKS,
    Codebook,
    Dense,
    Diagonal,
    External,
    Hadamard,
    Nested,
    Permutation,
    Quantized,
    Scaled,
    Signs,
)
from compress.weights.pack import pack, specify, unpack
from compress.weights.pattern import NM, Blocks, Pattern, PerMatrix, PerRow, pattern
from compress.weights.tree import put_together, taken_apart

__all__ = [
    "BOOKS", "INPUTS", "NM", "Blocks", "Codebook", "Dense", "Diagonal", "External", "Grid", "Hadamard", "Masked",
    "Nested", "Pattern", "PerMatrix", "PerRow", "Permutation", "Product", "Quantized", "Scaled", "Signs", "Sum",
    "Weight", "check_claims", "input_transform", "nodes", "pack", "pattern", "put_together", "rounded_for",
    "rounded_inputs", "specify", "taken_apart", "unpack",
]  # fmt: skip
