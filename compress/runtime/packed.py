"""Weights that stay packed on a GPU: the op of `compress_kernels` that computes an expression, or why none does.

The supported expressions are the cases of one `match`; the rules of `lower.py` decode all others. A form that the
roofline model predicts to be slower than the decoded matrix is used only with `low_memory`. CPU forms are in
`lower.py`; whether an op reads the packed form or decodes it for many rows of x is decided in the op.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.runtime.maps import Linear, Packed, Transformed
from compress.weights import Codebook, Dense, Diagonal, Hadamard, Masked, Permutation, Product, Quantized, Sum, Weight
from compress.weights import Scaled as Floats
from compress_kernels import bitmap, dispatch, nm, w8a8, wq
from compress_kernels.given import HALVES

FLOAT8 = (8, 9)  # the least compute capability that multiplies float8
Form = wq.Packed | nm.Packed | bitmap.Packed | w8a8.Packed
LINEAR: dict[type[Any], Linear] = {
    wq.Packed: wq.linear, nm.Packed: nm.linear, bitmap.Packed: bitmap.linear, w8a8.Packed: w8a8.linear
}  # fmt: skip
WITH_LOW_RANK: dict[type[Any], Callable[[Any, Tensor, Tensor], Form]] = {
    wq.Packed: wq.with_low_rank, nm.Packed: nm.with_low_rank, bitmap.Packed: bitmap.with_low_rank
}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """The packed form of an expression, or the reason why there is none."""

    form: Form | None = None
    problem: str = ""


def packed(weight: Weight, dtype: torch.dtype, *, lean: bool = False) -> nn.Module | None:
    """The module that computes with a packed weight for x of `dtype`, or None if the weight has to be decoded.

    `lean` also accepts forms that are expected to be slower than the decoded matrix, to save memory.
    """
    match weight:
        case Product(left, Hadamard() | Diagonal() as transform):
            then = packed(left, dtype, lean=lean)
            return None if then is None else Transformed(transform, then)
        case _:
            form = way(weight, dtype, lean=lean).form
            if form is not None:
                return Packed(form, LINEAR[type(form)], weight.describe())
            if isinstance(weight, Product) and isinstance(weight.right, Permutation):
                then = packed(weight.left, dtype, lean=lean)
                return None if then is None else Transformed(weight.right, then)
            return None


def way(weight: Weight, dtype: torch.dtype, *, lean: bool = False) -> Way:
    """The packed form of an expression for x of `dtype`, or the reason why there is none."""
    if dtype not in HALVES:
        return Way(problem=f"x is {dtype}; tensor cores take float16 and bfloat16")
    try:
        form = form_of(weight, dtype)
    except ValueError as error:
        return Way(problem=str(error))
    expected = prediction(form)
    if expected.speedup < 1 and not lean:
        share = f"{expected.speedup:.2f} times as fast as the decoded matrix"
        return Way(problem=f"{weight.describe()} is expected to be {share}; low memory keeps it packed")
    return Way(form)


def form_of(weight: Weight, dtype: torch.dtype) -> Form:
    """The packed form; raises ValueError with the reason if no kernel takes the weight."""
    match weight:
        case Quantized(codes, scale, zero, bits):
            return wq.pack(codes, scale, bits, zero)
        case Floats(data, scale, rows, columns):
            return wq.pack_floats(data, scale, (rows, columns))
        case Codebook(codes, book, scale) if book.shape[1] == 1:
            return wq.pack_book(codes, book, scale.dense())
        case Masked(values, mask_OI, pattern):
            return sparse(values, mask_OI, n_of_m(pattern), dtype)
        case Product(left, Permutation(order)) if not isinstance(left, (Masked, Sum)):
            inner = form_of(left, dtype)
            if isinstance(inner, wq.Packed):
                return wq.with_order(inner, order)
        case Sum(terms):
            return summed(terms, dtype)
    raise ValueError(f"there is no kernel for {weight.describe()}")


def n_of_m(pattern: str) -> tuple[int, int] | None:
    """(n, m) if the pattern of a mask is n:m, else None."""
    found = re.fullmatch(r"(\d+):(\d+)", pattern.partition("@")[0])
    return None if found is None else (int(found[1]), int(found[2]))


def sparse(values: Weight, mask_OI: Tensor, ratio: tuple[int, int] | None, dtype: torch.dtype) -> Form:
    """The packed form of a masked weight, pruned n:m or, if `ratio` is None, anywhere; raises ValueError if none."""
    match values, ratio:
        case Dense(data), None:
            return bitmap.pack(data.to(dtype), mask_OI)
        case Dense(data), (n, m):
            return nm.pack(data.to(dtype), mask_OI, n, m)
        case Quantized(codes, scale, zero, bits), (n, m) if bits <= 4 or bits == 8:
            if zero is None and bits < 4:
                zero = torch.full_like(scale, 2 ** (bits - 1))
            each = scale.expand(len(codes), -1)
            zeros = None if zero is None else zero.expand(len(codes), -1)
            return nm.pack_codes(codes, each, zeros, max(bits, 4), mask_OI, n, m)
        case Floats(data, rows=1), (n, m):
            return nm.pack_float8(data, whole(values), mask_OI, n, m)
    where = "pruned anywhere" if ratio is None else "pruned n:m"
    raise ValueError(f"there is no kernel for {values.describe()} {where}")


def whole(values: Weight) -> Tensor:
    """The scales of groups of inputs; raises ValueError if the last group is partial, which no kernel supports."""
    if not isinstance(values, Floats) or (values.scale.shape[1] > 1 and values.shape[1] % values.columns):
        raise ValueError(f"there is no kernel for tiles that do not divide {values.shape[1]} inputs")
    return values.scale


def summed(terms: Sequence[Weight], dtype: torch.dtype) -> Form:
    """The packed form of one term plus low-rank terms, whose factors are concatenated; raises ValueError if none."""
    thin = [term for term in terms if isinstance(term, Product) and term.left.shape[1] < min(term.shape)]
    others = [term for term in terms if not any(term is each for each in thin)]
    if len(others) != 1 or not thin:
        raise ValueError(f"there is no kernel for {Sum(tuple(terms)).describe()}")
    form = form_of(others[0], dtype)
    add = WITH_LOW_RANK.get(type(form))
    if add is None:
        raise ValueError(f"there is no kernel for {Sum(tuple(terms)).describe()}")
    u_OR = torch.cat([term.left.dense().to(dtype) for term in thin], 1)
    v_RI = torch.cat([term.right.dense().to(dtype) for term in thin], 0)
    return add(form, u_OR, v_RI)


def rounded(weight: Weight, inputs: str) -> nn.Module | None:
    """The module that rounds x to `inputs` and multiplies 8-bit by 8-bit numbers, or None if no kernel does.

    A transform of the input is applied first, in float32, as in `rounded_for`.
    """
    match weight:
        case Product(left, Hadamard() | Diagonal() as transform):
            then = rounded(left, inputs)
            return None if not isinstance(then, Packed) else Transformed(transform, then, wide=True)
        case _:
            try:
                form = eight(weight, inputs)
            except ValueError:
                return None
            return Packed(form, w8a8.linear, f"{weight.describe()}, inputs {inputs}")


def eight(weight: Weight, inputs: str) -> w8a8.Packed:
    """The packed 8-bit codes and their scales; raises ValueError if no kernel multiplies them by such inputs."""
    match weight:
        case Quantized(codes, scale, None, bits) if inputs == "int8" and bits <= 8:
            return w8a8.pack((codes.short() - 2 ** (bits - 1)).to(torch.int8), scale)
        case Masked(Quantized(codes, scale, None, bits), mask_OI):
            return eight(Quantized(codes.where(mask_OI, 2 ** (bits - 1)), scale, None, bits), inputs)
        case Floats(data, rows=1) if inputs == "fp8" and data.dtype == torch.float8_e4m3fn:
            if data.is_cuda and torch.cuda.get_device_capability(data.device) < FLOAT8:
                raise ValueError(f"products of float8 need a GPU of capability {FLOAT8}")
            return w8a8.pack(data, whole(weight))
    raise ValueError(f"no kernel multiplies {inputs} inputs by {weight.describe()}")


def prediction(form: Form, rows: int = 1, path: str = "") -> dispatch.Choice:
    """The roofline's prediction for a form on its GPU, for the given path or, without one, for the faster path."""
    weights = form.shape[0] * form.shape[1]
    return dispatch.predict(dispatch.format_of(form, weights), rows, weights, dispatch.here(device_of(form)), path)


def device_of(form: Form) -> torch.device:
    """The device that holds a form."""
    return next(value.device for value in vars(form).values() if isinstance(value, Tensor))


def said(form: Form, rows: int) -> str:
    """Which path a form takes for this many rows of x, how fast it is against dense, and whether that was measured."""
    measured = dispatch.tuned(form.kind, rows, *form.shape, device_of(form))
    if measured is not None:
        way, what = measured["path"], f"measured {measured['speedup']} times as fast as decoding first"
    else:
        expected = prediction(form, rows, dispatch.way(form, rows, device_of(form)))
        way, bound = expected.path, f", bound by {expected.bound}" if expected.path == dispatch.KERNEL else ""
        what = f"expected to be {expected.speedup:.2f} times as fast as a dense matrix{bound} (roofline, not measured)"
    taken = "read by its kernel" if way == dispatch.KERNEL else "decoded to scratch memory and multiplied as dense"
    return f"{taken}: {what}"
