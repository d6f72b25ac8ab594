"""Weight expressions, patterns, grids and their stored form."""

from compress.weights.expr import Masked, Product, Sum, Weight
from compress.weights.grid import Grid
from compress.weights.leaves import Codebook, Dense, Diagonal, External, Hadamard, Permutation, Quantized, Signs
from compress.weights.pack import pack, specify, unpack
from compress.weights.pattern import NM, Blocks, Pattern, PerMatrix, PerRow, pattern

__all__ = [
    "NM", "Blocks", "Codebook", "Dense", "Diagonal", "External", "Grid", "Hadamard", "Masked", "Pattern", "PerMatrix",
    "PerRow", "Permutation", "Product", "Quantized", "Signs", "Sum", "Weight", "pack", "pattern", "specify", "unpack",
]  # fmt: skip
