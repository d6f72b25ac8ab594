"""Finds the best configuration of a kernel for each size and number of rows: the GPU half of `compress tune`.

Every candidate is timed as one CUDA graph over weights that rotate to exceed the last-level cache, as in
`bench/gpu.py`, and so is decoding the weight first and multiplying it as dense; the fastest is kept. There are few
candidates: those that would leave most of the GPU idle are excluded by arithmetic, and those that need more resources
than the GPU has are skipped when they fail.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compress_kernels import nm, wq
from compress_kernels.bench import subjects
from compress_kernels.bench.gpu import ROWS, SHAPES, spans
from compress_kernels.dispatch import DENSE, KERNEL, OP
from compress_kernels.tuning import Choice, Key, Profile, device_name

if TYPE_CHECKING:
    from compress_kernels.gpu.launch import Config

REPLAYS = 10
ROTATED = 1 << 27  # bytes of packed weights to rotate through: twice the last-level cache of an H200
SPLITS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class Tunable:
    """A kernel to tune: a packed form, a function that launches it, its default configuration, and its decoder."""

    form: subjects.Ours
    run: Callable[[Any, Tensor, Config], Tensor]
    default: Callable[[Any, int, torch.device], Config]
    dense: Callable[[Any, torch.dtype], Tensor]


def tunables() -> Iterator[Tunable]:
    """The kernels to tune, one for each packed form; `int4 g32` is not tuned."""
    from compress_kernels.gpu import nm as gpu_nm
    from compress_kernels.gpu import wq as gpu_wq

    def words(p: wq.Packed, x: Tensor, config: Config) -> Tensor:
        return gpu_wq.linear(x, p, None, config)

    def slots(p: nm.Packed, x: Tensor, config: Config) -> Tensor:
        return gpu_nm.linear(gpu_nm.planes(x, p.of, p.mask.shape[2]), None, p, None, config)

    def of_words(p: wq.Packed, m: int, device: torch.device) -> Config:
        return gpu_wq.heuristic(p.form, m, p.shape[0], p.shape[1], p.group, device)

    def of_slots(p: nm.Packed, m: int, device: torch.device) -> Config:
        return gpu_nm.heuristic(m, p.shape[0], p, device)

    for form in subjects.ours():
        if form.linear is wq.linear and form.name != "int4 g32":
            yield Tunable(form=form, run=words, default=of_words, dense=gpu_wq.dense)
        elif form.linear is nm.linear:
            yield Tunable(form=form, run=slots, default=of_slots, dense=gpu_nm.dense)


def candidates(first: Config, m: int, out: int, device: torch.device) -> list[Config]:
    """Configurations worth timing, the default first."""
    from compress_kernels.gpu.launch import multiprocessors

    first, there = replace(first, dense=False), multiprocessors(device)
    found = [first]
    for outputs in sorted({64, first.outputs}):
        tiles = -(-out // outputs) * -(-m // first.rows)
        for splits in SPLITS:
            if there // 2 <= tiles * splits <= 8 * there:
                found += [replace(first, outputs=outputs, splits=splits, warps=warps) for warps in (first.warps, 8)]
    return list(dict.fromkeys(found))


def search(
    tunable: Tunable, shape: tuple[int, int], rows: Sequence[int], device: torch.device, copies: int = 0
) -> Iterator[tuple[Key, Choice]]:
    """The choice for each number of rows, timed over `copies` of the weight (0: enough to exceed the cache)."""
    w_OI = torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device).half() / shape[1] ** 0.5
    form = tunable.form.pack(w_OI)
    forms = [form, *(tunable.form.pack(w_OI) for _ in range((copies or max(2, -(-ROTATED // form.nbytes))) - 1))]
    for m in rows:
        x = torch.randn(m, shape[1], generator=torch.Generator(device).manual_seed(m), device=device).half()
        default = tunable.default(form, m, device)
        timed = dict(fitting(tunable, forms, x, candidates(default, m, shape[0], device)))
        best = min(timed, key=timed.__getitem__) if timed else default
        around = [partial(decoded, tunable, each, x) for each in forms[:2]]
        dense = statistics.median(spans(around, device, REPLAYS))
        path = KERNEL if timed and timed[best] <= dense else DENSE
        choice: dict[str, str | int | float | bool] = {"path": path}
        choice["speedup"] = round(dense / timed[best], 3) if timed else 0.0
        choice |= {name: getattr(best, name) for name in ("rows", "outputs", "splits", "warps", "stages")}
        yield Key(OP, str(form.kind), *shape, m), choice


def decoded(tunable: Tunable, form: Any, x: Tensor) -> Tensor:
    """The product with the weight decoded to a dense matrix first."""
    return F.linear(x, tunable.dense(form, x.dtype))


def fitting(
    tunable: Tunable, forms: Sequence[Any], x: Tensor, configs: Sequence[Config]
) -> Iterator[tuple[Config, float]]:
    """The median seconds of every configuration for which the GPU has enough resources."""
    from triton.runtime.errors import OutOfResources

    for config in configs:
        try:
            taken = spans([partial(tunable.run, each, x, config) for each in forms], x.device, REPLAYS)
        except OutOfResources:
            continue
        yield config, statistics.median(taken)


def profile(
    device: torch.device,
    say: Callable[[str], object],
    shapes: Sequence[tuple[int, int]] = SHAPES,
    rows: Sequence[int] = ROWS,
    copies: int = 0,
) -> Profile:
    """The choices of every kernel at every size on one device."""
    entries: dict[Key, Choice] = {}
    for tunable in tunables():
        for shape in shapes:
            say(f"{tunable.form.name} {shape[0]} x {shape[1]}")
            entries.update(search(tunable, shape, rows, device, copies))
    name = device_name(str(device))
    return Profile(name, torch.__version__, date.today().isoformat(), torch.get_num_threads(), entries)
