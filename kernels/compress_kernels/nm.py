"""Products y = x W^T with N:M weights: at most N of every M inputs in a row are kept, and only those are stored.

Contains packing, the specification and the ops `compress::nm_linear`, `nm_dense`, `nm_planes`; the kernels are in
`gpu/nm.py`. Kept values are 16-bit floats, or 4- or 8-bit codes with a scale (and a zero point) for every group of
inputs, or e4m3 floats with a scale. The mask is a bitmap with one bit per input, never a list of positions: it takes no
more space than 2:4 indices and needs no comparisons.

Layout: For every row, P words of 16 bits hold the bitmaps of a block of 16 * P inputs; P is 32, or 16 for small groups
of scales. Group g of word p consists of the M inputs from `(g * P + p) * M` of the block on; `places` gives the bit of
each of them. Slot i of these groups is a plane of P values. Planes of floats are stored as they are, planes of codes
several per word. The kept values of the front half of a group fill its slots from the first slot on, those of the back
half from the last slot backwards, so that a group may keep fewer than N. Element e of the P groups is a plane of x,
once x is permuted so that planes are contiguous.

In the format "nibble" (4-bit codes in groups of four), a word of slot i holds that slot of the four groups of one mask
word. The mask can then be applied to all four codes at once, before they are decoded. Codes are stored xor their zero
point, so that a masked code, which is 0, stands for 0.
Shape suffixes: M rows of x, O out, I in, R padded rows, G groups of scales, B blocks, P places, C planes, W words.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compress_kernels import formats, given, low_rank

SIZES = (2, 4, 8, 16)  # the supported M, which divide a word
PLACES = (32, 16)  # words per row of a block; a group of scales must be whole runs of M times this: 128 or 64 in 2:4
BITS = {"half": 16, "int4": 4, "nibble": 4, "int8": 8, "fp8": 8}
CODES = ("int4", "nibble", "int8")


@dataclass(frozen=True)
class Packed:
    """A packed N:M weight: a mask and the kept values.

    `values` are floats [B, C, R, P], or words [B, W, R, P] of codes or e4m3. Kept weights are
    `scale * (code - 2**(bits - 1) - zero)`, `scale * e4m3`, or the values themselves. `u` [out, rank] and `v`
    [rank, in] add a low-rank term U V.
    """

    mask: Tensor
    values: Tensor
    scale: Tensor | None
    zero: Tensor | None
    format: str
    keep: int
    of: int
    group: int
    shape: tuple[int, int]
    u: Tensor | None = None
    v: Tensor | None = None

    @property
    def kind(self) -> str:
        """The name of this form in `dispatch.py` and in tuning profiles."""
        return f"{self.keep}:{self.of} {self.format}"

    @property
    def nbytes(self) -> int:
        """Bytes that a product of few rows reads."""
        stored = (self.mask, self.values, self.scale, self.zero, self.u, self.v)
        return sum(t.nbytes for t in stored if t is not None)


def unsupported(format: str, keep: int, of: int, inputs: int, group: int) -> str:
    """The reason why there is no kernel for such a weight; empty if there is one. `group` 0: one scale per row."""
    if format not in BITS:
        return f"values as {format!r}; there are kernels for {', '.join(BITS)}"
    if format == "nibble" and of != 4:
        return f"{keep}:{of} as nibbles; four groups of four fill a word"
    if of not in SIZES or not 0 < keep < of:
        return f"{keep}:{of}; kernels take N:M with M of {', '.join(map(str, SIZES))} and 0 < N < M"
    if group and (format == "half" or inputs % group or not words_of(of, group)):
        return f"{format} in groups of {group} of {inputs} inputs; {keep}:{of} takes {16 * of} times a power of two"
    return ""


def words_of(of: int, group: int) -> int:
    """P, the words per row of a block, for groups of this many inputs; 0 if no layout fits."""
    for count in PLACES:
        run, block = count * of, 16 * count
        if group % run == 0 and (group % block == 0 or block % group == 0):
            return count
    return 0


def pack(values_OI: Tensor, mask_OI: Tensor, keep: int, of: int) -> Packed:
    """Pack the float16 or bfloat16 values where the mask is True; kept values may be 0.

    Raises ValueError if a group keeps more than `keep` values, or no kernel supports such a weight (`unsupported`).
    """
    if values_OI.dtype not in given.HALVES:
        raise ValueError(
            f"nm: values are {values_OI.dtype}; kept values are float16 or bfloat16, or codes with a scale"
        )
    planes = slots(values_OI, mask_OI, keep, of, "half", 0)
    return Packed(
        pack_masks(mask_OI, of, PLACES[0], "half"), planes, None, None, "half", keep, of, 0, tuple_of(mask_OI)
    )


def pack_codes(
    codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, bits: int, mask_OI: Tensor, keep: int, of: int
) -> Packed:
    """Pack kept codes of 4 or 8 bits that stand for `scale * (code - zero)`; without `zero_OG`, zero is 2**(bits - 1).

    A kernel subtracts zero points in the dtype of x, which is exact if they are integers and rounded otherwise. For
    M = 4, 4-bit codes whose zero points are integers from 0 to 15 are stored in the format "nibble", as
    `code xor zero`, so that a mask can be applied to four of them at once.
    """
    zero = None if zero_OG is None else formats.pack_groups((zero_OG.float() - 2.0 ** (bits - 1)).half())
    codes = torch.arange(16.0, device=scale_OG.device)
    if (bits, of) != (4, 4) or (zero_OG is not None and not bool(torch.isin(zero_OG.float(), codes).all())):
        return scaled(codes_OI, scale_OG, zero, f"int{bits}", mask_OI, keep, of)
    zeros_OG = torch.full_like(scale_OG, 8) if zero_OG is None else zero_OG
    zeros_OI = zeros_OG.to(torch.uint8).repeat_interleave(codes_OI.shape[1] // scale_OG.shape[1], 1)
    return scaled(codes_OI.to(torch.uint8) ^ zeros_OI, scale_OG, zero, "nibble", mask_OI, keep, of)


def pack_float8(values_OI: Tensor, scale_OG: Tensor, mask_OI: Tensor, keep: int, of: int) -> Packed:
    """Pack kept values of dtype float8_e4m3fn that stand for `scale * value`; raises ValueError if one is NaN."""
    if values_OI.dtype != torch.float8_e4m3fn:
        raise ValueError(f"nm: values are {values_OI.dtype}, not torch.float8_e4m3fn")
    codes_OI = values_OI.view(torch.uint8)
    if bool((((codes_OI & 127) == 127) & mask_OI).any()):
        raise ValueError("nm: a kept value is NaN; the kernels decode e4m3 without it")
    return scaled(codes_OI, scale_OG, None, "fp8", mask_OI, keep, of)


def scaled(
    codes_OI: Tensor, scale_OG: Tensor, zero: Tensor | None, format: str, mask_OI: Tensor, keep: int, of: int
) -> Packed:
    """Pack codes of a format with one scale per group of inputs."""
    outputs, inputs = codes_OI.shape
    group = 0 if scale_OG.shape[1] == 1 else inputs // scale_OG.shape[1]
    words = pack_planes(slots(codes_OI, mask_OI, keep, of, format, group), BITS[format])
    if scale_OG.dtype.itemsize == 1:  # e8m0, e4m3: bfloat16 holds both exactly, and every GPU reads it
        scale_OG = scale_OG.to(torch.bfloat16)
    scale = formats.pack_groups(scale_OG.expand(outputs, -1))
    return Packed(
        pack_masks(mask_OI, of, words_of(of, group), format),
        words,
        scale,
        zero,
        format,
        keep,
        of,
        group,
        (outputs, inputs),
    )


def with_low_rank(packed: Packed, u_OR: Tensor, v_RI: Tensor) -> Packed:
    """The weight plus `U V`; the same kernel adds the low-rank term at its end."""
    u, v = low_rank.pack(u_OR, v_RI)
    return replace(packed, u=u, v=v)


def tuple_of(matrix_OI: Tensor) -> tuple[int, int]:
    """The shape of a matrix."""
    return matrix_OI.shape[0], matrix_OI.shape[1]


def grouped(matrix_OI: Tensor, of: int, count: int) -> Tensor:
    """A padded matrix as [R, B, 16/M, P, M]: rows, blocks, groups of a word, words, elements of a group."""
    outputs, inputs = matrix_OI.shape
    more = (0, formats.padded(inputs, 16 * count) - inputs, 0, formats.padded(outputs, formats.ROWS) - outputs)
    whole: Tensor = F.pad(matrix_OI, more).unflatten(1, (-1, 16 // of, count, of))
    return whole


def pack_masks(mask_OI: Tensor, of: int, count: int, format: str) -> Tensor:
    """The bitmap of a mask as int16 words [B, R, P]."""
    bits_RBGPM = grouped(mask_OI, of, count).to(torch.int32) << places(of, format, mask_OI.device)[:, None]
    return bits_RBGPM.sum((2, 4), dtype=torch.int32).to(torch.int16).transpose(0, 1).contiguous()


def unpack_masks(words_BRP: Tensor, of: int, format: str) -> Tensor:
    """The mask in words, as bool [R, B, 16/M, P, M]: rows, blocks, groups of a word, words, elements of a group."""
    words_RB1P1 = words_BRP.transpose(0, 1)[:, :, None, :, None].to(torch.int32)
    return ((words_RB1P1 >> places(of, format, words_BRP.device)[:, None]) & 1).bool()


def places(of: int, format: str, device: torch.device) -> Tensor:
    """The bit that belongs to every element of every group of a word, [16/M, M].

    Element e of the front half of a group and element e + M/2 are eight bits apart. In the format "nibble", the bits of
    a group are adjacent, at the position of its code.
    """
    if format == "nibble":
        return torch.arange(16, dtype=torch.int32, device=device).view(4, 4)
    half = of // 2
    element_M = torch.arange(of, dtype=torch.int32, device=device)
    group_G = torch.arange(16 // of, dtype=torch.int32, device=device)
    return group_G[:, None] * half + element_M % half + 8 * (element_M // half)


def slot_of(mask: Tensor, keep: int) -> Tensor:
    """The slot of every kept element of groups in the last dimension, int64; undefined for the other elements."""
    front, back = mask.chunk(2, -1)
    before = front.cumsum(-1) - front.long()
    behind = back.flip(-1).cumsum(-1).flip(-1) - back.long()
    return torch.cat((before, keep - 1 - behind), -1)


def slots(values_OI: Tensor, mask_OI: Tensor, keep: int, of: int, format: str, group: int) -> Tensor:
    """Planes of kept values [B, C, R, P], with 0 in empty slots.

    Raises ValueError for a mask that does not fit or a weight that no kernel supports.
    """
    if problem := unsupported(format, keep, of, values_OI.shape[1], group):
        raise ValueError(f"nm: {problem}")
    if mask_OI.dtype != torch.bool or mask_OI.shape != values_OI.shape:
        raise ValueError(
            f"nm: the mask is {given.described(mask_OI)}; it must be bool of shape {tuple(values_OI.shape)}"
        )
    count = words_of(of, group)
    mask, values = grouped(mask_OI, of, count), grouped(values_OI, of, count)
    if int(mask.sum(-1).max()) > keep:
        raise ValueError(f"nm: a group of {of} keeps {int(mask.sum(-1).max())}; {keep}:{of} keeps at most {keep}")
    where = slot_of(mask, keep).masked_fill_(~mask, keep)
    planes = values.new_zeros(*values.shape[:-1], keep + 1).scatter_(-1, where, values)[..., :keep]
    order = (1, 4, 2, 0, 3) if format == "nibble" else (1, 2, 4, 0, 3)  # a word of nibbles is one slot of four groups
    return planes.permute(order).flatten(1, 2).contiguous()


def pack_planes(planes_BCRP: Tensor, bits: int) -> Tensor:
    """Pack planes of codes into int16 words [B, W, R, P]: 16 / bits planes per word, the first in the lowest bits."""
    per = formats.planes(bits)
    whole = F.pad(planes_BCRP.to(torch.int32), (0, 0, 0, 0, 0, -planes_BCRP.shape[1] % per)).unflatten(1, (-1, per))
    at = torch.arange(0, 16, bits, dtype=torch.int32, device=planes_BCRP.device)
    words: Tensor = (whole << at[:, None, None]).sum(2, dtype=torch.int32)
    return words.to(torch.int16)


def reference(packed: Packed) -> Tensor:
    """The specification: the float32 matrix [out, in], without the low-rank term."""
    outputs, inputs = packed.shape
    bits, per = BITS[packed.format], 16 // packed.of
    planes = packed.values
    if packed.format != "half":
        at = torch.arange(0, 16, bits, dtype=torch.int32, device=planes.device)[:, None, None]
        planes = ((planes[:, :, None].to(torch.int32) >> at) & (2**bits - 1)).flatten(1, 2)
        planes = planes[:, : per * packed.keep]
    if packed.format == "fp8":
        planes = planes.to(torch.uint8).view(torch.float8_e4m3fn).float()
    if packed.format == "nibble":
        kept_RBGPN = planes.unflatten(1, (packed.keep, per)).permute(3, 0, 2, 4, 1)
    else:
        kept_RBGPN = planes.unflatten(1, (per, packed.keep)).permute(3, 0, 1, 4, 2)
    mask = unpack_masks(packed.mask, packed.of, packed.format)
    where = slot_of(mask, packed.keep).clamp(0, packed.keep - 1)
    stored_OI: Tensor = kept_RBGPN.gather(-1, where).flatten(1)[:outputs, :inputs]
    if packed.format == "nibble":
        stored_OI = stored_OI ^ (8 if packed.zero is None else spread_groups(packed.zero, packed).int() + 8)
    values_OI = stored_OI.float() - (2.0 ** (bits - 1) if packed.format in CODES else 0)
    mask_OI = mask.flatten(1)[:outputs, :inputs]
    if packed.zero is not None:
        values_OI = values_OI - spread_groups(packed.zero, packed)
    if packed.scale is not None:
        values_OI = values_OI * spread_groups(packed.scale, packed)
    return torch.as_tensor(values_OI.masked_fill(~mask_OI, 0))


def spread_groups(values_GR: Tensor, packed: Packed) -> Tensor:
    """Repeat one value per group for each weight, float32 [out, in]."""
    outputs, inputs = packed.shape
    each: Tensor = values_GR.T[:outputs].float().repeat_interleave(packed.group or inputs, 1)
    return each


def permuted(x: Tensor, of: int, count: int) -> Tensor:
    """The specification of `nm_planes`: x [..., in] in the order of planes, with zeros at the end of the last block."""
    padding = formats.padded(x.shape[-1], 16 * count) - x.shape[-1]
    return torch.as_tensor(F.pad(x, (0, padding)).unflatten(-1, (-1, count, of)).transpose(-1, -2).flatten(-3))


def check(op: str, w: Packed, x: Tensor) -> None:
    """Check that a kernel can read the weight, which must be on the device of x.

    Raises ValueError that names the argument.
    """
    out, inputs = w.shape
    if problem := unsupported(w.format, w.keep, w.of, inputs, w.group):
        raise ValueError(f"{op}: {problem}")
    count, rows = words_of(w.of, w.group), formats.padded(out, formats.ROWS)
    blocks, per = -(-inputs // (16 * count)), 16 // BITS[w.format]
    half = w.format == "half"
    if half and w.values.dtype not in given.HALVES:
        raise ValueError(f"{op}: values is {given.described(w.values)}; they must be float16 or bfloat16")
    given.expect(f"{op}: mask", w.mask, x, (blocks, rows, count), torch.int16)
    shape = (blocks, -(-16 // w.of * w.keep // per), rows, count)
    given.expect(f"{op}: values", w.values, x, shape, w.values.dtype if half else torch.int16)
    if (w.scale is None) != half or (w.zero is not None and w.format not in CODES):
        raise ValueError(f"{op}: scales go with int4, int8 and fp8, and only with them; zeros with int4 and int8")
    for name, numbers in (("scale", w.scale), ("zero", w.zero)):
        if numbers is not None:
            given.expect(f"{op}: {name}", numbers, x, (inputs // w.group if w.group else 1, rows), None)


def check_product(w: Packed, x: Tensor, planes: Tensor | None, bias: Tensor | None) -> None:
    """`check`, and check the other arguments of a product; raises ValueError or TypeError that names the argument."""
    given.floats("nm_linear: x", x)
    check("nm_linear", w, x)
    low_rank.check("nm_linear", x, w.u, w.v, w.shape[0])
    if planes is not None:
        wide = formats.padded(x.shape[-1], 16 * w.mask.shape[2])
        given.expect("nm_linear: planes", planes, x, (*x.shape[:-1], wide), x.dtype)
    if bias is not None:
        given.expect("nm_linear: bias", bias, x, (w.shape[0],), None)


def fits(values: Tensor, format: str, dtype: torch.dtype) -> None:
    """Raise TypeError unless values and result have one 16-bit dtype, since the GPU kernels convert nothing."""
    if dtype not in given.HALVES or (format == "half" and values.dtype != dtype):
        raise TypeError(f"nm: values are {values.dtype}, x or the result {dtype}; a GPU takes one 16-bit float for all")


def linear(w: Packed, x: Tensor, bias: Tensor | None = None, planes: Tensor | None = None) -> Tensor:
    """`x @ W.T + bias` for x [..., in]; `planes` is what `nm_planes` returns for x, which several weights can share."""
    tensors = (w.mask, w.values, w.scale, w.zero, w.u, w.v)
    return torch.as_tensor(nm_linear(x, planes, *tensors, bias, w.format, w.keep, w.of, w.group, w.shape[0]))


def dense(w: Packed, dtype: torch.dtype) -> Tensor:
    """The matrix [out, in] in `dtype`, without the low-rank term."""
    tensors = (w.mask, w.values, w.scale, w.zero)
    return torch.as_tensor(nm_dense(*tensors, w.format, w.keep, w.of, w.group, *w.shape, dtype))


@torch.library.custom_op("compress::nm_planes", mutates_args=(), device_types="cpu")
def nm_planes(x: Tensor, of: int, count: int) -> Tensor:
    """x [..., in] in the order of planes of `count` values for groups of `of` inputs, padded to whole blocks."""
    given.floats("nm_planes: x", x)
    return permuted(x, of, count).contiguous()


@nm_planes.register_kernel("cuda")
def _(x: Tensor, of: int, count: int) -> Tensor:
    from compress_kernels.gpu import nm

    given.floats("nm_planes: x", x)
    planes_MK = nm.planes(x.reshape(-1, x.shape[-1]).contiguous(), of, count)
    return planes_MK.view(*x.shape[:-1], planes_MK.shape[1])


@nm_planes.register_fake
def _(x: Tensor, of: int, count: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], formats.padded(x.shape[-1], 16 * count))


@torch.library.custom_op("compress::nm_dense", mutates_args=(), device_types="cpu")
def nm_dense(
    mask: Tensor, values: Tensor, scale: Tensor | None, zero: Tensor | None,
    format: str, keep: int, of: int, group: int, out: int, inputs: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The matrix [out, in] that the tensors of a `Packed` encode, rounded once to `dtype`."""
    w = Packed(mask, values, scale, zero, format, keep, of, group, (out, inputs))
    check("nm_dense", w, mask)
    return reference(w).to(dtype)


@nm_dense.register_kernel("cuda")
def _(
    mask: Tensor, values: Tensor, scale: Tensor | None, zero: Tensor | None,
    format: str, keep: int, of: int, group: int, out: int, inputs: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    from compress_kernels.gpu import nm

    w = Packed(mask, values, scale, zero, format, keep, of, group, (out, inputs))
    check("nm_dense", w, mask)
    fits(values, format, dtype)
    return nm.dense(w, dtype)


@nm_dense.register_fake
def _(
    mask: Tensor, values: Tensor, scale: Tensor | None, zero: Tensor | None,
    format: str, keep: int, of: int, group: int, out: int, inputs: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return mask.new_empty(out, inputs, dtype=dtype)


@torch.library.custom_op("compress::nm_linear", mutates_args=(), device_types="cpu")
def nm_linear(
    x: Tensor, planes: Tensor | None, mask: Tensor, values: Tensor, scale: Tensor | None, zero: Tensor | None,
    u: Tensor | None, v: Tensor | None, bias: Tensor | None,
    format: str, keep: int, of: int, group: int, out: int,
) -> Tensor:  # fmt: skip
    """`x @ W.T + bias` for x [..., in] and the tensors of a `Packed`; `planes` is as in `linear`, and made if None."""
    w = Packed(mask, values, scale, zero, format, keep, of, group, (out, x.shape[-1]), u, v)
    check_product(w, x, planes, bias)
    y = F.linear(x, reference(w).to(x.dtype), None if bias is None else bias.to(x.dtype))
    return y if u is None or v is None else y + low_rank.term(x, u, v)


@nm_linear.register_kernel("cuda")
def _(
    x: Tensor, planes: Tensor | None, mask: Tensor, values: Tensor, scale: Tensor | None, zero: Tensor | None,
    u: Tensor | None, v: Tensor | None, bias: Tensor | None,
    format: str, keep: int, of: int, group: int, out: int,
) -> Tensor:  # fmt: skip
    from compress_kernels.gpu import nm

    w = Packed(mask, values, scale, zero, format, keep, of, group, (out, x.shape[-1]), u, v)
    check_product(w, x, planes, bias)
    fits(values, format, x.dtype)
    return nm.product(x, planes, w, bias)


@nm_linear.register_fake
def _(
    x: Tensor, planes: Tensor | None, mask: Tensor, values: Tensor, scale: Tensor | None, zero: Tensor | None,
    u: Tensor | None, v: Tensor | None, bias: Tensor | None,
    format: str, keep: int, of: int, group: int, out: int,
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], out)


def remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save what the gradients need."""
    x, _, *tensors = inputs[:8]
    ctx.save_for_backward(x, *tensors)
    ctx.rest = inputs[9:-1]


def gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    """The gradients of x, the low-rank factors and the bias; packed tensors are constant."""
    x, mask, values, scale, zero, u, v = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    dx = None
    if wanted[0]:
        dx = dy @ nm_dense(mask, values, scale, zero, *ctx.rest, dy.shape[-1], x.shape[-1], dy.dtype)
    more, du, dv = low_rank.gradients(x, u, v, dy, wanted[6:8])
    dbias = low_rank.rows(dy).sum(0) if wanted[8] else None
    dx = dx if dx is None or more is None else dx + more
    return dx, None, None, None, None, None, du, dv, dbias, *([None] * 5)


nm_linear.register_autograd(gradients, setup_context=remember)
