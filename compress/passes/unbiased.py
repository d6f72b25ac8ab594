"""Rescaling a compressed weight so that it is not biased towards zero.

The nearest matrix that a codec can store is too small: its error is orthogonal to it, so it contains only the share
rho < 1 of W itself. In every matrix of a model that error points the same way, towards less of W; where W is what
fine-tuning added, the model falls back towards its base. Scaled by 1 / rho, the error is larger in each matrix, but
orthogonal to W.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from compress.errors import UnsupportedWeight
from compress.passes.whitened import weighed
from compress.weights import Dense, Masked, Product, Quantized, Signs, Sum, Weight

LEAST = 0.05  # share rho below which the stored weight says next to nothing about W and is left as it is


def unbiased(weight: Weight, w_OI: Tensor, gram_II: Tensor | None) -> Weight:
    """`weight` scaled by 1 / rho, where rho = tr(W' G Wᵀ) / tr(W G Wᵀ), so that this share becomes 1.

    Without a Gram, rho is taken over the entries. Only scales change. The weight is left as it is if rho is at most a
    twentieth, or if W has no output.
    """
    seen_OI = weighed(w_OI.float(), gram_II)
    whole = float((seen_OI * w_OI).sum())
    share = float((seen_OI * weight.dense().float()).sum()) / whole if whole > 0 else 0.0
    return enlarged(weight, 1 / share) if share > LEAST else weight


def enlarged(weight: Weight, factor: float) -> Weight:
    """The same expression with its matrix multiplied by `factor`.

    Raises UnsupportedWeight for an expression that has no scale to multiply.
    """
    match weight:
        case Sum(terms):
            return Sum(tuple(enlarged(term, factor) for term in terms))
        case Product(left, right):
            return Product(enlarged(left, factor), right)
        case Masked(values, mask_OI, pattern):
            return Masked(enlarged(values, factor), mask_OI, pattern)
        case Quantized(_, scale) | Signs(_, scale):
            return replace(weight, scale=(scale * factor).to(scale.dtype))
        case Dense(data):
            return Dense((data * factor).to(data.dtype))
        case _:
            raise UnsupportedWeight(f"{weight.describe()} has no scale by which it could be rescaled")
