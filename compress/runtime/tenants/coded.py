"""Differences of small integer codes, computed packed, for the tokens of several tenants in one go.

What differs between tenants is the product with their bytes; scales, zeros and the sums over inputs are then applied
to all tokens. Signs are codes of one bit: scale * (2b - 1) = 2 scale * (b - 0.5).
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

PIECES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}  # lowest bits first


@dataclass(frozen=True, eq=False, kw_only=True)
class Codes(Part):
    """`scale * (code - zero)`: one matrix, or several of one input side by side, with `outputs` each.

    `words` holds the bytes of each piece of the code, lowest bits first. `scale` is [O, G] for all outputs, or [M]
    where a matrix has but one; `zero` is a number, or like the scale.
    """

    words: tuple[Tensor, ...]
    bits: int
    inputs: int
    outputs: tuple[int, ...]
    scale: Tensor
    zero: Tensor | float

    @staticmethod
    def of(codes_OI: Tensor, bits: int, scale: Tensor, zero: Tensor | float) -> Codes:
        """Pack codes below 2**bits; scale and zero are [O, G] or [1, 1]."""
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
        """Groups of inputs."""
        return 1 if self.scale.ndim == 1 else int(self.scale.shape[1])

    @cached_property
    def kind(self) -> Hashable:
        """Bits, shapes, and which zero."""
        zero = self.zero if isinstance(self.zero, float) else self.zero.shape
        return "codes", self.bits, self.inputs, self.outputs, self.scale.shape, zero

    def tensors(self) -> list[Tensor]:
        """Packed codes, scales and zeros."""
        return [*self.words, self.scale, *([self.zero] if isinstance(self.zero, Tensor) else [])]

    @classmethod
    def together(cls, parts: Sequence[Codes], x_NI: Tensor, counts: Sequence[int]) -> Tensor:
        """The product with the one matrix of each."""
        return coded(parts, x_NI, counts)[0]

    def rows(self, ids: Tensor) -> Tensor:
        """The rows of these numbers of the one matrix."""
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
    """The scales or zeros of these outputs, [N, G, 1], or of all."""
    return (each if each.ndim == 1 else each[ids_N][..., None]).float()


def joined(parts: Sequence[Part | None]) -> Codes | None:
    """The parts of one input as one, if all are codes of one kind."""
    codes = [part for part in parts if isinstance(part, Codes)]
    zeros = [part.zero if isinstance(part.zero, float) else part.zero.ndim for part in codes]
    alike = {(part.bits, part.groups, part.scale.ndim, zero) for part, zero in zip(codes, zeros, strict=True)}
    if len(codes) != len(parts) or len(alike) != 1:
        return None
    first = codes[0]
    if len(codes) == 1:
        return first  # the very same: an embedding may hold it too
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
    """For each matrix of codes of one kind, the product of every tenant's tokens with its own, [N, O]."""
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
    """x times the codes alone, [N, G, O]."""
    first, total, below = tenants[0], None, 0
    for number, bits in enumerate(PIECES[first.bits]):
        y_NGO = planes.products(x_NI, counts, [tenant.words[number] for tenant in tenants], bits, first.groups)
        total = y_NGO if total is None else total.add_(y_NGO, alpha=2.0**below)
        below += bits
    return torch.as_tensor(total)


def spread(each: Sequence[Tensor], counts: Sequence[int], outputs: tuple[int, ...]) -> Tensor:
    """Scales or zeros of every tenant, [O, G] or [M], for each token and output: [N, G, O]."""
    found = per_token(each, counts)
    if found.ndim == 3:
        return found.transpose(1, 2)
    return found[..., None] if len(outputs) == 1 else found.index_select(1, matrix_of(outputs, found.device))[:, None]


@lru_cache(maxsize=64)
def matrix_of(outputs: tuple[int, ...], device: torch.device) -> Tensor:
    """The number of the matrix that every output is of."""
    return torch.arange(len(outputs), device=device).repeat_interleave(torch.tensor(outputs, device=device))
