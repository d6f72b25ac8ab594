"""The processes that work on one run together: who does what, and how they tell each other.

`torchrun` starts them. Each holds the same model and does its share; what one has computed it tells to all, so that all
go on with the same bits, which are those of one process. A message is JSON with tensors as raw bytes beside it: nothing
is pickled. One process alone is a team too, so nobody else asks how many there are.
Not here: what is divided (`job.py`, `model/block.py`, `passes/manager.py`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from compress import errors
from compress.errors import CompressError, LostProcess, RecipeError, out_of_memory

ALIGNED = 64  # bytes: where in such a line a tensor begins may decide which instructions read it
LONGEST_WAIT = timedelta(hours=6)  # for a process that lives: process 0 may evaluate, or read a large model, alone
Parcel = tuple[Any, list[Tensor]]  # what JSON can say, and tensors
T = TypeVar("T")


class Team:
    """One process alone, which does everything; `rank` is its number among `size`."""

    rank, size = 0, 1

    @property
    def chief(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def owns(self, number: int) -> bool:
        """Whether what is dealt round by number is this process's."""
        return number % self.size == self.rank

    def deal(self, costs: Sequence[float]) -> list[int]:
        """The process that does each of some works: the costliest first, each to who has least so far."""
        loads = [0.0] * self.size
        owners = [0] * len(costs)
        for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
            owners[i] = loads.index(min(loads))
            loads[owners[i]] += costs[i]
        return owners

    def share(self, make: Callable[[], Parcel]) -> Iterator[Parcel]:
        """What `make` gives in each process, in their order; the tensors are lent, not to be changed.

        Where it raises in one, all raise that: a CompressError or missing memory as what it is, else LostProcess. The
        parcels come one by one, so whoever asks takes them all.
        """
        return iter([make()])

    def first(self, make: Callable[[], T]) -> T:
        """What `make` gives in process 0, which alone calls it; JSON must be able to say it. Raises like `share`."""
        return make()

    def agree(self, values: Callable[[], Mapping[str, Any]]) -> None:
        """Raise RecipeError unless every process has these values, by their names; a process alone does not look."""

    def least(self, value: int) -> int:
        """The smallest value of all processes."""
        return value

    def placed(self, device: str) -> str:
        """The device that this process computes on, where the run is told `device`."""
        return device


ALONE = Team()
JOINED: ContextVar[Team | None] = ContextVar("JOINED", default=None)  # like torch's group, one at a time


class Processes(Team):
    """This process among those of torch's default group, which must be there."""

    def __init__(self) -> None:
        from torch import distributed

        self.group = distributed
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self.wire = torch.device("cuda", local_rank()) if distributed.get_backend() == "nccl" else torch.device("cpu")
        self.apart = False  # whether nothing can be told to all: tensors are under way, or it has ended in an error
        self.agreed = False  # whether that error is the same in all

    def share(self, make: Callable[[], Parcel]) -> Iterator[Parcel]:
        """One exchange of all JSON, then each tensor from its process to the others."""
        try:
            value, tensors = make()
        except LostProcess:
            raise
        except Exception as error:
            if (common := self.common(error)) is not error:
                raise common from error
            raise
        forms = [form(tensor) for tensor in tensors]
        told = self._tell({"value": value, "tensors": forms})
        return self._parcels(told, value, tensors)

    def first(self, make: Callable[[], T]) -> T:
        """The other processes wait."""
        found: T = next(self.share(lambda: (make() if self.chief else None, [])))[0]
        return found

    def agree(self, values: Callable[[], Mapping[str, Any]]) -> None:
        """Costs one exchange."""
        own = dict(values())
        told = self._tell({"values": own})
        for rank, name in ((rank, name) for rank in range(self.size) for name in own):
            first, other = (told[i]["values"][name] for i in (0, rank))
            if first != other:
                raise RecipeError(
                    f"torchrun: {name}: {said(first)} in process 0, {said(other)} in process {rank}; every process of "
                    "a run needs the same"
                )

    def least(self, value: int) -> int:
        """Costs one exchange."""
        return int(min(self._tell(value)))

    def placed(self, device: str) -> str:
        """A GPU of its own. Raises RecipeError for one GPU that all would share."""
        if device.startswith("cuda:"):
            raise RecipeError(f"--device: {device!r} is one GPU for {self.size} processes; cuda gives each its own")
        return f"cuda:{local_rank()}" if device == "cuda" else device

    def common(self, error: Exception) -> Exception:
        """What all processes raise where this one has met an error: that of the first of them that met one.

        The others learn of it at what they exchange next. The error itself where no one can be told any more.
        """
        if self.apart:
            return error
        try:
            self._tell({"error": [kind_of(error), str(error)]}, error)
        except LostProcess:
            return error
        except Exception as first:
            return first
        return error

    def _parcels(self, told: list[Any], value: Any, tensors: list[Tensor]) -> Iterator[Parcel]:
        """The parcels in order of processes; each tensor is on the wire when its turn comes."""
        self.apart = any(message["tensors"] for message in told)
        for rank, message in enumerate(told):
            if rank == self.rank:
                for tensor in tensors:
                    self._broadcast(flat(tensor).to(self.wire), rank)
                yield value, tensors
            else:
                yield message["value"], [self._receive(held, rank) for held in message["tensors"]]
        self.apart = False

    def _receive(self, held: Sequence[Any], rank: int) -> Tensor:
        """A tensor that another process sends, in memory of its own, laid out as there."""
        name, shape, stride, phase, where = held
        flat_N = torch.empty(phase + span(shape, stride), dtype=getattr(torch, name), device=self.wire)[phase:]
        self._broadcast(flat_N, rank)
        return flat_N.to("cpu" if where == "cpu" else f"cuda:{local_rank()}").as_strided(shape, stride)

    def _broadcast(self, flat_N: Tensor, rank: int) -> None:
        """The bytes of a flat tensor, from one process into those of the others."""
        if flat_N.numel():
            with self._linked():
                self.group.broadcast(flat_N.view(torch.uint8), src=rank)

    def _tell(self, value: Any, error: Exception | None = None) -> list[Any]:
        """What each process tells at this moment; raises the error of the first that tells one, which may be ours."""
        text_N = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.wire)
        sizes = [int(size) for size in self._gather(torch.tensor([len(text_N)], device=self.wire))]
        padded_N = torch.zeros(max(sizes), dtype=torch.uint8, device=self.wire)
        padded_N[: len(text_N)] = text_N
        texts = self._gather(padded_N)
        told = [json.loads(bytes(t.cpu().numpy())[:n]) for t, n in zip(texts, sizes, strict=True)]
        for rank, message in enumerate(told):
            if isinstance(message, dict) and "error" in message:
                self.apart = self.agreed = True
                raise error if error is not None and rank == self.rank else error_of(rank, *message["error"])
        return told

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        """This tensor of every process."""
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        with self._linked():
            self.group.all_gather(found, tensor)
        return found

    @contextmanager
    def _linked(self) -> Iterator[None]:
        """A connection that breaks means that a process has gone."""
        try:
            yield
        except RuntimeError as error:
            self.apart = True
            reason = " ".join(str(error).split())[-160:]
            raise LostProcess(f"another process of this run has ended, or does not answer ({reason})") from error


@contextmanager
def joined(device: str, once: bool = False) -> Iterator[Team]:
    """The processes that torchrun has started with this one, or this one alone; those that are joined already again.

    An error of one becomes the error of all. With `once`, only process 0 raises it and another ends with its exit code,
    so that whoever looks at their common output sees it once. A group that torch has already is used and left.
    Raises RecipeError if the processes do not find each other.
    """
    if (team := JOINED.get()) is not None:
        yield team
        return
    made = start(device)
    if made is None:
        yield ALONE
        return
    team, ours = made
    token, failed = JOINED.set(team), True
    try:
        yield team
        failed = False
    except Exception as error:
        common = team.common(error)
        if once and team.agreed and not team.chief and (code := exit_code(common)):
            raise SystemExit(code) from error
        if common is error:
            raise
        raise common from error
    finally:
        JOINED.reset(token)
        if ours and not (failed and team.wire.type == "cuda"):  # NCCL would wait for those that do not answer
            team.group.destroy_process_group()


def start(device: str) -> tuple[Processes, bool] | None:
    """The processes and whether their group was made here, or None if there is only this one."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        return None if distributed.get_world_size() == 1 else (Processes(), False)
    if number("WORLD_SIZE", 1) == 1:
        return None
    backend = "nccl" if device.startswith("cuda") and torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(local_rank())
    try:
        distributed.init_process_group(backend, timeout=LONGEST_WAIT)
    except (RuntimeError, ValueError) as error:
        raise RecipeError(f"torchrun: the processes do not find each other: {error}") from error
    return Processes(), True


def number(name: str, default: int) -> int:
    """What torchrun tells in the environment; raises RecipeError if it is no number."""
    told = os.environ.get(name, str(default))
    if not told.isdecimal():
        raise RecipeError(f"{name}={told!r} in the environment is not a number; start with torchrun, or unset it")
    return int(told)


def local_rank() -> int:
    """The number of this process among those of its machine."""
    return number("LOCAL_RANK", 0)


# -- messages --------------------------------------------------------------------------------------


def form(tensor: Tensor) -> list[Any]:
    """What is to be known of a tensor before its bytes come."""
    name = str(tensor.dtype).removeprefix("torch.")
    phase = tensor.data_ptr() % ALIGNED // tensor.element_size()
    return [name, list(tensor.shape), list(tensor.stride()), phase, tensor.device.type]


def span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Values in the memory that a tensor's entries lie in, from the first to the last."""
    return 0 if 0 in shape else 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))


def flat(tensor: Tensor) -> Tensor:
    """That memory: products depend in their last bits on how and where a matrix lies, so both are kept."""
    return tensor.detach().as_strided((span(tensor.shape, tensor.stride()),), (1,))


def kind_of(error: Exception) -> str:
    """The class of ours that an error is, `memory` if that ran out, else its own name, which no other process knows."""
    if out_of_memory(error):
        return "memory"
    return next(
        (k.__name__ for k in type(error).__mro__ if k.__module__ == errors.__name__), f"?{type(error).__name__}"
    )


def error_of(rank: int, kind: str, message: str) -> Exception:
    """An error that another process has met."""
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, CompressError):
        return known(message)
    if kind == "memory":
        return MemoryError(message)
    return LostProcess(f"process {rank} of this run failed: {kind.removeprefix('?')}: {message}")


def exit_code(error: Exception) -> int:
    """The exit code of an error that the command line tells in one line; 0 if it is a bug."""
    if isinstance(error, CompressError):
        return error.exit_code
    return 3 if out_of_memory(error) else 0


def said(value: Any) -> str:
    """A value in a message."""
    return json.dumps(value)[:120]
