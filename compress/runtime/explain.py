"""Says in one sentence how a layer computes, and why."""

from __future__ import annotations

import torch
from torch import nn

from compress.errors import RecipeError
from compress.runtime.linear import CompressedLinear
from compress.runtime.lower import lower
from compress.runtime.maps import ByRows, FewRows, IntegerProduct, Matrix, Packed, Parallel, RoundedFirst, Transformed
from compress.runtime.packed import said
from compress.weights import Weight
from compress_kernels import cpu, dispatch
from compress_kernels.tuning import TuningError, known

NAMES = {cpu.Int4: "packed int4", cpu.Int8: "packed int8", cpu.Sparse: "a sparse product that skips zeros"}


def explain(layer: nn.Module | Weight, rows: int, *, dtype: torch.dtype = torch.bfloat16, inputs: str = "") -> str:
    """One sentence on how `layer` computes for `rows` rows of x, and why.

    `layer` is a module of a loaded model, or a weight expression. An expression is first lowered for x of `dtype`,
    rounded to `inputs` if that is given. Raises RecipeError for fewer than one row and for a module that is not
    compressed.
    """
    if rows < 1:
        raise RecipeError(f"rows: {rows} rows of x; give 1 or more")
    if isinstance(layer, Weight):
        return sentence(lower(layer, dtype, inputs), rows)
    if not isinstance(layer, CompressedLinear):
        raise RecipeError(
            f"explain: a {type(layer).__name__} is not compressed; give a compressed layer of a loaded model"
        )
    if layer.lowered is None:
        return "decoded at each call: low memory keeps only the stored bits"
    return sentence(layer.lowered, rows)


def sentence(module: nn.Module, rows: int) -> str:
    """What a lowered module does for x with this many rows."""
    match module:
        case FewRows():
            name, matrix = NAMES[type(module.packed)], f"the decoded {short(module.many.matrix.dtype)} matrix"
            if rows <= module.few:
                return f"{name}: faster up to {module.few} rows, {origin()}; with more rows, {matrix}"
            return f"{matrix}: faster above {module.few} rows, {origin()}; up to {module.few} rows, {name}"
        case Packed():
            return f"packed {module.name}, {said(module.form, rows)}"
        case Transformed():
            return f"{module.transform.describe()} of the input, then {sentence(module.then, rows)}"
        case Matrix():
            missing = dispatch.missing(module.matrix.device) if module.matrix.is_cuda else ""
            return (
                f"the decoded {short(module.matrix.dtype)} matrix: "
                f"{missing or 'nothing packed is faster for this form and size'}"
            )
        case IntegerProduct():
            behind = "" if module.transform is None else ", after a transform of the input"
            return f"int8 inputs times int8 weights{behind}, exact in integers: faster than rounded floats, {origin()}"
        case ByRows():
            if module.chosen(rows) is module.integers:
                return sentence(module.integers, rows)
            return f"{sentence(module.floats, rows)}; at this many rows integers are slower, {origin()}"
        case RoundedFirst():
            return f"inputs rounded to {module.inputs}, then {sentence(module.product, rows)}"
        case nn.Sequential():
            return "factor by factor, which costs less than the whole matrix: " + ", then ".join(
                sentence(p, rows) for p in module
            )
        case Parallel():
            return "term by term, since none is a whole matrix: " + ", plus ".join(
                sentence(part, rows) for part in module.parts
            )
        case _:
            return f"{type(module).__name__}: chosen by a lowering rule for this device"


def origin() -> str:
    """Where the measurement behind a choice was made; raises RecipeError for a damaged tuning profile."""
    try:
        profile = known("cpu")
    except TuningError as error:
        raise RecipeError(str(error)) from error
    if profile is None:
        return "as measured on the CPU of the defaults (`compress tune` measures this one)"
    return f"as `compress tune` measured here on {profile.measured}"


def short(dtype: torch.dtype) -> str:
    """The short name of a dtype, such as `bf16` or `fp32`."""
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")


__all__ = ["explain"]
