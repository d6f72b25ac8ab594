"""Unusable input gives one clear line and the right exit code; nothing is half-written, and inputs are unchanged.

Recipes are tested in test_cli, headers of checkpoints in model/test_source, formats of other methods in test_sources.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import compress
from compress import (
    ALPS,
    GPTQ,
    RTN,
    ArtifactError,
    Calibration,
    CalibrationError,
    DSnoT,
    Global,
    Magnitude,
    Pass,
    Pruner,
    Realign,
    Recipe,
    RecipeError,
    Reconstruct,
    SparseGPT,
    Swaps,
    Wanda,
)
from compress.cli import main

SINGLE = "model.safetensors"
Cli = Callable[..., tuple[int, str]]


def hashes(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir() if f.is_file()}


@pytest.fixture
def refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., str]]:
    """`refused(model, recipe, code=2)`: the one line of stderr; checks the code, the folder and the model."""
    yaml = tmp_path / "r.yaml"

    def run(model: Path, recipe: str = "passes: [rtn: {group: 8}]", code: int = 2, out: Path | None = None) -> str:
        yaml.write_text(recipe)
        before, beside = hashes(model), sorted(tmp_path.iterdir())
        place = out or tmp_path / "o"
        monkeypatch.setattr(sys, "argv", ["compress", "run", str(yaml), "--model", str(model), "--out", str(place)])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr()
        assert stopped.value.code == code
        errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert said.err.splitlines()[-1] == errors[0]
        assert "Traceback" not in said.err
        assert hashes(model) == before
        assert sorted(tmp_path.iterdir()) == beside
        return errors[0]

    yield run


@pytest.fixture
def single(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def sharded(model_folder: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder("llama", sharded=True), tmp_path / "model"))


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


# -- shards ----------------------------------------------------------------------------------------


def test_a_missing_shard(sharded: Path, refused: Any) -> None:
    next(sharded.glob("model-00002-*")).unlink()
    assert "is not a file of this folder" in refused(sharded)


@pytest.mark.parametrize("keep", [0, 7, 300, -1], ids=["empty", "no length", "no header", "one byte short"])
def test_a_truncated_shard(keep: int, sharded: Path, refused: Any) -> None:
    shard = next(sharded.glob("model-00002-*"))
    shard.write_bytes(shard.read_bytes()[:keep])
    assert f"{shard}: not a readable safetensors file" in refused(sharded)


def test_a_shard_of_another_save(sharded: Path, refused: Any) -> None:
    shutil.copyfile(next(sharded.glob("model-00002-*")), sharded / "model-00007-of-00009.safetensors")
    assert "does not name this shard; remove it or fix the index" in refused(sharded)


def test_a_whole_checkpoint_beside_an_index(sharded: Path, refused: Any) -> None:
    shutil.copyfile(next(sharded.glob("model-00002-*")), sharded / "model.safetensors")
    assert "are two saves, and transformers reads the first; remove one of them" in refused(sharded)


def test_a_single_shard_that_the_index_names(sharded: Path, tmp_path: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    old = next(sharded.glob("model-00002-*"))
    old.rename(sharded / "model.safetensors")
    content["weight_map"] = {k: "model.safetensors" if v == old.name else v for k, v in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    assert compress.run(sharded, [RTN(group=8)], tmp_path / "o").coverage.missed == 0


def test_other_files_of_weights_are_no_shards(sharded: Path, tmp_path: Path) -> None:
    shutil.copyfile(next(sharded.glob("model-00002-*")), sharded / "consolidated.safetensors")
    assert compress.run(sharded, [RTN(group=8)], tmp_path / "o").coverage.missed == 0


def test_an_index_that_names_absent_tensors(sharded: Path, refused: Any) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.1.mlp.extra.weight"] = next(sharded.glob("model-00002-*")).name
    index.write_text(json.dumps(content))
    assert "the index lists 'model.layers.1.mlp.extra.weight', but the shard lacks it" in refused(sharded)


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_a_weight_that_is_not_finite_is_named_before_any_work(
    name: str, value: float, single: Path, refused: Any
) -> None:
    edit(single, lambda tensors: tensors[name].reshape(-1)[7:8].fill_(value))
    assert refused(single).endswith(f"{single}: {name} holds NaN or infinite values")


def test_a_weight_of_another_kind_of_number(single: Path, refused: Any) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit(single, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    assert f"{name} holds I8, but the model has floating-point numbers there" in refused(single)


def test_a_weight_of_another_shape(single: Path, refused: Any) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit(single, lambda tensors: tensors.update({name: tensors[name][:70].contiguous()}))
    assert f"{name} has shape (70, 48); the config implies (72, 48)" in refused(single)


def test_activations_that_overflow_name_the_first_site(single: Path, refused: Any) -> None:
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    edit(single, lambda tensors: tensors["model.layers.0.mlp.gate_proj.weight"].mul_(3e3))
    edit(single, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].mul_(3e3))
    said = refused(single, "passes: [wanda: {sites: '*.1.*'}]\ncalibration: {samples: 4, length: 32}")
    assert "model.layers.0: its output is not finite; the first input that is not finite is that of" in said
    assert said.endswith("model.layers.0.mlp.down_proj")


def test_statistics_that_overflow_name_the_site(single: Path, refused: Any) -> None:
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    edit(single, lambda tensors: tensors["model.layers.0.mlp.gate_proj.weight"].mul_(3e3))
    edit(single, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].mul_(3e3))
    said = refused(single, "passes: [wanda]\ncalibration: {samples: 4, length: 32}")
    assert "model.layers.0.mlp.down_proj: the ColumnNorm of its input is not finite" in said


# -- architectures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["no_such_family", "vit", ""])
def test_an_architecture_nobody_walks(kind: str, single: Path, refused: Any) -> None:
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    assert "config.json" in refused(single) or "is missing" in refused(single)


# -- calibration -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "\n\n \n", "too short"])
def test_calibration_without_enough_text(text: str, single: Path, tmp_path: Path, refused: Any) -> None:
    (tmp_path / "c.txt").write_text(text)
    said = refused(single, f"passes: [wanda]\ncalibration: {{data: {tmp_path / 'c.txt'}, length: 32}}")
    assert "tokens, but 160 are needed" in said


def test_a_missing_tokenizer(single: Path, refused: Any) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (single / name).unlink()
    said = refused(single, "passes: [wanda]")
    assert "there is no tokenizer, and calibration needs one" in said


def test_a_hub_dataset_without_a_network(single: Path, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    said = refused(single, "passes: [wanda]\ncalibration: {data: 'hub:someone/texts', length: 32}")
    assert "calibration.data: hub:someone/texts cannot be loaded: offline" in said


# -- places ----------------------------------------------------------------------------------------


def mounted(place: Path, options: bytes, flags: int = 0) -> Any:
    """The C library after mounting a small file system at `place`; skips where this user may not."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", flags, options):
        pytest.skip(f"this user may not mount: {os.strerror(ctypes.get_errno())}")
    return libc


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder in which this user may not write: by its mode, or for root by its file system."""
    place = tmp_path / "closed"
    place.mkdir(mode=0o500)
    if os.geteuid():
        yield place
        return
    libc = mounted(place, b"size=4m", flags=1)
    yield place
    libc.umount2(os.fsencode(place), 2)


def test_a_place_where_this_user_may_not_write(single: Path, read_only: Path, refused: Any) -> None:
    assert f"{read_only}: cannot write there: " in refused(single, out=read_only / "o")


def test_a_place_whose_name_is_no_text(single: Path, tmp_path: Path, refused: Any) -> None:
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/o\xff"))
    assert refused(single, out=place / "o") == f"error: --out: {tmp_path}/o\\udcff/o is not UTF-8; choose another name"


def command(model: Path, out: Path, *options: str) -> list[str]:
    yaml = out.with_name("recipe.yaml")
    yaml.write_text("passes: [rtn: {group: 8}]")
    return [sys.executable, "-m", "compress", "run", str(yaml), "--model", str(model), "--out", str(out), *options]


def limited() -> None:
    """Files of this process end at 30 kB, as on a disk that is full."""
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))


@pytest.mark.slow
def test_a_file_that_cannot_be_finished(single: Path, tmp_path: Path) -> None:
    before = hashes(single)
    place = tmp_path / "place"
    place.mkdir()
    done = subprocess.run(
        command(single, place / "o"), capture_output=True, text=True, preexec_fn=limited, timeout=120, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {place / 'o'}: cannot be written")
    assert "Traceback" not in done.stderr
    assert [f.name for f in place.iterdir()] == ["recipe.yaml"]
    assert hashes(single) == before


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 400 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    libc = mounted(place, b"size=400k")
    yield place
    libc.umount2(os.fsencode(place), 2)


def test_a_disk_that_is_too_small_is_found_before_the_work(single: Path, full_disk: Path) -> None:
    (full_disk / "else").write_bytes(bytes(300_000))
    with pytest.raises(compress.PlanError, match=r"bytes are free, the run may need") as told:
        compress.run(single, [RTN(group=8)], full_disk / "o")
    assert told.value.exit_code == 3
    assert [f.name for f in full_disk.iterdir()] == ["else"]


def test_a_disk_that_fills_up_during_the_work(single: Path, full_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.driver.check_room", lambda *_, **__: (full_disk / "else").write_bytes(bytes(300_000)))
    before = hashes(single)
    with pytest.raises(ArtifactError, match=r"o: cannot be written: .*No space left on device"):
        compress.run(single, [Magnitude(sparsity=0.1)], full_disk / "o")
    assert [f.name for f in full_disk.iterdir()] == ["else"]
    assert hashes(single) == before


@pytest.mark.slow
def test_hidden_states_that_do_not_fit_on_the_disk(
    single: Path, full_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.driver.check_room", lambda *_, **__: None)
    recipe = Recipe(passes=(Wanda(),), calibration=Calibration(samples=64, length=64))
    with pytest.raises(ArtifactError, match=r"cannot be written: .*No space left on device"):
        compress.run(single, recipe, full_disk / "o", offload=True)
    assert list(full_disk.iterdir()) == []


@pytest.mark.slow
def test_offloaded_states_change_nothing_and_are_gone(single: Path, tmp_path: Path) -> None:
    recipe = Recipe(passes=(GPTQ(group=8),), calibration=Calibration(samples=8, length=64))
    compress.run(single, recipe, tmp_path / "memory")
    compress.run(single, recipe, tmp_path / "disk", offload=True)
    assert hashes(tmp_path / "memory") == hashes(tmp_path / "disk")
    assert not (tmp_path / "disk" / "scratch").exists()


@pytest.mark.parametrize("size", ["0", "-1GB", "five", "1 XB", ""])
def test_a_shard_size_that_is_none(
    size: str, single: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["compress", "run", "rtn-int4", "--model", str(single), f"--shard-size={size}"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "--shard-size" in capsys.readouterr().err


def test_windows_that_are_all_padding(hugging_face: Any, single: Path) -> None:
    model, ids = hugging_face(single), torch.ones(2, 8, dtype=torch.long)
    with pytest.raises(CalibrationError, match="a window is all padding, or has padding inside"):
        compress.PassManager([Wanda()]).apply(model, ids, torch.tensor([[1] * 8, [0] * 8]))


# -- passes in an order that cannot be -------------------------------------------------------------


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([RTN(group=8), Wanda()], r"passes\[1\]\.wanda: takes a dense weight; \S+ is quantized by then"),
        ([Swaps()], r"passes\[0\]\.swaps: takes a pruned weight; \S+ is dense by then"),
        ([Wanda(), Realign()], r"passes\[1\]\.realign: takes a dense weight; \S+ is pruned by then"),
        ([Wanda(), Wanda(sites="*.mlp.*")], r"passes\[1\]\.wanda: .* \S+\.mlp\.\S+ is pruned by then"),
        ([SparseGPT(bits=4, group=8), Reconstruct()], r"passes\[1\]\.reconstruct: .* is quantized by then"),
        ([Wanda(sites="*.mlp.*"), DSnoT()], r"passes\[1\]\.dsnot: takes a pruned weight; \S+\.self_attn\.\S+ is dense"),
    ],
    ids=str,
)
def test_an_impossible_order_is_refused_before_any_work(
    passes: list[Pass], message: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.model.walk.Walk.enter", lambda *_, **__: pytest.fail("work was begun"))
    with pytest.raises(RecipeError, match=message):
        compress.run(tiny_llama, passes, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "passes", [[Wanda(sites="*.mlp.*"), RTN(group=8)], [Wanda(), Swaps(), Reconstruct(), RTN(group=8)]], ids=str
)
def test_an_order_that_can_be_is_not_refused(passes: list[Pass], tiny_llama: Path, tmp_path: Path) -> None:
    calibration = compress.Calibration(samples=4, length=32)
    assert compress.run(tiny_llama, passes, tmp_path / "out", calibration=calibration).out.is_dir()


@pytest.mark.parametrize("kind", [SparseGPT, ALPS])
def test_a_global_competition_needs_scores(kind: type[Pruner]) -> None:
    with pytest.raises(RecipeError, match=rf"passes\[0\]\.global: {kind.name} has no scores to compare; use magnitude"):
        compress.Recipe(passes=(Global(), kind()))
