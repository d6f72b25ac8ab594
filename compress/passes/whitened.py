"""The best low-rank matrix for a given input, and when its factors are worth their bits.

Shape suffixes: O out, I in, R rank.
"""

from __future__ import annotations

from math import floor, log

import torch
from torch import Tensor

from compress.passes.hessian import damp

DAMPING = 1e-6  # of the factor of a Gram that is not of full rank, where there are more outputs than inputs


def output_basis(w_OI: Tensor, gram_II: Tensor, rank: int) -> Tensor:
    """Orthonormal U [out, R]; of all matrices of that rank U Uᵀ W is the one of least tr((W - A) G (W - A)ᵀ).

    The eigenvectors of W G Wᵀ, found by those of the smaller Cᵀ Wᵀ W C with G = C Cᵀ if there are more outputs than
    inputs; the rank is at most the smaller of the two. With G = 1 this is the plain singular value decomposition.
    Source: Wang et al., SVD-LLM, ICLR 2025, theorem 1, without its inverse: S S^-1 cancels in U Uᵀ W.
    """
    if w_OI.shape[0] <= w_OI.shape[1]:
        basis_OO: Tensor = torch.linalg.eigh(w_OI @ gram_II @ w_OI.T).eigenvectors
        return basis_OO[:, -rank:].flip(1)
    root_OI = w_OI @ torch.linalg.cholesky(damp(gram_II, DAMPING))
    basis_II = torch.linalg.eigh(root_OI.T @ root_OI).eigenvectors
    basis_OR: Tensor = torch.linalg.qr(root_OI @ basis_II[:, -rank:].flip(1)).Q
    return basis_OR


def rank_within(share: float, shape: tuple[int, int]) -> int:
    """The largest rank whose two factors hold at most `share` of the parameters of a matrix [out, in]."""
    rows, columns = shape
    return floor(share * rows * columns / (rows + columns) + 1e-9)


def bits_saved(was_OI: Tensor, left_OI: Tensor) -> float:
    """Bits a weight by which codes of what is left may be shorter for the same output error, log4(|W|² / |R|²).

    With error feedback that error grows with the square of the step and the conditional variances of the inputs; only
    the step depends on what is coded.
    """
    least = torch.finfo(torch.float32).tiny
    return log(max(float(was_OI.square().sum()), least) / max(float(left_OI.square().sum()), least), 4)
