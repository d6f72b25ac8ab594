"""The low-rank term of a product: y += U (V x). `V x` is one small product; `gpu.gemm.add_low_rank` adds U times it.

Ranks are padded with zeros to a multiple of STEP, the least depth that a tensor core multiplies. For ranks above MOST,
a separate product is faster than adding the term at the end of another kernel.
Shape suffixes: M rows of x, O out, I in, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from compress_kernels import formats, given

STEP = 16
MOST = 128


def pack(u_OR: Tensor, v_RI: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors, contiguous and with padded rank. Raises ValueError if the ranks differ, are 0 or exceed `MOST`."""
    rank = u_OR.shape[1]
    if rank != v_RI.shape[0] or not 1 <= rank <= MOST:
        raise ValueError(
            f"low-rank factors {tuple(u_OR.shape)} and {tuple(v_RI.shape)} must share one rank from 1 to {MOST}"
        )
    more = formats.padded(rank, STEP) - rank
    return F.pad(u_OR, (0, more)).contiguous(), F.pad(v_RI, (0, 0, 0, more)).contiguous()


def check(op: str, x: Tensor, u: Tensor | None, v: Tensor | None, out: int) -> None:
    """Raise ValueError, naming the argument, for factors that do not fit x and the number of outputs."""
    if (u is None) != (v is None):
        raise ValueError(f"{op}: u and v must be given together; one is None")
    if u is None or v is None:
        return
    rank = u.shape[-1]
    if rank % STEP or not STEP <= rank <= MOST:
        raise ValueError(f"{op}: u has rank {rank}; it must be a multiple of {STEP} up to {MOST}")
    given.expect(f"{op}: u", u, x, (out, rank), None)
    given.expect(f"{op}: v", v, x, (rank, x.shape[-1]), None)


def inner(x: Tensor, v_RI: Tensor) -> Tensor:
    """`V x` for every row of x, in the dtype of x, as `gpu.gemm.add_low_rank` needs it."""
    return F.linear(x, v_RI.to(x.dtype))


def term(x: Tensor, u_OR: Tensor, v_RI: Tensor) -> Tensor:
    """The specification: `U (V x)` for every row of x."""
    return F.linear(inner(x, v_RI), u_OR.to(x.dtype))


def gradients(
    x: Tensor, u: Tensor | None, v: Tensor | None, dy: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, U and V through the term; those of U and V only if wanted. All None without a term."""
    if u is None or v is None:
        return None, None, None
    dt = dy @ u.to(dy.dtype)
    du = (rows(dy).T @ rows(inner(x, v))).to(u.dtype) if wanted[0] else None
    dv = (rows(dt).T @ rows(x)).to(v.dtype) if wanted[1] else None
    return dt @ v.to(dy.dtype), du, dv


def rows(x: Tensor) -> Tensor:
    """x [..., n] as a matrix of rows; a vector becomes one row."""
    return x.reshape(-1, x.shape[-1])
