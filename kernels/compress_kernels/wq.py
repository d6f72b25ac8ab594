"""Weight-only products y = x W^T: integer codes, small floats and codebooks, with a scale for every group of inputs.

Contains packing, the specification and the ops `compress::wq_linear` and `wq_dense`; the kernels are in `gpu/wq.py`. On
the CPU the op decodes and multiplies: it is the reference there, not a fast path (those are in `cpu.py`). Scales that
are themselves quantized are decoded before packing.
Shape suffixes: M rows of x, O out, I in, R padded rows, G groups, B blocks, P places, E entries of a book.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compress_kernels import formats, given, low_rank
from compress_kernels.prep import Plan

BITS = {"int2": 2, "int3": 3, "int4": 4, "int8": 8, "e4m3": 8, "e5m2": 8, "e2m1": 4, "book": 4}
INTEGERS = tuple(bits for form, bits in BITS.items() if form.startswith("int"))
SUBNORMAL = ("int2", "int3", "int4")  # forms that may be read as subnormal float16 numbers
FLOATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
ENTRIES = 16  # of a codebook
BOOK = 2 * 8 + ENTRIES  # 32-bit words of a packed book: the bytes of its entries in two 16-bit dtypes, then in float32


@dataclass(frozen=True)
class Packed:
    """A packed weight `scale * value`, with values coded in K-plane words (`formats.py`).

    `scale` is [G, R]; `group` is the number of inputs per group, or 0 for one scale per row. Integer values are
    `code - zero`, where `zero` has the shape of the scale, or is None for 2**(bits - 1). Three-bit codes are stored as
    `words` of the lower two bits and words `high` of the third; words of eight bits hold `code ^ 128`. Values of the
    form `book` are entries of `book`, int32: the lower and then the upper bytes of the 16 entries in float16, the same
    in bfloat16, and the entries in float32. The matrix multiplies `x[order]`; `u` [out, rank] and `v` [rank, in] add a
    low-rank term U V.
    """

    words: Tensor
    high: Tensor | None
    scale: Tensor
    zero: Tensor | None
    book: Tensor | None
    order: Tensor | None
    u: Tensor | None
    v: Tensor | None
    form: str
    group: int
    shape: tuple[int, int]

    @property
    def kind(self) -> str:
        """The name of this form in `dispatch.py` and in tuning profiles."""
        return self.form

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return sum(t.nbytes for t in (getattr(self, f.name) for f in fields(self)) if isinstance(t, Tensor))


# -- packing ---------------------------------------------------------------------------------------


def pack(codes_OI: Tensor, scale_OG: Tensor, bits: int, zero_OG: Tensor | None = None) -> Packed:
    """Pack `scale * (code - zero)`, with codes below 2**bits and one scale and zero point (any number) per group.

    Raises ValueError if there is no kernel for the group size; see `unsupported`.
    """
    return packed(f"int{bits}", codes_OI, scale_OG, zero_OG=zero_OG)


def pack_floats(data_OI: Tensor, scale: Tensor, tile: tuple[int, int]) -> Packed:
    """Pack float8 `data * scale`; scale has one entry per tile, [tiles down, tiles across], of (rows, columns).

    Raises ValueError for NaN and infinities, which the kernels do not decode, and if there is no kernel.
    """
    form = next((form for form, dtype in FLOATS.items() if dtype == data_OI.dtype), "")
    if not form:
        raise ValueError(f"data is {data_OI.dtype}; there are kernels for {', '.join(map(str, FLOATS.values()))}")
    if not bool(data_OI.float().isfinite().all()):
        raise ValueError(f"{data_OI.dtype} data with NaN or infinities, which kernels do not decode")
    rows_OG = scale.repeat_interleave(min(tile[0], data_OI.shape[0]), 0)[: data_OI.shape[0]]
    return packed(form, data_OI.view(torch.uint8), rows_OG, group=tile[1] if scale.shape[1] > 1 else 0)


def pack_book(codes_OI: Tensor, book_E: Tensor, scale_OG: Tensor) -> Packed:
    """Pack `scale * book[code]` for a book of at most 16 numbers; the book of e2m1 is decoded without a table.

    The entries are stored in float32; products use them in the dtype of x. Raises ValueError for larger books and if
    there is no kernel.
    """
    entries = book_E.flatten().float()
    if len(entries) > ENTRIES:
        raise ValueError(f"a book of {len(entries)} entries; there are kernels for {ENTRIES}")
    if entries.tolist() == list(E2M1):
        return packed("e2m1", codes_OI, scale_OG)
    whole_E = F.pad(entries, (0, ENTRIES - len(entries)))
    halves = (whole_E.half(), whole_E.bfloat16())
    bytes_of = [half.view(torch.uint8).view(-1, 2).T.contiguous().view(torch.int32) for half in halves]
    parts = [part.flatten() for part in (*bytes_of, whole_E.view(torch.int32))]
    return packed("book", codes_OI, scale_OG, book=torch.cat(parts))


def with_order(w: Packed, order_I: Tensor) -> Packed:
    """The weight applied to `x[order]`. Raises ValueError if `order` is not a permutation."""
    if not torch.equal(order_I.sort().values, torch.arange(w.shape[1], device=order_I.device)):
        raise ValueError(f"order {tuple(order_I.shape)} is not a permutation of {w.shape[1]} inputs")
    return replace(w, order=order_I.to(torch.int32).contiguous())


def with_low_rank(w: Packed, u_OR: Tensor, v_RI: Tensor) -> Packed:
    """The weight plus `U V`, applied to x without `order`; the same kernel adds the low-rank term at its end."""
    u, v = low_rank.pack(u_OR, v_RI)
    return replace(w, u=u, v=v)


def packed(
    form: str, codes_OI: Tensor, scale_OG: Tensor, *, zero_OG: Tensor | None = None, book: Tensor | None = None,
    group: int | None = None,
) -> Packed:  # fmt: skip
    """Pack the codes of any form; raises ValueError if there is no kernel for it."""
    outputs, inputs = codes_OI.shape
    groups = scale_OG.shape[1]
    group = (0 if groups == 1 else inputs // groups) if group is None else group
    if problem := unsupported(form, inputs, group):
        raise ValueError(problem)
    if scale_OG.dtype.itemsize == 1:  # e8m0, e4m3: bfloat16 holds both exactly, and every GPU reads it
        scale_OG = scale_OG.to(torch.bfloat16)
    scale = formats.pack_groups(scale_OG.expand(outputs, -1))
    zero = None if zero_OG is None else formats.pack_groups(zero_OG.expand(outputs, groups))
    places, high = places_of(group), None
    if form == "int3":
        wide = formats.padded(inputs, formats.block(1, places))
        words = formats.pack_words(codes_OI & 3, 2, wide, places)
        high = formats.pack_words(codes_OI >> 2, 1, wide, places)
    else:
        words = formats.pack_words(codes_OI ^ 128 if form == "int8" else codes_OI, BITS[form], None, places)
    return Packed(words, high, scale, zero, book, None, None, None, form, group, (outputs, inputs))


def places_of(group: int) -> int:
    """Words per row of a block: 16 if the group size is an odd multiple of 16 inputs, else 32."""
    return formats.PLACES // 2 if group % formats.PLACES else formats.PLACES


def width(form: str, group: int) -> int:
    """The number of inputs of a block."""
    return formats.block(1 if form == "int3" else BITS[form], places_of(group))


def width_of(w: Packed) -> int:
    """The number of inputs of a block of a packed weight."""
    return width(w.form, w.group)


def unsupported(form: str, inputs: int, group: int) -> str:
    """The reason why there is no kernel for such a weight; empty if there is one. `group` 0: one scale per row."""
    if form not in BITS:
        return f"weights of form {form}; there are kernels for {', '.join(BITS)}"
    wide = width(form, group)
    if group and (group % (formats.PLACES // 2) or (wide % group and group % wide)):
        return f"groups of {group} of {inputs} inputs; {form} takes divisors of {wide} by 16, and its multiples"
    return ""


def plan_of(w: Packed, subnormal: bool) -> Plan:
    """How x must be prepared for a product with a weight; `subnormal` asks for decoding by subnormal numbers."""
    wide, places = width_of(w), places_of(w.group)
    unit = w.group if 0 < w.group < wide else wide
    asked = subnormal and w.form in SUBNORMAL
    low = 2 if w.form == "int3" else BITS[w.form]
    return Plan(block=wide, unit=unit, low=low, places=places, ordered=w.order is not None, subnormal=asked,
                sums=w.zero is not None or asked)  # fmt: skip


# -- specification ---------------------------------------------------------------------------------


def reference(w: Packed) -> Tensor:
    """The specification: the float32 matrix [out, in] (float64 if the scale is), without the low-rank term."""
    scale_OG = w.scale.T[: w.shape[0]].to(torch.promote_types(w.scale.dtype, torch.float32))
    matrix_OI = values(w) * scale_OG.repeat_interleave(w.group or w.shape[1], 1)[:, : w.shape[1]]
    if w.order is None:
        return matrix_OI
    return torch.empty_like(matrix_OI).index_copy_(1, w.order.long(), matrix_OI)


def values(w: Packed) -> Tensor:
    """The values that the codes stand for, float32 [out, in], before scale and order."""
    outputs, inputs = w.shape
    codes_RI = formats.unpack_words(w.words, 2 if w.form == "int3" else BITS[w.form])
    if w.high is not None:
        codes_RI = codes_RI | formats.unpack_words(w.high, 1) << 2
    codes_OI = codes_RI[:outputs, :inputs]
    if w.form in FLOATS:
        return codes_OI.to(torch.uint8).view(FLOATS[w.form]).float()
    if not w.form.startswith("int"):
        entries = torch.tensor(E2M1, device=w.words.device) if w.book is None else w.book[-ENTRIES:].view(torch.float32)
        return entries[codes_OI.long()]
    if w.form == "int8":
        codes_OI = codes_OI ^ 128
    if w.zero is None:
        return codes_OI.float() - 2.0 ** (BITS[w.form] - 1)
    return codes_OI.float() - w.zero.T[:outputs].float().repeat_interleave(w.group or inputs, 1)[:, :inputs]


# -- the op ----------------------------------------------------------------------------------------


def check(x: Tensor, w: Packed, bias: Tensor | None) -> None:
    """Check the arguments of a product. Raises ValueError or TypeError that names the argument."""
    op, (out, inputs) = "wq_linear", w.shape
    if problem := unsupported(w.form, inputs, w.group):
        raise ValueError(f"{op}: {problem}")
    rows, places, blocks = formats.padded(out, formats.ROWS), places_of(w.group), -(-inputs // width_of(w))
    groups = (-(-inputs // w.group) if w.group else 1, rows)
    given.floats(f"{op}: x", x)
    given.expect(f"{op}: words", w.words, x, (blocks * (2 if w.form == "int3" else 1), rows, places), torch.int16)
    given.expect(f"{op}: scale", w.scale, x, groups, None)
    only(op, "high", w.high, w.form == "int3", True)
    only(op, "zero", w.zero, w.form.startswith("int"), False)
    only(op, "book", w.book, w.form == "book", True)
    optional: dict[str, tuple[Tensor | None, tuple[int, ...], torch.dtype | None]] = {
        "high": (w.high, (blocks, rows, places), torch.int16),
        "zero": (w.zero, groups, torch.uint8 if w.zero is not None and w.zero.dtype == torch.uint8 else None),
        "book": (w.book, (BOOK,), torch.int32),
        "order": (w.order, (inputs,), torch.int32),
        "bias": (bias, (out,), None),
    }
    for name, (tensor, shape, dtype) in optional.items():
        if tensor is not None:
            given.expect(f"{op}: {name}", tensor, x, shape, dtype)
    low_rank.check(op, x, w.u, w.v, out)


def only(op: str, name: str, tensor: Tensor | None, allowed: bool, needed: bool) -> None:
    """Raise ValueError for a tensor that the form of the weight does not use, or that it needs and lacks."""
    if tensor is not None and not allowed:
        raise ValueError(f"{op}: {name} does not go with this form of weight")
    if tensor is None and allowed and needed:
        raise ValueError(f"{op}: {name} is missing for this form of weight")


def linear(w: Packed, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ W.T + bias` for x [..., in]; differentiable in x, scale, u, v and bias."""
    return torch.as_tensor(
        wq_linear(x, w.words, w.high, w.scale, w.zero, w.book, w.order, w.u, w.v, bias, w.form, w.group, w.shape[0])
    )


SCHEMA = (
    "(Tensor x, Tensor words, Tensor? high, Tensor scale, Tensor? zero, Tensor? book, Tensor? order, Tensor? u, "
    "Tensor? v, Tensor? bias, str form, int group, int out) -> Tensor"
)


NAMES = tuple(argument.split()[1] for argument in SCHEMA[1 : SCHEMA.index(")")].split(", "))


def taken(x: Tensor, rest: tuple[Any, ...]) -> tuple[Packed, Tensor | None]:
    """The weight and the bias from an op's arguments, checked."""
    words, high, scale, zero, book, order, u, v, bias, form, group, out = rest
    w = Packed(words, high, scale, zero, book, order, u, v, form, group, (out, x.shape[-1]))
    check(x, w, bias)
    return w, bias


@torch.library.custom_op("compress::wq_linear", mutates_args=(), device_types="cpu", schema=SCHEMA)
def wq_linear(x: Tensor, *rest: Any) -> Tensor:
    """`x @ W.T + bias` for x [..., in] and the tensors of a `Packed`, in the order of its fields."""
    w, bias = taken(x, rest)
    y = F.linear(x, reference(w).to(x.dtype), None if bias is None else bias.to(x.dtype))
    return y if w.u is None or w.v is None else y + low_rank.term(x, w.u, w.v)


@wq_linear.register_kernel("cuda")
def _(x: Tensor, *rest: Any) -> Tensor:
    from compress_kernels.gpu import wq

    w, bias = taken(x, rest)
    return wq.linear(x.reshape(-1, x.shape[-1]).contiguous(), w, bias).view(*x.shape[:-1], w.shape[0])


@wq_linear.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], rest[-1])


def dense(w: Packed, dtype: torch.dtype) -> Tensor:
    """The matrix [out, in] without the low-rank term, rounded once to `dtype`; on a GPU in one launch."""
    tensors = (w.words, w.high, w.scale, w.zero, w.book, w.order)
    return torch.as_tensor(wq_dense(*tensors, w.form, w.group, *w.shape, dtype))


@torch.library.custom_op(
    "compress::wq_dense",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor words, Tensor? high, Tensor scale, Tensor? zero, Tensor? book, Tensor? order, str form, int group, "
    "int out, int inputs, ScalarType dtype) -> Tensor",
)
def wq_dense(*given: Any) -> Tensor:
    """The matrix [out, in] that the tensors of a `Packed` encode."""
    w, dtype = decodable(given)
    return reference(w).to(dtype)


@wq_dense.register_kernel("cuda")
def _(*given: Any) -> Tensor:
    from compress_kernels.gpu import wq

    return wq.dense(*decodable(given))


@wq_dense.register_fake
def _(words: Tensor, *rest: Any) -> Tensor:
    return words.new_empty(rest[-3], rest[-2], dtype=rest[-1])


def decodable(arguments: tuple[Any, ...]) -> tuple[Packed, torch.dtype]:
    """The weight from an op's arguments, checked, and the dtype that is asked for."""
    words, high, scale, zero, book, order, form, group, out, inputs, dtype = arguments
    if dtype not in given.HALVES and words.device.type != "cpu":
        raise TypeError(f"wq_dense: dtype is {dtype}; GPU kernels give float16 and bfloat16")
    w = Packed(words, high, scale, zero, book, order, None, None, form, group, (out, inputs))
    check(scale.new_empty(0, inputs, dtype=dtype), w, None)
    return w, dtype


# -- gradients -------------------------------------------------------------------------------------


def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save what the gradients need."""
    *tensors, bias, ctx.form, ctx.group, ctx.out = inputs
    ctx.save_for_backward(*tensors)
    ctx.of_bias = None if bias is None else bias.dtype


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of x, scale, u, v and bias; codes, zero points and books are constant."""
    x, words, high, scale, zero, book, order, u, v = ctx.saved_tensors
    w = Packed(words, high, scale, zero, book, order, u, v, ctx.form, ctx.group, (ctx.out, x.shape[-1]))
    asked = dict(zip(NAMES, ctx.needs_input_grad, strict=True))
    x_MI, grad_MO = x.reshape(-1, x.shape[-1]), grad.reshape(-1, ctx.out)
    of_x = grad @ dense(w, x.dtype) if asked["x"] else None
    of_scale = scale_gradient(w, x_MI, grad_MO) if asked["scale"] else None
    more, of_u, of_v = low_rank.gradients(x, u, v, grad, (asked["u"], asked["v"]))
    of_x = of_x if of_x is None or more is None else of_x + more
    of_bias = grad_MO.sum(0).to(ctx.of_bias) if asked["bias"] else None
    return (of_x, None, None, of_scale, None, None, None, of_u, of_v, of_bias, None, None, None)


def scale_gradient(w: Packed, x_MI: Tensor, grad_MO: Tensor) -> Tensor:
    """The gradient of the scale of every group, [G, R]: that of the matrix times the values of the codes, summed.

    Materializes whole matrices.
    """
    wide = torch.promote_types(x_MI.dtype, torch.float32)
    ordered_MI = x_MI if w.order is None else x_MI[:, w.order.long()]
    product_OI = grad_MO.to(wide).T @ ordered_MI.to(wide) * values(w)
    group = w.group or w.shape[1]
    whole_OI = F.pad(product_OI, (0, formats.padded(w.shape[1], group) - w.shape[1]))
    return formats.pack_groups(whole_OI.unflatten(1, (-1, group)).sum(-1)).to(w.scale.dtype)


wq_linear.register_autograd(backward, setup_context=keep)
