"""Slow, obvious implementations, and the fixtures of the specifications that need no download.

Everything is float64 and reads like the formula it stands for. Shape suffixes: O out, I in, T tokens, N any size.
"""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Decimal

import numpy as np
import torch
from torch import Tensor

# -- golden fixtures -------------------------------------------------------------------------------


def golden_weight() -> Tensor:
    """W [4, 16] of pruning.md section 16."""
    r, j = torch.meshgrid(torch.arange(4.0).double(), torch.arange(16.0).double(), indexing="ij")
    return torch.sin(1.7 * (16 * r + j) + 0.3) * (1 + 0.5 * torch.cos(0.37 * j))


def golden_tokens() -> Tensor:
    """X [32, 16] of pruning.md section 16."""
    t, j = torch.meshgrid(torch.arange(32.0).double(), torch.arange(16.0).double(), indexing="ij")
    return torch.cos(0.9 * (16 * t + j) + 0.011 * t * j) * (1 + j % 5) + 0.6 * torch.sin(1.3 * j + 0.2)


def golden_gaussian() -> Tensor:
    """W [256, 4096] of lowrank_quant_delta.md section 0.1, standard normal."""
    return torch.from_numpy(np.random.default_rng(0).standard_normal((256, 4096)))


def golden_correlated() -> tuple[Tensor, Tensor]:
    """(W [256, 256], H [256, 256]) of the GPTQ fixture there: Toeplitz-correlated inputs with log-normal channels."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((256, 256))
    channel = np.exp(rng.standard_normal(256))
    toeplitz = 0.9 ** np.abs(np.subtract.outer(np.arange(256), np.arange(256)))
    x = (rng.standard_normal((4096, 256)) @ np.linalg.cholesky(toeplitz).T) * channel
    return torch.from_numpy(w), torch.from_numpy(2 * x.T @ x / len(x))


# -- measures --------------------------------------------------------------------------------------


def energy(w_OI: Tensor, gram_II: Tensor) -> float:
    """tr(W G Wᵀ)."""
    w, gram = w_OI.double(), gram_II.double()
    return float(torch.trace(w @ gram @ w.T))


def proxy_loss(was_OI: Tensor, now_OI: Tensor, gram_II: Tensor) -> float:
    """tr(D H Dᵀ) / tr(W H Wᵀ) with D = W' - W."""
    return energy(now_OI.double() - was_OI.double(), gram_II) / energy(was_OI, gram_II)


def relative_mse(was: Tensor, now: Tensor) -> float:
    """E (w - w')² / E w²."""
    return float((now.double() - was.double()).square().mean() / was.double().square().mean())


def mask_hex(mask_OI: Tensor) -> list[str]:
    """One hexadecimal number a row, column 0 = most significant bit."""
    return [f"{int(''.join(str(int(kept)) for kept in row), 2):0{len(row) // 4}x}" for row in mask_OI]


# -- pruning ---------------------------------------------------------------------------------------


def drop_lowest(scores: list[float], drop: int) -> list[bool]:
    """Kept or not, by stable rank: of equal scores the one further left goes first."""
    ranked = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    gone = set(ranked[:drop])
    return [i not in gone for i in range(len(scores))]


def dropped(size: int, sparsity: str) -> int:
    """size x sparsity, half to even, on the decimal as written."""
    return int((Decimal(size) * Decimal(sparsity)).quantize(Decimal(1), ROUND_HALF_EVEN))


# -- quantization ----------------------------------------------------------------------------------


def round_to_grid(w_O: Tensor, scale_O: Tensor, zero_O: Tensor, bits: int) -> Tensor:
    """The codes of a column on given grids."""
    return ((w_O / scale_O).round() + zero_O).clamp(0, 2**bits - 1)


def ldlq(w_OI: Tensor, gram_II: Tensor, scale_O: Tensor, zero_O: Tensor, bits: int) -> Tensor:
    """Codes [out, in] by LDLQ with one grid a row: an oracle for GPTQ that never inverts the Gram.

    H = (M + 1) D (M + 1)ᵀ with M strictly upper triangular; column i rounds w_i + (W - Q)_{<i} M_{<i, i}.
    Source: Chee et al., QuIP, NeurIPS 2023, section 3.1.
    """
    w, scale = w_OI.double(), scale_O.double()
    flipped = torch.linalg.cholesky(gram_II.double().flip(0, 1)).flip(0, 1)  # upper R with H = R Rᵀ
    feedback = flipped / flipped.diagonal()
    codes = torch.zeros_like(w)
    rounded = torch.zeros_like(w)
    for i in range(w.shape[1]):
        seen = w[:, i] + (w[:, :i] - rounded[:, :i]) @ feedback[:i, i]
        codes[:, i] = round_to_grid(seen, scale, zero_O.double(), bits)
        rounded[:, i] = scale * (codes[:, i] - zero_O.double())
    return codes


def pack_stream(values: list[int], bits: int) -> bytes:
    """Values end to end in one little-endian bit stream; above 8 bits the low bytes first, then the rest."""
    if bits > 8:
        return bytes(v & 255 for v in values) + pack_stream([v >> 8 for v in values], bits - 8)
    stream = sum(value << (i * bits) for i, value in enumerate(values))
    return stream.to_bytes(-(-len(values) * bits // 8), "little")
