"""Exact swaps: exchange a cut weight for a kept one wherever that lowers the squared error of the output.

The core, `swap`, works on plain matrices. Shape suffixes: O out, I in, S shortlisted, M inputs of a group, B inputs of
a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from compress.model.site import Site
from compress.passes.base import Refiner
from compress.stats import Gram
from compress.weights import Weight
from compress_kernels import solver

AT_ONCE = 1 << 18  # entries of the rows processed together, so that their error vectors stay in the cache
BLOCK = 64  # inputs between two matrix products that carry the swaps over to the inputs not yet reached
GAIN = 1e-7  # least gain of a swap, relative to the row's loss: a smaller one is rounding noise of float32


@dataclass(frozen=True, kw_only=True)
class Swaps(Refiner, name="swaps"):
    """Restore one cut weight to its original value and cut a kept one, the best pair first, until no pair helps.

    With d = w - w', the loss of a row is d G dᵀ, and the effect of a swap is known exactly, so the loss never rises.
    Rows take one swap after another; under n:m, groups are swept from left to right until a sweep finds nothing. If the
    kept values were changed before (SparseGPT), weights that stay kept retain them.
    Source: pruning as a quadratic problem on the Gram, Frantar and Alistarh, SparseGPT, ICML 2023, eq. 1; 1-swap local
    search as in SparseSwaps, arXiv 2512.10922. Deviation: pairs are sought among the `shortlist` best weights to
    restore and the best to cut, each judged alone; where these find nothing, each of them is paired with all.
    """

    requires = (Gram,)

    limit: Annotated[int, Field(ge=0, le=100000, description="swaps per row; with n:m, sweeps")] = 100
    shortlist: Annotated[int, Field(ge=1, le=4096, description="candidates on each side of a swap")] = 8

    def rewrite(self, site: Site) -> Weight:
        """The weight under the improved mask."""
        kept_OI, weight = self.masked(site)
        w_OI, gram_II = site.target.data.float(), site.stats[Gram]
        m = self.group(site, weight)
        if m:
            after_OI, keep_OI, swaps = swap_in_groups(w_OI, kept_OI, weight.mask_OI, gram_II, m, self.limit)
        else:
            after_OI, keep_OI, swaps = swap(w_OI, kept_OI, weight.mask_OI, gram_II, self.limit, self.shortlist)
        site.ledger["swaps"] = int(swaps.sum())
        return self.remasked(site, after_OI, keep_OI, weight.pattern)


def swap(
    w_OI: Tensor, kept_OI: Tensor, keep_OI: Tensor, gram_II: Tensor, limit: int = 100, shortlist: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """(values, mask, swaps of each row) after up to `limit` swaps in each row, with as many kept as before.

    `kept_OI` holds the kept values, 0 elsewhere. At the end each row is 1-swap optimal, except for pairs of which
    neither weight is on a shortlist, and unless it ran into the limit.
    """
    step = len(w_OI) if w_OI.is_cuda else max(1, AT_ONCE // w_OI.shape[1])
    parts = [
        Search(w, kept, keep, gram_II, shortlist).run(limit)
        for w, kept, keep in zip(w_OI.split(step), kept_OI.split(step), keep_OI.split(step), strict=True)
    ]
    values, masks, counts = zip(*parts, strict=True)
    return torch.cat(values), torch.cat(masks), torch.cat(counts)


class Search:
    """The state of the search in all rows; rows that are done are removed.

    The cost of restoring (`up`) or cutting (`down`) each weight alone is a fixed part, infinite where that is
    impossible, plus a part linear in c = d G: two fused operations an iteration.
    """

    def __init__(self, w_OI: Tensor, kept_OI: Tensor, keep_OI: Tensor, gram_II: Tensor, shortlist: int) -> None:
        self.gram_II, self.diagonal_I = gram_II, gram_II.diagonal()
        self.values, self.masks = kept_OI.clone(), keep_OI.clone()
        self.listed = min(shortlist, w_OI.shape[1])
        self.at_once = max(1, AT_ONCE // w_OI.shape[1])
        missing = w_OI - kept_OI
        c = missing @ gram_II
        self.rows = torch.arange(len(w_OI), device=w_OI.device)
        self.live = {
            "w": w_OI, "kept": kept_OI.clone(), "keep": keep_OI.clone(), "c": c, "loss": (missing * c).sum(1),
            "up": (w_OI.square() * self.diagonal_I).masked_fill_(keep_OI, torch.inf),
            "down": (kept_OI.square() * self.diagonal_I).masked_fill_(~keep_OI, torch.inf),
        }  # fmt: skip

    def run(self, limit: int) -> tuple[Tensor, Tensor, Tensor]:
        """(values, mask, swaps of each row)."""
        counts_O = torch.zeros_like(self.rows)
        for _ in range(limit):
            gain_O, up_O, down_O = self.best()
            enough_O = -GAIN * self.live["loss"].clamp(min=0)
            stuck_O = (gain_O >= enough_O).nonzero()[:, 0]
            for stuck in stuck_O.split(self.at_once) if self.listed < len(self.gram_II) else ():
                gain_O[stuck], up_O[stuck], down_O[stuck] = self.best_with_any(stuck)
            better_O = gain_O < enough_O
            if not bool(better_O.all()):
                self.leave(~better_O)
                gain_O, up_O, down_O = gain_O[better_O], up_O[better_O], down_O[better_O]
            if not len(self.rows):
                break
            self.take(gain_O, up_O, down_O)
            counts_O[self.rows] += 1
        self.leave(torch.ones_like(self.rows, dtype=torch.bool))
        return self.values, self.masks, counts_O

    def best(self) -> tuple[Tensor, Tensor, Tensor]:
        """(change of the loss, weight to restore, weight to cut) of the best pair of each row, both shortlisted."""
        w, kept, c = self.live["w"], self.live["kept"], self.live["c"]
        up_OS, up_at = torch.addcmul(self.live["up"], w, c, value=-2).topk(self.listed, 1, largest=False)
        down_OS, down_at = torch.addcmul(self.live["down"], kept, c, value=2).topk(self.listed, 1, largest=False)
        cross = self.gram_II[up_at[:, :, None], down_at[:, None, :]]
        cross *= w.gather(1, up_at)[:, :, None] * (2 * kept.gather(1, down_at))[:, None, :]
        gain_O, place_O = (up_OS[:, :, None] + down_OS[:, None, :] - cross).flatten(1).min(1)
        up_O = up_at.gather(1, place_O[:, None] // self.listed)[:, 0]
        down_O = down_at.gather(1, place_O[:, None] % self.listed)[:, 0]
        return gain_O, up_O, down_O

    def best_with_any(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same for some rows, over the pairs of which one weight is on a shortlist.

        Tokens of huge activations correlate inputs strongly: the partner that cancels a swap may be a weight that does
        not look good alone.
        """
        w, kept, c = (self.live[name][rows] for name in ("w", "kept", "c"))
        up_OI = torch.addcmul(self.live["up"][rows], w, c, value=-2)
        down_OI = torch.addcmul(self.live["down"][rows], kept, c, value=2)
        kept *= 2
        gain_O, up_O, down_O = paired(self.gram_II, up_OI, w, down_OI, kept, self.listed)
        other_O, cut_O, restored_O = paired(self.gram_II, down_OI, kept, up_OI, w, self.listed)
        first_O = gain_O <= other_O
        return (
            torch.where(first_O, gain_O, other_O),
            torch.where(first_O, up_O, restored_O),
            torch.where(first_O, down_O, cut_O),
        )

    def take(self, gain_O: Tensor, up_O: Tensor, down_O: Tensor) -> None:
        """Swap one pair in each row."""
        live, at = self.live, torch.arange(len(up_O), device=up_O.device)
        restored_O, lost_O = live["w"][at, up_O], live["kept"][at, down_O]
        live["c"].addcmul_(self.gram_II[down_O], lost_O[:, None])
        live["c"].addcmul_(self.gram_II[up_O], restored_O[:, None], value=-1)
        live["loss"] += gain_O
        live["kept"][at, up_O], live["kept"][at, down_O] = restored_O, 0
        live["keep"][at, up_O], live["keep"][at, down_O] = True, False
        live["down"][at, up_O] = restored_O.square() * self.diagonal_I[up_O]
        live["up"][at, down_O] = live["w"][at, down_O].square() * self.diagonal_I[down_O]
        live["up"][at, up_O] = live["down"][at, down_O] = torch.inf

    def leave(self, done_O: Tensor) -> None:
        """Store the results of the rows that are done, and continue with the others."""
        rows = self.rows[done_O]
        self.values[rows], self.masks[rows] = self.live["kept"][done_O], self.live["keep"][done_O]
        self.rows = self.rows[~done_O]
        self.live = {name: tensor[~done_O] for name, tensor in self.live.items()}


def paired(
    gram_II: Tensor, one_OI: Tensor, one_w: Tensor, other_OI: Tensor, other_w: Tensor, listed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(change of the loss, place of the one and of the other) of the best pair of one of the `listed` best and any."""
    one_OS, at_OS = one_OI.topk(listed, 1, largest=False)
    pairs_OSI = gram_II[at_OS] * one_w.gather(1, at_OS)[:, :, None] * other_w[:, None, :]
    gain_O, place_O = (one_OS[:, :, None] + other_OI[:, None, :] - pairs_OSI).flatten(1).min(1)
    width = one_OI.shape[1]
    return gain_O, at_OS.gather(1, place_O[:, None] // width)[:, 0], place_O % width


def swap_in_groups(
    w_OI: Tensor, kept_OI: Tensor, keep_OI: Tensor, gram_II: Tensor, m: int, limit: int = 100
) -> tuple[Tensor, Tensor, Tensor]:
    """(values, mask, swaps of each row): sweeps over the groups of `m`, each taking its best swap if that helps.

    A sweep costs one product [out, in] @ [in, in]. Within a block of inputs every swap is taken into account at once;
    the inputs further right take it into account after the block. When a sweep finds nothing, rows are 1-swap optimal
    within groups.
    """
    kept_OI, keep_OI = kept_OI.clone(), keep_OI.clone()
    counts_O = torch.zeros(len(w_OI), dtype=torch.long, device=w_OI.device)
    rows = torch.arange(len(w_OI), device=w_OI.device)  # rows that the last sweep changed; the others are optimal
    for _ in range(limit):
        w, kept, keep = w_OI[rows], kept_OI[rows], keep_OI[rows]
        found_O = sweep(w, kept, keep, gram_II, m)
        kept_OI[rows], keep_OI[rows] = kept, keep
        counts_O[rows] += found_O
        rows = rows[found_O > 0]
        if not len(rows):
            break
    return kept_OI, keep_OI, counts_O


def sweep(w_OI: Tensor, kept_OI: Tensor, keep_OI: Tensor, gram_II: Tensor, m: int) -> Tensor:
    """Take the best swap of every group from left to right, in place; returns the number of swaps of each row."""
    c_OI = (w_OI - kept_OI) @ gram_II
    loss_O = ((w_OI - kept_OI) * c_OI).sum(1)
    found_O = torch.zeros(len(w_OI), dtype=torch.long, device=w_OI.device)
    width = max(m, BLOCK // m * m)
    for start in range(0, w_OI.shape[1], width):
        part = slice(start, min(start + width, w_OI.shape[1]))
        before_OB = kept_OI[:, part].clone()
        if solver.usable(w_OI) and m <= solver.WIDEST:
            found_O += solver.swap_groups(w_OI, kept_OI, keep_OI, c_OI, gram_II, loss_O, part, m, GAIN)
        else:
            for at in range(part.start, part.stop, m):
                group = slice(at, at + m)
                change_OM, swapped_O = swap_once(w_OI, kept_OI, keep_OI, gram_II, c_OI, group, loss_O)
                c_OI[:, part] += change_OM @ gram_II[group, part]
                found_O += swapped_O
        c_OI[:, part.stop :] += (before_OB - kept_OI[:, part]) @ gram_II[part, part.stop :]
    return found_O


def swap_once(
    w_OI: Tensor, kept_OI: Tensor, keep_OI: Tensor, gram_II: Tensor, c_OI: Tensor, group: slice, loss_O: Tensor
) -> tuple[Tensor, Tensor]:
    """Take the best swap of one group in each row, in place; (change of the missing part [out, m], whether swapped)."""
    w, kept, keep, c = w_OI[:, group], kept_OI[:, group], keep_OI[:, group], c_OI[:, group]
    gram_MM = gram_II[group, group]
    up = (w * (w * gram_MM.diagonal() - 2 * c)).masked_fill(keep, torch.inf)
    down = (kept * (kept * gram_MM.diagonal() + 2 * c)).masked_fill(~keep, torch.inf)
    pairs = (up[:, :, None] + down[:, None, :] - 2 * w[:, :, None] * kept[:, None, :] * gram_MM).flatten(1)
    gain_O, place_O = pairs.min(1)
    swapped_O = gain_O < -GAIN * loss_O.clamp(min=0)
    loss_O += torch.where(swapped_O, gain_O, 0)
    rows = swapped_O.nonzero()[:, 0]
    up_at, down_at = place_O[rows] // len(gram_MM), place_O[rows] % len(gram_MM)
    change_OM = torch.zeros_like(w)
    change_OM[rows, up_at] = -w[rows, up_at]
    change_OM[rows, down_at] = kept[rows, down_at]
    kept[rows, up_at], kept[rows, down_at] = w[rows, up_at], 0.0
    keep[rows, up_at], keep[rows, down_at] = True, False
    return change_OM, swapped_O
