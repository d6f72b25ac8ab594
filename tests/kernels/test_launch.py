"""Launches: on the device of what they are given."""

from __future__ import annotations

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
