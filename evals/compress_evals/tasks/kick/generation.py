"""The functions that the task files of longer written answers call: summaries, instructions, open questions.

Not here: the measures (`metrics/`) and the optional judge (`judge.py`). Prompts are plain text; for a chat model the
engine applies the chat template, not the wording here. lm-eval loads this file by its path.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.errors import ArtifactError
from compress_evals.data import Found, read, subset
from compress_evals.metrics.instructions import instruction_scores
from compress_evals.metrics.summaries import summary_scores
from compress_evals.metrics.text import distinct, ends_early, longest_repeat, repetitive, says_something, words
from compress_evals.tasks.kick.functions import SAMPLE_SEED, named

Document = dict[str, Any]

STORIES, INSTRUCTIONS, VICUNA, MTBENCH = (
    "cnn_dailymail/test", "ifeval/input_data", "instruct/vicuna80", "instruct/mtbench80",
)  # fmt: skip
LENGTHS = {"short": (1, 470), "medium": (471, 789), "long": (790, 10**6)}  # words of a story, inclusive
SUMMARISE = (  # the wording of LLM-KICK
    "Summarize the given story in less than 150 words while preserving high coherence, consistency, fluency, and "
    "relevance.\n\n{story}"
)
HIGHLIGHT = "@highlight"  # the reference follows this mark in a raw CNN story; LLM-KICK's prompts contain it


def load(
    kind: str, n: int | None = None, data_dir: str | None = None, online: bool = False, **_: Any
) -> dict[str, Any]:
    """The documents of one kind as a `test` split, all or a fixed sample of `n`.

    `data_dir` and `online` come from the metadata of lm-eval's TaskManager or of `lm-eval --metadata`; without
    `data_dir`, the environment variable KICK_DATA_DIR is used. Raises Unavailable if the data are not available.
    """
    from datasets import Dataset

    documents = build(kind, named(data_dir), online=bool(online))
    return {"test": Dataset.from_list([documents[i] for i in subset(documents, n, SAMPLE_SEED)])}


def build(kind: str, folder: Path | None, *, online: bool = False) -> list[Document]:
    """All documents of one kind: `short`, `medium` or `long` stories, `ifeval`, `vicuna` or `mtbench`.

    Raises ValueError for any other kind.
    """
    match kind:
        case "short" | "medium" | "long":
            return stories(read(STORIES, folder, online), kind)
        case "ifeval":
            return instructions(read(INSTRUCTIONS, folder, online))
        case "vicuna":
            return questions(read(VICUNA, folder, online), kind)
        case "mtbench":
            return questions(read(MTBENCH, folder, online), kind)
        case _:
            raise ValueError(f"nothing is written of kind {kind!r}")


def stories(found: Found, length: str) -> list[Document]:
    """The stories of one length without duplicates; stories that contain their whole reference are left out.

    Rows need `article` and `highlights`.
    Source: Jaiswal et al., LLM-KICK, ICLR 2024: stories of up to 470 words, 470 to 790, 790 and more.
    """
    least, most = LENGTHS[length]
    documents: dict[str, Document] = {}
    for row in rows_with(found, "article", "highlights"):
        story, reference = row["article"].partition(HIGHLIGHT)[0].strip(), row["highlights"].strip()
        if not reference or reference in story or not least <= len(story.split()) <= most:
            continue
        item = f"cnn:{hashlib.sha256(story.encode()).hexdigest()[:16]}"
        prompt = SUMMARISE.format(story=story)
        documents.setdefault(item, document(item, "", prompt, reference, story=story, reference=reference))
    return list(documents.values())


def instructions(found: Found) -> list[Document]:
    """IFEval's prompts, with tiers by their number of instructions.

    `kinds` and `options` are parallel. Options are JSON strings, because a table of objects would give each of them the
    arguments of all.
    """
    return [
        document(
            f"ifeval:{row['key']}",
            f"{len(row['kwargs'])} at once",
            row["prompt"],
            "",
            kinds=row["instruction_id_list"],
            options=[json.dumps(options, sort_keys=True) for options in row["kwargs"]],
        )
        for row in rows_with(found, "prompt", key=int, instruction_id_list=list, kwargs=list)
    ]


def questions(found: Found, kind: str) -> list[Document]:
    """Open questions, with tiers by category; only the first turn, because lm-eval asks one turn."""
    return [
        document(f"{kind}:{row['question_id']}", row["category"], row["turns"][0], "")
        for row in rows_with(found, "category", question_id=int, turns=list)
    ]


def document(item: str, tier: str, prompt: str, target: str, **more: Any) -> Document:
    """One row for lm-eval."""
    return {"id": item, "cluster": item, "tier": tier, "prompt": prompt, "target": target, **more}


def rows_with(found: Found, *texts: str, **columns: type) -> list[Document]:
    """The rows; raises ArtifactError unless all of them have these columns with values of these types."""
    wanted = dict.fromkeys(texts, str) | columns
    for i, row in enumerate(found.rows, start=1):
        for column, kind in wanted.items():
            if not isinstance(row.get(column), kind):
                raise ArtifactError(f"{found.name}: row {i} has no {column!r} that is of type {kind.__name__}")
    return found.rows


def summarised(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """The measures of a summary against its reference and its story, and those of `shown`."""
    [said] = results
    return {**summary_scores(said, doc["reference"], doc["story"]), **shown(said)}


def instructed(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """The strict and loose instruction accuracies, and the measures of `shown`."""
    [said] = results
    options = [json.loads(text) for text in doc["options"]]
    return {**instruction_scores(said, doc["kinds"], options), **shown(said)}


def written(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """The measures of an answer that only a judge can grade: those of `shown`, variety, and length in words."""
    [said] = results
    found = words(said)
    return {
        **shown(said),
        "distinct_1": distinct(said, 1) if found else 0.0,
        "distinct_2": distinct(said, 2) if len(found) > 1 else 0.0,
        "unique_words": float(len(set(found))),
        "longest_repeat": float(longest_repeat(said)),
        "length": float(len(found)),
    }


def shown(said: str) -> dict[str, float]:
    """`valid`: it says something and is not in a loop; `degenerate`: it is in a loop; `early_end`: it stops at once."""
    stuck = repetitive(said)
    return {
        "valid": float(says_something(said) and not stuck),
        "degenerate": float(stuck),
        "early_end": float(ends_early(said)),
    }
