"""Statistics of a mask: how much it keeps, how evenly, and which rows and inputs lost everything."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from compress.weights import Masked, Product, Weight


def masks(weight: Weight) -> tuple[Tensor, Tensor] | None:
    """The masks that act on the outputs and on the inputs of a weight, or None if it has no mask.

    They are those of the first term that has one; for a product of two masked factors they differ.
    """
    match weight:
        case Masked(_, mask_OI):
            return mask_OI, mask_OI
        case Product(left, right):
            found = [pair for factor in (left, right) if (pair := masks(factor)) is not None]
            return (found[0][0], found[-1][1]) if found else None
        case _:
            return next((pair for child in weight.children() if (pair := masks(child)) is not None), None)


def mask_statistics(weight: Weight) -> dict[str, Any]:
    """`mask`: the share kept, the fewest and most kept in a row, and how many rows and inputs lost everything.

    Empty for a weight without a mask.
    """
    found = masks(weight)
    if found is None:
        return {}
    mask_OI, inner = found
    rows_O, columns_I = mask_OI.sum(1), inner.sum(0)
    return {
        "mask": {
            "kept": float(rows_O.sum()) / mask_OI.numel(),
            "row": [int(rows_O.min()), int(rows_O.max())],
            "empty_rows": int((rows_O == 0).sum()),
            "empty_inputs": int((columns_I == 0).sum()),
        }
    }
