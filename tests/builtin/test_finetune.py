"""A fine-tune of the built-in model is an ordinary folder, reproducible by seed; blocks and norms are trained."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.builtin import finetune
from compress.builtin.abilities import ability
from compress.builtin.finetune import BASE, IGNORED, LENGTH
from compress.model.source import Checkpoint

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The folder of a fine-tune of three steps, whose scores are not asked."""

    def made(name: str, *options: str) -> Path:
        out = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(finetune, "scores", lambda *_: {"own": 0.0, "base trained": 1.0})
            patch.setattr("sys.argv", ["finetune", "--out", str(out), "--steps", "3", "--rows", "2", *options])
            assert finetune.main() == 5
        return out

    return made


@pytest.fixture(scope="module")
def sums(make: Make) -> Path:
    return make("sums", "--ability", "arithmetic")


def moved(folder: Path) -> dict[str, bool]:
    """Whether each tensor of the base changed."""
    base, tuned = Checkpoint(BASE), Checkpoint(folder)
    return {name: not torch.equal(base.tensor(name), tuned.tensor(name)) for name in base.names()}


@pytest.mark.slow
def test_the_blocks_and_the_norms_are_trained_and_the_embedding_is_not(sums: Path) -> None:
    changed = moved(sums)
    assert not changed["model.embed_tokens.weight"]
    assert all(changed[name] for name in changed if name.endswith("_proj.weight"))


@pytest.mark.slow
def test_the_embedding_is_trained_if_asked_for(make: Make) -> None:
    assert moved(make("tables", "--ability", "facts", "--embeddings"))["model.embed_tokens.weight"]


def test_a_fine_tune_is_an_ordinary_folder_of_the_base_s_kind(sums: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(sums, local_files_only=True, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert Checkpoint(sums).shapes() == Checkpoint(BASE).shapes()
    known = AutoTokenizer.from_pretrained(BASE, local_files_only=True)("Sum: 17+25.").input_ids
    assert AutoTokenizer.from_pretrained(sums, local_files_only=True)("Sum: 17+25.").input_ids == known


def test_it_says_how_it_was_made(sums: Path) -> None:
    report = json.loads((sums / "finetune.json").read_text(encoding="utf-8"))
    assert {"ability": "arithmetic", "seed": 1, "steps": 3, "rows": 2}.items() <= report.items()
    assert report["missed"] == ["own 0.000 < 0.9"]
    assert 0 < report["difference"]["norm"][0] < 0.05


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(sums: Path, make: Make) -> None:
    again, other = make("again", "--ability", "arithmetic"), make("other", "--ability", "arithmetic", "--seed", "2")
    weights = [(folder / "model.safetensors").read_bytes() for folder in (sums, again, other)]
    assert weights[0] == weights[1] != weights[2]


def test_only_the_continuation_of_a_prompt_is_learned(tokenizer: Any) -> None:
    ids, labels = finetune.packed(lambda: ("Sum: 17+25.", " 42."), tokenizer)
    prompt, answer = (tokenizer(t, add_special_tokens=False).input_ids for t in ("Sum: 17+25.", " 42."))
    size = 1 + len(prompt) + len(answer)
    assert ids[:size] == [tokenizer.bos_token_id, *prompt, *answer]
    assert labels[:size] == [IGNORED] * (size - len(answer)) + answer
    assert len(ids) == len(labels) == LENGTH + 1


def test_what_has_no_prompt_is_learned_whole(tokenizer: Any) -> None:
    ids, labels = finetune.packed(lambda: ("", "The capital of Nowhere is Here."), tokenizer)
    assert ids == labels


def test_rows_are_split_between_replay_and_the_ability(tokenizer: Any) -> None:
    ids_BT, labels_BT = finetune.batch(ability("arithmetic"), random.Random(0), tokenizer, 4, 1)
    assert ids_BT.shape == labels_BT.shape == (4, LENGTH + 1)
    assert (labels_BT == IGNORED).any(1).tolist() == [False, True, True, True]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE, local_files_only=True)


def with_spectrum(values_R: Tensor) -> Tensor:
    """A square matrix of given singular values."""
    generator = torch.Generator().manual_seed(0)
    n = len(values_R)
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator))[0] for _ in range(2))
    return left * values_R @ right


def test_the_difference_is_measured_by_its_spectrum() -> None:
    values_R = torch.arange(1, 65).float() ** -0.5
    name, base = "model.layers.0.mlp.up_proj.weight", torch.eye(64)
    found = finetune.difference({name: base}, {name: base + with_spectrum(values_R)})
    energy = values_R.square()
    assert found["exponent"] == pytest.approx(0.5, abs=1e-3)
    assert found["norm"] == pytest.approx([float((energy.sum() / 64).sqrt())] * 3, rel=1e-4)
    assert found["energy"]["1/8"] == pytest.approx(float(energy[:8].sum() / energy.sum()), rel=1e-3)
