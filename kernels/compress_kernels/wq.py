"""Weight-only products y = x W^T with integer codes of 2, 3, 4 or 8 bits, a scale for every group of inputs.

Packing, specification and the op `compress::wq_linear`; the kernel is `gpu/wq.py`. On the CPU the op decodes and
multiplies: it is the reference there, not a fast path (`cpu.py` has those).
Shape suffixes: M rows of x, O out, I in, R padded rows, G groups, B blocks, P places.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from compress_kernels import formats, given, low_rank

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Packed:
    """`scale * (code - 2**(bits - 1))`, codes as K-plane words; `scale` is [G, R], one group of a row has group 0.

    Three bits are words of the lower two and words `high` of the third. `u` [out, rank] and `v` [rank, in] add U V.
    """

    words: Tensor
    high: Tensor | None
    scale: Tensor
    bits: int
    group: int
    shape: tuple[int, int]
    u: Tensor | None = None
    v: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return sum(t.nbytes for t in (self.words, self.high, self.scale, self.u, self.v) if t is not None)


def pack(codes_OI: Tensor, scale_OG: Tensor, bits: int) -> Packed:
    """Pack codes below 2**bits and their scales, one a group of inputs.

    Raises ValueError if there is no kernel for the group: see `supports`.
    """
    outputs, inputs = codes_OI.shape
    groups = scale_OG.shape[1]
    group = 0 if groups == 1 else inputs // groups
    if problem := unsupported(bits, inputs, group):
        raise ValueError(problem)
    scale = formats.pack_groups(scale_OG.expand(outputs, -1))
    if bits != 3:
        return Packed(formats.pack_words(codes_OI, bits), None, scale, bits, group, (outputs, inputs))
    wide = formats.padded(inputs, formats.block(1))
    low, high = formats.pack_words(codes_OI & 3, 2, wide), formats.pack_words(codes_OI >> 2, 1, wide)
    return Packed(low, high, scale, bits, group, (outputs, inputs))


def unsupported(bits: int, inputs: int, group: int) -> str:
    """Why there is no kernel for such a weight, or nothing. `group` is 0 if a row has one scale."""
    width = formats.block(1 if bits == 3 else bits)
    if bits not in BITS:
        return f"codes of {bits} bits; there are kernels for {', '.join(map(str, BITS))}"
    if group and (inputs % group or (width % group and group % width) or group % formats.PLACES):
        return (
            f"groups of {group} of {inputs} inputs; {bits}-bit words take divisors of {width} by 32, and its multiples"
        )
    return ""


def reference(packed: Packed) -> Tensor:
    """The specification: the float32 matrix [out, in], without the low-rank term."""
    outputs, inputs = packed.shape
    codes_RI = formats.unpack_words(packed.words, 2 if packed.bits == 3 else packed.bits)
    if packed.high is not None:
        codes_RI = codes_RI | formats.unpack_words(packed.high, 1) << 2
    values_OI = codes_RI[:outputs, :inputs].float() - 2.0 ** (packed.bits - 1)
    scale_OG = packed.scale.T[:outputs].float()
    return values_OI * scale_OG.repeat_interleave(packed.group or inputs, 1)


def with_low_rank(packed: Packed, u_OR: Tensor, v_RI: Tensor) -> Packed:
    """The weight plus `U V`, whose product with x the end of the same kernel adds."""
    u, v = low_rank.pack(u_OR, v_RI)
    return replace(packed, u=u, v=v)


def check(x: Tensor, w: Packed, bias: Tensor | None) -> None:
    """Refuse what a kernel would read wrongly. Raises ValueError or TypeError that names the argument."""
    out, inputs = w.shape
    rows = formats.padded(out, formats.ROWS)
    if problem := unsupported(w.bits, inputs, w.group):
        raise ValueError(f"wq_linear: {problem}")
    width = formats.block(1 if w.bits == 3 else w.bits)
    blocks = -(-inputs // width)
    given.floats("wq_linear: x", x)
    given.expect(
        "wq_linear: words", w.words, x, (blocks * (2 if w.bits == 3 else 1), rows, formats.PLACES), torch.int16
    )
    given.expect("wq_linear: scale", w.scale, x, (inputs // w.group if w.group else 1, rows), None)
    if (w.high is not None) != (w.bits == 3):
        raise ValueError(f"wq_linear: high: words of a third bit go with 3 bits, and only with them; bits is {w.bits}")
    if w.high is not None:
        given.expect("wq_linear: high", w.high, x, (blocks, rows, formats.PLACES), torch.int16)
    low_rank.check("wq_linear", x, w.u, w.v, out)
    if bias is not None:
        given.expect("wq_linear: bias", bias, x, (out,), None)


def linear(w: Packed, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ W.T + bias` for x [..., in]."""
    return torch.as_tensor(wq_linear(x, w.words, w.high, w.scale, w.u, w.v, bias, w.bits, w.group, w.shape[0]))


@torch.library.custom_op("compress::wq_linear", mutates_args=(), device_types="cpu")
def wq_linear(
    x: Tensor, words: Tensor, high: Tensor | None, scale: Tensor, u: Tensor | None, v: Tensor | None,
    bias: Tensor | None, bits: int, group: int, out: int,
) -> Tensor:  # fmt: skip
    """`x @ W.T + bias` for x [..., in] and the tensors of a `Packed`."""
    w = Packed(words, high, scale, bits, group, (out, x.shape[-1]), u, v)
    check(x, w, bias)
    y = F.linear(x, reference(w).to(x.dtype), bias)
    return y if u is None or v is None else y + low_rank.term(x, u, v)


@wq_linear.register_kernel("cuda")
def _(
    x: Tensor, words: Tensor, high: Tensor | None, scale: Tensor, u: Tensor | None, v: Tensor | None,
    bias: Tensor | None, bits: int, group: int, out: int,
) -> Tensor:  # fmt: skip
    from compress_kernels.gpu import wq

    w = Packed(words, high, scale, bits, group, (out, x.shape[-1]), u, v)
    check(x, w, bias)
    return wq.linear(x.reshape(-1, x.shape[-1]).contiguous(), w, bias).view(*x.shape[:-1], out)


@wq_linear.register_fake
def _(
    x: Tensor, words: Tensor, high: Tensor | None, scale: Tensor, u: Tensor | None, v: Tensor | None,
    bias: Tensor | None, bits: int, group: int, out: int,
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], out)
