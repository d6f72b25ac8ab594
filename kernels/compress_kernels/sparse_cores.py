"""2:4 products for many rows of x on the sparse tensor cores of a GPU, through torch's binding of cuSPARSELt.

They need a second copy of the matrix in the library's own form, 9/16 the size of the dense matrix, which is made only
on request (`nm.with_sparse_cores`). This code has never been run: the calls are those of torch's own
`SparseSemiStructuredTensorCUSPARSELT` (2.13), and whether they are faster has not been measured.
Shape suffixes: M rows of x, O out, I in.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from compress_kernels import given

SIDE = 16  # must divide both sides of the matrix; rows of x are padded to a multiple of STEP
STEP = 8


def unavailable(shape: tuple[int, int], keep: int, of: int, dtype: torch.dtype, device: torch.device) -> str:
    """The reason why a weight cannot use sparse tensor cores; empty if it can."""
    if (keep, of) not in ((2, 4), (1, 4)):
        return f"{keep}:{of}; sparse tensor cores take 2:4, and 1:4 as such"
    if dtype not in given.HALVES:
        return f"{dtype}; here they take float16 and bfloat16"
    if shape[0] % SIDE or shape[1] % SIDE:
        return f"a matrix of {shape}; both sides must be multiples of {SIDE}"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return f"{device}; it must be a GPU of compute capability 8.0 or more"
    if not torch.backends.cusparselt.is_available():
        return "this torch, which was built without cuSPARSELt"
    return ""


def compress(matrix_OI: Tensor) -> Tensor:
    """A 2:4 matrix compressed to the library's form."""
    return torch.as_tensor(torch._cslt_compress(matrix_OI))


def product(x_MI: Tensor, compressed: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ W.T + bias`; rows of x are padded as the library requires."""
    rows = x_MI.shape[0]
    whole = F.pad(x_MI, (0, 0, 0, -rows % STEP))
    bias = None if bias is None else bias.to(x_MI.dtype)
    return torch.as_tensor(torch._cslt_sparse_mm(compressed, whole.t(), bias=bias, transpose_result=True))[:rows]
