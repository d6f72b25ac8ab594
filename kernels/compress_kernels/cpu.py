"""Low-bit and sparse products on the CPU with kernels that ship with torch, and their plain-torch specification.

Weight-only int4 and int8 (`Int4`, `Int8`) are faster only for a few rows of x (token generation): they read a quarter
or half of the bytes, but the kernels do not block for reuse. The same holds for skipping zeros (`Sparse`) if 95 % of
the weights are zero. `worth_packing` and `FEW_ROWS` hold the measured thresholds, which `compress tune` measures again
for the CPU at hand. Int8 weights with inputs that are rounded to int8 too (`Integers`) are faster at every number of
rows, because the product itself is computed in integers. `python -m compress_kernels.bench` prints the measurements.
Shape suffixes: M rows of x, O out, I in, G groups.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress_kernels.tuning import REMEDY, TuningError, known, place

OP, INT4, INT8, INT8_INT8, CSR = "cpu", "int4", "int8", "int8-int8", "csr"  # names in tuning profiles
PACKED, DECODED = "packed", "decoded"
FEW_ROWS = {INT4: 8, INT8: 4, CSR: 32}  # rows of x up to which the packed product was faster than bf16
SMALLEST = 1 << 16  # number of weights; the smallest size measured, at which packing is still faster
SPARSE = 0.05  # share of kept weights up to which skipping the others was faster than bf16 (at 0.1: below 64 rows only)
SPARSE_FROM = 1 << 20  # weights from which it was faster: 256 x 256 was slower, 768 x 256 hardly faster
GROUPS = (32, 64, 128, 256)  # group sizes that ATen's int4 kernel supports
BLOCKED_FROM = 1 << 19  # weights from which a blocked copy was faster than `_int_mm`, which blocks at each call
WIDEST = 1 << 16  # the most inputs for which sums of byte products, at most 255 * 128 each, fit in int32
FLOOR, LEVELS = 1e-5, 127.0  # as in compress.weights.inputs: the least maximum of a token, and the number of levels
ZERO = 128  # the zero point of bytes that hold signed codes


def reference(codes_OI: Tensor, scale_OG: Tensor, offset_OG: Tensor) -> Tensor:
    """The specification, float32 [out, in]: `scale * codes + offset` group by group."""
    codes = codes_OI.unflatten(1, (scale_OG.shape[1], -1)).float()
    dense: Tensor = (codes * scale_OG.float()[..., None] + offset_OG.float()[..., None]).flatten(1)
    return dense


def worth_packing(out_features: int, in_features: int) -> bool:
    """Whether packing a weight of this size pays: it is large enough, and 16 divides its outputs."""
    return out_features * in_features >= SMALLEST and out_features % 16 == 0


def few_rows(form: str, out_features: int, in_features: int) -> int:
    """Rows of x up to which a packed product is chosen: as `compress tune` has measured, else from `FEW_ROWS`."""
    found = measured(form, out_features, in_features)
    slow = [rows for rows, packed in found.items() if not packed]
    fast = [rows for rows in found if rows < min(slow, default=rows + 1)]
    return max(fast, default=0) if found else FEW_ROWS[form]


def measured(form: str, out_features: int, in_features: int) -> dict[int, bool]:
    """For each number of rows that `compress tune` has measured, whether the packed product was faster.

    Raises TuningError for a damaged profile.
    """
    profile = known("cpu")
    choices = {} if profile is None else profile.choices(OP, form, out_features, in_features)
    paths = {rows: choice.get("path") for rows, choice in choices.items()}
    if not {PACKED, DECODED}.issuperset(paths.values()):
        raise TuningError(f"{place('cpu')}: a path of {form} is neither {PACKED} nor {DECODED}; {REMEDY}")
    return {rows: path == PACKED for rows, path in paths.items()}


def nbytes(packed: Any) -> int:
    """The bytes of all tensors of a packed weight."""
    held = [value for value in vars(packed).values() if isinstance(value, Tensor)]
    for csr in [value for value in held if value.layout == torch.sparse_csr]:
        held += [csr.crow_indices(), csr.col_indices(), csr.values()]
    return sum(value.nbytes for value in held if value.layout != torch.sparse_csr)


@dataclass(frozen=True)
class Int4:
    """A weight packed for `_weight_int4pack_mm_for_cpu`; scales and offsets are rounded to bf16."""

    packed: Tensor
    scales: Tensor
    group: int

    @staticmethod
    def pack(codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | float) -> Int4:
        """Pack codes 0..15 that stand for `scale * (code - zero)`; ATen computes `scale * (code - 8) + offset`."""
        scale = scale_OG.float()
        offset = (8 - torch.as_tensor(zero_OG, dtype=torch.float32)) * scale
        pairs = torch.stack((scale.T, offset.expand_as(scale).T), -1).contiguous().to(torch.bfloat16)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_OI.int(), 1)
        return Int4(packed, pairs, codes_OI.shape[1] // scale.shape[1])

    def linear(self, x_MI: Tensor) -> Tensor:
        """`x @ W.T` for bf16 x."""
        return torch.as_tensor(torch.ops.aten._weight_int4pack_mm_for_cpu(x_MI, self.packed, self.group, self.scales))


@dataclass(frozen=True)
class Int8:
    """A symmetric weight with one scale per row, for `_weight_int8pack_mm`; scales are rounded to bf16."""

    codes: Tensor
    scales: Tensor

    @staticmethod
    def pack(codes_OI: Tensor, scale_O: Tensor) -> Int8:
        """Pack codes 0..255 that stand for `scale * (code - 128)`."""
        return Int8((codes_OI.int() - 128).to(torch.int8).contiguous(), scale_O.to(torch.bfloat16).contiguous())

    def linear(self, x_MI: Tensor) -> Tensor:
        """`x @ W.T` for bf16 x."""
        return torch.as_tensor(torch.ops.aten._weight_int8pack_mm(x_MI, self.codes, self.scales))


@dataclass(frozen=True)
class Sparse:
    """A weight with few non-zero entries, float32 in compressed sparse rows (CSR), multiplied by MKL."""

    csr: Tensor

    @staticmethod
    def pack(w_OI: Tensor) -> Sparse:
        """Pack the non-zero entries."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")  # torch 2.13, once a process
            return Sparse(w_OI.float().to_sparse_csr())

    def linear(self, x_MI: Tensor) -> Tensor:
        """`x @ W.T`, summed in float32 and returned in the dtype of x."""
        return torch.as_tensor((self.csr @ x_MI.float().T).T.to(x_MI.dtype).contiguous())

    def __deepcopy__(self, memo: dict[int, Any]) -> Sparse:
        """Returns itself, because it never changes and torch cannot copy it."""
        return self


def multiplies_integers() -> bool:
    """Whether this CPU sums byte products in 32 bits (VNNI, AMX); older ones saturate at 16 and give wrong sums."""
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))


def rounded(x_MI: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of x rounded to int8 codes from -127 to 127, and their scales [M, 1] in float32; see `LEVELS`."""
    wide = x_MI.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp_(min=FLOOR).div_(LEVELS)
    return (wide / scale).round_().to(torch.int8), scale


@dataclass(frozen=True)
class Integers:
    """A weight `scale * (code + offset)`, codes from -128 to 127, for inputs that are rounded to int8 row by row.

    Scales and offsets are per row of the weight. Sums are exact, so that only the scaling rounds. A large weight is
    kept in oneDNN's blocked layout, which `_int_mm` would otherwise make at every call.
    """

    codes: Tensor  # int8: [out, in], or in oneDNN's opaque blocked layout
    scales: Tensor  # float32 [out]
    offset: Tensor | None  # float32 [out]
    zeros: Tensor | None  # int32 [out], of the blocked form only

    @staticmethod
    def pack(codes_OI: Tensor, scale_O: Tensor, offset_O: Tensor | None = None) -> Integers:
        """Pack int8 codes; raises ValueError for more than `WIDEST` inputs."""
        if codes_OI.shape[1] > WIDEST:
            raise ValueError(f"{codes_OI.shape[1]} inputs: sums of more than {WIDEST} products may not fit int32")
        scale, codes = scale_O.float().contiguous(), codes_OI.contiguous()
        offset = None if offset_O is None else offset_O.float().contiguous()
        if codes.numel() < BLOCKED_FROM:
            return Integers(codes, scale, offset, None)
        return Integers(torch.ops.onednn.qlinear_prepack(codes, None), scale, offset, torch.zeros_like(scale).int())

    def linear(self, codes_MI: Tensor, scale_M1: Tensor) -> Tensor:
        """`(scale * codes) @ W.T` in float32, for codes and scales from `rounded`."""
        if not len(codes_MI):
            return scale_M1.new_zeros(0, len(self.scales))
        if self.zeros is None:
            y_MO = torch._int_mm(codes_MI, self.codes.T).float().mul_(self.scales)
        else:
            bytes_MI = codes_MI.bitwise_xor(-ZERO).view(torch.uint8)  # code + 128
            multiply = torch.ops.onednn.qlinear_pointwise  # only in builds for x86
            y_MO = multiply(bytes_MI, 1.0, ZERO, self.codes, self.scales, self.zeros, *PLAIN)
        if self.offset is not None:
            y_MO.addcmul_(codes_MI.sum(-1, keepdim=True, dtype=torch.int32).float(), self.offset * self.scales)
        return torch.as_tensor(y_MO.mul_(scale_M1))

    def __deepcopy__(self, memo: dict[int, Any]) -> Integers:
        """Returns itself, because it never changes and a blocked tensor cannot be copied."""
        return self


PLAIN: tuple[Any, ...] = (
    None,
    1.0,
    0,
    torch.float32,
    "none",
    [],
    "",
)  # the remaining arguments: no bias, no output scale or zero point, float32 output, no activation function
