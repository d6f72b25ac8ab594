"""What is worth knowing about a mask: how much it keeps, how evenly, and what died."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from compress.weights import Masked, Weight


def outer_mask(weight: Weight) -> Tensor | None:
    """The mask [out, in] of an expression, or of the first of its terms or factors that has one."""
    if isinstance(weight, Masked):
        return weight.mask_OI
    return next((mask for child in weight.children() if (mask := outer_mask(child)) is not None), None)


def mask_statistics(weight: Weight) -> dict[str, Any]:
    """`mask`: the share kept, the fewest and most kept of a row, and how many rows and inputs lost everything."""
    mask_OI = outer_mask(weight)
    if mask_OI is None:
        return {}
    rows_O, columns_I = mask_OI.sum(1), mask_OI.sum(0)
    return {
        "mask": {
            "kept": float(rows_O.sum()) / mask_OI.numel(),
            "row": [int(rows_O.min()), int(rows_O.max())],
            "empty_rows": int((rows_O == 0).sum()),
            "empty_inputs": int((columns_I == 0).sum()),
        }
    }
