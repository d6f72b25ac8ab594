"""Patches Triton's interpreter (3.6 to 3.9) to behave like a GPU; it is silently wrong for bfloat16 and float8.

The following are patched; each was seen to be wrong in 3.6 and 3.9 with numpy 2.4: loops over a bound that is given at
run time (TypeError); products, sums and casts of bfloat16 (computed on the bits as integers, casts truncated); casts to
float8 e4m3 (wrong by up to 64, where a GPU rounds to nearest and saturates); autotuning (asks for a driver);
comparisons of scalars, which count as int32 inside a mask (3.9: ValueError). `install` can be removed when
`test_interpreter.py` passes without it.
All tests of this folder were run with 3.6.0, which is pinned, and on 2026-11-26 with 3.9.0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import autotuner, interpreter

BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
COMPARE = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)
FLOAT8 = {tl.float8e4nv: (torch.float8_e4m3fn, 448.0), tl.float8e5: (torch.float8_e5m2, 57344.0)}
PLACES = (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base)  # what a launch patches
Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle


def widened(bits: Any) -> Any:
    """bfloat16 bits as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(values: Any) -> Any:
    """float32 rounded to the nearest bfloat16, ties to even, as bits; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def is_bf16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def values_of(handle: Any) -> Any:
    return widened(handle.data) if is_bf16(handle) else handle.data


def install() -> None:
    """Patch the interpreter of this process, once."""
    if getattr(Builder, "mended", False):
        return
    Builder.mended = True
    mend_scalars()
    mend_products()
    mend_casts()
    hasten()
    autotuner.Autotuner.do_bench = property(lambda _: lambda call, quantiles=None: (call(), [0.0] * 3)[1])


def hasten() -> None:
    """Speed up launches, so that they take half of the time.

    `tl` is searched only once for what a launch patches, and nothing is patched twice. Integer overflow is not computed
    unless `debug` is set, because it is not used otherwise.
    """
    builder, patch = interpreter.interpreter_builder, interpreter._patch_builtin
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)
    members = interpreter.inspect.getmembers
    found = {place: [(n, m) for n, m in members(place) if tl.core.is_builtin(m)] for place in PLACES}

    def patched(place: Any, builder: Any, scope: Any) -> None:
        if place not in found:
            patch(place, builder, scope)
        for name, member in found.get(place, ()):
            if getattr(place, name) is member:
                interpreter._patch_attr(place, name, member, builder, scope)

    interpreter._patch_builtin = patched


def mend_scalars() -> None:
    """Convert one-element arrays to int where needed, because numpy 2.4 no longer does so implicitly."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))

    interpreter._patch_lang_tensor = patched


def mend_products() -> None:
    """Patch products, fused multiply-adds, sums and signs of bfloat16, and all comparisons."""
    dot, binary, fma = Builder.create_dot, Builder.binary_op, Builder.create_fma
    fneg = getattr(Builder, "create_fneg", None)  # since 3.9
    total = interpreter.ReduceOps.sum

    def mended_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if is_bf16(a) or is_bf16(b):
            return Handle(np.matmul(values_of(a), values_of(b)) + d.data, d.dtype.scalar)
        return dot(self, a, b, d, *rest)

    def mended_binary(self: Any, left: Any, right: Any, op: Any) -> Any:
        if is_bf16(left) and op not in BITWISE:
            result = op(values_of(left), values_of(right))
            return Handle(result, tl.int1) if op in COMPARE else Handle(narrowed(result), tl.bfloat16)
        result = binary(self, left, right, op)
        return Handle(result.data, tl.int1) if op in COMPARE else result

    def mended_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if is_bf16(x):
            exact = values_of(x).astype(np.float64) * values_of(y) + values_of(z)
            return Handle(narrowed(exact.astype(np.float32)), tl.bfloat16)
        return fma(self, x, y, z)

    def mended_fneg(self: Any, x: Any) -> Any:
        return Handle(x.data ^ np.uint16(0x8000), tl.bfloat16) if is_bf16(x) else fneg(self, x)

    def refusing_sum(self: Any, x: Any) -> Any:
        if x.dtype.scalar == tl.bfloat16:
            raise TypeError("tl.sum of bfloat16 is not what a GPU computes: make it float32 first")
        return total(self, x)

    Builder.create_dot, Builder.binary_op, Builder.create_fma = mended_dot, mended_binary, mended_fma
    interpreter.ReduceOps.sum = refusing_sum
    if fneg is not None:
        Builder.create_fneg = mended_fneg


def mend_casts() -> None:
    """Patch casts from and to bfloat16, and to float8."""
    cast, convert = Builder.cast_impl, Builder.create_fp_to_fp

    def mended_cast(self: Any, source: Any, to: Any) -> Any:
        if to.scalar == tl.bfloat16 and not is_bf16(source):
            return Handle(narrowed(source.data.astype(np.float32)), to.scalar)
        if is_bf16(source) and to.scalar != tl.bfloat16:
            return Handle(widened(source.data).astype(interpreter._get_np_dtype(to)), to.scalar)
        return cast(self, source, to)

    def mended_convert(self: Any, source: Any, to: Any, mode: Any) -> Any:
        if to.scalar in FLOAT8 and source.dtype.scalar not in FLOAT8:
            dtype, largest = FLOAT8[to.scalar]
            values = torch.from_numpy(np.ascontiguousarray(values_of(source)).astype(np.float32))
            return Handle(values.clamp(-largest, largest).to(dtype).view(torch.uint8).numpy(), to.scalar)
        if to.scalar == tl.bfloat16 and source.dtype.scalar not in FLOAT8:
            return Handle(narrowed(values_of(source).astype(np.float32)), to.scalar)
        return convert(self, source, to, mode)

    Builder.cast_impl, Builder.create_fp_to_fp = mended_cast, mended_convert
