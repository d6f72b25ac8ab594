"""What the input of a linear map may be rounded to on its way in: one scale a token, found when it comes.

Source: Xiao et al., SmoothQuant, ICML 2023, dynamic per-token activations; e4m3 by the OCP 8-bit floating point
specification. Not a weight, so not in the tree: it is kept beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

INPUTS = ("int8", "fp8")
FLOOR = 1e-5  # of the largest entry of a token, so that a token of zeros has a scale
LEVELS = 127.0
E4M3 = 448.0


def rounded_inputs(x: Tensor, kind: str) -> Tensor:
    """x [..., in] with each token on the grid of `kind`, in its dtype; float32 arithmetic."""
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True).clamp(min=FLOOR)
    if kind == "int8":
        scale = largest / LEVELS
        return (wide / scale).round_().mul_(scale).to(x.dtype)
    if kind == "fp8":
        scale = largest / E4M3
        return (wide / scale).clamp_(-E4M3, E4M3).to(torch.float8_e4m3fn).float().mul_(scale).to(x.dtype)
    raise ValueError(f"inputs {kind!r} are unknown; allowed: {', '.join(INPUTS)}")
