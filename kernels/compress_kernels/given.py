"""Checks of what an op is given, before anything is launched: one line that names the argument and what is allowed."""

from __future__ import annotations

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)  # what the tensor cores take


def floats(name: str, x: Tensor) -> None:
    """Refuse an x [..., in] that a GPU kernel cannot take; the CPU takes every float."""
    if x.ndim == 0 or not x.is_floating_point():
        raise TypeError(f"{name} is {described(x)}; it must be floats [..., in]")
    if x.device.type != "cpu" and x.dtype not in HALVES:
        raise TypeError(f"{name} is {x.dtype}; GPU kernels take float16 and bfloat16")


def expect(name: str, got: Tensor, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    """Refuse a tensor of another shape, dtype (None: any float) or device than x's, or not contiguous."""
    kind = "floats" if dtype is None else str(dtype)
    fits = got.is_floating_point() if dtype is None else got.dtype == dtype
    if tuple(got.shape) != shape or not fits:
        raise ValueError(f"{name} is {described(got)}; it must be {kind} of shape {shape}")
    if got.device != x.device:
        raise ValueError(f"{name} is on {got.device}, x on {x.device}")
    if not got.is_contiguous():
        raise ValueError(f"{name} is not contiguous")


def described(tensor: Tensor) -> str:
    """Its dtype and shape."""
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"
