"""The best low-rank part of a slowly changing matrix, by subspace iteration warm-started from the previous subspace.

It starts with one exact decomposition; each update then costs two thin products and a small eigenproblem. A random
start is not good enough: after 80 iterations of `oats` the residual is then 2 % larger for a matrix of the built-in
model and 5 % larger for a synthetic one. Shape suffixes: O out, I in, K directions followed.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXTRA = 8  # directions tracked beyond the rank


class Subspace:
    """The leading right singular directions of a slowly changing matrix [out, in], a few more than the rank."""

    def __init__(self, w_OI: Tensor, rank: int) -> None:
        self.rank = rank
        self.right_IK = right_vectors(w_OI, min(rank + EXTRA, *w_OI.shape))

    def follow(self, w_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Orthonormal U [out, rank] and Uᵀ W [rank, in], nearly the leading ones of W; one step from those of the last.

        The residual is no larger than with the previous factors: their rows span the leading previous directions V, the
        best matrix with those rows is W V Vᵀ, and its columns lie in the space searched here. Costs 4
        out x in x (rank + 8) operations.
        Source: Halko, Martinsson and Tropp, SIAM Review 2011, algorithm 4.4 with one step, started from the previous
        result.
        """
        basis_OK = torch.linalg.qr(w_OI @ self.right_IK).Q
        inside_KI = basis_OK.T @ w_OI
        turn_KK = torch.linalg.eigh(inside_KI @ inside_KI.T).eigenvectors.flip(1)
        rotated_KI = turn_KK.T @ inside_KI
        self.right_IK = rotated_KI.T / torch.linalg.vector_norm(rotated_KI, dim=1).clamp(min=1e-30)
        return basis_OK @ turn_KK[:, : self.rank], rotated_KI[: self.rank]


def right_vectors(w_OI: Tensor, count: int) -> Tensor:
    """Orthonormal input directions [in, count] that W enlarges most, from an eigenproblem of its shorter side."""
    if w_OI.shape[1] <= w_OI.shape[0]:
        inner_II: Tensor = torch.linalg.eigh(w_OI.T @ w_OI).eigenvectors
        return inner_II.flip(1)[:, :count]
    left_OK = torch.linalg.eigh(w_OI @ w_OI.T).eigenvectors.flip(1)[:, :count]
    right_IK: Tensor = torch.linalg.qr(w_OI.T @ left_OK).Q
    return right_IK
