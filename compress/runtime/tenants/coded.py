"""Quantized differences, multiplied in packed form for the tokens of several tenants at once.

Only the product with the packed codes is computed tenant by tenant; scales, zero points and the sums over inputs are
then applied to all tokens together. Signs are one-bit codes: scale * (2b - 1) = 2 scale * (b - 0.5).
Shapes: N tokens, O out, I in, G groups of inputs, M matrices of one input.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from compress.runtime.tenants.part import Part, per_token
from compress_kernels import planes

# Bits of a code -> widths in bits of the pieces that it is packed in, lowest bits first.
PIECES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


@dataclass(frozen=True, eq=False, kw_only=True)
class Codes(Part):
    """`scale * (code - zero)`: one matrix, or several with the same input stacked along the outputs.

    `outputs` holds the number of outputs of each matrix, `words` the packed bytes of each piece of the codes, lowest
    bits first. `scale` is [O, G] over all outputs, or [M] if each matrix has a single scale; `zero` is a number, or a
    tensor shaped like the scale.
    """

    words: tuple[Tensor, ...]
    bits: int
    inputs: int
    outputs: tuple[int, ...]
    scale: Tensor
    zero: Tensor | float

    @staticmethod
    def of(codes_OI: Tensor, bits: int, scale: Tensor, zero: Tensor | float) -> Codes:
        """Pack codes [O, I] below 2**bits; scale and zero are [O, G] or [1, 1]."""
        words, below = [], 0
        for piece in PIECES[bits]:
            words.append(planes.pack((codes_OI >> below) & (2**piece - 1), piece))
            below += piece
        outputs, inputs = codes_OI.shape
        scale = scale.view(-1) if scale.numel() == 1 else scale
        zero = zero.view(-1) if isinstance(zero, Tensor) and zero.numel() == 1 else zero
        return Codes(words=tuple(words), bits=bits, inputs=inputs, outputs=(outputs,), scale=scale, zero=zero)

    @property
    def groups(self) -> int:
        """The number of groups of inputs."""
        return 1 if self.scale.ndim == 1 else int(self.scale.shape[1])

    @cached_property
    def kind(self) -> Hashable:
        """Bits, shapes, and the zero point's value or shape."""
        zero = self.zero if isinstance(self.zero, float) else self.zero.shape
        return "codes", self.bits, self.inputs, self.outputs, self.scale.shape, zero

    def tensors(self) -> list[Tensor]:
        """Packed codes, scales and, if they are tensors, zero points."""
        return [*self.words, self.scale, *([self.zero] if isinstance(self.zero, Tensor) else [])]

    @classmethod
    def together(cls, parts: Sequence[Codes], x_NI: Tensor, counts: Sequence[int]) -> Tensor:
        """The product of each tenant's tokens with its part, which must hold a single matrix."""
        return coded(parts, x_NI, counts)[0]

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` of the matrix, decoded; the part must hold a single matrix."""
        flat = ids.flatten()
        codes_NI = torch.zeros((), device=ids.device)
        below = 0
        for bits, words_JO in zip(PIECES[self.bits], self.words, strict=True):
            codes_NI = codes_NI + planes.unpack(words_JO[:, flat], bits, self.inputs).float() * 2.0**below
            below += bits
        codes_NGW = codes_NI.unflatten(1, (self.groups, -1))
        zero = self.zero if isinstance(self.zero, float) else picked(self.zero, flat)
        found: Tensor = ((codes_NGW - zero) * picked(self.scale, flat)).view(*ids.shape, self.inputs)
        return found

    def describe(self) -> str:
        """`packed 4-bit codes`."""
        return f"packed {self.bits}-bit codes"


def picked(each: Tensor, ids_N: Tensor) -> Tensor:
    """The scales or zero points of these outputs, [N, G, 1], or [1] if one stands for all outputs."""
    return (each if each.ndim == 1 else each[ids_N][..., None]).float()


def joined(parts: Sequence[Part | None]) -> Codes | None:
    """The parts of modules that share an input, stacked into one; None unless all are codes with matching formats."""
    codes = [part for part in parts if isinstance(part, Codes)]
    zeros = [part.zero if isinstance(part.zero, float) else part.zero.ndim for part in codes]
    alike = {(part.bits, part.groups, part.scale.ndim, zero) for part, zero in zip(codes, zeros, strict=True)}
    if len(codes) != len(parts) or len(alike) != 1:
        return None
    first = codes[0]
    if len(codes) == 1:
        return first  # not a copy, because an embedding may hold the same object
    zero = first.zero if isinstance(first.zero, float) else torch.cat([torch.as_tensor(part.zero) for part in codes])
    return Codes(
        words=tuple(torch.cat(words, 1) for words in zip(*(part.words for part in codes), strict=True)),
        bits=first.bits,
        inputs=first.inputs,
        outputs=tuple(part.outputs[0] for part in codes),
        scale=torch.cat([part.scale for part in codes]),
        zero=zero,
    )


def coded(tenants: Sequence[Codes], x_NI: Tensor, counts: Sequence[int]) -> Sequence[Tensor]:
    """For each matrix, the product of all tokens with their tenants' codes, [N, O]; the codes are of one kind."""
    first = tenants[0]
    x_NI = x_NI.float()
    y_NGO = code_products(tenants, x_NI, counts)
    sums_NG1 = x_NI.view(len(x_NI), first.groups, -1).sum(-1, keepdim=True)
    if isinstance(first.zero, float):
        y_NGO.sub_(sums_NG1, alpha=first.zero)
    else:
        y_NGO.sub_(sums_NG1 * spread([torch.as_tensor(t.zero) for t in tenants], counts, first.outputs))
    y_NGO.mul_(spread([tenant.scale for tenant in tenants], counts, first.outputs))
    y_NO = y_NGO[:, 0] if first.groups == 1 else y_NGO.sum(1)
    return y_NO.split(list(first.outputs), 1) if len(first.outputs) > 1 else (y_NO,)


def code_products(tenants: Sequence[Codes], x_NI: Tensor, counts: Sequence[int]) -> Tensor:
    """x times the codes alone, without scale and zero point, [N, G, O]."""
    first, total, below = tenants[0], None, 0
    for number, bits in enumerate(PIECES[first.bits]):
        y_NGO = planes.products(x_NI, counts, [tenant.words[number] for tenant in tenants], bits, first.groups)
        total = y_NGO if total is None else total.add_(y_NGO, alpha=2.0**below)
        below += bits
    return torch.as_tensor(total)


def spread(each: Sequence[Tensor], counts: Sequence[int], outputs: tuple[int, ...]) -> Tensor:
    """The scales or zero points of every tenant, [O, G] or [M], repeated for each token and output: [N, G, O]."""
    found = per_token(each, counts)
    if found.ndim == 3:
        return found.transpose(1, 2)
    return found[..., None] if len(outputs) == 1 else found.index_select(1, matrix_of(outputs, found.device))[:, None]


@lru_cache(maxsize=64)
def matrix_of(outputs: tuple[int, ...], device: torch.device) -> Tensor:
    """The index of the matrix to which each output belongs, [O]."""
    return torch.arange(len(outputs), device=device).repeat_interleave(torch.tensor(outputs, device=device))
