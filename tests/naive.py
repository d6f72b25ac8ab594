"""Slow reference implementations, and those fixtures of the specifications that need no download.

Everything is float64 and written like the formula that it implements. Shape suffixes: O out, I in, T tokens, N any
size.
"""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Decimal
from itertools import combinations, permutations, product
from typing import Any

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
    """(W [256, 256], H [256, 256]) of the GPTQ fixture of lowrank_quant_delta.md."""
    w, x = golden_inputs()
    return w, 2 * x.T @ x / len(x)


def golden_inputs(rng: np.random.Generator | None = None) -> tuple[Tensor, Tensor]:
    """(W [256, 256], X [4096, 256]) of the GPTQ fixture: Toeplitz-correlated inputs with log-normal channels."""
    rng = rng or np.random.default_rng(0)
    w = rng.standard_normal((256, 256))
    channel = np.exp(rng.standard_normal(256))
    toeplitz = 0.9 ** np.abs(np.subtract.outer(np.arange(256), np.arange(256)))
    x = (rng.standard_normal((4096, 256)) @ np.linalg.cholesky(toeplitz).T) * channel
    return torch.from_numpy(w), torch.from_numpy(x)


def golden_spectrum() -> tuple[Tensor, Tensor]:
    """(W [256, 256] with the singular values i**-0.5, X of the GPTQ fixture); W is drawn next from its generator."""
    rng = np.random.default_rng(0)
    x = golden_inputs(rng)[1]
    left, right = (np.linalg.qr(rng.standard_normal((256, 256)))[0] for _ in range(2))
    return torch.from_numpy((left * np.arange(1, 257.0) ** -0.5) @ right.T), x


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
    """One hexadecimal number per row, in which column 0 is the most significant bit."""
    return [f"{int(''.join(str(int(kept)) for kept in row), 2):0{len(row) // 4}x}" for row in mask_OI]


# -- pruning ---------------------------------------------------------------------------------------


def drop_lowest(scores: list[float], drop: int) -> list[bool]:
    """The mask that drops the `drop` lowest scores; of equal scores, the one further left is dropped first."""
    ranked = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    gone = set(ranked[:drop])
    return [i not in gone for i in range(len(scores))]


def dropped(size: int, sparsity: str) -> int:
    """size x sparsity, computed in decimal from the text and rounded half to even."""
    return int((Decimal(size) * Decimal(sparsity)).quantize(Decimal(1), ROUND_HALF_EVEN))


def alpha_mask(score_OI: Tensor, sparsity: float) -> tuple[list[list[bool]], float]:
    """(mask, alpha) of Wanda's search for unequal rows; pruning.md section 3, for scores without ties."""

    def cut(alpha: float) -> list[list[bool]]:
        rows = []
        for row in score_OI.tolist():
            ordered = sorted(row)
            sums = [sum(ordered[: i + 1]) for i in range(len(ordered))]
            count = sum(s <= alpha * sum(row) for s in sums)
            rows.append([score in ordered[:count] for score in row])
        return rows

    low, high, alpha = 0.0, 0.8, 0.4
    while True:
        gone = cut(alpha)
        reached = sum(map(sum, gone)) / score_OI.numel()
        if abs(reached - sparsity) <= 1e-3 or high - low < 1e-3:
            return [[not one for one in row] for row in gone], alpha
        if reached > sparsity:
            high, alpha = alpha, (alpha + low) / 2
        else:
            low, alpha = alpha, (alpha + high) / 2


def ria_score(w_OI: Tensor, norm_I: Tensor, power: float) -> Tensor:
    """(|w| / sum of its column + |w| / sum of its row) ||x||^power, entry by entry; section 10."""
    rows = w_OI.double().abs().tolist()
    return torch.tensor(
        [
            [(w / sum(r[j] for r in rows) + w / sum(row)) * float(norm_I[j]) ** power for j, w in enumerate(row)]
            for row in rows
        ],
        dtype=torch.float64,
    )


def snake(score_OI: Tensor, m: int) -> Tensor:
    """An order of the columns: ranked by their totals and dealt to groups of m in serpentine order; section 10."""
    totals = score_OI.double().sum(0).tolist()
    ranked = sorted(range(len(totals)), key=lambda j: -totals[j])
    size = len(totals) // m
    rounds = [ranked[r * size : (r + 1) * size][:: -1 if r % 2 else 1] for r in range(m)]
    return torch.tensor([rounds[r][g] for g in range(size) for r in range(m)])


def retained(score_OI: Tensor, n: int, m: int) -> float:
    """The share of the total score that the n best of every m columns retain."""
    best = score_OI.double().unflatten(1, (-1, m)).sort(2, descending=True).values[:, :, :n]
    return float(best.sum() / score_OI.double().sum())


def deal(score_OI: Tensor, n: int, m: int) -> list[Tensor]:
    """The order of `snake` after the columns of each rank in turn were assigned to the groups in the best possible way.

    Several assignments may be equally good and lead to different orders, so all of these are returned.
    """
    ends = [snake(score_OI, m).view(-1, m)]
    for rank in range(m):
        tried = []
        for groups_GM in ends:
            for order in permutations(range(len(groups_GM))):
                moved_GM = groups_GM.clone()
                moved_GM[:, rank] = groups_GM[list(order), rank]
                tried.append((retained(score_OI[:, moved_GM.flatten()], n, m), groups_GM, moved_GM))
        best = [max(value for value, before, _ in tried if before is groups_GM) for groups_GM in ends]
        found = [
            moved_GM
            for most, groups_GM in zip(best, ends, strict=True)
            for value, before, moved_GM in tried
            if before is groups_GM and value > most - 1e-7
        ]
        ends = list({tuple(groups_GM.flatten().tolist()): groups_GM for groups_GM in found}.values())
    return [groups_GM.flatten() for groups_GM in ends]


def sparsegpt(
    w_OI: Tensor, hessian_II: Tensor, sparsity: str, block: int, keep_OI: Tensor | None = None
) -> tuple[Tensor, Tensor, float]:
    """(W', mask, loss) by optimal brain surgery with frozen columns; sections 4 and 15.

    For each column, the inverse of the remaining part of the damped Hessian is computed anew; it gives the cost of
    pruning and the update of all columns further right that compensates for it. `sparsity` is a fraction, over all rows
    and `block` columns, or n:m; with `keep_OI` the mask is given.
    """
    w, hessian = w_OI.double().clone(), hessian_II.double()
    rows, width = w.shape
    left = [torch.linalg.inv(hessian[j:, j:]) for j in range(width)]
    keep = torch.ones_like(w, dtype=torch.bool) if keep_OI is None else keep_OI.clone()
    kept_of, of = map(int, sparsity.split(":")) if ":" in sparsity else (0, block)
    loss = 0.0
    for j in range(width):
        if keep_OI is None and j % of == 0:
            part = range(j, min(j + of, width))
            score = torch.stack([w[:, i] ** 2 / left[i][0, 0] for i in part], 1)
            if kept_of:
                keep[:, j : part.stop] = torch.tensor([drop_lowest(row, of - kept_of) for row in score.tolist()])
            else:
                drop = dropped(rows * part.stop, sparsity) - dropped(rows * j, sparsity)
                keep[:, j : part.stop] = torch.tensor(drop_lowest(score.flatten().tolist(), drop)).view(rows, -1)
        cut_O = w[:, j] * ~keep[:, j]
        loss += float((cut_O**2).sum() / left[j][0, 0]) / 2
        w[:, j:] -= torch.outer(cut_O / left[j][0, 0], left[j][0])
        w[:, j] *= keep[:, j]
    return w, keep, loss


def dsnot_row(
    w: list[float], kept: list[bool], mean: list[float], variance: list[float], norm: list[float], *, form: str,
    m: int = 0, cycles: int = 50, threshold: float = 0.0, power: float = 1.0,
) -> tuple[list[bool], list[float]]:  # fmt: skip
    """(mask, the error before and after every swap) of one row by DSnoT; section 5.

    `guarded` accepts a swap only if it reduces the error; `reference` accepts any swap (under n:m, while the error
    keeps its sign). Both take entries from queues that are fixed at the start. `paper` accepts any swap and ranks all
    entries again each time. Inputs without variance are not grown, an exhausted queue ends the search, and under n:m
    swapped entries are not dropped again.
    """
    part = [a * b for a, b in zip(w, mean, strict=True)]
    quiet = [abs(a) * b for a, b in zip(w, norm, strict=True)]
    merit = [
        p / v**power if power and v > 0 else 0.0 if power else p for p, v in zip(part, variance, strict=True)
    ]  # fmt: skip
    every = range(len(w))

    def growable(sign: float, now: list[bool]) -> list[int]:
        return sorted((j for j in every if not now[j] and sign * merit[j] > 0), key=lambda j: -sign * merit[j])

    def droppable(sign: float, now: list[bool]) -> list[int]:
        return sorted((j for j in every if now[j] and sign * part[j] < 0), key=lambda j: quiet[j])

    now, used = list(kept), set[int]()
    grow, drop = ({sign: find(sign, now) for sign in (1.0, -1.0)} for find in (growable, droppable))
    errors = [sum(p for p, keep in zip(part, now, strict=True) if not keep)]
    for _ in range(cycles):
        error = errors[-1]
        if abs(error) <= threshold or error == 0:
            break
        sign = 1.0 if error > 0 else -1.0
        grows = growable(sign, now) if form == "paper" else grow[sign]
        drops = droppable(sign, now) if form == "paper" else drop[sign]
        if grows and m:
            first = grows[0] // m * m
            drops = sorted((j for j in range(first, first + m) if now[j] and j not in used), key=lambda j: quiet[j])
        if not grows or not drops:
            break
        restored, gone = grows[0], drops[0]
        after = error + part[gone] - part[restored]
        if form == "guarded" and abs(after) >= abs(error):
            break
        if form == "reference" and m and after * errors[0] <= 0:
            break
        now[restored], now[gone] = True, False
        used |= {restored, gone}
        errors.append(after)
        if form != "paper":
            grow[sign] = grow[sign][1:]
            drop[sign] = drop[sign][1:]
    return now, errors


def row_loss(w_I: Tensor, now_I: Tensor, gram_II: Tensor) -> float:
    """The loss d G dᵀ of a row, with d = w - w'."""
    missing = w_I.double() - now_I.double()
    return float(missing @ gram_II.double() @ missing)


def best_pair(
    w_I: Tensor, now_I: Tensor, kept: list[bool], gram_II: Tensor, where: range
) -> tuple[float, int, int] | None:
    """(loss after it, entry to restore, entry to prune) of the best exchange within `where`; None if there is none."""
    tried = []
    for up in (j for j in where if not kept[j]):
        for down in (j for j in where if kept[j]):
            after = now_I.clone()
            after[up], after[down] = w_I[up], 0
            tried.append((row_loss(w_I, after, gram_II), up, down))
    return min(tried, default=None)


def swap_row(
    w_I: Tensor, now_I: Tensor, kept: list[bool], gram_II: Tensor, limit: int = 100, least: float = 1e-7
) -> tuple[Tensor, list[bool], list[float]]:
    """(values, mask, the loss before and after every swap) of taking the best exchange until none helps; section 6.

    An exchange helps if it lowers the loss by at least the share `least`.
    """
    now, kept = now_I.double().clone(), list(kept)
    losses = [row_loss(w_I, now, gram_II)]
    for _ in range(limit):
        found = best_pair(w_I.double(), now, kept, gram_II, range(len(kept)))
        if found is None or found[0] - losses[-1] >= -least * losses[-1]:
            break
        loss, up, down = found
        now[up], now[down], kept[up], kept[down] = w_I[up].double(), 0, True, False
        losses.append(loss)
    return now, kept, losses


def swap_row_in_groups(
    w_I: Tensor, now_I: Tensor, kept: list[bool], gram_II: Tensor, m: int, limit: int = 100, least: float = 1e-7
) -> tuple[Tensor, list[bool], list[float]]:
    """The same under n:m: from left to right, each group takes its best exchange, until a full sweep finds none."""
    now, kept = now_I.double().clone(), list(kept)
    losses = [row_loss(w_I, now, gram_II)]
    for _ in range(limit):
        before = len(losses)
        for start in range(0, len(kept), m):
            found = best_pair(w_I.double(), now, kept, gram_II, range(start, start + m))
            if found is not None and found[0] - losses[-1] < -least * losses[-1]:
                loss, up, down = found
                now[up], now[down], kept[up], kept[down] = w_I[up].double(), 0, True, False
                losses.append(loss)
        if len(losses) == before:
            break
    return now, kept, losses


def least_squares_row(w_I: Tensor, keep_I: Tensor, gram_II: Tensor) -> Tensor:
    """The values of the kept entries with the least loss, by a direct solve: G_KK w' = (G w)_K; section 10."""
    gram = gram_II.double()
    now = torch.zeros_like(w_I, dtype=torch.float64)
    now[keep_I] = torch.linalg.solve(gram[keep_I][:, keep_I], (gram @ w_I.double())[keep_I])
    return now


def best_mask_row(w_I: Tensor, gram_II: Tensor, keep: int) -> tuple[Tensor, float]:
    """(mask, loss) of the best choice of `keep` weights that stay unchanged, by exhaustive search."""
    choices = list(combinations(range(len(w_I)), len(w_I) - keep))
    cut_CI = torch.zeros(len(choices), len(w_I), dtype=torch.float64)
    cut_CI.scatter_(1, torch.tensor(choices), 1.0)
    missing_CI = cut_CI * w_I.double()
    losses_C = ((missing_CI @ gram_II.double()) * missing_CI).sum(1)
    best = int(losses_C.argmin())
    return cut_CI[best] == 0, float(losses_C[best])


def moments(windows: list[Tensor]) -> Tensor:
    """Mean, variance and variance within windows [3, in], each in two passes over all tokens."""
    x_TI = torch.cat(windows).double()
    within_I = torch.stack([(w.double() - w.double().mean(0)).square().sum(0) for w in windows]).sum(0)
    return torch.stack((x_TI.mean(0), (x_TI - x_TI.mean(0)).square().mean(0), within_I / len(x_TI)))


def cheapest(costs: list[list[float]], kept: list[list[float]], sizes: list[int], keep: float) -> float:
    """The least sum of costs, one option per part, keeping at most the share `keep` of all; by exhaustive search."""
    most = keep * sum(sizes) + 1e-9
    picks = product(*(range(len(options)) for options in costs))
    return min(
        sum(costs[i][j] for i, j in enumerate(pick))
        for pick in picks
        if sum(sizes[i] * kept[i][j] for i, j in enumerate(pick)) <= most
    )


# -- quantization ----------------------------------------------------------------------------------


def round_to_grid(w_O: Tensor, scale_O: Tensor, zero_O: Tensor, bits: int) -> Tensor:
    """The codes of a column on the given grids."""
    return ((w_O / scale_O).round() + zero_O).clamp(0, 2**bits - 1)


def ldlq(w_OI: Tensor, gram_II: Tensor, scale_O: Tensor, zero_O: Tensor, bits: int) -> Tensor:
    """Codes [out, in] by LDLQ with one grid per row: an oracle for GPTQ that never inverts the Gram.

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


def gptaq(
    w_OI: Tensor, upper_II: Tensor, shift_II: Tensor, scale_O: Tensor, zero_O: Tensor, bits: int, alpha: float
) -> Tensor:
    """GPTQ with GPTAQ's correction for a drifted input, column by column; `shift_II` is the mean of (x - x') x'ᵀ.

    Source: Li et al., "GPTAQ", 2025, algorithm 1: P = alpha (shift Uᵀ, strictly upper) U, w_j -= e U_ij - w_i P_ij.
    """
    w, upper = w_OI.double().clone(), upper_II.double()
    pull = alpha * (shift_II.double() @ upper.T).triu(1) @ upper
    out = torch.zeros_like(w)
    for i in range(w.shape[1]):
        column = w[:, i].clone()
        out[:, i] = round_to_grid(column, scale_O.double(), zero_O.double(), bits)
        error = (column - out[:, i]) / upper[i, i]
        w[:, i:] -= torch.outer(error, upper[i, i:]) - torch.outer(column, pull[i, i:])
    return out


def pack_stream(values: list[int], bits: int) -> bytes:
    """Values packed into one little-endian bit stream; above 8 bits, all low bytes come first, then the high bits."""
    if bits > 8:
        return bytes(v & 255 for v in values) + pack_stream([v >> 8 for v in values], bits - 8)
    stream = sum(value << (i * bits) for i, value in enumerate(values))
    return stream.to_bytes(-(-len(values) * bits // 8), "little")


def pack_gaps(mask: list[bool], width: int) -> bytes:
    """The low `width` bits of the gap before each kept entry, then the high part of each gap in unary (zeros, a 1)."""
    gaps, gap = [], 0
    for kept in mask:
        gap += 1
        if kept:
            gaps.append(gap - 1)
            gap = 0
    unary = [bit for gap in gaps for bit in [0] * (gap >> width) + [1]]
    return pack_stream([gap & (2**width - 1) for gap in gaps], width) + pack_stream(unary, 1)


def number(index: int, seed: int) -> int:
    """The hash of a counter and a seed, for random masks that are not stored."""

    def scrambled(x: int) -> int:
        for shift, factor in ((16, 0x7FEB352D), (15, 0x21F0AAAD), (17, 0x31848BAB)):
            x = (x ^ (x >> shift)) * factor % 2**32
        return x ^ (x >> 15)

    once = scrambled(index % 2**32 ^ seed)
    return scrambled(once ^ index // 2**32 ^ scrambled(seed ^ 0x5BD1E995))


# -- the key-value cache ---------------------------------------------------------------------------


def rounded_group(x_G: Tensor, bits: int) -> Tensor:
    """One group quantized from its minimum, with minimum and scale in float16; a constant group becomes its minimum."""
    low = x_G.min().half().float()
    scale = ((x_G.max() - low).clamp(min=0) / (2**bits - 1)).half().float()
    if scale == 0:
        return torch.full_like(x_G, float(low))
    return ((x_G - low) / scale).round().clamp(0, 2**bits - 1) * scale + low


def kivi(x_TD: Tensor, kv: Any, keys: bool) -> Tensor:
    """The keys or values of one head as a later token reads them, from the whole prefix by KIVI's flush rule."""
    seen_TD, tokens = x_TD.clone(), len(x_TD)
    due = (tokens - kv.sink) // kv.residual * kv.residual if keys else tokens - kv.sink - kv.residual
    rows, columns = (kv.group, 1) if keys and kv.keys == "channel" else (1, kv.group)
    for t in range(kv.sink, kv.sink + max(0, due), rows):
        for d in range(0, x_TD.shape[1], columns):
            group = x_TD[t : t + rows, d : d + columns]
            seen_TD[t : t + rows, d : d + columns] = rounded_group(group.reshape(-1), kv.bits).view(group.shape)
    return seen_TD


# -- vector codes ----------------------------------------------------------------------------------


def svd_llm(w_OI: Tensor, root_II: Tensor, rank: int) -> Tensor:
    """The matrix of SVD-LLM, SVD_r(W S) S^-1, from any square root S of the Gram."""
    u, s, v = torch.linalg.svd(w_OI @ root_II, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank] @ torch.linalg.inv(root_II)


def best_ranks(energies: list[list[float]], sizes: list[tuple[int, int]], budget: int) -> float:
    """The least total energy lost by truncated or whole matrices within `budget` parameters, by exhaustive search."""
    options = [
        [(sum(energy[rank:]), rank * (m + n)) for rank in range(1, (m * n - 1) // (m + n) + 1)] + [(0.0, m * n)]
        for energy, (m, n) in zip(energies, sizes, strict=True)
    ]
    return min(
        sum(lost for lost, _ in chosen) for chosen in product(*options) if sum(size for _, size in chosen) <= budget
    )


def block_ldl(gram_II: Tensor, width: int) -> tuple[Tensor, list[Tensor]]:
    """(L, [D_k]) with G = L D Lᵀ and L unit lower block triangular, by eliminating one block of inputs at a time."""
    rest, size = gram_II.double().clone(), len(gram_II)
    lower, blocks = torch.eye(size).double(), []
    for start in range(0, size, width):
        own = slice(start, start + width)
        block = rest[own, own].clone()
        lower[start:, own] = rest[start:, own] @ torch.linalg.inv(block)
        rest = rest - lower[:, own] @ block @ lower[:, own].T
        blocks.append(block)
    return lower, blocks


def block_ldlq(w_OI: Tensor, gram_II: Tensor, book_KD: Tensor) -> Tensor:
    """Q by the equation of lowrank_quant_delta.md section 7.1, with blocks from last to first.

    Each block gets the book entry b with the least (x - b) D (x - b)ᵀ.
    """
    w, book = w_OI.double(), book_KD.double()
    width = book.shape[1]
    lower, blocks = block_ldl(gram_II, width)
    q = w.clone()
    for k in reversed(range(w.shape[1] // width)):
        own, after = slice(k * width, (k + 1) * width), slice((k + 1) * width, None)
        x = w[:, own] + (w - q)[:, after] @ lower[after, own]
        for row in range(len(w)):
            change = x[row] - book
            q[row, own] = book[int(((change @ blocks[k]) * change).sum(1).argmin())]
    return q


def in_e8(point: list[float]) -> bool:
    """Whether a point is in the lattice E8: coordinates all integers or all half-integers, with an even sum."""
    kinds = {x % 1 for x in point}
    return kinds in ({0.0}, {0.5}) and sum(point) % 2 == 0


# -- sparse plus low rank --------------------------------------------------------------------------


def oats(a_OI: Tensor, rank: int, kept: int, turns: int) -> tuple[Tensor, Tensor]:
    """(L, S) by alternating between the best rank-`rank` matrix and the `kept` largest entries per row of the rest.

    Each turn computes a full singular value decomposition; pruning.md section 15.
    """
    a = a_OI.double()
    sparse = torch.zeros_like(a)
    for _ in range(turns):
        u, s, v = torch.linalg.svd(a - sparse, full_matrices=False)
        low = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
        rest = a - low
        sparse = torch.zeros_like(a)
        for row, out in zip(rest, sparse, strict=True):
            largest = row.abs().argsort(descending=True)[:kept]
            out[largest] = row[largest]
    return low, sparse


# -- low-rank corrections --------------------------------------------------------------------------


def eora(error_OI: Tensor, gram_II: Tensor, rank: int) -> Tensor:
    """The product A B of EoRA, from a root of the Gram and its pseudo-inverse; lowrank_quant_delta.md section 2.4."""
    values, vectors = torch.linalg.eigh(gram_II.double())
    kept = values > 1e-6 * values.max()
    root = vectors[:, kept] * values[kept].sqrt()
    u, s, vt = torch.linalg.svd(error_OI.double() @ root, full_matrices=False)
    left = u[:, :rank] * s[:rank].sqrt()
    right = s[:rank].sqrt()[:, None] * vt[:rank]
    return left @ right @ torch.linalg.pinv(root)


def clipped_error(w_OI: Tensor, clip: float, bits: int) -> float:
    """The sum of (w - w')² for signed codes with step clip / (2**(bits-1) - 1); pruning.md section 9."""
    levels = 2 ** (bits - 1)
    step = clip / (levels - 1)
    return float(((w_OI.double() / step).round().clamp(-levels, levels - 1) * step - w_OI.double()).square().sum())


def least_clipped_error(w_OI: Tensor, bits: int, tries: int) -> float:
    """The least `clipped_error` over `tries` evenly spaced clips up to the largest |w|."""
    top = float(w_OI.abs().max())
    return min(clipped_error(w_OI, top * (i + 1) / tries, bits) for i in range(tries))
