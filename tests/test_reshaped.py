"""A folder whose recipe only changed shapes is an ordinary model, and still an artifact that can be verified."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import compress
from compress import RTN, ArtifactError, Calibration, VerificationError, WandaSP
from compress.artifact import Artifact, check_base, is_artifact, verify
from compress.cli import main
from compress.export.dense import export_dense
from compress.model.source import Checkpoint

RECIPE = "passes:\n  - wanda-sp: {heads: 0.5, neurons: 0.25}\ncalibration: {samples: 4, length: 32}\n"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`cli("run", ...)` -> (exit code, stdout, stderr), in this process."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["compress", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        return int(stop.value.code or 0), printed.out, printed.err

    return call


@pytest.fixture
def narrow(tiny_llama: Path, tmp_path: Path) -> Path:
    """The tiny Llama with half its heads and three quarters of its neurons."""
    step = WandaSP(heads=0.5, neurons=0.25)
    return compress.run(tiny_llama, [step], tmp_path / "narrow", calibration=Calibration(samples=4, length=32)).out


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=ids, use_cache=False).logits)


def test_it_names_no_method_and_loads_either_way(narrow: Path, hugging_face: Any, ids: Tensor) -> None:
    assert "quantization_config" not in json.loads((narrow / "config.json").read_text())
    assert torch.equal(logits(hugging_face(narrow), ids), logits(compress.load(narrow), ids))


def test_it_is_ours_and_verified(narrow: Path) -> None:
    assert is_artifact(narrow)
    assert Artifact(narrow).names() == Checkpoint(narrow).names()
    assert verify(narrow)[0].endswith("files match their sha256")


def test_damage_is_found(narrow: Path) -> None:
    shard = next(narrow.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(VerificationError, match="sha256 is not the recorded one"):
        verify(narrow)


def test_a_packed_artifact_without_its_method_is_not_taken_for_a_plain_one(own_artifact: Path) -> None:
    config = json.loads((own_artifact / "config.json").read_text())
    del config["quantization_config"]
    (own_artifact / "config.json").write_text(json.dumps(config))
    assert not is_artifact(own_artifact)
    with pytest.raises(ArtifactError, match="not a Compress artifact"):
        Artifact(own_artifact)


def test_its_export_is_itself(narrow: Path, tmp_path: Path) -> None:
    export_dense(narrow, tmp_path / "dense")
    one, other = Checkpoint(narrow), Checkpoint(tmp_path / "dense")
    assert one.names() == other.names()
    assert all(torch.equal(one.tensor(name), other.tensor(name)) for name in one.names())
    assert not is_artifact(tmp_path / "dense")


@pytest.mark.slow
def test_it_can_be_compressed_again(narrow: Path, tmp_path: Path) -> None:
    report = compress.run(narrow, [RTN(group=8)], tmp_path / "again")
    assert compress.load(report.out).config.intermediate_size == 56


@pytest.mark.slow
def test_the_command_line_runs_shows_verifies_and_replaces_it(cli: Run, tiny_llama: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(RECIPE)
    code, _, progress = cli("run", recipe, "--model", tiny_llama, "--out", out)
    removed = "1 of 2 key-value heads with their query heads and 16 of 72 neurons of every block"
    assert code == 0
    assert f"wanda-sp: without {removed}" in progress
    assert f"without {removed} (wanda-sp)" in cli("inspect", out)[1]
    assert json.loads(cli("inspect", out, "--json")[1])["reshaped"][0]["change"] == f"without {removed}"
    assert cli("verify", out)[0] == 0
    assert cli("run", recipe, "--model", tiny_llama, "--out", out)[0] == 2
    assert cli("run", recipe, "--model", tiny_llama, "--out", out, "--force")[0] == 0


def test_its_card_says_what_is_gone(narrow: Path) -> None:
    card = (narrow / "README.md").read_text()
    assert "It is without 1 of 2 key-value heads" in card
    assert 'tags: ["compress", "wanda-sp"]' in card
    assert "| site |" not in card


def test_an_evaluation_knows_where_it_comes_from(narrow: Path, tiny_llama: Path) -> None:
    from compress_evals.folders import describe, opened

    check_base([narrow], tiny_llama)
    model, _ = opened(narrow, "cpu")
    size = sum(Checkpoint(narrow).tensor(name).nbytes for name in Checkpoint(narrow).names())
    told = describe(narrow)
    assert model.config.num_key_value_heads == 1
    assert told["bytes_on_disk"] == size
    assert told["parameters"] == size // 4
    assert "wanda-sp" in told["recipe"]
