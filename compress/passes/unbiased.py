"""Making a compressed weight as large as it should be.

The nearest matrix of a codec is too small: its error is orthogonal to it, so of W itself it holds the share rho < 1. In
every matrix of a model that error points the same way, towards less of W; where W is what fine-tuning added, the model
falls back towards its base. Enlarged by 1 / rho the error is larger in each matrix, and orthogonal to W.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from compress.errors import UnsupportedWeight
from compress.passes.whitened import weighed
from compress.weights import Dense, Masked, Product, Quantized, Signs, Sum, Weight

LEAST = 0.05  # a share below which what is stored says next to nothing, and is left as it is


def unbiased(weight: Weight, w_OI: Tensor, gram_II: Tensor | None) -> Weight:
    """`weight` times 1 / rho, rho = tr(W' G Wᵀ) / tr(W G Wᵀ), so that the share becomes 1; by entries without a Gram.

    Only scales change. Left as it is if it holds less than a twentieth of W, or W has no output.
    """
    seen_OI = weighed(w_OI.float(), gram_II)
    whole = float((seen_OI * w_OI).sum())
    share = float((seen_OI * weight.dense().float()).sum()) / whole if whole > 0 else 0.0
    return enlarged(weight, 1 / share) if share > LEAST else weight


def enlarged(weight: Weight, factor: float) -> Weight:
    """The same expression, of `factor` times the matrix; raises UnsupportedWeight where no scale can say it."""
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
            raise UnsupportedWeight(f"{weight.describe()} cannot be enlarged by its scales alone")
