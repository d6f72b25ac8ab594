"""Weighted k-means: a codebook fitted to given vectors. Shape suffixes: N vectors, K entries, D dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

SAMPLES = 1 << 16  # vectors that a book is fitted to at most
ROUNDS = 25  # of Lloyd's algorithm; the last ones change little
AT_ONCE = 1024  # vectors compared together
LEAST = 1e-6  # smallest weight, relative to the mean, so that a cluster of inputs that never fire has a mean too


def fit_book(x_ND: Tensor, weight_ND: Tensor, entries: int, seed: int) -> Tensor:
    """A book [K, D], float32, with a small sum of weight (x - nearest entry)², fitted to at most `SAMPLES` vectors.

    It starts from random vectors. An entry that is nearest to no vector moves to one of the vectors with the largest
    error. If there are no more vectors than entries, every vector becomes an entry, and the rest of the book is 0.
    Source: Lloyd, "Least squares quantization in PCM", 1982; weights by entry as in van Baalen et al., GPTVQ, 2024,
    section 3.2 (the paper uses the diagonal of the inverse Hessian; here it is the Gram's).
    """
    chosen_N = torch.randperm(len(x_ND), generator=torch.Generator().manual_seed(seed))[:SAMPLES].to(x_ND.device)
    x_ND, weight_ND = x_ND[chosen_N].float(), weight_ND[chosen_N].float()
    weight_ND = (weight_ND / weight_ND.mean().clamp(min=torch.finfo(torch.float32).tiny)).clamp_(min=LEAST)
    if len(x_ND) <= entries:
        return torch.cat((x_ND, x_ND.new_zeros(entries - len(x_ND), x_ND.shape[1])))
    book_KD, pull_ND = x_ND[:entries].clone(), x_ND * weight_ND
    square_N = (pull_ND * x_ND).sum(1)
    for _ in range(ROUNDS):
        index_N, gain_N = assign(pull_ND, weight_ND, book_KD)
        total_KD = torch.zeros_like(book_KD).index_add_(0, index_N, weight_ND)
        mean_KD = torch.zeros_like(book_KD).index_add_(0, index_N, pull_ND) / total_KD.clamp(min=LEAST)
        empty_K = total_KD[:, 0] == 0
        worst_K = (square_N - 2 * gain_N).topk(int(empty_K.sum())).indices
        mean_KD[empty_K] = x_ND[worst_K]
        book_KD = mean_KD
    return book_KD


def assign(pull_ND: Tensor, weight_ND: Tensor, book_KD: Tensor) -> tuple[Tensor, Tensor]:
    """(index of the entry b with the largest w x·b - w b² / 2, that value), [N] each; `pull_ND` is w x."""
    half_KD = book_KD.square() / 2
    parts = [
        (pull @ book_KD.T).addmm_(weight, half_KD.T, alpha=-1).max(1)
        for pull, weight in zip(pull_ND.split(AT_ONCE), weight_ND.split(AT_ONCE), strict=True)
    ]
    return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])
