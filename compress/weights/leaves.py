"""The leaves of weight expressions: tensors that denote a matrix.

Nodes hold plain tensors (codes as one integer an entry, masks as bools); `pack.py` decides what is stored. Shape
suffixes: O out, I in, G groups, N any square size, K codebook entries, D sub-vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compress.errors import UnsupportedWeight
from compress.weights.expr import Weight
from compress.weights.lattice import E8, E8P

BASE = "base"  # the name by which the expressions of a delta refer to their base model


@dataclass(frozen=True, eq=False)
class Dense(Weight):
    """A plain matrix [out, in] in its own dtype."""

    data: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.data.shape
        return rows, columns

    def dense(self) -> Tensor:
        """The matrix, not a copy."""
        return self.data


@dataclass(frozen=True, eq=False)
class Quantized(Weight):
    """`scale * (codes - zero)`: integer codes [out, in] on one grid per group of inputs.

    `codes` is uint8 below 2**bits; `scale` is [out, groups], or [1, 1] for one grid; `zero` has the shape of `scale`
    and is uint8 or a float16 real number, or None for a symmetric grid, whose zero is 2**(bits - 1). The denoted matrix
    is float32.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int

    def __post_init__(self) -> None:
        groups = self.scale.shape[1]
        if self.codes.shape[1] % groups or self.scale.shape[0] not in (1, self.codes.shape[0]):
            raise UnsupportedWeight(
                f"scales of {tuple(self.scale.shape)} do not divide codes of {tuple(self.codes.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.codes.shape
        return rows, columns

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return int(self.codes.shape[1] // self.scale.shape[1])

    def dense(self) -> Tensor:
        """The grid values, float32."""
        zero = 2.0 ** (self.bits - 1) if self.zero is None else self.zero.float()[..., None]
        codes: Tensor = self.codes.unflatten(1, (self.scale.shape[1], -1)).float()
        return codes.sub_(zero).mul_(self.scale.float()[..., None]).flatten(1)

    def describe(self) -> str:
        """`int4g64`, `int4row` or `int8tensor`; a trailing `s` marks a symmetric grid, `r` a real zero."""
        kind = "s" if self.zero is None else "r" if self.zero.is_floating_point() else ""
        return f"int{self.bits}{span_of(self.scale.shape, self.shape)}{kind}"


@dataclass(frozen=True, eq=False)
class Signs(Weight):
    """`scale` where `positive` is True, `-scale` elsewhere: one bit a weight; scale is [1, 1] or [out, 1]."""

    positive: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.positive.shape
        return rows, columns

    def dense(self) -> Tensor:
        """The signed scales, float32."""
        scale = self.scale.float()
        return torch.where(self.positive, scale, -scale)

    def describe(self) -> str:
        """`sign`."""
        return "sign"


@dataclass(frozen=True, eq=False)
class Codebook(Weight):
    """Rows split into sub-vectors of D inputs, each an entry of `book` [entries, D] times the scale of its group.

    `codes` is an integer tensor [out, in / D]; `scale` denotes a matrix [out, groups], [1, groups] or [1, 1]. A book
    that `BOOKS` has under `name` is not stored. The denoted matrix is float32.
    """

    codes: Tensor
    book: Tensor
    scale: Weight
    name: str = ""

    def __post_init__(self) -> None:
        rows, groups = self.scale.shape
        if self.shape[1] % (groups * self.book.shape[1]) or rows not in (1, self.codes.shape[0]):
            raise UnsupportedWeight(f"scales of {self.scale.shape} do not divide codes of {tuple(self.codes.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.codes.shape[1] * self.book.shape[1]

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return max(1, (self.book.shape[0] - 1).bit_length())

    def dense(self) -> Tensor:
        """The entries of the codes, scaled, float32."""
        looked_up = self.book.float()[self.codes.long()].flatten(1).unflatten(1, (self.scale.shape[1], -1))
        scaled: Tensor = looked_up.mul_(self.scale.dense().float()[..., None]).flatten(1)
        return scaled

    def describe(self) -> str:
        """`nf4g64`, the name and what shares a scale; or `vq8x4`, bits of a code x inputs it covers.

        A trailing `d` marks scales that are themselves coded.
        """
        name = self.name or f"vq{self.bits}x{self.book.shape[1]}"
        span = span_of(self.scale.shape, self.shape) if self.name or self.scale.shape[1] > 1 else ""
        return f"{name}{span}{'d' if isinstance(self.scale, Nested) else ''}"


NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
BOOKS = {  # the codebooks of formats, in the order of their codes, [entries, inputs that one covers]
    "nf4": torch.tensor(NF4)[:, None],  # quantiles of a normal; Dettmers et al., QLoRA, 2023, appendix E
    "mxfp4": torch.tensor(E2M1)[:, None],  # OCP Microscaling Formats 1.0, table 5; scales are powers of two
    "nvfp4": torch.tensor(E2M1)[:, None],  # the same values; scales are e4m3 numbers
    "e8p": E8P,
    "e8": E8,
}


@dataclass(frozen=True, eq=False)
class Scaled(Weight):
    """`data * scale`: a matrix of small floats [out, in] whose tiles of `rows` x `columns` share a scale.

    `data` is float8_e4m3fn or float8_e5m2; `scale` is [tiles down, tiles across]. The last tiles are smaller where the
    tile does not divide the matrix. The denoted matrix is float32.
    """

    data: Tensor
    scale: Tensor
    rows: int
    columns: int

    def __post_init__(self) -> None:
        tiles = (-(-self.data.shape[0] // self.rows), -(-self.data.shape[1] // self.columns))
        if tuple(self.scale.shape) != tiles:
            raise UnsupportedWeight(f"scales of {tuple(self.scale.shape)} for {tiles} tiles of {self.shape}")

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.data.shape
        return rows, columns

    def dense(self) -> Tensor:
        """The scaled values, float32."""
        return self.data.float().mul_(spread_tiles(self.scale.float(), (self.rows, self.columns), self.shape))

    def describe(self) -> str:
        """`e4m3row`, `e5m2tensor`, `e4m3b128x128`."""
        kind = str(self.data.dtype).removeprefix("torch.float8_").removesuffix("fn")
        if self.rows == 1 or self.scale.numel() == 1:
            return kind + span_of(self.scale.shape, self.shape)
        return f"{kind}b{self.rows}x{self.columns}"


def spread_tiles(scale: Tensor, tile: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """The scale of each entry of a matrix of `shape`, from one scale per tile."""
    down, across = min(tile[0], shape[0]), min(tile[1], shape[1])
    return scale.repeat_interleave(down, 0)[: shape[0]].repeat_interleave(across, 1)[:, : shape[1]]


def span_of(scales: Sequence[int], shape: tuple[int, int]) -> str:
    """The span of one of `scales` [rows, groups] in a matrix of `shape`: `tensor`, `row`, or `g64`."""
    if scales[1] > 1:
        return f"g{shape[1] // scales[1]}"
    return "tensor" if scales[0] == 1 and shape[0] > 1 else "row"


def dynamic_values() -> Tensor:
    """The 256 sorted values of the signed 8-bit dynamic format: a decimal exponent and a fraction share seven bits.

    For exponent 10**(i - 6), i from 0 to 6: the midpoints of 2**i equal parts of [0.1, 1] and their negatives; also 0
    and 1.
    Source: Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", ICLR 2016; values as in bitsandbytes.
    """
    values = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        values += [middles, -middles]
    return torch.cat(values).sort().values


DYNAMIC = dynamic_values()


@dataclass(frozen=True, eq=False)
class Nested(Weight):
    """Scales that are themselves coded: `DYNAMIC[codes] * absmax + offset`, in blocks of 256 over the flattened matrix.

    `codes` is uint8 [out, in], `absmax` float32 [blocks], `offset` float32 [1], about the mean of the matrix. The
    denoted matrix is float32.
    Source: Dettmers et al., QLoRA, NeurIPS 2023, section 3 (double quantization).
    """

    codes: Tensor
    absmax: Tensor
    offset: Tensor

    BLOCK: ClassVar[int] = 256

    def __post_init__(self) -> None:
        if tuple(self.absmax.shape) != (-(-self.codes.numel() // self.BLOCK),) or self.offset.numel() != 1:
            raise UnsupportedWeight(
                f"{tuple(self.absmax.shape)} maxima and {tuple(self.offset.shape)} offsets for codes of {self.shape}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.codes.shape
        return rows, columns

    def dense(self) -> Tensor:
        """The decoded values, float32."""
        scale = self.absmax.repeat_interleave(self.BLOCK)[: self.codes.numel()]
        decoded = DYNAMIC.to(self.codes.device)[self.codes.long().flatten()].mul_(scale).add_(self.offset)
        return decoded.view(self.shape)

    def describe(self) -> str:
        """`dynamic8`."""
        return "dynamic8"


@dataclass(frozen=True, eq=False)
class Diagonal(Weight):
    """A diagonal matrix [n, n], given by its diagonal."""

    diagonal: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        return self.diagonal.shape[0], self.diagonal.shape[0]

    def dense(self) -> Tensor:
        """The full matrix."""
        return torch.diag(self.diagonal)

    def linear(self, x_TI: Tensor) -> Tensor:
        """The elementwise product of x and the diagonal."""
        return x_TI * self.diagonal.to(x_TI.dtype)

    def describe(self) -> str:
        """`diag`."""
        return "diag"


@dataclass(frozen=True, eq=False)
class Permutation(Weight):
    """The matrix that maps x to `x[order]`: row i has its one at column order[i]."""

    order: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        return self.order.shape[0], self.order.shape[0]

    def dense(self) -> Tensor:
        """The full 0/1 matrix, float32."""
        return torch.eye(self.order.shape[0], device=self.order.device)[self.order.long()]

    def linear(self, x_TI: Tensor) -> Tensor:
        """A gather."""
        return x_TI[..., self.order.long()]

    def describe(self) -> str:
        """`perm`."""
        return "perm"


@dataclass(frozen=True, eq=False)
class Hadamard(Weight):
    """The randomised Hadamard rotation `H diag(signs) / sqrt(block)`, block-diagonal, orthogonal.

    `positive` [n] is True where the sign is +; the block is the largest power of two that divides n.
    Source: Tseng et al., QuIP#, 2024, section 3 (Sylvester order).
    """

    positive: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        return self.positive.shape[0], self.positive.shape[0]

    @property
    def block(self) -> int:
        """Size of one Hadamard block."""
        n = int(self.positive.shape[0])
        return n & -n

    def dense(self) -> Tensor:
        """The full matrix, float32."""
        return self.linear(torch.eye(self.shape[0], device=self.positive.device)).T.contiguous()

    def linear(self, x_TI: Tensor) -> Tensor:
        """The fast transform, n log(block) additions a row, computed in float32."""
        signs = torch.where(self.positive, 1.0, -1.0)
        y: Tensor = (x_TI.float() * signs).unflatten(-1, (-1, self.block))
        half = 1
        while half < self.block:
            pairs: Tensor = y.unflatten(-1, (-1, 2, half))
            y = torch.stack((pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]), -2).flatten(-3)
            half *= 2
        rotated: Tensor = (y / self.block**0.5).flatten(-2)
        return rotated.to(x_TI.dtype)

    def describe(self) -> str:
        """`had`."""
        return "had"


@dataclass(frozen=True, eq=False)
class External(Weight):
    """A tensor of another model, identified by name but not stored: the base of a delta."""

    data: Tensor
    source: str
    tensor: str

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.data.shape
        return rows, columns

    def dense(self) -> Tensor:
        """The base tensor, not a copy."""
        return self.data

    def describe(self) -> str:
        """`base`."""
        return "base"
