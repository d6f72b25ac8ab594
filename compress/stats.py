"""Statistics of a site's input, accumulated over calibration tokens and discarded with the block.

Each is additive over tokens: any split into batches gives the same value up to the float32 rounding of one
batch; running totals of vectors are float64. Inputs are cast to float32 before squaring, because squares in bf16
and fp16 overflow or lose rank. Shape suffixes: T tokens, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from compress.errors import CalibrationError
from compress.team import ALONE, Team
from compress_kernels import solver


def finite(tensor: Tensor) -> bool:
    """Whether every value is finite; checked 4 Mi values at a time, so that no temporary is as large as the tensor."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    parts = tensor.reshape(-1).split(1 << 22)
    narrow = tensor.dtype.itemsize == 1  # float8: no comparison is implemented
    ends = [torch.stack(torch.aminmax(part.float() if narrow else part)) for part in parts]  # aminmax propagates NaN
    return bool(torch.isfinite(torch.stack(ends)).all())


@cache
def tiled() -> bool:
    """Whether this CPU has bf16 tile multiplication (AMX) and this PyTorch has the setting that enables it."""
    return torch.cpu.get_capabilities().get("amx_bf16", False) and hasattr(torch.backends.mkldnn, "matmul")


@contextmanager
def products_of(*tensors: Tensor) -> Iterator[None]:
    """Inside, float32 copies of bf16 tensors are multiplied as bf16 and summed in float32, if the CPU has AMX.

    The products stay exact and run three times as fast. If any of the `tensors` is not bf16 or not on the CPU, nothing
    changes.
    """
    if not tiled() or any(x.dtype != torch.bfloat16 or x.device.type != "cpu" for x in tensors):
        yield
        return
    setting: Any = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009 - its stubs do not know it
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


class Statistic:
    """An accumulator over the tokens [T, in] that reach a site.

    `by_window`: `update` is given whole windows, [..., T, in]. `paired`: the same tokens of the dense model are needed
    too (`update_pair`); the value is left out if `tokens` stays 0.
    """

    by_window = False
    paired = False
    square = False  # whether the value is [in, in]
    tokens = 0

    def __init__(self, inputs: int, device: torch.device) -> None:
        raise NotImplementedError

    @classmethod
    def nbytes(cls, inputs: int) -> int:
        """The bytes it takes for an input of this width; float32 [in, in] unless a subclass says otherwise."""
        return 4 * inputs * inputs

    def update(self, x_TI: Tensor) -> None:
        """Add a batch of tokens."""
        raise NotImplementedError

    def update_pair(self, dense_TI: Tensor, x_TI: Tensor) -> None:
        """Add a batch of tokens and the same tokens of the dense model; only for a paired statistic."""
        raise NotImplementedError

    def divide(self, team: Team, turn: int) -> None:
        """Restrict this process to its share of the expensive part of the accumulation; a subclass says which part.

        When several statistics are collected at once, each gets its own `turn`, so that the work is spread evenly
        instead of always starting with the same process.
        """

    def unite(self, team: Team) -> None:
        """Combine the shares that the processes of the team have accumulated."""

    def value(self) -> Tensor:
        """The statistic so far."""
        raise NotImplementedError


class ColumnNorm(Statistic):
    """L2 norm of each input feature over all calibration tokens, float32 [in]."""

    @classmethod
    def nbytes(cls, inputs: int) -> int:
        """The bytes of one float64 per input."""
        return 8 * inputs

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.square_I = torch.zeros(inputs, device=device, dtype=torch.float64)

    def update(self, x_TI: Tensor) -> None:
        """Add the squares of a batch."""
        wide_TI = x_TI.float()
        square_TI = wide_TI.square() if wide_TI is x_TI else wide_TI.square_()
        self.square_I += square_TI.sum(0)

    def value(self) -> Tensor:
        """The norms."""
        return self.square_I.sqrt().float()


class AbsMean(Statistic):
    """Mean of |x| of each input feature over all calibration tokens, float32 [in]."""

    @classmethod
    def nbytes(cls, inputs: int) -> int:
        """The bytes of one float64 per input."""
        return 8 * inputs

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.sum_I = torch.zeros(inputs, device=device, dtype=torch.float64)
        self.tokens = 0

    def update(self, x_TI: Tensor) -> None:
        """Add a batch of tokens."""
        self.sum_I += x_TI.float().abs().sum(0)
        self.tokens += len(x_TI)

    def value(self) -> Tensor:
        """The means."""
        return (self.sum_I / max(1, self.tokens)).float()


class AbsMax(Statistic):
    """Largest |x| of each input feature over all calibration tokens, float32 [in]."""

    @classmethod
    def nbytes(cls, inputs: int) -> int:
        """The bytes of one float32 per input."""
        return 4 * inputs

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.max_I = torch.zeros(inputs, device=device)

    def update(self, x_TI: Tensor) -> None:
        """Add a batch of tokens."""
        if len(x_TI):
            self.max_I = torch.maximum(self.max_I, x_TI.float().abs().amax(0))

    def value(self) -> Tensor:
        """The maxima."""
        return self.max_I


class Sample(Statistic):
    """Evenly spaced calibration tokens, float32 [tokens, in]: FEW / 2 to FEW of them, or all if there are fewer.

    Which tokens are kept depends only on their number, not on how they were split into batches.
    """

    FEW = 1024

    @classmethod
    def nbytes(cls, inputs: int) -> int:
        """The bytes of FEW tokens."""
        return 4 * cls.FEW * inputs

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.kept_TI = torch.zeros(0, inputs, device=device)
        self.every, self.tokens = 1, 0

    def update(self, x_TI: Tensor) -> None:
        """Keep each token whose index is a multiple of the spacing, which doubles when more than FEW are kept."""
        first = -self.tokens % self.every
        self.kept_TI = torch.cat((self.kept_TI, x_TI[first :: self.every].float()))
        self.tokens += len(x_TI)
        while len(self.kept_TI) > self.FEW:
            self.kept_TI, self.every = self.kept_TI[::2].clone(), 2 * self.every

    def value(self) -> Tensor:
        """The kept tokens."""
        return self.kept_TI


SIDE = 1024  # side of the square blocks in which a Gram is accumulated
HALVES = (torch.float16, torch.bfloat16)  # dtypes whose products tensor cores compute exactly


class Gram(Statistic):
    """Mean of x xᵀ over all calibration tokens, float32 [in, in]."""

    square = True

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.sum_II = torch.zeros(inputs, inputs, device=device)
        self.tokens = 0
        self.starts = list(range(0, inputs, SIDE))  # first rows of the strips that this process accumulates

    def divide(self, team: Team, turn: int) -> None:
        """Give each process whole strips of rows, so that each strip is the same product as in a single process.

        Where one kernel launch computes all strips, one process gets all of them.
        """
        sizes = [self.sum_II.shape[0] - start for start in self.starts]
        owners = [0 for _ in sizes] if solver.usable(self.sum_II) else team.deal(sizes)
        mine = (team.rank - turn) % team.size
        self.starts = [start for start, owner in zip(self.starts, owners, strict=True) if owner == mine]

    def unite(self, team: Team) -> None:
        """Copy each strip from the process that accumulated it."""
        strips = [self.sum_II[start : start + SIDE, start:] for start in self.starts]
        for starts, found in team.share(lambda: (self.starts, strips)):
            if starts is not self.starts:
                for start, strip in zip(starts, found, strict=True):
                    self.sum_II[start : start + SIDE, start:] = strip

    def update(self, x_TI: Tensor) -> None:
        """Add the outer products of a batch."""
        self.tokens += len(x_TI)
        if not self.starts:
            return
        if solver.usable(x_TI) and x_TI.dtype in HALVES:
            solver.add_gram(self.sum_II, x_TI.contiguous())
            return
        wide_TI = x_TI.float()
        with products_of(x_TI):
            for start in self.starts:  # only the upper triangle of blocks: half the work
                part = slice(start, start + SIDE)
                self.sum_II[part, start:].addmm_(wide_TI[:, part].T, wide_TI[:, start:])

    def value(self) -> Tensor:
        """The mean outer product; the accumulator itself, mirrored and divided in place."""
        if solver.usable(self.sum_II):
            solver.mirror(self.sum_II)
        else:
            for start in range(0, self.sum_II.shape[0], SIDE):
                part = slice(start, start + SIDE)
                self.sum_II[start + SIDE :, part] = self.sum_II[part, start + SIDE :].T
        mean_II, self.sum_II = self.sum_II.div_(max(1, self.tokens)), self.sum_II[:0]
        return mean_II


class Cross(Statistic):
    """Mean of x x'ᵀ over all calibration tokens, float32 [in, in].

    x is the input in the dense model, x' the input now. Absent for experts, because the tokens that reach them differ
    between the two models.
    """

    paired = True
    square = True

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.sum_II = torch.zeros(inputs, inputs, device=device)
        self.tokens = 0

    def update_pair(self, dense_TI: Tensor, x_TI: Tensor) -> None:
        """Add the outer products of a batch."""
        with products_of(dense_TI, x_TI):
            self.sum_II.addmm_(dense_TI.float().T, x_TI.float())
        self.tokens += len(x_TI)

    def value(self) -> Tensor:
        """The mean outer product; the accumulator itself, divided in place."""
        return self.sum_II.div_(max(1, self.tokens))


class Moments(Statistic):
    """Moments of each input feature, float32 [3, in]: mean, variance, and mean variance within windows.

    These are population variances, and windows are weighted by their number of tokens. Windows are merged pairwise in
    float64 (Chan et al., 1979), because the mean may be far larger than the spread.
    """

    by_window = True

    @classmethod
    def nbytes(cls, inputs: int) -> int:
        """The bytes of three float64 per input."""
        return 24 * inputs

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.mean_I, self.square_I, self.within_I = torch.zeros(3, inputs, device=device, dtype=torch.float64)
        self.tokens = 0

    def update(self, x_TI: Tensor) -> None:
        """Add a batch of windows."""
        if not x_TI.numel():
            return
        for x in x_TI.float().reshape(-1, *x_TI.shape[-2:]) if x_TI.ndim > 1 else [x_TI.float()[None]]:
            count = len(x)
            mean_I = x.mean(0)
            square_I = (x - mean_I).square().sum(0).double()
            moved_I = mean_I.double() - self.mean_I
            total = self.tokens + count
            self.square_I += square_I + moved_I.square() * (self.tokens * count / total)
            self.mean_I += moved_I * (count / total)
            self.within_I += square_I
            self.tokens = total

    def value(self) -> Tensor:
        """Mean, variance, variance within windows."""
        total = max(1, self.tokens)
        return torch.stack((self.mean_I, self.square_I / total, self.within_I / total)).float()


class Statistics:
    """The values measured for one distinct input, shared by every site that reads it.

    `stats[Gram]` returns a value and raises CalibrationError if it was not collected; `derived` caches what passes
    compute from the values, so that sites which share an input also share its factorisation.
    """

    def __init__(self, values: dict[type[Statistic], Tensor], tokens: int) -> None:
        self.values, self.tokens = values, tokens
        self._derived: dict[Any, Any] = {}

    def __getitem__(self, kind: type[Statistic]) -> Tensor:
        if kind not in self.values:
            raise CalibrationError(f"no {kind.__name__} was collected; the pass must name it in `requires`")
        return self.values[kind]

    def __contains__(self, kind: object) -> bool:
        return kind in self.values

    def forget(self) -> None:
        """Free every value and everything derived; the token count stays."""
        self.values, self._derived = {}, {}

    def derived(self, key: Any, make: Callable[[], Any]) -> Any:
        """The result of `make()`, computed once for each `key`."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]


class Collector:
    """Fills several statistics from the same tokens.

    Every process of a `team` must be given all tokens; each does its share of the expensive part, starting at `turn`.
    """

    def __init__(
        self, kinds: Iterable[type[Statistic]], inputs: int, device: torch.device, team: Team = ALONE, turn: int = 0
    ) -> None:
        self.parts = {kind: kind(inputs, device) for kind in kinds}
        self.tokens, self.team = 0, team
        for part in self.parts.values():
            part.divide(team, turn)

    def update(self, x_BTI: Tensor, dense_BTI: Tensor | None = None) -> None:
        """Add a batch [..., in]; paired statistics need the same tokens of the dense model, else they skip it."""
        x_TI = x_BTI.reshape(-1, x_BTI.shape[-1])
        self.tokens += len(x_TI)
        for part in self.parts.values():
            if not part.paired:
                part.update(x_BTI if part.by_window else x_TI)
            elif dense_BTI is not None:
                part.update_pair(dense_BTI.reshape(x_TI.shape), x_TI)

    def finish(self, where: str) -> Statistics:
        """The values; raises CalibrationError, naming `where`, if one is not finite."""
        for part in self.parts.values():
            part.unite(self.team)
        values = {k: part.value() for k, part in self.parts.items() if not part.paired or part.tokens}
        for kind, value in values.items():
            if not finite(value):
                raise CalibrationError(
                    f"{where}: the {kind.__name__} of its input is not finite; the model overflows here"
                )
        return Statistics(values, self.tokens)
