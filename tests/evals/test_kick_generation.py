"""Written answers: documents are complete and stable, prompts hide the reference, constant output gains nothing."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from compress.errors import ArtifactError
from compress_evals.data import Found, Unavailable, read
from compress_evals.suite import KICK, MINI
from compress_evals.tasks.kick import generation
from compress_evals.tasks.kick.generation import build, instructed, stories, summarised, written

CONSTANT = ["", "....", "the", "e", " \n", "the the the the the"]
NAMES = ["Anna Vell", "Tom Harrow", "Port Merrow", "Saint Iva", "Boris Krane"]
FILLER = ["they", "saw", "ships", "come", "slowly", "over", "grey", "water", "while", "people", "waited", "there"]
OWN = ["kick_sum_short", "kick_sum_medium", "kick_sum_long", "kick_ifeval", "kick_vicuna", "kick_mtbench"]
COUNTS = [200, 470, 471, 600, 789, 790, 1000, 300, 700, 900]  # words of the ten invented stories


def story(i: int, count: int) -> dict[str, Any]:
    """A story of so many words and its reference, which names one of its people and two of its numbers."""
    rng = random.Random(i)
    name = NAMES[i % len(NAMES)]
    opening = f"{name} said on Tuesday that {i + 12} boats and {1000 + i} crates were lost in the harbour .".split()
    filler = rng.choices(FILLER, k=count)
    return {
        "id": str(i),
        "article": " ".join((opening + filler)[:count]),
        "highlights": f"{name} says {i + 12} boats are lost.\n{1000 + i} crates are missing too.",
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with ten invented stories, one of them twice, and no manifest."""
    rows = [story(i, count) for i, count in enumerate(COUNTS)]
    place = tmp_path_factory.mktemp("data")
    (place / "cnn_dailymail").mkdir()
    text = "\n".join(json.dumps(row) for row in [*rows, rows[0]])
    (place / "cnn_dailymail" / "test.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return place


def tasks(folder: Path | None, *names: str) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    metadata = {"data_dir": str(folder), "online": False} if folder else {}
    manager = TaskManager(include_path=str(KICK.folder), include_defaults=False, metadata=metadata)
    return dict(manager.load(list(names))["tasks"])


def test_stories_go_by_length(folder: Path) -> None:
    counts = {
        length: [len(document["story"].split()) for document in build(length, folder)]
        for length in ("short", "medium", "long")
    }
    assert counts == {"short": [200, 470, 300], "medium": [471, 600, 789, 700], "long": [790, 1000, 900]}


def test_the_prompt_never_has_the_reference(folder: Path) -> None:
    documents = [document for length in generation.LENGTHS for document in build(length, folder)]
    assert len(documents) == 10
    for document in documents:
        assert document["reference"] not in document["prompt"]
        assert document["prompt"].startswith("Summarize the given story in less than 150 words while preserving ")
        assert document["prompt"].endswith(f"relevance.\n\n{document['story']}")


def test_references_within_stories_are_cut_off_or_left_out() -> None:
    raw = {"article": "A long story .\n\n@highlight\n\nThe point of it", "highlights": "The point of it"}
    told = {"article": "It begins so. The point of it is told.", "highlights": "The point of it"}
    found = Found(rows=[raw, told], source="data folder", name="x", sha256="")
    assert [document["story"] for document in stories(found, "short")] == ["A long story ."]


def test_a_malformed_row_is_named() -> None:
    found = Found(rows=[{"article": "a", "highlights": "b"}, {"article": "a"}], source="hub", name="cnn", sha256="")
    with pytest.raises(ArtifactError, match="cnn: row 2 has no 'highlights'"):
        stories(found, "short")


def test_an_absent_set_and_an_unknown_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="cnn_dailymail/test: not in the data folder"):
        build("short", tmp_path)
    with pytest.raises(ValueError, match="kind 'haiku'"):
        build("haiku", tmp_path)


@pytest.mark.parametrize("said", CONSTANT)
def test_constant_summaries_score_nothing(folder: Path, said: str) -> None:
    for length in generation.LENGTHS:
        for document in build(length, folder):
            scores = summarised(document, [said])
            assert scores["rouge_l"] == scores["entity_recall"] == scores["valid"] == 0
            assert scores["number_precision"] == scores["entity_precision"] == 0


def test_a_good_summary_beats_a_copy_and_noise(folder: Path) -> None:
    [document, *_] = build("long", folder)
    good = summarised(document, [document["reference"].replace("says", "said")])
    copied = summarised(document, [document["story"]])
    noise = summarised(document, ["qx zv kk wy"])
    assert good["rouge_l"] > 0.9 > 0.2 > copied["rouge_l"] > noise["rouge_l"] == 0
    assert good["entity_recall"] == good["number_precision"] == 1
    assert copied["copy_rate"] == 1 and copied["longest_copy"] > 500


@pytest.mark.parametrize("name", [f"{name}{end}" for name in OWN[:3] for end in ("", MINI)])
def test_summary_tasks_load_in_lm_eval(folder: Path, name: str) -> None:
    [task] = tasks(folder, name).values()
    document = task.eval_docs[0]
    assert task.doc_to_text(document) == document["prompt"]
    assert task.doc_to_target(document) == document["reference"]
    headline = next(one.headline for one in KICK.tasks if one.name == name.removesuffix(MINI))
    assert headline in task.higher_is_better()
    assert set(task.process_results(document, ["a b c"])) == set(task.higher_is_better())


def test_open_answers_show_collapse() -> None:
    sound = written({}, ["Plan your day, then do the hardest thing first and rest before you are tired."])
    stuck = written({}, ["the boats are gone and " * 20])
    short = written({}, ["I would not."])
    assert (sound["valid"], sound["degenerate"], sound["early_end"]) == (1, 0, 0)
    assert (stuck["valid"], stuck["degenerate"], stuck["unique_words"]) == (0, 1, 5)
    assert (short["valid"], short["early_end"], short["length"]) == (1, 1, 3)


@pytest.mark.parametrize("said", CONSTANT)
def test_constant_open_answers_are_not_valid(said: str) -> None:
    scores = written({}, [said])
    assert scores["valid"] == 0 and scores["early_end"] == 1


# -- the real sets --------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "n"), [("ifeval", 541), ("vicuna", 80), ("mtbench", 80)])
def test_real_questions_are_whole_and_have_their_own_ids(kick_data: Path, kind: str, n: int) -> None:
    documents = build(kind, kick_data)
    assert len(documents) == len({document["id"] for document in documents}) == n
    assert all(document["id"].startswith(f"{kind}:") and document["prompt"].strip() for document in documents)


def test_open_questions_have_their_categories(kick_data: Path) -> None:
    assert len({document["tier"] for document in build("vicuna", kick_data)}) == 9
    assert len({document["tier"] for document in build("mtbench", kick_data)}) == 8
    assert {document["tier"] for document in build("ifeval", kick_data)} == {"1 at once", "2 at once", "3 at once"}


def test_tables_keep_every_prompts_own_options(kick_data: Path) -> None:
    [task] = tasks(kick_data, "kick_ifeval_mini").values()
    raw = {row["key"]: row for row in read("ifeval/input_data", kick_data, online=False).rows}
    assert len(task.eval_docs) == 200
    for document in task.eval_docs:
        row = raw[int(document["id"].partition(":")[2])]
        assert document["kinds"] == row["instruction_id_list"]
        assert [json.loads(text) for text in document["options"]] == row["kwargs"]


def test_a_mini_is_a_fixed_part_of_the_whole(kick_data: Path) -> None:
    loaded = tasks(kick_data, "kick_ifeval", "kick_ifeval_mini", "kick_vicuna_mini", "kick_mtbench_mini")
    every = {document["id"]: document for document in loaded["kick_ifeval"].eval_docs}
    assert all(every[document["id"]] == document for document in loaded["kick_ifeval_mini"].eval_docs)
    assert len(loaded["kick_vicuna_mini"].eval_docs) == len(loaded["kick_mtbench_mini"].eval_docs) == 80


@pytest.mark.parametrize("said", CONSTANT)
def test_constant_answers_score_nothing_on_the_real_sets(kick_data: Path, said: str) -> None:
    assert not any(instructed(document, [said])["prompt_loose"] for document in build("ifeval", kick_data))


def test_plain_lm_eval_finds_the_folder_in_the_environment(kick_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KICK_DATA_DIR", str(kick_data))
    assert len(tasks(None, "kick_vicuna")["kick_vicuna"].eval_docs) == 80


def test_a_random_model_writes_through_lm_eval(kick_data: Path, tokenizer: Any) -> None:
    import torch
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, intermediate_size=16, num_attention_heads=2,
        max_position_embeddings=4096, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    scorer = HFLM(pretrained=LlamaForCausalLM(config), tokenizer=tokenizer, batch_size=4, max_length=4096)
    loaded = tasks(kick_data, "kick_ifeval", "kick_vicuna", "kick_mtbench")
    for task in loaded.values():
        task.set_config("generation_kwargs", {"max_gen_toks": 24}, update=True)
    found = evaluate(
        lm=scorer, task_dict={"tasks": loaded, "groups": {}}, samples={name: [0, 1, 2, 3] for name in loaded},
        bootstrap_iters=0, log_samples=True,
    )  # fmt: skip
    for task in KICK.tasks:
        if task.name in loaded:
            rows = found["samples"][task.name]
            assert len(rows) == 4
            assert all(0 <= row[task.headline] <= 1 and isinstance(row["filtered_resps"][0], str) for row in rows)
