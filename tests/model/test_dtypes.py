"""A checkpoint is computed in the dtype that its config names, whatever its file contains, as in transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import compress
from compress import RTN, PassManager

RATIOS = {"float32": 1e-5, "bfloat16": 2.0**-6, "float16": 2.0**-9}  # a few roundings deep


@pytest.fixture
def declared(model_folder: Any, tmp_path: Path) -> Any:
    """`declared(stored, name)`: a folder of `stored` tensors whose config names another dtype, or none."""

    def make(stored: str, name: str | None) -> Path:
        folder = Path(shutil.copytree(model_folder("llama", stored), tmp_path / "model"))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "dtype": name}))
        return folder

    return make


def compressed_like_in_memory(folder: Path, dtype: str, ids: Tensor, hugging_face: Any, assert_close: Any) -> None:
    model = hugging_face(folder).to(getattr(torch, dtype))
    PassManager([RTN(group=8)]).apply(model, ids)
    compress.run(folder, [RTN(group=8)], folder.parent / "out")
    loaded = compress.load(folder.parent / "out")
    with torch.inference_mode():
        assert_close("logits", loaded(ids).logits, model(ids).logits, RATIOS[dtype])
    assert loaded.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("dtype", RATIOS)
def test_a_file_of_the_declared_dtype(
    dtype: str, declared: Any, hugging_face: Any, ids: Tensor, assert_close: Any
) -> None:
    compressed_like_in_memory(declared(dtype, dtype), dtype, ids, hugging_face, assert_close)


@pytest.mark.parametrize(
    ("stored", "name"),
    [("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float16"), ("bfloat16", "float32")],
)
def test_a_file_of_another_dtype_than_the_config_names(
    stored: str, name: str, declared: Any, hugging_face: Any, ids: Tensor, assert_close: Any
) -> None:
    compressed_like_in_memory(declared(stored, name), name, ids, hugging_face, assert_close)


def test_a_config_that_names_no_dtype(declared: Any, ids: Tensor) -> None:
    folder = declared("bfloat16", None)
    compress.run(folder, [RTN(group=8)], folder.parent / "out")
    assert bool(torch.isfinite(compress.load(folder.parent / "out")(ids).logits).all())


def test_norms_kept_in_float32_in_a_bfloat16_model(declared: Any, ids: Tensor) -> None:
    folder = declared("bfloat16", "bfloat16")
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: t.float() for name, t in tensors.items() if "norm" in name}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    compress.run(folder, [RTN(group=8)], folder.parent / "out")
    assert bool(torch.isfinite(compress.load(folder.parent / "out")(ids).logits).all())
