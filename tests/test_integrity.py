"""An artifact is whole or absent, and damage to it is detected."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import compress
from compress import (
    RTN,
    AcceptanceError,
    ArtifactError,
    CalibrationError,
    Magnitude,
    PlanError,
    RecipeError,
    Site,
    UnsupportedWeight,
    VerificationError,
    Weight,
    WeightPass,
)
from compress.artifact import Artifact, seal, verify


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# -- verification ----------------------------------------------------------------------------------


def test_an_untouched_folder_verifies(llama_artifact: Path) -> None:
    lines = verify(llama_artifact)
    assert lines[1] == "14 compressed sites decode to finite values"


@pytest.mark.parametrize("shard", [1, 2, 3])
@pytest.mark.parametrize("position", [0, 100, -1], ids=["length", "header", "data"])
def test_a_flipped_byte_is_found(own_artifact: Path, shard: int, position: int) -> None:
    path = own_artifact / f"model-0000{shard}-of-00003.safetensors"
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(VerificationError, match=rf"{path.name}: its sha256 is not the recorded one"):
        verify(own_artifact)


@pytest.mark.parametrize("shard", [1, 2, 3])
def test_a_missing_shard_is_found(own_artifact: Path, shard: int) -> None:
    (own_artifact / f"model-0000{shard}-of-00003.safetensors").unlink()
    with pytest.raises(VerificationError, match=rf"model-0000{shard}-of-00003\.safetensors"):
        verify(own_artifact)


SITE = "model.layers.0.mlp.up_proj"


def edit_spec(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"]["weights"][SITE]["tree"])
    forge(folder, config)


def forge(folder: Path, config: dict[str, Any]) -> None:
    """Write config.json and its hash, as one who wants to deceive would."""
    (folder / "config.json").write_text(json.dumps(config))
    provenance = json.loads((folder / "compress.json").read_text())
    provenance["files"]["config.json"] = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    (folder / "compress.json").write_text(json.dumps({**provenance, "sha256": seal(provenance)}))


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree["values"].update(bits=3),
        lambda tree: tree["values"].update(scales=[72, 3]),
        lambda tree: tree.update(kind="dense"),
        lambda tree: tree.pop("values"),
    ],
    ids=["bits", "scales", "kind", "values"],
)
def test_an_edited_specification_is_found(own_artifact: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit_spec(own_artifact, change)
    with pytest.raises(VerificationError, match=SITE):
        verify(own_artifact)


def test_a_transposed_shape_is_found(own_artifact: Path) -> None:
    edit_spec(own_artifact, lambda tree: tree.update(shape=[48, 72]))
    with pytest.raises(VerificationError, match=SITE):
        verify(own_artifact)


@pytest.mark.parametrize(
    "change",
    [lambda tree: tree["values"].update(symmetric=True), lambda tree: tree.update(pattern="1:4")],
    ids=["symmetric", "pattern"],
)
def test_an_edited_specification_that_still_decodes_is_found(
    own_artifact: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    config = json.loads((own_artifact / "config.json").read_text())
    change(config["quantization_config"]["weights"][SITE]["tree"])
    (own_artifact / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerificationError, match=r"config\.json: its sha256"):
        verify(own_artifact)


def test_a_site_without_its_specification_is_found(own_artifact: Path) -> None:
    config = json.loads((own_artifact / "config.json").read_text())
    del config["quantization_config"]["weights"][SITE]
    forge(own_artifact, config)
    with pytest.raises(VerificationError, match=SITE):
        verify(own_artifact)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", 2, "format version 2, this program reads 1"),
        ("quant_method", "gptq", "not a Compress artifact"),
        ("weights", None, "quantization_config.weights"),
    ],
)
def test_a_folder_of_another_kind_is_refused(own_artifact: Path, key: str, value: object, message: str) -> None:
    config = json.loads((own_artifact / "config.json").read_text())
    config["quantization_config"][key] = value
    (own_artifact / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=message):
        verify(own_artifact)


# -- whole or absent -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Crash(WeightPass):
    """Raises in a block, by default the second."""

    error: Any = ValueError
    block: int = 1

    def rewrite(self, site: Site) -> Weight:
        if f".{self.block}." in site.name:
            raise self.error("on purpose")
        return Magnitude().rewrite(site)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError, SystemExit])
def test_a_crash_leaves_only_what_the_next_run_goes_on_with(
    tiny_llama: Path, tmp_path: Path, error: type[BaseException]
) -> None:
    with pytest.raises(error, match="on purpose"):
        compress.run(tiny_llama, [Crash(error=error)], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


@pytest.mark.parametrize("error", [CalibrationError, UnsupportedWeight, RecipeError, AcceptanceError])
def test_an_error_that_would_come_again_leaves_nothing(
    tiny_llama: Path, tmp_path: Path, error: type[BaseException]
) -> None:
    with pytest.raises(error, match="on purpose"):
        compress.run(tiny_llama, [Crash(error=error)], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError, ArtifactError])
def test_a_crash_in_the_first_block_leaves_nothing(
    tiny_llama: Path, tmp_path: Path, error: type[BaseException]
) -> None:
    with pytest.raises(error, match="on purpose"):
        compress.run(tiny_llama, [Crash(error=error, block=0)], tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


@dataclass(frozen=True, kw_only=True)
class Idle(WeightPass):
    """Leaves every weight as it is."""

    def rewrite(self, site: Site) -> Weight:
        return site.weight


def test_a_run_that_changes_nothing_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the passes left every weight as it was; there is nothing to write"):
        compress.run(tiny_llama, [Idle()], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_crash_leaves_the_old_output_alone(tiny_llama: Path, own_artifact: Path) -> None:
    before = files(own_artifact)
    with pytest.raises(CalibrationError, match="on purpose"):
        compress.run(tiny_llama, [Crash(error=CalibrationError)], own_artifact, force=True)
    assert files(own_artifact) == before
    assert [path.name for path in own_artifact.parent.iterdir()] == [own_artifact.name]


def test_a_crash_in_the_last_check_leaves_nothing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise VerificationError("on purpose")

    monkeypatch.setattr("compress.job.check_whole", fail)
    with pytest.raises(VerificationError, match="on purpose"):
        compress.run(tiny_llama, [Magnitude()], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_and_untouched(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("keep me")
    with pytest.raises(RecipeError, match=r"out exists; choose another folder, or --force to replace"):
        compress.run(tiny_llama, [Magnitude()], out)
    assert files(out) == {"precious.txt": b"keep me"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_replaces_the_output(tiny_llama: Path, own_artifact: Path) -> None:
    compress.run(tiny_llama, [Magnitude()], own_artifact, force=True)
    assert Artifact(own_artifact).provenance["recipe"].count("magnitude") == 1
    assert [path.name for path in own_artifact.parent.iterdir()] == [own_artifact.name]


def test_force_never_replaces_the_source(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    before = files(folder)
    with pytest.raises(compress.CompressError):
        compress.run(folder, [Magnitude()], folder, force=True)
    assert files(folder) == before


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failed_replacement_keeps_the_old_output(
    error: type[BaseException], tiny_llama: Path, own_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, real = files(own_artifact), Path.rename

    def fail(self: Path, target: Path) -> Path:
        if Path(target) == own_artifact and json.loads((self / "compress.json").read_text())["recipe"].count(
            "magnitude"
        ):
            raise error("on purpose")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises((ArtifactError, KeyboardInterrupt), match="on purpose"):
        compress.run(tiny_llama, [Magnitude()], own_artifact, force=True)
    assert own_artifact.exists()
    assert files(own_artifact) == before
    monkeypatch.undo()
    compress.run(tiny_llama, [Magnitude()], own_artifact, force=True)
    assert Artifact(own_artifact).provenance["recipe"].count("magnitude") == 1
    assert [path.name for path in own_artifact.parent.iterdir()] == [own_artifact.name]


@dataclass(frozen=True, kw_only=True)
class Weaker(WeightPass):
    """Falls back everywhere."""

    def rewrite(self, site: Site) -> Weight:
        site.fall_back("weaker", "on purpose")
        return RTN(group=8).rewrite(site)


def test_more_fallbacks_than_allowed_leave_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"7 fallbacks, limits\.max_fallbacks allows 0; nothing was kept"):
        compress.run(tiny_llama, [Weaker()], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
