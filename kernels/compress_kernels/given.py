"""Checks of an op's arguments before a launch; each error is one line that names the argument and what is allowed."""

from __future__ import annotations

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)  # the dtypes that the kernels multiply on tensor cores


def floats(name: str, x: Tensor) -> None:
    """Raise TypeError for an x [..., in] that the kernels do not support; the CPU takes any float."""
    if x.ndim == 0 or not x.is_floating_point():
        raise TypeError(f"{name} is {described(x)}; it must be floats [..., in]")
    if x.device.type != "cpu" and x.dtype not in HALVES:
        raise TypeError(f"{name} is {x.dtype}; GPU kernels take float16 and bfloat16")


def expect(name: str, got: Tensor, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    """Raise ValueError unless a tensor has this shape and dtype (None: any float), is on x's device and contiguous."""
    kind = "floats" if dtype is None else str(dtype)
    fits = got.is_floating_point() if dtype is None else got.dtype == dtype
    if tuple(got.shape) != shape or not fits:
        raise ValueError(f"{name} is {described(got)}; it must be {kind} of shape {shape}")
    if got.device != x.device:
        raise ValueError(f"{name} is on {got.device}, x on {x.device}")
    if not got.is_contiguous():
        raise ValueError(f"{name} is not contiguous")


def described(tensor: Tensor) -> str:
    """A tensor's dtype and shape as text."""
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"
