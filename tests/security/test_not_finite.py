"""NaN and infinity at every stage end a run with one line that names the place, and nothing is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress import GPTQ, RTN, Calibration, Dense, Magnitude, Pass, Site, Wanda, Weight, WeightPass
from compress.artifact import verify

Refuse = Callable[..., str]
FEW = Calibration(samples=4, length=32)
SITE = "model.layers.1.mlp.up_proj"
VALUES = [float("nan"), float("inf"), -float("inf")]


def stopped(model: Path, passes: list[Pass], refuse: Refuse) -> str:
    return refuse(
        lambda: compress.run(model, passes, model.parent / "out", calibration=FEW),
        "fault",
        "NaN or infinity at a stage",
    )


def edit(model: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", [f"{SITE}.weight", "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_in_a_weight_of_the_source(name: str, value: float, single: Path, refuse: Refuse) -> None:
    edit(single, lambda tensors: tensors[name].view(-1)[5:6].fill_(value))
    assert f"{name} holds NaN or infinite values" in stopped(single, [Magnitude()], refuse)


@pytest.mark.parametrize("step", [Wanda(), GPTQ(group=8)])
def test_in_what_one_token_brings_a_site(step: Pass, single: Path, refuse: Refuse) -> None:
    """A row of the embedding that is finite, and overflows where it is multiplied."""
    edit(single, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].mul_(1e36))
    said = stopped(single, [step], refuse)
    assert "model.layers.0" in said and "not finite" in said


def test_in_the_hidden_state_without_statistics(single: Path, refuse: Refuse) -> None:
    edit(single, lambda tensors: [tensors[f"model.layers.0.mlp.{n}_proj.weight"].mul_(1e25) for n in ("up", "gate")])
    assert "model.layers.0: its output is not finite" in stopped(single, [RTN(group=8)], refuse)


def test_in_a_statistic(tiny_llama: Path, tmp_path: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.stats import ColumnNorm

    monkeypatch.setattr(ColumnNorm, "value", lambda self: torch.full_like(self.square_I, float("nan")).float())
    said = refuse(
        lambda: compress.run(tiny_llama, [Wanda()], tmp_path / "out", calibration=FEW),
        "fault",
        "NaN or infinity at a stage",
    )
    assert "the ColumnNorm of its input is not finite" in said and "model.layers.0.self_attn" in said


@dataclass(frozen=True, kw_only=True)
class Poisoned(WeightPass):
    """Gives one entry of one site a value that is none."""

    value: float = 0.0

    def rewrite(self, site: Site) -> Weight:
        w_OI = site.weight.dense().clone()
        if site.name == SITE:
            w_OI[3, 4] = self.value
        return Dense(w_OI)


@pytest.mark.parametrize("value", VALUES)
def test_in_what_a_pass_gives(value: float, single: Path, refuse: Refuse) -> None:
    said = stopped(single, [Poisoned(value=value)], refuse)
    assert f"{SITE}: the rewritten weight is not finite" in said


@pytest.mark.parametrize("value", VALUES)
def test_in_the_logits_of_the_last_check(
    value: float, tiny_llama: Path, tmp_path: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.verification import RuntimeWalk

    real = RuntimeWalk.replay
    monkeypatch.setattr(RuntimeWalk, "replay", lambda self, *given: real(self, *given).fill_(value))
    said = refuse(
        lambda: compress.run(tiny_llama, [Magnitude()], tmp_path / "out"), "fault", "NaN or infinity at a stage"
    )
    assert "the reloaded model's logits differ" in said


@pytest.mark.parametrize("value", VALUES)
def test_in_the_logits_of_the_compressed_model(
    value: float, tiny_llama: Path, tmp_path: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.model.walk import Walk

    real = Walk.leave
    monkeypatch.setattr(Walk, "leave", lambda self, travellers: real(self, travellers).fill_(value))
    refuse(lambda: compress.run(tiny_llama, [Magnitude()], tmp_path / "out"), "fault", "NaN or infinity at a stage")


@pytest.mark.parametrize("value", VALUES)
def test_in_a_scale_of_an_artifact(value: float, own_artifact: Path, sign: Any, refuse: Refuse) -> None:
    shard = next(f for f in own_artifact.glob("*.safetensors") if any(SITE in name for name in load_file(f)))
    tensors = load_file(shard)
    tensors[next(n for n in tensors if n.startswith(SITE) and "scale" in n)].view(-1)[0] = value
    save_file(tensors, shard, metadata={"format": "pt"})
    sign(own_artifact)
    assert f"{SITE} decodes to values that are not finite" in refuse(
        lambda: verify(own_artifact), "fault", "NaN or infinity at a stage"
    )


def test_a_pass_without_poison_is_kept(single: Path) -> None:
    assert compress.run(single, [Poisoned(value=1.0)], single.parent / "out").out.is_dir()
