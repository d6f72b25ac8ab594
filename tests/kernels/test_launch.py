"""Kernels are launched on the device of their arguments."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from compress_kernels.gpu import launch

GPU = Path(launch.__file__).parent
DIRECT = re.compile(r"^\s+_\w+_kernel\[", re.MULTILINE)


def test_a_kernel_runs_on_the_device_of_its_first_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    @contextmanager
    def entered(tensor: torch.Tensor) -> Iterator[None]:
        seen.append(tensor)
        yield
        seen.append("left")

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            return lambda *arguments, **constants: seen.append((grid, arguments, constants))

    monkeypatch.setattr(torch.cuda, "device_of", entered)
    x = torch.zeros(2)

    launch.run(Kernel(), (3,), x, 5, SIZE=7)

    assert seen == [x, ((3,), (x, 5), {"SIZE": 7}), "left"]


@pytest.mark.parametrize("file", sorted(path.name for path in GPU.glob("*.py")))
def test_every_launch_goes_that_way(file: str) -> None:
    assert DIRECT.findall((GPU / file).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("file", sorted(path.stem for path in GPU.glob("*.py") if path.stem != "__init__"))
def test_what_kernels_read_of_a_module_equals_itself(file: str) -> None:
    triton = pytest.importorskip("triton.language")
    module = importlib.import_module(f"compress_kernels.gpu.{file}")
    constants = {name: value.value for name, value in vars(module).items() if isinstance(value, triton.constexpr)}
    # triton compares them at every launch, and refuses the second one if there is a NaN
    assert [name for name, value in constants.items() if value != value] == []


# -- counters of programs that split the inputs ------------------------------------------------------


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> dict[str, int | bool]:
    """A GPU's current stream, and whether it is being captured, as a test sets them."""
    state: dict[str, int | bool] = {"stream": 0, "capturing": False}

    class Stream:
        @property
        def cuda_stream(self) -> int:
            return int(state["stream"])

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(state["capturing"]))
    return state


def room_of_a_gpu() -> launch.Room:
    room = launch.Room(torch.device("cpu"))
    room.device = torch.device("cuda")
    room.fresh = lambda tiles: torch.zeros(tiles, dtype=torch.int32)  # type: ignore[method-assign]
    return room


def test_streams_have_counters_of_their_own_while_there_are(streams: dict[str, int | bool]) -> None:
    room = room_of_a_gpu()
    found = []
    for stream in range(launch.STREAMS + 2):
        streams["stream"] = 1000 + stream
        found.append(room.counters(4).data_ptr())
    streams["stream"] = 1000

    assert len(set(found[: launch.STREAMS])) == launch.STREAMS
    assert room.counters(4).data_ptr() == found[0]
    inside = room.streams.data_ptr(), room.streams.data_ptr() + room.streams.nbytes
    assert not any(inside[0] <= each < inside[1] for each in found[launch.STREAMS :])  # fresh, not shared


def test_every_captured_launch_has_counters_of_its_own(streams: dict[str, int | bool]) -> None:
    room = room_of_a_gpu()
    streams["capturing"] = True

    first, second = room.counters(8), room.counters(8)
    room.taken = launch.CAPTURED - 4
    third = room.counters(8)

    assert second.data_ptr() == first.data_ptr() + first.nbytes
    assert third.shape == (8,) and not third.any()


def test_the_first_launch_is_not_captured(streams: dict[str, int | bool]) -> None:
    streams["capturing"] = True

    with pytest.raises(RuntimeError, match="run the model once"):
        launch.Room(torch.device("cuda"))
