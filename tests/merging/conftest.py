"""Fixtures: folders with a few oddly shaped tensors, and fine-tunes of them whose changes are partly zero or equal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.model.source import Checkpoint

SHAPES: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "embed.weight": ((63, 8), torch.bfloat16),
    "layers.0.up.weight": ((17, 33), torch.bfloat16),
    "layers.1.up.weight": ((9, 100), torch.float32),
    "layers.1.stack": ((3, 4, 5), torch.float16),
    "norm.weight": ((33,), torch.float32),
    "scalar": ((), torch.float32),
}
CONFIG = {"model_type": "llama", "vocab_size": 63, "hidden_size": 8, "num_attention_heads": 2, "dtype": "bfloat16"}
Tensors = dict[str, Tensor]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def write(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def base_tensors() -> Tensors:
    draws = generator(100)
    made = {name: torch.randn(shape, generator=draws).to(dtype) for name, (shape, dtype) in SHAPES.items()}
    return {**made, "count": torch.tensor([3])}


def tuned_tensors(seed: int) -> Tensors:
    """Tensors with a third of the entries unchanged, the others changed by few steps, so that magnitudes often tie."""
    draws = generator(seed)
    made = dict(base_tensors())
    for name, (shape, dtype) in SHAPES.items():
        steps = torch.randint(-4, 5, shape, generator=draws) * torch.randint(0, 3, shape, generator=draws)
        made[name] = (made[name].float() + steps / 64).to(dtype)
    return made


@pytest.fixture(scope="session")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`odd("base")`, `odd("a")`, `odd("b")`, `odd("c")`: shared folders, which tests must not modify."""
    root = tmp_path_factory.mktemp("odd")
    write(root / "base", base_tensors())
    for seed, name in enumerate("abc"):
        write(root / name, tuned_tensors(seed))
    return lambda name: root / name


@pytest.fixture
def changed(odd: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """`changed(tensors, model="a", **config)`: a copy of a folder with some tensors and config entries replaced."""

    def make(tensors: Mapping[str, Tensor], model: str = "a", name: str = "changed", **config: Any) -> Path:
        held = load_file(odd(model) / "model.safetensors")
        return write(tmp_path / name, {**held, **tensors}, **config)

    return make


@pytest.fixture
def read() -> Callable[[Path], Tensors]:
    """`read(folder)`: every tensor, by name."""
    return lambda folder: {name: Checkpoint(folder).tensor(name) for name in Checkpoint(folder).names()}


@pytest.fixture
def same() -> Callable[[Tensors, Tensors], bool]:
    """`same(a, b)`: equal names, dtypes and bits."""

    def compare(one: Tensors, other: Tensors) -> bool:
        return one.keys() == other.keys() and all(
            one[n].dtype == other[n].dtype
            and torch.equal(one[n].reshape(-1).view(torch.uint8), other[n].reshape(-1).view(torch.uint8))
            for n in one
        )

    return compare


@pytest.fixture(scope="session")
def tuned_llamas(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two noisy copies of the tiny Llama, `left` and `right`."""
    made = {}
    for seed, name in enumerate(("left", "right")):
        folder = tmp_path_factory.mktemp(name) / name
        shutil.copytree(tiny_llama, folder)
        draws = generator(seed)
        held = load_file(tiny_llama / "model.safetensors")
        noisy = {n: t + 0.05 * torch.randn(t.shape, generator=draws) for n, t in held.items()}
        save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})
        made[name] = folder
    return made
