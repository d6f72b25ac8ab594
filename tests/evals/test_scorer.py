"""Logits are computed only where they are read, and likelihoods equal those of lm-eval's own wrapper."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from compress.runtime.kv import attach
from compress_evals import scorer
from compress_evals.questions import beginning_with_bos
from compress_evals.scorer import Scorer, first_line, fitted, read


def requests(rng: random.Random, count: int) -> list[tuple[None, list[int], list[int]]]:
    """Prompts and continuations of any lengths, with zeros among their tokens and contexts that occur twice."""
    contexts = [[rng.randrange(0, 300) for _ in range(rng.randrange(1, 60))] for _ in range(count // 2)]
    made = [(None, context, [rng.randrange(0, 300) for _ in range(rng.randrange(1, 9))]) for context in contexts]
    single = [(None, context, [rng.randrange(0, 300)]) for context in contexts]
    return [*made, *single, (None, [0, 0, 0], [0, 0]), (None, [5, 0], [0])]


def likelihoods(model: Any, asked: Any, size: int) -> Any:
    return model._loglikelihood_tokens(asked, disable_tqdm=True, override_bs=size)


@pytest.fixture
def pair(model: Any, tokenizer: Any) -> tuple[Scorer, Any]:
    """Our wrapper, and lm-eval's own with the same settings."""
    ours = Scorer(model, tokenizer, 8)
    return ours, HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=8, add_bos_token=True,
        prefix_token_id=tokenizer.bos_token_id, softmax_dtype=torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("size", [1, 7, 64])
def test_likelihoods_are_those_of_whole_logits(pair: tuple[Scorer, Any], size: int) -> None:
    ours, theirs = pair
    ours.batch_size_per_gpu = theirs.batch_size_per_gpu = size
    asked = requests(random.Random(size), 40)
    for mine, whole in zip(likelihoods(ours, asked, size), likelihoods(theirs, asked, size), strict=True):
        assert mine[0] == pytest.approx(whole[0], abs=1e-4) and mine[1] == whole[1]


def test_only_the_end_of_a_batch_has_logits(pair: tuple[Scorer, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair
    kept = []
    call = ours._model_call
    monkeypatch.setattr(
        ours, "_model_call", lambda inps: kept.append((inps.shape[1], call(inps).shape[1])) or call(inps)
    )
    likelihoods(ours, [(None, list(range(1, 50)), [3, 4]), (None, list(range(1, 48)), [3])], 2)
    assert kept == [(50, 5)]  # the shorter row ends three tokens earlier, and two are read
    assert ours._model_call(torch.ones(1, 9, dtype=torch.long)).shape[1] == 9  # asked for by somebody else: all


@pytest.mark.parametrize(
    ("rows", "longest", "kept"),
    [
        ([[1, 2, 3, 4]], 1, 1),
        ([[1, 2, 3, 4], [1, 2, 0, 0]], 1, 3),
        ([[1, 2, 3, 0]], 1, 2),  # a zero that may be a token
        ([[0, 0, 0, 0]], 1, 4),
        ([[1, 2, 3, 4]], 9, 4),
    ],
)
def test_as_much_is_kept_as_is_read(rows: list[list[int]], longest: int, kept: int) -> None:
    assert read(torch.tensor(rows), longest) == kept


def test_a_model_that_cannot_leave_logits_out_computes_them_all(pair: tuple[Scorer, Any], model: Any) -> None:
    class Plain(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> Any:
            return model(input_ids)

    assert scorer.options(Plain()) is None
    ours, theirs = pair
    ours._options = None
    asked = requests(random.Random(3), 10)
    assert likelihoods(ours, asked, 8) == likelihoods(theirs, asked, 8)


def test_the_cache_of_a_recipe_stays_in_use(model: Any, tokenizer: Any) -> None:
    assert Scorer(model, tokenizer, 8)._options == {"use_cache": False}
    cached = copy.deepcopy(model)
    attach(cached, {"bits": 4, "group": 16})
    assert Scorer(cached, tokenizer, 8)._options == {}


def test_a_padding_that_is_not_known_is_not_relied_on(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorer, "pad_and_concat", lambda *_, **__: torch.tensor([[7, 1, 1]]))
    scorer.pads_with_zeros.cache_clear()
    try:
        assert Scorer(model, tokenizer, 8)._options is None
    finally:
        scorer.pads_with_zeros.cache_clear()


def test_a_context_that_is_cut_keeps_its_bos(pair: tuple[Scorer, Any]) -> None:
    ours, theirs = pair
    ours._max_length = 12
    bos, then = ours.tokenizer.bos_token_id, [7, 8]
    long, short = [bos, *range(20, 50)], [bos, *range(41, 50)]
    found = likelihoods(ours, [(None, long, then), (None, long[1:], then)], 2)
    kept, bare = likelihoods(theirs, [(None, [bos, *range(40, 50)], then), (None, list(range(39, 50)), then)], 2)
    assert found[0][0] == pytest.approx(kept[0], abs=1e-4) != pytest.approx(found[1][0], abs=1e-4)
    assert found[1][0] == pytest.approx(bare[0], abs=1e-4)  # it had none
    assert fitted(short, 11, bos) is short and fitted(long, 0, bos) is long and fitted(long, 3, bos) == [bos, 48, 49]


def test_a_prompt_to_continue_that_is_cut_keeps_its_bos(model: Any, tokenizer: Any) -> None:
    ours = Scorer(model, beginning_with_bos(tokenizer), 8)
    bos, texts = ours.tokenizer.bos_token_id, ["The capital of France is Paris, and of Spain", "The capital"]
    whole, mask = ours.tok_batch_encode(texts)
    width = whole.shape[1] - 3
    ids, its = ours.tok_batch_encode(texts, left_truncate_len=width)
    assert ids.shape == its.shape == (2, width)
    assert ids[0].tolist() == [bos, *whole[0, 4:].tolist()] and torch.equal(ids[1], whole[1, 3:])
    assert torch.equal(its, mask[:, 3:]) and torch.equal(ours.tok_batch_encode(texts, left_truncate_len=99)[0], whole)


class Parrot:
    """A model that says the given tokens, whatever the prompt, and counts its steps."""

    def __init__(self, model: Any, said: list[list[int]]) -> None:
        self.model, self.said, self.steps = model, said, 0

    def __call__(self, monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> Scorer:
        ours = Scorer(self.model, beginning_with_bos(tokenizer), 8)
        monkeypatch.setattr(self.model, "generate", self.generate)
        return ours

    def generate(self, input_ids: Tensor, max_length: int, stopping_criteria: Any, **options: Any) -> Tensor:
        ids, done = input_ids, torch.zeros(len(input_ids), dtype=torch.bool)
        while ids.shape[1] < max_length and not done.all():
            at, self.steps = ids.shape[1] - input_ids.shape[1], self.steps + 1
            new = torch.tensor([2 if ended else row[at] for row, ended in zip(self.said, done.tolist(), strict=True)])
            ids = torch.cat([ids, new[:, None]], 1)
            done |= stopping_criteria(ids, None)
        return ids


def asked_for(prompts: list[str], **settings: Any) -> list[Instance]:
    return [
        Instance(request_type="generate_until", doc={}, arguments=(prompt, settings), idx=i)
        for i, prompt in enumerate(prompts)
    ]


def test_a_newline_ends_an_answer_behind_something_said(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids) + [tokenizer.eos_token_id] * 40

    said = [" Paris\nQ: more", "\n\n Rome\nQ", "\n", "no end" * 20]
    parrot = Parrot(model, [tokens(text) for text in said])
    ours = parrot(monkeypatch, tokenizer)
    requests = asked_for(
        [f"Q: one{more}" for more in (" two" * 3, " two" * 2, " two", "")],
        until=["\n"],
        max_gen_toks=24,
        do_sample=False,
    )
    found = ours.generate_until(requests, True)
    assert found[:3] == ["Paris", "Rome", ""] and found[3].startswith("no endno end") and parrot.steps == 24
    assert [request.arguments[1]["until"] for request in requests] == [["\n"]] * 4  # as they were
    parrot.said, parrot.steps = parrot.said[:3], 0
    assert ours.generate_until(requests[:3], True) == ["Paris", "Rome", ""]
    assert parrot.steps < 12


def test_the_first_line_is_not_blank() -> None:
    assert [first_line(text) for text in ("", "\n", " a\nb", "\n \n b\nc", "a", " \n\ta ")] == [
        "", "", "a", "b", "a", "a",
    ]  # fmt: skip


def test_rolling_likelihoods_read_everything(pair: tuple[Scorer, Any], tokenizer: Any) -> None:
    ours, theirs = pair
    text = "The capital of France is Paris, and of Italy it is Rome. " * 8
    windows = [(None, [tokenizer.bos_token_id], tokenizer.encode(text, add_special_tokens=False))]
    [mine], [whole] = likelihoods(ours, windows, 1), likelihoods(theirs, windows, 1)
    assert mine[0] == pytest.approx(whole[0], rel=1e-5) and math.isfinite(mine[0])
