"""The functions that the task files of the kick group call, for their documents and their scoring.

Not here: the wording of questions (`questions.py`) and the source of the data (`compress_evals.data`). lm-eval loads
this file by its path.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from compress_evals.data import read, subset
from compress_evals.metrics.answers import contains, exact_match, f1, first_line, folded_match, normalise
from compress_evals.metrics.text import degenerate
from compress_evals.tasks.facts.functions import strict_choice
from compress_evals.tasks.kick import questions
from compress_evals.tasks.kick.questions import LETTERS, Document

FOLDER_VARIABLE = "KICK_DATA_DIR"  # names the data folder for plain lm-eval without `--metadata`
SAMPLE_SEED = 0  # of the fixed samples of `n` documents
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")

# the data sets that each kind of question reads, and the function that makes documents of them
KINDS: dict[str, tuple[tuple[str, ...], Callable[..., list[Document]]]] = {
    "freebaseqa": (("freebaseqa/eval",), questions.freebaseqa),
    "triviaqa": (("triviaqa/no_context",), questions.triviaqa),
    "nq_closed": (("nq/questions",), questions.nq_closed),
    "nq_open": (("nq/oracle",), questions.nq_open),
    "mmlu": (("mmlu/test", "mmlu/dev"), questions.mmlu),
    "kv": (("kv/75_keys",), questions.key_value),
    "needle": (("nq/oracle",), questions.needle),
    "arc_easy": (("arc/easy_test",), partial(questions.choice, name="arc_easy")),
    "arc_challenge": (("arc/challenge_test",), partial(questions.choice, name="arc_challenge")),
    "piqa": (("piqa/validation",), partial(questions.choice, name="piqa")),
    "boolq": (("boolq/validation",), partial(questions.choice, name="boolq")),
    "hellaswag": (("hellaswag/validation",), partial(questions.choice, name="hellaswag")),
    "winogrande": (("winogrande/validation",), questions.winogrande),
    "gsm8k": (("gsm8k/test",), questions.gsm8k),
}


def load(
    kind: str,
    n: int | None = None,
    keys: int | None = None,
    data_dir: str | None = None,
    online: bool = False,
    **_: Any,
) -> dict[str, Any]:
    """The documents of one kind as a `test` split, all or a fixed sample of `n`.

    `data_dir` and `online` come from the metadata of lm-eval's TaskManager or of `lm-eval --metadata`; without
    `data_dir`, the environment variable KICK_DATA_DIR is used. Raises Unavailable if the data are not available.
    """
    from datasets import Dataset

    documents = build(kind, named(data_dir), online=online, keys=keys)
    return {"test": Dataset.from_list([documents[i] for i in subset(documents, n, SAMPLE_SEED)])}


def named(data_dir: str | None) -> Path | None:
    """The data folder in lm-eval's metadata, where "" means none; without an entry there, the one in KICK_DATA_DIR.

    The "" keeps evaluations by `compress eval` from reading a folder that their results do not record.
    """
    given = os.environ.get(FOLDER_VARIABLE) if data_dir is None else data_dir
    return Path(given) if given else None


def build(kind: str, folder: Path | None, *, online: bool = False, keys: int | None = None) -> list[Document]:
    """All documents of one kind; `keys` is the number of keys in a key-value question."""
    needs, make = KINDS[kind]
    found = [read(name, folder, online) for name in needs]
    return make(*found) if keys is None else make(*found, keys=keys)


def answered(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """Scores of the first line of a free answer, each against the best of the accepted answers.

    They are `em`, `em_folded` (without accents), `contains` (as whole words), `f1`, `valid` (it says anything) and
    `degenerate` (stuck in a loop).
    """
    said, answers = first_line(results[0]), doc["answers"]
    return {
        "em": float(exact_match(said, answers)),
        "em_folded": float(folded_match(said, answers)),
        "contains": float(contains(said, answers)),
        "f1": f1(said, answers),
        "valid": float(bool(normalise(said))),
        "degenerate": float(degenerate(said)),
    }


def letter(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """`acc`: the one generated token is the right letter; `valid`: it is one of the four letters."""
    said = results[0].strip()
    return {"acc": float(said == LETTERS[doc["gold"]]), "valid": float(said in LETTERS)}


def choice_by_length(doc: Document, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """`acc` as in `strict_choice`, and `acc_norm`: the same with log-likelihoods divided by the choice's characters."""
    lengths = (max(len(choice), 1) for choice in doc["choices"])
    divided = [(likelihood / length, greedy) for (likelihood, greedy), length in zip(results, lengths, strict=True)]
    return {**strict_choice(doc, results), "acc_norm": strict_choice(doc, divided)["acc"]}


def number(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """`em`: the last number in the answer is right; `valid`: there is a number; `degenerate`: stuck in a loop."""
    said = _NUMBER.findall(results[0])
    wanted = [float(answer.replace(",", "")) for answer in doc["answers"]]
    return {
        "em": float(bool(said) and float(said[-1].replace(",", "")) in wanted),
        "valid": float(bool(said)),
        "degenerate": float(degenerate(results[0])),
    }
