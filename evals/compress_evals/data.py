"""Reads public data sets, from a folder that the user names or from the Hugging Face hub, and samples their questions.

Not here: how a row becomes a question (`tasks/kick/functions.py`). The folder may have a manifest.json with the sha256
of its files; the project ships none of these files. Rows from the hub are converted to the folder's columns, so that
tasks do not depend on the source, which is recorded in the results. Nothing is downloaded unless `online` is set, and
no code from a data set is run.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from compress.errors import ArtifactError, CompressError, RecipeError, first_line, why
from compress_evals.results import Data

MANIFEST = "manifest.json"
ENDINGS = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz")
WITHIN = {"nq/questions": "nq/oracle"}  # in the folder both are the same file; the hub has only the questions

Item = dict[str, Any]


class Unavailable(CompressError):
    """Raised for a data set that is neither in the folder nor available from the hub; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The rows of a data set and where they came from.

    `sha256` is the hash of the file as stored, or, for the hub, of the converted rows as JSON lines. A line of a text
    file becomes the row `{"text": line}`.
    """

    rows: list[Item]
    source: Literal["data folder", "hub"]
    name: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Hub:
    """A data set on the hub: its name, configuration and split, and the function that converts a row of it to ours."""

    path: str
    config: str | None
    split: str
    row: Callable[[Item], Item]


def read(name: str, folder: Path | None, online: bool) -> Found:
    """The data set called `name`, such as `mmlu/test`: from `folder` if it is there, else from the hub if `online`.

    A file is read once per process. Raises Unavailable if the data set is in neither place, ArtifactError if a file
    does not match the folder's manifest or a line of it cannot be read.
    The names and columns on the hub are those of lm-eval 0.4.13's own tasks; reading from the hub has only been tested
    with rows made by hand, never over a network.
    """
    if folder is not None:
        path = _locate(folder, WITHIN.get(name, name))
        if path is not None:
            return _from_folder(path, folder.resolve())
    missing = f"{name}: no data folder was given" if folder is None else f"{name}: not in the data folder {folder}"
    if not online:
        raise Unavailable(f"{missing}, and --online was not given")
    if name not in HUB:
        raise Unavailable(f"{missing}, and no equivalent copy on the hub is known")
    return _from_hub(name)


def available(needs: Sequence[str], folder: Path | None, online: bool) -> Data | str:
    """The source and combined hash of all data sets that a task needs, or the reason why the task cannot be asked.

    Raises ArtifactError as `read` does: damaged data are an error, not a reason to skip a task.
    """
    try:
        found = [read(name, folder, online) for name in needs]
    except Unavailable as reason:
        return str(reason)
    names = ", ".join(dict.fromkeys(part.name for part in found))
    digests = [part.sha256 for part in found]
    whole = digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return Data(
        source="hub" if any(part.source == "hub" for part in found) else "data folder", name=names, sha256=whole
    )


def subset(documents: Sequence[Item], limit: int | None, seed: int) -> list[int]:
    """The indices of the documents to ask, ascending: all, or `limit` of them, stratified in proportion to their tiers.

    The sample depends on the identity of the fact (the id after its colon) and on `seed`, not on the wording, so that
    tasks about the same facts sample the same ones. A larger limit only adds questions.
    """
    if limit is None or limit >= len(documents):
        return list(range(len(documents)))
    tiers: dict[str, list[tuple[int, int]]] = {}
    for i, document in enumerate(documents):
        fact = document["id"].partition(":")[2]
        tiers.setdefault(document["tier"], []).append((zlib.crc32(f"{seed}:{fact}".encode()), i))
    ranked = ((place + 0.5) / len(tier) for tier in tiers.values() for place in range(len(tier)))
    order = sorted(zip(ranked, (i for tier in tiers.values() for _, i in sorted(tier)), strict=True))
    return sorted(i for _, i in order[:limit])


def check_folder(folder: Path | None) -> None:
    """Raise RecipeError if the data folder is not a folder."""
    if folder is not None and not os.path.isdir(folder):  # unlike Path.is_dir, never raises, whatever the name
        raise RecipeError(f"--data-dir: {folder} is not a folder")


def _locate(folder: Path, name: str) -> Path | None:
    """The file of a data set, None if there is none.

    Raises ArtifactError for a name or a link that leads out of the folder.
    """
    check_folder(folder)
    root = folder.resolve()
    for ending in ENDINGS:
        path = (root / f"{name}{ending}").resolve()
        if not path.is_relative_to(root):
            raise ArtifactError(f"{name}{ending} leads outside the data folder {folder}")
        if path.is_file():
            return root / f"{name}{ending}"
    return None


@cache
def _from_folder(path: Path, root: Path) -> Found:
    name = path.relative_to(root).as_posix()
    try:
        raw = path.read_bytes()
        content = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise ArtifactError(f"{path}: cannot be read: {why(error)}") from None
    sha256 = hashlib.sha256(raw).hexdigest()
    expected = _manifest(root).get(name, sha256)
    if sha256 != expected:
        raise ArtifactError(f"{path}: sha256 {sha256}, but {MANIFEST} says {expected}; fetch the file again")
    parse = _json_row if ".jsonl" in path.suffixes else _text_row
    # split at "\n" only: str.splitlines also splits at U+2028 and U+0085, which JSON leaves unescaped
    lines = enumerate(_decoded(content, path).split("\n"), start=1)
    rows = [parse(line, f"{path}: line {i}") for i, line in lines if line.strip()]
    return Found(rows=rows, source="data folder", name=name, sha256=sha256)


@cache
def _manifest(root: Path) -> dict[str, str]:
    """The sha256 of each file according to the manifest; empty for a folder without one."""
    path = root / MANIFEST
    if not path.is_file():
        return {}
    try:
        return {str(entry["file"]): str(entry["sha256"]) for entry in json.loads(path.read_bytes())}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: is not a list of {{file, sha256}}: {error}") from None


def _decoded(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ArtifactError(f"{path}: line {line} is not UTF-8") from None


def _json_row(line: str, place: str) -> Item:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{place} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ArtifactError(f"{place} is not a JSON object")
    return row


def _text_row(line: str, place: str) -> Item:
    return {"text": line}


@cache
def _from_hub(name: str) -> Found:
    from datasets import load_dataset

    source = HUB[name]
    title = "/".join(filter(None, (source.path, source.config, source.split)))
    try:
        table = load_dataset(source.path, source.config, split=source.split)
    except Exception as error:  # of many types: no network, no such split, a script; the message has the reason
        raise Unavailable(f"{name}: the hub's {title} could not be read: {first_line(error)}") from error
    try:
        rows = [source.row(row) for row in table]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ArtifactError(f"{name}: the hub's {title} no longer has the expected columns: {error!r}") from None
    lines = (json.dumps(row, sort_keys=True) for row in rows)
    return Found(rows=rows, source="hub", name=title, sha256=hashlib.sha256("\n".join(lines).encode()).hexdigest())


def _as_it_is(row: Item) -> Item:
    return dict(row)


def _triviaqa(row: Item) -> Item:
    answer = row["answer"]
    return {"context": f"Question: {row['question']}\nAnswer:", "answer": answer["value"], "aliases": answer["aliases"]}


def _nq(row: Item) -> Item:
    return {"question": row["question"], "answers": row["answer"]}


def _arc(row: Item) -> Item:
    choices = row["choices"]
    gold = choices["label"].index(row["answerKey"])
    return {"query": f"Question: {row['question']}", "choices": choices["text"], "gold": gold}


def _piqa(row: Item) -> Item:
    return {"query": f"Question: {row['goal']}\n", "choices": [row["sol1"], row["sol2"]], "gold": row["label"]}


def _winogrande(row: Item) -> Item:
    before, after = row["sentence"].split("_")
    options = [before + row[option] for option in ("option1", "option2")]
    return {"context_options": options, "continuation": after.strip(), "gold": int(row["answer"]) - 1}


def _boolq(row: Item) -> Item:
    query = f"Passage: {row['passage']}\nQuestion: {row['question']}?"
    return {"query": query, "choices": ["no", "yes"], "gold": int(row["label"])}


def _hellaswag(row: Item) -> Item:
    """A HellaSwag row without the markers `[title]` and `[step]` of its WikiHow half, as is usual when it is scored."""

    def clean(text: str) -> str:
        return " ".join(re.sub(r"\[.*?\]", "", text.replace(" [title]", ". ")).split())

    query = clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return {"query": query, "choices": [clean(ending) for ending in row["endings"]], "gold": int(row["label"])}


def _ifeval(row: Item) -> Item:
    """An IFEval row without the None values that the table format adds for arguments a question does not have."""
    given = [{key: value for key, value in arguments.items() if value is not None} for arguments in row["kwargs"]]
    return {**row, "kwargs": given}


HUB = {
    "triviaqa/no_context": Hub(path="mandarjoshi/trivia_qa", config="rc.nocontext", split="validation", row=_triviaqa),
    "nq/questions": Hub(path="google-research-datasets/nq_open", config=None, split="validation", row=_nq),
    "mmlu/test": Hub(path="cais/mmlu", config="all", split="test", row=_as_it_is),
    "mmlu/dev": Hub(path="cais/mmlu", config="all", split="dev", row=_as_it_is),
    "arc/easy_test": Hub(path="allenai/ai2_arc", config="ARC-Easy", split="test", row=_arc),
    "arc/challenge_test": Hub(path="allenai/ai2_arc", config="ARC-Challenge", split="test", row=_arc),
    "piqa/validation": Hub(path="baber/piqa", config=None, split="validation", row=_piqa),
    "winogrande/validation": Hub(
        path="allenai/winogrande", config="winogrande_xl", split="validation", row=_winogrande
    ),
    "boolq/validation": Hub(path="aps/super_glue", config="boolq", split="validation", row=_boolq),
    "hellaswag/validation": Hub(path="Rowan/hellaswag", config=None, split="validation", row=_hellaswag),
    "gsm8k/test": Hub(path="openai/gsm8k", config="main", split="test", row=_as_it_is),
    "cnn_dailymail/test": Hub(path="abisee/cnn_dailymail", config="3.0.0", split="test", row=_as_it_is),
    "ifeval/input_data": Hub(path="google/IFEval", config=None, split="train", row=_ifeval),
}
