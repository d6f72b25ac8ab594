"""Moving a transform T into a site's input: W x = (W T^-1)(T x). Shape suffixes: O out, I in."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from compress.errors import UnsupportedWeight
from compress.stats import ColumnNorm, Gram, Statistics
from compress.weights import Diagonal, Hadamard, Permutation, Weight


def undone(w_OI: Tensor, transform: Weight) -> Tensor:
    """W T^-1, in the dtype of W; raises UnsupportedWeight for a T that cannot be undone exactly."""
    match transform:
        case Permutation() | Hadamard():  # orthogonal: W Tᵀ
            return transform.linear(w_OI)
        case Diagonal(diagonal_I):
            return (w_OI.float() / diagonal_I.float()).to(w_OI.dtype)
        case _:
            raise UnsupportedWeight(f"an input transformed by {transform.describe()} is not known")


def statistics_behind(stats: Statistics, transform: Weight) -> Statistics:
    """The statistics of T x, from those of x: T S Tᵀ for square ones; per-feature ones only if they follow from T.

    A permutation reorders them, a diagonal scales ColumnNorm, and all others are left out.
    """
    square = {k: transform.linear(transform.linear(v).T).T for k, v in stats.values.items() if k.square}
    single = {k: v for k, v in stats.values.items() if not k.square}
    match transform:
        case Permutation(order_I):
            moved = {k: v[..., order_I.long()] for k, v in single.items()}
        case Diagonal(diagonal_I) if ColumnNorm in single:
            moved = {ColumnNorm: single[ColumnNorm] * diagonal_I.abs().float()}
        case _:
            moved = {}
    return Statistics(moved | square, stats.tokens)


def statistics_after(stats: Statistics, w_OI: Tensor) -> Statistics:
    """The statistics of W x that follow from those of x: W S Wᵀ for square ones, and ColumnNorm from the Gram."""
    w_OI = w_OI.float()
    square = {k: linear(linear(v, w_OI).T, w_OI).T for k, v in stats.values.items() if k.square}
    both = Gram in square and ColumnNorm in stats.values
    norms = {ColumnNorm: (stats.tokens * square[Gram].diagonal().clamp(min=0)).sqrt()} if both else {}
    return Statistics(norms | square, stats.tokens)
