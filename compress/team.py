"""The processes that share one run: how work is assigned to them, and how they exchange results.

`torchrun` starts them. Each holds the same model and does its share. Results are sent to all, so that every process
continues with the same bits, which are those that a single process would compute. A message is JSON plus tensors as
raw bytes; nothing is pickled. A single process is a team too, so that no other code needs to ask how many there are.
Not here: which work is divided (`job.py`, `model/block.py`, `passes/manager.py`).
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

ALIGNED = 64  # bytes of a cache line: a tensor's offset in one may decide which instructions read it
LONGEST_WAIT = timedelta(hours=6)  # for a live process: process 0 may evaluate, or read a large model, alone
Parcel = tuple[Any, list[Tensor]]  # a value that JSON can represent, and tensors
T = TypeVar("T")


class Team:
    """A single process, which does everything; `rank` is its number among `size` processes."""

    rank, size = 0, 1

    @property
    def chief(self) -> bool:
        """Whether this is process 0, the one that writes files and emits events."""
        return self.rank == 0

    def owns(self, number: int) -> bool:
        """Whether item `number` is this process's when items are dealt round-robin."""
        return number % self.size == self.rank

    def deal(self, costs: Sequence[float]) -> list[int]:
        """The process that does each task: tasks are dealt by falling cost, each to the process with the least load."""
        loads = [0.0] * self.size
        owners = [0] * len(costs)
        for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
            owners[i] = loads.index(min(loads))
            loads[owners[i]] += costs[i]
        return owners

    def share(self, make: Callable[[], Parcel]) -> Iterator[Parcel]:
        """The result of `make` in every process, in order of rank; the tensors are lent and must not be changed.

        If it raises in one process, all raise: a CompressError or MemoryError as itself, any other error as
        LostProcess. The parcels arrive one by one, so the caller must consume the whole iterator.
        """
        return iter([make()])

    def first(self, make: Callable[[], T]) -> T:
        """The result of `make` in process 0, the only one to call it; must be JSON-serializable. Raises as `share`."""
        return make()

    def agree(self, values: Callable[[], Mapping[str, Any]]) -> None:
        """Raise RecipeError unless all processes have the same values; a single process does not even compute them."""

    def least(self, value: int) -> int:
        """The smallest value of all processes."""
        return value

    def placed(self, device: str) -> str:
        """The device that this process computes on if the run was given `device`."""
        return device


ALONE = Team()
JOINED: ContextVar[Team | None] = ContextVar("JOINED", default=None)  # one at a time, as with torch's group


class Processes(Team):
    """This process among those of torch's default process group, which must be initialized."""

    def __init__(self) -> None:
        from torch import distributed

        self.group = distributed
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self.wire = torch.device("cuda", local_rank()) if distributed.get_backend() == "nccl" else torch.device("cpu")
        self.apart = False  # whether no message can be sent: tensors are being exchanged, or an error has ended the run
        self.agreed = False  # whether that error is known to all processes

    def share(self, make: Callable[[], Parcel]) -> Iterator[Parcel]:
        """Exchange all JSON at once, then broadcast each tensor from its process to the others."""
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
        """Run `make` in process 0 while the other processes wait."""
        found: T = next(self.share(lambda: (make() if self.chief else None, [])))[0]
        return found

    def agree(self, values: Callable[[], Mapping[str, Any]]) -> None:
        """Compare the values of all processes; costs one exchange."""
        own = dict(values())
        told = self._tell({"values": own})
        for rank, name in ((rank, name) for rank in range(self.size) for name in own):
            first, other = (told[i]["values"][name] for i in (0, rank))
            if first != other:
                raise RecipeError(
                    f"torchrun: {name}: {said(first)} in process 0, {said(other)} in process {rank}; all processes "
                    "of a run must agree"
                )

    def least(self, value: int) -> int:
        """The smallest value of all processes; costs one exchange."""
        return int(min(self._tell(value)))

    def placed(self, device: str) -> str:
        """For `cuda`, this process's own GPU. Raises RecipeError for one GPU that all processes would share."""
        if device.startswith("cuda:"):
            raise RecipeError(
                f"--device: {device!r} is one GPU for {self.size} processes; use cuda, which gives each its own"
            )
        return f"cuda:{local_rank()}" if device == "cuda" else device

    def common(self, error: Exception) -> Exception:
        """The error that all processes raise after this one met `error`: that of the lowest rank that met one.

        The other processes learn of it in their next exchange. Returns `error` itself if no message can be sent.
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
        """The parcels in order of rank; each tensor is broadcast when the iterator reaches it."""
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
        """A tensor that another process sends, in new memory with the same strides and alignment."""
        name, shape, stride, phase, where = held
        flat_N = torch.empty(phase + span(shape, stride), dtype=getattr(torch, name), device=self.wire)[phase:]
        self._broadcast(flat_N, rank)
        return flat_N.to("cpu" if where == "cpu" else f"cuda:{local_rank()}").as_strided(shape, stride)

    def _broadcast(self, flat_N: Tensor, rank: int) -> None:
        """Broadcast the bytes of a flat tensor from process `rank` into the tensors of the others."""
        if flat_N.numel():
            with self._linked():
                self.group.broadcast(flat_N.view(torch.uint8), src=rank)

    def _tell(self, value: Any, error: Exception | None = None) -> list[Any]:
        """All-gather a JSON value; raises the error of the lowest rank that sent one, which may be our own."""
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
        """Turn a broken connection, which means that another process has died, into LostProcess."""
        try:
            yield
        except RuntimeError as error:
            self.apart = True
            reason = " ".join(str(error).split())[-160:]
            raise LostProcess(f"another process of this run has ended, or does not answer ({reason})") from error


@contextmanager
def joined(device: str, once: bool = False) -> Iterator[Team]:
    """The team of processes that torchrun started with this one, or this process alone; nested calls share one team.

    An error in one process becomes the error of all. With `once`, only process 0 raises it and the others exit with its
    exit code, so that it appears once in their common output. A process group that torch already has is used and not
    destroyed. Raises RecipeError if the processes do not find each other.
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
        if ours and not (failed and team.wire.type == "cuda"):  # NCCL would wait for processes that do not answer
            team.group.destroy_process_group()


def start(device: str) -> tuple[Processes, bool] | None:
    """The team, and whether its process group was created here; None if there is only this process."""
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
        raise RecipeError(f"torchrun: the processes cannot connect to each other: {error}") from error
    return Processes(), True


def number(name: str, default: int) -> int:
    """A number that torchrun sets in the environment; raises RecipeError if it is not a number."""
    told = os.environ.get(name, str(default))
    if not told.isdecimal():
        raise RecipeError(f"{name}={told!r} in the environment is not a number; start with torchrun, or unset it")
    return int(told)


def local_rank() -> int:
    """The number of this process among those on its machine."""
    return number("LOCAL_RANK", 0)


# -- messages --------------------------------------------------------------------------------------


def form(tensor: Tensor) -> list[Any]:
    """What a receiver must know before a tensor's bytes arrive: dtype, shape, strides, alignment, device type."""
    name = str(tensor.dtype).removeprefix("torch.")
    phase = tensor.data_ptr() % ALIGNED // tensor.element_size()
    return [name, list(tensor.shape), list(tensor.stride()), phase, tensor.device.type]


def span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """The number of values from a tensor's first entry to its last in memory, gaps included."""
    return 0 if 0 in shape else 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))


def flat(tensor: Tensor) -> Tensor:
    """That span of memory as one flat tensor.

    Strides and alignment are kept, because the last bits of a product depend on both.
    """
    return tensor.detach().as_strided((span(tensor.shape, tensor.stride()),), (1,))


def kind_of(error: Exception) -> str:
    """How an error is named in a message: its class in `compress.errors`, `memory`, or `?` and another class's name."""
    if out_of_memory(error):
        return "memory"
    return next(
        (k.__name__ for k in type(error).__mro__ if k.__module__ == errors.__name__), f"?{type(error).__name__}"
    )


def error_of(rank: int, kind: str, message: str) -> Exception:
    """The error to raise for one that process `rank` met."""
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, CompressError):
        return known(message)
    if kind == "memory":
        return MemoryError(message)
    return LostProcess(f"process {rank} of this run failed: {kind.removeprefix('?')}: {message}")


def exit_code(error: Exception) -> int:
    """The exit code of an error that the command line reports in one line; 0 for a bug."""
    if isinstance(error, CompressError):
        return error.exit_code
    return 3 if out_of_memory(error) else 0


def said(value: Any) -> str:
    """A value as it appears in an error message, at most 120 characters."""
    return json.dumps(value)[:120]
