"""Products of two 8-bit matrices, y = x W^T: each row of x is rounded to int8 or fp8 (e4m3) at run time.

Contains the specification and the op `compress::w8a8_linear`; the kernels are in `gpu/w8a8.py`. The codes of weights
are not packed, since each takes one byte; their dtype determines the dtype that x is rounded to. On the CPU, int8
products with one scale per row are exact and fast (`torch._int_mm`); fp8 and grouped products run the specification.
Shape suffixes: M rows of x, O out, I in, G groups of inputs, S inputs of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress_kernels import dispatch, given

LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # the code to which the largest entry of a row is scaled
FLOOR = 1e-5  # the least maximum of a row, so that a row of zeros has a scale; as in `compress.weights.inputs`
GROUP = 32  # groups of inputs are multiples of this, the least depth of 8-bit products on tensor cores


@dataclass(frozen=True)
class Packed:
    """A weight `scale * codes`: codes [out, in], int8 or e4m3, and scales [groups, out].

    x is rounded to the dtype of the codes.
    """

    codes: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def kind(self) -> str:
        """The name of this form in `dispatch.py` and in tuning profiles."""
        return "int8 x int8" if self.codes.dtype == torch.int8 else "fp8 x fp8"

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return self.codes.nbytes + self.scale.nbytes


def pack(codes_OI: Tensor, scale_OG: Tensor) -> Packed:
    """Pack codes with one scale per group of inputs, [out, groups], or [1, groups] for all rows.

    Raises ValueError if there is no kernel for the weight; see `unsupported`.
    """
    if problem := unsupported(codes_OI.dtype, codes_OI.shape[1], scale_OG.shape[1]):
        raise ValueError(problem)
    return Packed(codes_OI.contiguous(), scale_OG.float().expand(len(codes_OI), -1).T.contiguous())


def unsupported(dtype: torch.dtype, inputs: int, groups: int) -> str:
    """The reason why there is no kernel for such a weight; empty if there is one."""
    if dtype not in LIMITS:
        return f"codes of {dtype}; there are kernels for {' and '.join(map(str, LIMITS))}"
    if groups != 1 and (groups < 1 or inputs % groups or inputs // groups % GROUP):
        return f"{groups} groups do not cut {inputs} inputs in multiples of {GROUP}"
    return ""


def linear(packed: Packed, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """`round(x) @ W.T + bias` for x [..., in]."""
    return torch.as_tensor(w8a8_linear(x, packed.codes, packed.scale, bias))


def quantize(x_MI: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantize each row of x by its own scale; returns codes [M, I] and float32 scales [M].

    Rounds to nearest, ties to even. A row with an entry that is not finite gets codes 0 and the scale NaN, so that its
    products are NaN.
    """
    wide_MI, limit = x_MI.float(), LIMITS[dtype]
    scale_M1 = wide_MI.abs().amax(-1, keepdim=True).clamp(min=FLOOR) / limit
    finite_M1 = scale_M1.isfinite()
    steps_MI = torch.where(finite_M1, wide_MI / scale_M1, 0.0)
    codes_MI = steps_MI.round() if dtype == torch.int8 else steps_MI.clamp(-limit, limit)
    return codes_MI.to(dtype), torch.where(finite_M1, scale_M1, torch.nan)[:, 0]


def reference(codes_MI: Tensor, scale_M: Tensor, weight_OI: Tensor, scale_GO: Tensor) -> Tensor:
    """The specification of the product, float32 [M, O]: the partial sums of groups, each multiplied by its scale."""
    groups = len(scale_GO)
    x_GMS = codes_MI.float().unflatten(1, (groups, -1)).transpose(0, 1)
    w_GSO = weight_OI.float().unflatten(1, (groups, -1)).permute(1, 2, 0)
    y_MO = (torch.bmm(x_GMS, w_GSO) * scale_GO.float()[:, None]).sum(0)
    return y_MO * scale_M[:, None]


def exact(codes_MI: Tensor, scale_M: Tensor, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
    """The same product for int8 with one scale per output, with exact int32 sums."""
    sums_MO = torch._int_mm(codes_MI, weight_OI.T)
    return sums_MO.float() * scale_O.float() * scale_M[:, None]


def rowwise(codes_MI: Tensor, scale_M: Tensor, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
    """The same product for fp8 with one scale per output, in bfloat16, by `torch._scaled_mm`."""
    return torch._scaled_mm(
        codes_MI, weight_OI.T, scale_a=scale_M[:, None], scale_b=scale_O.float()[None], out_dtype=torch.bfloat16
    )


def check(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    """Check the arguments of a product. Raises ValueError or TypeError that names the argument."""
    if x.ndim == 0 or not x.is_floating_point() or (x.is_cuda and x.dtype not in (*given.HALVES, torch.float32)):
        raise TypeError(
            f"w8a8_linear: x is {given.described(x)}; it must be floats [..., in], on a GPU with 16 or 32 bits"
        )
    if weight.dtype not in LIMITS or weight.ndim != 2:
        allowed = " or ".join(map(str, LIMITS))
        raise ValueError(f"w8a8_linear: weight is {given.described(weight)}; it must be {allowed} [out, in]")
    outputs, inputs = weight.shape[0], x.shape[-1]
    given.expect("w8a8_linear: weight", weight, x, (outputs, inputs), weight.dtype)
    groups = scale.shape[0] if scale.ndim == 2 else 1
    given.expect("w8a8_linear: scale", scale, x, (groups, outputs), None)
    if problem := unsupported(weight.dtype, inputs, groups):
        raise ValueError(f"w8a8_linear: scale: {problem}")
    if bias is not None:
        given.expect("w8a8_linear: bias", bias, x, (outputs,), None)
    if x.is_cuda and weight.dtype != torch.int8 and torch.cuda.get_device_capability(x.device) < (8, 9):
        raise ValueError("w8a8_linear: weight: fp8 products need a GPU of compute capability 8.9 or later")


@torch.library.custom_op("compress::w8a8_linear", mutates_args=(), device_types="cpu")
def w8a8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`round(x) @ (scale * weight).T + bias` for x [..., in], codes [out, in] and scales [groups, out]."""
    check(x, weight, scale, bias)
    codes_MI, scale_M = quantize(x.reshape(-1, x.shape[-1]), weight.dtype)
    if weight.dtype == torch.int8 and len(scale) == 1:
        y_MO = exact(codes_MI, scale_M, weight, scale[0])
    else:
        y_MO = reference(codes_MI, scale_M, weight, scale)
    y_MO = y_MO if bias is None else y_MO + bias.float()
    return y_MO.to(x.dtype).view(*x.shape[:-1], len(weight))


@w8a8_linear.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    from compress_kernels.gpu import w8a8

    check(x, weight, scale, bias)
    codes_MI, scale_M = w8a8.quantize(x.reshape(-1, x.shape[-1]).contiguous(), weight.dtype)
    if by_library(len(codes_MI), weight, scale, x.dtype):
        product = exact if weight.dtype == torch.int8 else rowwise
        y_MO = product(codes_MI, scale_M, weight, scale[0])
        y_MO = (y_MO if bias is None else y_MO + bias).to(x.dtype)
    else:
        y_MO = w8a8.linear(codes_MI, scale_M, weight, scale, bias, x.dtype)
    return y_MO.view(*x.shape[:-1], len(weight))


def by_library(rows: int, weight: Tensor, scale: Tensor, out: torch.dtype) -> bool:
    """Whether torch's own product supports these on a GPU, and there are enough rows for it to be the faster one."""
    multiple = 8 if weight.dtype == torch.int8 else 16
    if len(scale) > 1 or rows <= dispatch.LIBRARY_ABOVE or weight.shape[0] % multiple or weight.shape[1] % multiple:
        return False
    if weight.dtype == torch.int8:
        return True
    return out == torch.bfloat16 and (not weight.is_cuda or torch.cuda.get_device_capability(weight.device) >= (9, 0))


@w8a8_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])
