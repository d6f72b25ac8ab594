"""Prepares x for a product in one launch: gather, cast to float16, scaling by powers of two, sums of groups."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from compress_kernels import formats
from compress_kernels.gpu import launch
from compress_kernels.gpu.aot import Case
from compress_kernels.prep import Plan, Prepared

TILE = 1024  # inputs per program, or one unit if that is larger


@triton.jit
def _prep_kernel(
    p_x, p_order, p_out, p_sums, p_factor, M, K, S,
    UNIT: tl.constexpr, UNITS: tl.constexpr, LOW: tl.constexpr, PLACES: tl.constexpr,
    ORDER: tl.constexpr, WRITE: tl.constexpr, SUBNORMAL: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Programs: tiles of UNITS x UNIT inputs, rows of x.

    PLACES inputs share a plane; its place in a word is LOW bits above that of the plane before, modulo 8.
    """
    i_m = tl.program_id(1)
    o_u = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    o_k = o_u[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
    o_from = tl.load(p_order + o_k, mask=o_k < K, other=0) if ORDER else o_k
    b_x = tl.load(p_x + i_m * K + o_from, mask=o_k < K, other=0.0).to(tl.float32)
    if SUBNORMAL:
        b_top = tl.zeros((2048,), tl.float32)
        for k in range(0, K, 2048):
            o_r = k + tl.arange(0, 2048)
            b_top = tl.maximum(b_top, tl.abs(tl.load(p_x + i_m * K + o_r, mask=o_r < K, other=0.0).to(tl.float32)))
        exponent = tl.max(b_top, axis=0).to(tl.int32, bitcast=True) >> 23  # with the bias of float32, 127
        exponent = tl.minimum(tl.maximum(exponent, 40), 254)
        up = ((268 - exponent) << 23).to(tl.float32, bitcast=True)  # brings the largest into [2**14, 2**15)
        if tl.program_id(0) == 0:
            tl.store(p_factor + i_m, ((exponent - 14) << 23).to(tl.float32, bitcast=True))
        place = (o_k // PLACES) * LOW % 8
        down = ((127 - place) << 23).to(tl.float32, bitcast=True)
        back = ((127 - 24 + place) << 23).to(tl.float32, bitcast=True)  # in units of the products with codes
        b_out = (b_x * up * down).to(tl.float16)
        b_x = b_out.to(tl.float32) * back
    else:
        b_out = b_x.to(p_out.dtype.element_ty)
    if WRITE:
        tl.store(p_out + i_m * S + o_k, b_out, mask=o_k < S)
    if SUMS:
        tl.store(p_sums + o_u * M + i_m, tl.sum(b_x, axis=1), mask=o_u * UNIT < K)


def prepare(x_MI: Tensor, plan: Plan, order: Tensor | None) -> Prepared:
    """The result of `compress_kernels.prep.reference`, in one launch."""
    m, k = x_MI.shape
    stride = formats.padded(k, plan.block) if plan.writes else k
    out = x_MI.new_empty(m, stride, dtype=plan.dtype(x_MI)) if plan.writes else x_MI
    sums = x_MI.new_empty((-(-k // plan.unit), m) if plan.sums else 1, dtype=x_MI.float().dtype)
    factor = x_MI.new_empty(m if plan.subnormal else 1, dtype=sums.dtype)
    units = max(1, TILE // plan.unit)
    launch.run(
        _prep_kernel, (-(-stride // (units * plan.unit)), m),
        x_MI, x_MI if order is None else order, out, sums, factor, m, k, stride,
        UNIT=plan.unit, UNITS=units, LOW=plan.low, PLACES=plan.places,
        ORDER=order is not None, WRITE=plan.writes, SUBNORMAL=plan.subnormal, SUMS=plan.sums,
    )  # fmt: skip
    return Prepared(out, sums, factor)


def case(kind: str, *, subnormal: bool) -> Case:
    """One configuration to compile: sums only, or with `subnormal` everything."""
    return Case(
        name=f"prep {kind}" + " subnormal" * subnormal,
        kernel=_prep_kernel,
        types={"p_x": f"*{kind}", "p_out": "*fp16" if subnormal else f"*{kind}", "p_order": "*i32", "p_sums": "*fp32",
               "p_factor": "*fp32"} | dict.fromkeys("MKS", "i32"),
        constants={"UNIT": 128, "UNITS": 8, "LOW": 4, "PLACES": 32, "ORDER": subnormal, "WRITE": subnormal,
                   "SUBNORMAL": subnormal, "SUMS": True},
    )  # fmt: skip


CASES = [case("bf16", subnormal=False), case("bf16", subnormal=True)]
