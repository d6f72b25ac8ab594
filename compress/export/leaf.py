"""A site as the export formats see it: one quantized leaf, its name in the file, and the error if it is refused.

None of these formats can represent a mask; pruned entries get the code that decodes to zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.artifact import Artifact, tensor_of
from compress.errors import UnsupportedWeight
from compress.weights import Codebook, Dense, Masked, Quantized, Scaled, Weight


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """One site: its module's `name`, the prefix `key` of its tensors in the file, and its weight without a mask."""

    name: str
    key: str
    weight: Weight
    inputs: str
    described: str

    def refused(self, form: str, reason: str, instead: str) -> UnsupportedWeight:
        """The error for a site that a format cannot represent."""
        return UnsupportedWeight(f"{self.name} ({self.described}): {form} cannot represent it: {reason}; {instead}")


def leaves(artifact: Artifact, form: str) -> Iterator[Leaf]:
    """The sites of an artifact, read one at a time; raises UnsupportedWeight as `leaf`."""
    for site in artifact.specs:
        yield leaf(artifact, site, form)


def leaf(artifact: Artifact, site: str, form: str) -> Leaf:
    """One site of an artifact.

    Raises UnsupportedWeight if the file stores the matrix in a form that `form` cannot address: among other experts in
    one tensor, or transposed.
    """
    spec = artifact.specs[site]
    weight, tensor = artifact.expression(site), tensor_of(site, spec)
    found = Leaf(
        name=site,
        key=tensor.removesuffix(".weight"),
        weight=filled(weight),
        inputs=spec.get("inputs", ""),
        described=weight.describe(),
    )
    if "expert" in spec or not tensor.endswith(".weight"):
        raise found.refused(form, f"the file stores all its experts in one tensor, {tensor}", "use --to dense")
    if spec["transposed"]:
        raise found.refused(form, "the file stores this matrix as [in, out]", "use --to dense")
    return found


def filled(weight: Weight) -> Weight:
    """The weight without its mask if it can represent zeros itself; pruned entries get the code that decodes to zero.

    Otherwise the weight is returned unchanged.
    """
    match weight:
        case Masked(Dense(data), mask_OI):
            return Dense(data.masked_fill(~mask_OI, 0))
        case Masked(Quantized(codes, _, zero, _) as values, mask_OI) if zero is None or not zero.is_floating_point():
            return replace(values, codes=torch.where(mask_OI, codes, zero_codes(values)))
        case Masked(Scaled(data) as values, mask_OI):
            return replace(values, data=data.view(torch.uint8).masked_fill(~mask_OI, 0).view(data.dtype))
        case Masked(Codebook(codes, book) as values, mask_OI) if book.shape[1] == 1 and bool((book == 0).any()):
            return replace(values, codes=codes.masked_fill(~mask_OI, int((book[:, 0] == 0).int().argmax())))
        case _:
            return weight


def zero_codes(weight: Quantized) -> Tensor:
    """The codes that decode to zero: a scalar if symmetric, else [out, in]."""
    if weight.zero is None:
        return torch.tensor(2 ** (weight.bits - 1), dtype=torch.uint8)
    return weight.zero.to(torch.uint8).repeat_interleave(weight.group, 1)
