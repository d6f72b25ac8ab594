"""An unusable checkpoint is refused with one clear sentence, before anything is written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress import ArtifactError, CalibrationError, Magnitude, Wanda
from compress.model import source
from compress.model.source import DTYPES, Checkpoint, Shard, dtype_of, locate

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@pytest.fixture
def single(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def sharded(model_folder: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder("llama", sharded=True), tmp_path / "model"))


def refused(folder: Path, message: str) -> None:
    """The run stops with this message and leaves nothing beside the model."""
    with pytest.raises(ArtifactError, match=message) as error:
        compress.run(folder, [Magnitude()], folder.parent / "out")
    assert "\n" not in str(error.value).strip()
    assert [p.name for p in folder.parent.iterdir() if p != folder] == []


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(folder: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


# -- folders ---------------------------------------------------------------------------------------


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no model folder at '.*nowhere'; give a folder with config\.json"):
        compress.run(tmp_path / "nowhere", [Magnitude()], tmp_path / "out")


def test_a_name_of_the_hub_is_told_that_nothing_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtifactError, match=r"at 'org/Name-1\.5B'; nothing is downloaded: give a folder with config"):
        locate("org/Name-1.5B")
    for path in ("./nowhere", "/org/name", "nowhere"):
        with pytest.raises(ArtifactError, match=r"'; give a folder with config"):
            locate(path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    with pytest.raises(ArtifactError, match=r"'; give a folder with config"):
        locate("org/name")


def test_builtin_is_a_model(tmp_path: Path) -> None:
    assert (locate("builtin") / "config.json").is_file()


def test_a_folder_without_a_config_is_refused(single: Path) -> None:
    (single / "config.json").unlink()
    refused(single, r"no model folder at")


@pytest.mark.parametrize("text", ["", "{", "\x00", '{"a": 1,}'])
def test_a_malformed_config_is_refused(single: Path, text: str) -> None:
    (single / "config.json").write_text(text)
    refused(single, r"config\.json: config\.json cannot be read")


def test_a_config_that_is_a_list_is_refused(single: Path) -> None:
    (single / "config.json").write_text("[]")
    refused(single, r"config\.json: config\.json must be a JSON object")


def test_a_config_of_an_unknown_family_is_refused(single: Path) -> None:
    edit_json(single / "config.json", lambda c: c.update(model_type="no_such_family"))
    refused(single, r"config\.json: transformers cannot build this model")


def test_a_config_with_an_unknown_dtype_is_refused(single: Path) -> None:
    edit_json(single / "config.json", lambda c: c.update(dtype="float17"))
    refused(single, r"config\.json: unknown dtype 'float17'")


def test_a_folder_without_weights_is_refused(single: Path) -> None:
    (single / SINGLE).unlink()
    refused(single, r"no model\.safetensors and no model\.safetensors\.index\.json")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_not_read(single: Path, name: str) -> None:
    (single / SINGLE).rename(single / name)
    refused(single, rf"{name}: pickled weights can run code and are not read; convert the folder to safetensors")


@pytest.mark.parametrize(
    "quantization", [{"quant_method": "gptq", "bits": 4}, {"bits": 4}, "int4"], ids=["gptq", "unnamed", "text"]
)
def test_a_quantized_source_is_refused(single: Path, quantization: object) -> None:
    edit_json(single / "config.json", lambda c: c.update(quantization_config=quantization))
    refused(single, "already quantized by .*; start from the dense model")


def test_a_compressed_source_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    compress.run(tiny_llama, [Magnitude()], tmp_path / "model")
    refused(tmp_path / "model", "already quantized by compress; start from the dense model")


# -- the index -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "a\x00b"]
)
def test_an_index_that_leaves_the_folder_is_refused(sharded: Path, shard: str) -> None:
    (sharded / "sub").mkdir()
    shutil.copy(sharded / "model-00001-of-00007.safetensors", sharded / "sub" / "x.safetensors")
    edit_json(sharded / INDEX, lambda c: c["weight_map"].update({"lm_head.weight": shard}))
    refused(sharded, "is not a file of this folder")


def test_a_missing_shard_is_refused(sharded: Path) -> None:
    (sharded / "model-00003-of-00007.safetensors").unlink()
    refused(sharded, r"shard 'model-00003-of-00007\.safetensors' is not a file of this folder")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_an_index_that_promises_too_much_is_refused(sharded: Path, name: str) -> None:
    other = "model-00003-of-00007.safetensors"
    edit_json(sharded / INDEX, lambda c: c["weight_map"].update({name: other}))
    refused(sharded, rf"model-00003-of-00007\.safetensors: .*'{name}'")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_an_index_without_a_map_is_refused(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    refused(sharded, r"model\.safetensors\.index\.json: no weight_map")


@pytest.mark.parametrize("shard", [None, 3, ["x"]])
def test_an_index_that_names_no_text_is_refused(sharded: Path, shard: object) -> None:
    edit_json(sharded / INDEX, lambda c: c["weight_map"].update({"lm_head.weight": shard}))
    refused(sharded, "is not a file of this folder")


# -- tensors ---------------------------------------------------------------------------------------

NORM, PROJECTION, EMBEDDING = "model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize("name", [NORM, PROJECTION, EMBEDDING])
def test_a_missing_tensor_is_refused(single: Path, name: str) -> None:
    edit_tensors(single, lambda t: t.pop(name))
    refused(single, f"{name} is missing|the checkpoint lacks '{name}'|no tensor '{name}'")


def test_a_block_tensor_of_another_shape_is_refused(single: Path) -> None:
    edit_tensors(single, lambda t: t.update({PROJECTION: t[PROJECTION][:-1].contiguous()}))
    refused(single, rf"{PROJECTION} has shape \(71, 48\); the config implies \(72, 48\)")


@pytest.mark.parametrize("name", [NORM, EMBEDDING])
def test_a_frame_tensor_of_another_shape_is_refused(single: Path, name: str) -> None:
    edit_tensors(single, lambda t: t.update({name: t[name][:-1].contiguous()}))
    refused(single, rf"{name} has shape|size mismatch for {name}")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(single: Path, keep: int) -> None:
    content = (single / SINGLE).read_bytes()
    (single / SINGLE).write_bytes(content[:keep])
    refused(single, r"model\.safetensors: not a readable safetensors file")


def test_a_shard_that_is_no_safetensors_is_refused(sharded: Path) -> None:
    (sharded / "model-00002-of-00007.safetensors").write_bytes(b"\x80\x04not a tensor")
    refused(sharded, r"model-00002-of-00007\.safetensors: not a readable safetensors file")


# -- tokenizers ------------------------------------------------------------------------------------


def test_without_a_tokenizer_calibration_is_refused(single: Path) -> None:
    (single / "tokenizer.json").unlink()
    (single / "tokenizer_config.json").unlink()
    with pytest.raises(CalibrationError, match="there is no tokenizer, and calibration needs one"):
        compress.run(single, [Wanda()], single.parent / "out")
    assert not (single.parent / "out").exists()


def test_without_a_tokenizer_data_free_passes_run(single: Path) -> None:
    (single / "tokenizer.json").unlink()
    (single / "tokenizer_config.json").unlink()
    report = compress.run(single, [Magnitude()], single.parent / "out")
    assert report.out.is_dir()


# -- reading ---------------------------------------------------------------------------------------


def test_names_and_shapes_come_from_headers(sharded: Path) -> None:
    source = Checkpoint(sharded)
    shapes = source.shapes()
    assert source.names() == sorted(shapes)
    assert shapes["model.layers.0.mlp.up_proj.weight"] == (72, 48)
    assert "lm_head.weight" in source


def test_an_absent_tensor_is_named(single: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no tensor 'nothing\.weight'"):
        Checkpoint(single).tensor("nothing.weight")


@pytest.mark.parametrize(
    ("config", "dtype"),
    [({"dtype": "bfloat16"}, torch.bfloat16), ({"torch_dtype": "float16"}, torch.float16), ({}, torch.float32)],
)
def test_the_dtype_is_that_of_the_config(config: dict[str, str], dtype: torch.dtype) -> None:
    assert dtype_of(config) == dtype


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_a_weight_that_is_not_finite_is_named(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors[name][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=rf"{name} holds NaN or infinite values"):
        compress.run(folder, [Magnitude()], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", [Magnitude(), Wanda()])
def test_a_tokenizer_that_cannot_be_loaded_is_refused(step: Any, single: Path) -> None:
    """Otherwise the probe would be random tokens although the model has words."""
    (single / "tokenizer.json").write_text("{")
    with pytest.raises(CalibrationError, match="its tokenizer cannot be loaded: "):
        compress.run(single, [step], single.parent / "out")
    assert not (single.parent / "out").exists()


def test_a_folder_without_a_vocabulary_counts_as_without_a_tokenizer(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CalibrationError, match="there is no tokenizer"):
        compress.run(folder, [compress.Wanda()], tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32])
@pytest.mark.parametrize("at_once", [8, 1 << 22])
def test_one_reading_gives_hashes_and_what_is_not_finite(
    at_once: int, dtype: torch.dtype, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "m"))
    wanted, tensors = set(), {}
    for i, value in enumerate((0.0, 1.0, -3e4, float("nan"), float("inf"), -float("inf"))):
        name = f"t{i}"
        tensors[name] = torch.ones(3, 7).to(dtype)
        if dtype.is_floating_point:
            tensors[name][i % 3, i] = value
            wanted |= {name} if not torch.isfinite(tensors[name]).all() else set()
    tensors["most"] = torch.full((5,), torch.finfo(dtype).min if dtype.is_floating_point else -1, dtype=dtype)
    tensors["none"] = torch.empty(0, dtype=dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(source, "AT_ONCE", at_once)
    opened = Checkpoint(folder)
    assert opened.unsound() == wanted
    assert opened.digests() == {SINGLE: hashlib.sha256((folder / SINGLE).read_bytes()).hexdigest()}


def test_what_is_not_finite_in_a_copy_that_the_index_does_not_name_is_not_looked_at(
    sharded: Path,
) -> None:
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    name, other = next((n, f) for n, s in index.items() for f in index.values() if f != s)
    held = load_file(sharded / other)
    save_file(held | {name: torch.full((2, 2), float("nan"))}, sharded / other, metadata={"format": "pt"})
    opened = Checkpoint(sharded)
    assert opened.unsound() == frozenset()
    assert opened.digests() == {
        f: hashlib.sha256((sharded / f).read_bytes()).hexdigest() for f in sorted({*index.values()})
    }
    opened.ahead([name])
    start, end = Shard(opened.files[name]).span(name)
    assert end - start == opened.headers[name].nbytes


def test_a_hint_for_a_shard_that_is_gone_is_none(single: Path) -> None:
    opened = Checkpoint(single)
    names = opened.names()
    (single / SINGLE).unlink()
    opened.ahead(names)
    with pytest.raises(ArtifactError, match=rf"model\.safetensors: cannot read '{names[0]}': No such file"):
        opened.tensor(names[0])


def test_a_tensor_is_mapped_as_the_library_reads_it(tmp_path: Path) -> None:
    made = {name: torch.arange(6).to(dtype).reshape(2, 3) for name, dtype in DTYPES.items()}
    made |= {"F4": torch.arange(6, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}
    save_file(made | {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4)}, tmp_path / SINGLE)
    shard, read = Shard(tmp_path / SINGLE), load_file(tmp_path / SINGLE)
    assert shard.held.keys() == read.keys()
    for name, want in read.items():
        found = shard.tensor(name)
        assert (found.dtype, found.shape) == (want.dtype, want.shape), name
        assert bytes(found.reshape(-1).view(torch.uint8)) == bytes(want.reshape(-1).view(torch.uint8)), name
        found.view(torch.uint8 if found.ndim else found.dtype).zero_()  # its own copy of the page, not the file's
    assert Shard(tmp_path / SINGLE).tensor("F32").tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ArtifactError, match="cannot read 'other': the file has no such tensor"):
        shard.tensor("other")


def test_a_file_that_became_shorter_is_refused(single: Path) -> None:
    opened = Checkpoint(single)
    name = max(opened.files, key=lambda name: Shard(opened.files[name]).span(name))
    os.truncate(single / SINGLE, (single / SINGLE).stat().st_size - 1)
    with pytest.raises(ArtifactError, match=rf"model\.safetensors: cannot read '{name}'"):
        opened.tensor(name)


@pytest.mark.parametrize("reader", ["torch.from_file", "compress.model.source.safe_open"])
def test_memory_that_runs_out_is_not_the_fault_of_the_file(
    reader: str, single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    opened = Checkpoint(single)
    monkeypatch.setattr(reader, fail)
    with pytest.raises(MemoryError, match="allocate memory"):
        (opened if reader == "torch.from_file" else Checkpoint(single)).tensor(opened.names()[0])


def test_a_file_that_another_replaced_is_refused(single: Path) -> None:
    """The offsets are those of the one that was opened."""
    opened, other = Checkpoint(single), single / "other"
    names = opened.names()
    save_file({name: torch.cat((tensor, tensor)) for name, tensor in load_file(single / SINGLE).items()}, other)
    other.replace(single / SINGLE)
    with pytest.raises(ArtifactError, match=rf"cannot read '{names[0]}': the file was changed since it was opened"):
        opened.tensor(names[0])


def test_a_tensor_keeps_no_file_open_and_a_storage_of_its_size(single: Path) -> None:
    """A block of a mixture of experts has more tensors than a process may have open files."""
    opened = Checkpoint(single)
    names, before = opened.names(), os.listdir("/dev/fd")
    held = [opened.tensor(name) for name in names]
    assert os.listdir("/dev/fd") == before
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in held)


def test_the_library_reads_the_header_of_a_shard_once(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes time by the number of tensors: one header for each of them would make reading quadratic."""
    read, library = [], source.safe_open
    monkeypatch.setattr(source, "safe_open", lambda path, **how: (read.append(path), library(path, **how))[1])
    opened = Checkpoint(sharded)
    assert all(opened.tensor(name).shape == opened.headers[name].shape for name in opened.names())
    assert sorted(read) == sorted(set(opened.files.values()))


def test_every_byte_is_asked_for_once(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
    monkeypatch.setattr(
        os, "posix_fadvise", lambda handle, start, size, how: asked.append((start, size)), raising=False
    )
    opened = Checkpoint(tiny_llama)
    opened.ahead(["not there", *opened.names()])
    size = (tiny_llama / "model.safetensors").stat().st_size
    assert sum(length for _, length in asked) == opened.nbytes() and max(map(sum, asked)) == size
    monkeypatch.delattr(os, "posix_fadvise")
    opened.ahead(opened.names())
