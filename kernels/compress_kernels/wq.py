"""Weight-only products y = x W^T with integer codes of 2, 3, 4 or 8 bits, a scale for every group of inputs.

Packing, specification and the op `compress::wq_linear`; the kernel is `gpu/wq.py`. On the CPU the op decodes and
multiplies: it is the reference there, not a fast path (`cpu.py` has those).
Shape suffixes: M rows of x, O out, I in, R padded rows, G groups, B blocks, P places.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from compress_kernels import formats, given

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Packed:
    """`scale * (code - 2**(bits - 1))`, codes as K-plane words; `scale` is [G, R], one group of a row has group 0.

    Three bits are words of the lower two and words `high` of the third.
    """

    words: Tensor
    high: Tensor | None
    scale: Tensor
    bits: int
    group: int
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return sum(t.nbytes for t in (self.words, self.high, self.scale) if t is not None)


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
    """The specification: the float32 matrix [out, in]."""
    outputs, inputs = packed.shape
    codes_RI = formats.unpack_words(packed.words, 2 if packed.bits == 3 else packed.bits)
    if packed.high is not None:
        codes_RI = codes_RI | formats.unpack_words(packed.high, 1) << 2
    values_OI = codes_RI[:outputs, :inputs].float() - 2.0 ** (packed.bits - 1)
    scale_OG = packed.scale.T[:outputs].float()
    return values_OI * scale_OG.repeat_interleave(packed.group or inputs, 1)


def check(
    x: Tensor, words: Tensor, high: Tensor | None, scale: Tensor, bias: Tensor | None, bits: int, group: int, out: int
) -> None:
    """Refuse what a kernel would read wrongly. Raises ValueError or TypeError that names the argument."""
    inputs, rows = x.shape[-1], formats.padded(out, formats.ROWS)
    if problem := unsupported(bits, inputs, group):
        raise ValueError(f"wq_linear: {problem}")
    width = formats.block(1 if bits == 3 else bits)
    blocks = -(-inputs // width)
    given.floats("wq_linear: x", x)
    given.expect("wq_linear: words", words, x, (blocks * (2 if bits == 3 else 1), rows, formats.PLACES), torch.int16)
    given.expect("wq_linear: scale", scale, x, (inputs // group if group else 1, rows), None)
    if (high is not None) != (bits == 3):
        raise ValueError(f"wq_linear: high: words of a third bit go with 3 bits, and only with them; bits is {bits}")
    if high is not None:
        given.expect("wq_linear: high", high, x, (blocks, rows, formats.PLACES), torch.int16)
    if bias is not None:
        given.expect("wq_linear: bias", bias, x, (out,), None)


def linear(packed: Packed, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ W.T + bias` for x [..., in]."""
    return torch.as_tensor(
        wq_linear(x, packed.words, packed.high, packed.scale, bias, packed.bits, packed.group, packed.shape[0])
    )


@torch.library.custom_op("compress::wq_linear", mutates_args=(), device_types="cpu")
def wq_linear(
    x: Tensor, words: Tensor, high: Tensor | None, scale: Tensor, bias: Tensor | None, bits: int, group: int, out: int
) -> Tensor:
    """`x @ W.T + bias` for x [..., in] and the tensors of a `Packed`."""
    check(x, words, high, scale, bias, bits, group, out)
    matrix = reference(Packed(words, high, scale, bits, group, (out, x.shape[-1]))).to(x.dtype)
    return F.linear(x, matrix, bias)


@wq_linear.register_kernel("cuda")
def _(
    x: Tensor, words: Tensor, high: Tensor | None, scale: Tensor, bias: Tensor | None, bits: int, group: int, out: int
) -> Tensor:
    from compress_kernels.gpu import wq

    check(x, words, high, scale, bias, bits, group, out)
    x_MI = x.reshape(-1, x.shape[-1]).contiguous()
    return wq.linear(x_MI, words, high, scale, bias, bits, group, out).view(*x.shape[:-1], out)


@wq_linear.register_fake
def _(
    x: Tensor, words: Tensor, high: Tensor | None, scale: Tensor, bias: Tensor | None, bits: int, group: int, out: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out)
