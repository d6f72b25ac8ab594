"""`compress inspect` on a folder that is not an artifact: its sites by kind, and everything that no pass changes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.cli import main
from compress.survey import survey

Inspect = Callable[..., tuple[int, str, str]]


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Inspect:
    def call(*line: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["compress", "inspect", *map(str, line)])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr()
        return int(stopped.value.code or 0), said.out, said.err

    return call


def test_sites_are_counted_by_kind(tiny_llama: Path) -> None:
    found = survey(tiny_llama)
    assert [(row["sites"], row["shape"], row["count"]) for row in found["sites"]] == [
        ("model.layers.*.self_attn.q_proj", [48, 48], 2),
        ("model.layers.*.self_attn.k_proj", [24, 48], 2),
        ("model.layers.*.self_attn.v_proj", [24, 48], 2),
        ("model.layers.*.self_attn.o_proj", [48, 48], 2),
        ("model.layers.*.mlp.gate_proj", [72, 48], 2),
        ("model.layers.*.mlp.up_proj", [72, 48], 2),
        ("model.layers.*.mlp.down_proj", [48, 72], 2),
    ]
    assert (found["family"], found["tested_family"], found["blocks"], found["missed_share"]) == ("llama", True, 2, 0)
    held = sum(row["parameters"] for row in found["sites"]) + sum(found["untouched"].values())
    assert found["bytes"] == 4 * held


def test_the_command_shows_the_table(inspect: Inspect, tiny_llama: Path) -> None:
    code, out, _ = inspect(tiny_llama)
    assert code == 0
    assert "model.layers.*.mlp.down_proj" in out
    assert "LlamaForCausalLM, family llama (covered by tests)" in out


def test_the_reference_model_is_called_as_it_was_asked_for(inspect: Inspect) -> None:
    assert inspect("builtin")[1].split()[0] == "builtin:"


def test_the_command_gives_json(inspect: Inspect, tiny_llama: Path) -> None:
    code, out, _ = inspect(tiny_llama, "--json")
    assert code == 0
    assert json.loads(out)["sites"][0]["count"] == 2


def test_our_own_folder_shows_what_was_done(inspect: Inspect, llama_artifact: Path) -> None:
    code, out, _ = inspect(llama_artifact)
    assert code == 0
    assert "2:4·int4g8" in out


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    config: dict[str, Any] = {
        "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 1, "vocab_size": 211,
    }  # fmt: skip
    AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **config)).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def test_experts_are_one_kind_and_say_so(mixture: Path, inspect: Inspect) -> None:
    rows = {row["sites"]: row for row in survey(mixture)["sites"]}
    assert rows["model.layers.*.block_sparse_moe.experts.*.w1"]["count"] == 6
    assert rows["model.layers.*.block_sparse_moe.experts.*.w1"]["expert"]
    assert not rows["model.layers.*.self_attn.q_proj"]["expert"]
    assert survey(mixture)["untouched"]["a router"] == 2 * 3 * 48
    assert "(experts)" in inspect(mixture)[1]


@pytest.mark.parametrize("damage", ["config", "weights"])
def test_a_folder_that_cannot_be_used_is_one_line(damage: str, mixture: Path, inspect: Inspect) -> None:
    if damage == "config":
        (mixture / "config.json").write_text("{}")
    else:
        (mixture / "model.safetensors").write_bytes(b"")
    code, out, err = inspect(mixture)
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1)
