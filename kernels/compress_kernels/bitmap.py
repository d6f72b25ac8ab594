"""Products y = x W^T with unstructured sparsity: a bitmap with one bit per input, and the kept values end to end.

This saves memory, not time. A GPU finds every kept value by counting bits and loads it individually, which takes 10 to
20 instructions per weight, whereas a dense product issues fewer than 2. A dense matrix is therefore faster if it fits
in memory; this form is for matrices that would not fit. For many rows of x, the matrix is decoded once to scratch
memory and multiplied as dense.

Layout: kept values have 16 bits and are ordered by row, then by input. Bitmaps have one bit per input in 32-bit words:
bit k of word w of a block belongs to input 32 w + k. Every row of a block of 512 inputs has one offset into the values,
from which a kernel counts. With half of the weights kept, that makes 9.06 bits per weight.

Contains packing, the specification and the ops `compress::bitmap_linear` and `bitmap_dense`; the kernels are in
`gpu/bitmap.py`.
Shape suffixes: M rows of x, O out, I in, R padded rows, B blocks, W words of a block, K kept values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compress_kernels import formats, given, low_rank

WORDS = 16  # per block
BLOCK = 32 * WORDS


@dataclass(frozen=True)
class Packed:
    """A packed weight: bits [B, W, R] int32, offsets [B, R] int32, kept values [K].

    `u` [out, rank] and `v` [rank, in] add a low-rank term U V.
    """

    bits: Tensor
    offsets: Tensor
    values: Tensor
    shape: tuple[int, int]
    u: Tensor | None = None
    v: Tensor | None = None

    @property
    def kind(self) -> str:
        """The name of this form in `dispatch.py` and in tuning profiles."""
        return "bitmap"

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return sum(t.nbytes for t in (self.bits, self.offsets, self.values, self.u, self.v) if t is not None)


def pack(values_OI: Tensor, mask_OI: Tensor) -> Packed:
    """Pack the float16 or bfloat16 values where the mask is True; kept values may be 0.

    Raises ValueError for other dtypes, for shapes that differ, or if 2**31 or more values are kept.
    """
    outputs, inputs = values_OI.shape
    if values_OI.dtype not in given.HALVES:
        raise ValueError(f"bitmap: values are {values_OI.dtype}; kept values are float16 or bfloat16")
    if mask_OI.dtype != torch.bool or mask_OI.shape != values_OI.shape:
        raise ValueError(f"bitmap: the mask is {given.described(mask_OI)}; it must be bool of {tuple(values_OI.shape)}")
    more = (0, formats.padded(inputs, BLOCK) - inputs, 0, formats.padded(outputs, formats.ROWS) - outputs)
    mask_RBWK = F.pad(mask_OI, more).unflatten(1, (-1, WORDS, 32))
    counts_RB = mask_RBWK.sum((2, 3))
    ends = counts_RB.flatten().cumsum(0)
    if int(ends[-1]) >= 2**31:
        raise ValueError(f"bitmap: {int(ends[-1])} values are kept; offsets count to 2**31")
    offsets_RB = ends.view_as(counts_RB) - counts_RB
    weights_K = (1 << torch.arange(32, device=mask_OI.device)).to(torch.int32)  # the last one wraps to a negative
    bits_RBW = (mask_RBWK * weights_K).sum(3, dtype=torch.int32)
    return Packed(
        bits_RBW.permute(1, 2, 0).contiguous(), offsets_RB.T.to(torch.int32).contiguous(),
        values_OI[mask_OI].contiguous(), (outputs, inputs),
    )  # fmt: skip


def unpack_mask(packed: Packed) -> Tensor:
    """The mask, bool [out, in]."""
    outputs, inputs = packed.shape
    places_K = torch.arange(32, dtype=torch.int32, device=packed.bits.device)
    bits_RBWK = (packed.bits.permute(2, 0, 1)[..., None] >> places_K) & 1
    return bits_RBWK.flatten(1)[:outputs, :inputs].bool()


def reference(packed: Packed) -> Tensor:
    """The specification: the matrix [out, in] in the dtype of the values, without the low-rank term."""
    matrix_OI = packed.values.new_zeros(packed.shape)
    return matrix_OI.masked_scatter_(unpack_mask(packed), packed.values)


def with_low_rank(packed: Packed, u_OR: Tensor, v_RI: Tensor) -> Packed:
    """The weight plus `U V`; the same kernel adds the low-rank term at its end."""
    u, v = low_rank.pack(u_OR, v_RI)
    return replace(packed, u=u, v=v)


def check(op: str, w: Packed, x: Tensor) -> None:
    """Check that a kernel can read the weight, which must be on the device of x.

    Raises ValueError that names the argument.
    """
    blocks, rows = -(-w.shape[1] // BLOCK), formats.padded(w.shape[0], formats.ROWS)
    if w.values.ndim != 1 or w.values.dtype not in given.HALVES:
        raise ValueError(
            f"{op}: values is {given.described(w.values)}; they must be float16 or bfloat16, one dimension"
        )
    given.expect(f"{op}: values", w.values, x, tuple(w.values.shape), w.values.dtype)
    given.expect(f"{op}: bits", w.bits, x, (blocks, WORDS, rows), torch.int32)
    given.expect(f"{op}: offsets", w.offsets, x, (blocks, rows), torch.int32)


def check_product(w: Packed, x: Tensor, bias: Tensor | None) -> None:
    """`check`, and check the other arguments of a product; raises ValueError or TypeError that names the argument."""
    given.floats("bitmap_linear: x", x)
    check("bitmap_linear", w, x)
    low_rank.check("bitmap_linear", x, w.u, w.v, w.shape[0])
    if x.device.type != "cpu" and x.dtype != w.values.dtype:
        raise TypeError(f"bitmap_linear: x is {x.dtype}, values are {w.values.dtype}; a GPU takes one dtype for both")
    if bias is not None:
        given.expect("bitmap_linear: bias", bias, x, (w.shape[0],), None)


def linear(w: Packed, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ W.T + bias` for x [..., in]."""
    return torch.as_tensor(bitmap_linear(x, w.bits, w.offsets, w.values, w.u, w.v, bias, w.shape[0]))


def dense(w: Packed) -> Tensor:
    """The matrix [out, in] in the dtype of the values, without the low-rank term."""
    return torch.as_tensor(bitmap_dense(w.bits, w.offsets, w.values, *w.shape))


@torch.library.custom_op("compress::bitmap_dense", mutates_args=(), device_types="cpu")
def bitmap_dense(bits: Tensor, offsets: Tensor, values: Tensor, out: int, inputs: int) -> Tensor:
    """The matrix [out, in] that the tensors of a `Packed` encode."""
    w = Packed(bits, offsets, values, (out, inputs))
    check("bitmap_dense", w, bits)
    return reference(w)


@bitmap_dense.register_kernel("cuda")
def _(bits: Tensor, offsets: Tensor, values: Tensor, out: int, inputs: int) -> Tensor:
    from compress_kernels.gpu import bitmap

    w = Packed(bits, offsets, values, (out, inputs))
    check("bitmap_dense", w, bits)
    return bitmap.dense(w)


@bitmap_dense.register_fake
def _(bits: Tensor, offsets: Tensor, values: Tensor, out: int, inputs: int) -> Tensor:
    return values.new_empty(out, inputs)


@torch.library.custom_op("compress::bitmap_linear", mutates_args=(), device_types="cpu")
def bitmap_linear(
    x: Tensor, bits: Tensor, offsets: Tensor, values: Tensor, u: Tensor | None, v: Tensor | None, bias: Tensor | None,
    out: int,
) -> Tensor:  # fmt: skip
    """`x @ W.T + bias` for x [..., in] and the tensors of a `Packed`."""
    w = Packed(bits, offsets, values, (out, x.shape[-1]), u, v)
    check_product(w, x, bias)
    y = F.linear(x, reference(w).to(x.dtype), None if bias is None else bias.to(x.dtype))
    return y if u is None or v is None else y + low_rank.term(x, u, v)


@bitmap_linear.register_kernel("cuda")
def _(
    x: Tensor, bits: Tensor, offsets: Tensor, values: Tensor, u: Tensor | None, v: Tensor | None, bias: Tensor | None,
    out: int,
) -> Tensor:  # fmt: skip
    from compress_kernels.gpu import bitmap

    w = Packed(bits, offsets, values, (out, x.shape[-1]), u, v)
    check_product(w, x, bias)
    return bitmap.product(x, w, bias)


@bitmap_linear.register_fake
def _(
    x: Tensor, bits: Tensor, offsets: Tensor, values: Tensor, u: Tensor | None, v: Tensor | None, bias: Tensor | None,
    out: int,
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], out)


def remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save what the gradients need."""
    ctx.save_for_backward(*inputs[:6])


def gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    """The gradients of x, the kept values, the low-rank factors and the bias."""
    x, bits, offsets, values, u, v = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    dx = dvalues = None
    if wanted[0]:
        dx = dy @ bitmap_dense(bits, offsets, values, dy.shape[-1], x.shape[-1]).to(dy.dtype)
    if wanted[3]:
        kept = unpack_mask(Packed(bits, offsets, values, (dy.shape[-1], x.shape[-1]))).flatten()
        place = (kept.cumsum(0) - 1).masked_fill(~kept, len(values))  # selecting by a mask would synchronize a GPU
        dw = (low_rank.rows(dy).T @ low_rank.rows(x)).flatten()
        dvalues = dw.new_zeros(len(values) + 1).scatter(0, place, dw)[:-1].to(values.dtype)
    more, du, dv = low_rank.gradients(x, u, v, dy, wanted[4:6])
    dbias = low_rank.rows(dy).sum(0) if wanted[6] else None
    return dx if dx is None or more is None else dx + more, None, None, dvalues, du, dv, dbias, None


bitmap_linear.register_autograd(gradients, setup_context=remember)
