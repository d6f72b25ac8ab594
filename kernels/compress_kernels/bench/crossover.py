"""Measures up to how many rows each packed CPU product is faster than the plain one: the CPU half of `compress tune`.

Both sides run in alternation, and calls rotate through enough copies of the weight to exceed the cache. A packed
product is chosen only if its median is faster by `MARGIN`, so that noise does not decide.
Shape suffixes: M rows of x, O out, I in.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import cycle

import torch
from torch import Tensor
from torch.nn import functional as F

from compress_kernels import cpu
from compress_kernels.bench.clock import race
from compress_kernels.tuning import Choice, Key, Profile, TuningError, device_name

SIZES = ((256, 256), (768, 256), (1024, 1024), (2048, 2048), (4096, 4096))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
ROTATED = 1 << 26  # bytes of plain weights to rotate through, twice the last-level cache of the CPU measured
COPIES = 12  # at most
GROUP = 64
MARGIN = 1.05


@dataclass(frozen=True)
class Timed:
    """Seconds of plain and of packed products, round by round, keyed by format."""

    out: int
    inputs: int
    rows: int
    plain: dict[str, list[float]]
    packed: dict[str, list[float]]

    def ratios(self, form: str) -> list[float]:
        """The speed-up, plain / packed time, of each round."""
        return [p / t for p, t in zip(self.plain[form], self.packed[form], strict=True)]


def measure(
    sizes: Sequence[tuple[int, int]] = SIZES, rows: Sequence[int] = ROWS, seconds: float = 0.4, fewest: int = 9
) -> Iterator[Timed]:
    """Measure every size at every number of rows, about `seconds` and at least `fewest` rounds each."""
    for size in sizes:
        products = makers(*size)
        for count in rows:
            x = torch.randn(count, size[1], generator=torch.Generator().manual_seed(0)).bfloat16()
            with torch.inference_mode():
                times = race([turns(maps, x) for maps in products.values()], warm=2, seconds=seconds, fewest=fewest)
            found = dict(zip(products, times, strict=True))
            plain = {cpu.INT4: found["bf16"], cpu.INT8: found["bf16"], cpu.CSR: found["bf16"]}
            plain[cpu.INT8_INT8] = found["rounded bf16"]
            yield Timed(*size, count, plain, {form: found[form] for form in plain if form in found})


def makers(out: int, inputs: int) -> dict[str, list[Callable[[Tensor], Tensor]]]:
    """Functions that multiply by random weights, several of each kind."""
    draw = torch.Generator().manual_seed(0)
    copies = range(max(2, min(COPIES, ROTATED // (2 * out * inputs))))
    plain = [torch.randn(out, inputs, generator=draw).bfloat16() for _ in copies]
    scale = torch.rand(out, inputs // GROUP, generator=draw) + 0.5
    codes = [torch.randint(0, 256, (out, inputs), generator=draw) for _ in copies]
    made: dict[str, list[Callable[[Tensor], Tensor]]] = {
        "bf16": [lambda x, w=w: F.linear(x, w) for w in plain],  # type: ignore[misc]
        "rounded bf16": [lambda x, w=w: F.linear(on_grid(x), w) for w in plain],  # type: ignore[misc]
        cpu.INT4: [cpu.Int4.pack(code >> 4, scale, 8.0).linear for code in codes],
        cpu.CSR: [cpu.Sparse.pack(w * (torch.rand(w.shape, generator=draw) < cpu.SPARSE)).linear for w in plain],
        cpu.INT8: [cpu.Int8.pack(code, scale[:, 0]).linear for code in codes],
    }
    if cpu.multiplies_integers():
        signed = [(code - 128).to(torch.int8) for code in codes]
        packed = [cpu.Integers.pack(code, scale[:, 0]) for code in signed]
        made[cpu.INT8_INT8] = [lambda x, w=w: w.linear(*cpu.rounded(x)).to(x.dtype) for w in packed]  # type: ignore[misc]
    return made


def on_grid(x_MI: Tensor) -> Tensor:
    """x rounded to int8 levels but kept in its floating-point dtype."""
    codes_MI, scale_M1 = cpu.rounded(x_MI)
    return (codes_MI * scale_M1).to(x_MI.dtype)


def turns(maps: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Callable[[], object]:
    """A function that applies the next product of the rotation at each call."""
    turn = cycle(maps)
    return lambda: next(turn)(x)


def profile(timed: Sequence[Timed]) -> Profile:
    """The tuning profile with the choice for each measurement; raises TuningError if nothing was measured."""
    if not timed:
        raise TuningError("nothing was measured")
    entries: dict[Key, Choice] = {}
    for found in timed:
        for form in found.packed:
            ratio = statistics.median(found.ratios(form))
            chosen = cpu.PACKED if ratio >= MARGIN else cpu.DECODED
            key = Key(cpu.OP, form, found.out, found.inputs, found.rows)
            entries[key] = {"path": chosen, "speedup": round(ratio, 3)}
    return Profile(device_name("cpu"), torch.__version__, date.today().isoformat(), torch.get_num_threads(), entries)
