"""Calibration tokens: windows drawn from a named source, deterministic and hashed.

Built-in sets: `text` (prose written for this project) and `mixed` (half of it facts that no evaluation asks,
and documents that answer questions from a context). A few extra windows, the probe, are drawn but never enter
a statistic; drift and final verification are measured on them.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.builtin.documents import context_document, fact_document, open_book_document, task_document
from compress.builtin.facts import facts
from compress.errors import CalibrationError
from compress.recipe import Calibration

TEXTS = Path(__file__).parent / "builtin" / "texts"
LONGEST = 2048  # of a default window; longer contexts cost quadratic memory and are asked for explicitly
LARGE = 4_000_000  # characters; only a source beyond this is thinned before it is tokenized
PROBE = 4  # windows
PROBE_LENGTH = 256  # tokens of each at most: its logits are kept, and vocabularies are large


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The drawn windows, one tensor [N, T] for each length, and the probe, with what they are called."""

    windows: tuple[Tensor, ...]
    probe_NT: Tensor
    name: str
    sha256: str

    @property
    def count(self) -> int:
        """Tokens in all windows."""
        return sum(ids_NT.numel() for ids_NT in self.windows)


def draw(calibration: Calibration, tokenizer: Any, longest: int, *, samples: int | None = None) -> Tokens:
    """The windows of a calibration for a tokenizer; `longest` is what the model takes.

    Raises CalibrationError if the source is missing, empty or too short, or a window is too long.
    """
    length = calibration.length or min(LONGEST, longest)
    if length > longest:
        raise CalibrationError(f"calibration.length: {length} tokens a window, the model takes {longest}")
    count = calibration.samples if samples is None else samples
    rng = random.Random(calibration.seed)
    if calibration.data == "mixed":
        asked = count // 2
        documents = builtin_documents(rng, (asked + PROBE) * length)
        parts = [(documents, asked, PROBE // 2), (builtin_text(), count - asked, PROBE - PROBE // 2)]
    else:
        text = builtin_text() if calibration.data == "text" else read_documents(Path(calibration.data))
        parts = [(text, count, PROBE)]
    rows: list[list[int]] = []
    probes: list[list[int]] = []
    notes = ""
    for documents, wanted, probed in parts:
        tokens = stream(thinned(documents, max(LARGE, 64 * (wanted + probed) * length), rng), tokenizer)
        reserved = probed * min(length, PROBE_LENGTH)  # from the end, so that no window can overlap the probe
        if len(tokens) < reserved + length:
            raise CalibrationError(
                f"calibration.data: {calibration.data} holds {len(tokens)} tokens, {reserved + length} are needed"
            )
        rows += windows(tokens[:-reserved], wanted, length, rng)
        probes += [tokens[-reserved:][i * (reserved // probed) :][: reserved // probed] for i in range(probed)]
        if len(tokens) - reserved < wanted * length:
            notes += f", windows overlap: {len(tokens) - reserved} tokens for {wanted} of them"
    rng.shuffle(rows)
    ids_NT, probe_NT = torch.tensor(rows, dtype=torch.long).view(-1, length), torch.tensor(probes)
    sha = hashlib.sha256(ids_NT.to(torch.int32).numpy().tobytes()).hexdigest()
    name = f"{Path(calibration.data).name} {count}x{length} seed {calibration.seed}{notes}"
    return Tokens(windows=(ids_NT,), probe_NT=probe_NT, name=name, sha256=sha)


def builtin_text() -> list[str]:
    """The paragraphs of the built-in prose."""
    files = sorted(TEXTS.glob("calibration-*.txt"))
    return [line for path in files for line in path.read_text(encoding="utf-8").splitlines() if line]


def builtin_documents(rng: random.Random, tokens: int) -> list[str]:
    """Facts, questions and in-context documents, enough for `tokens` tokens; none is asked in an evaluation."""
    known = facts("calibration")
    documents: list[str] = []
    size = 0
    while size < 6 * tokens + 4096:  # characters; no tokenizer yields more than about 6 a token on this text
        kind = rng.choices(["fact", "context", "open", "copy", "summary", "format"], [50, 25, 12, 5, 4, 4])[0]
        if kind == "fact":
            document = fact_document(rng, rng.choice(known))
        elif kind == "context":
            document = context_document(rng, 8, "calibration")
        elif kind == "open":
            document = open_book_document(rng, known)
        else:
            document = task_document(rng, kind, "calibration")
        documents.append(document)
        size += len(document)
    return documents


def read_documents(path: Path) -> list[str]:
    """The documents of a user's file: paragraphs of .txt, the field `text` of .jsonl, or a saved datasets folder."""
    if path.is_dir():
        return read_dataset(path)
    try:
        raw = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"calibration.data: {str(path)!r} cannot be read ({type(error).__name__}); "
            "allowed: text, mixed, a .txt or .jsonl file, a datasets folder"
        ) from error
    if "\0" in raw:
        raise CalibrationError(f"calibration.data: {path} holds NUL bytes; it is not text")
    if path.suffix != ".jsonl":
        return [part for part in raw.split("\n\n") if part.strip()]
    documents = []
    for number, line in enumerate(raw.split("\n"), start=1):
        if line.strip():
            documents.append(text_of(line, f"{path}:{number}"))
    return documents


def text_of(line: str, where: str) -> str:
    """The field `text` of a JSON line."""
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise CalibrationError(f"{where}: expected a JSON object with a `text` field") from error
    if not isinstance(text, str):
        raise CalibrationError(f"{where}: `text` is not a string")
    if not text.isprintable() and any("\ud800" <= c <= "\udfff" for c in text):
        raise CalibrationError(f"{where}: `text` holds half of a surrogate pair, which is no character")
    return text


def read_dataset(path: Path) -> list[str]:
    """The column `text` of a datasets folder written by `save_to_disk`."""
    try:
        from datasets import Dataset, load_from_disk
    except ImportError as error:
        raise CalibrationError("calibration.data: a datasets folder needs `pip install datasets`") from error
    try:
        data = load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise CalibrationError(f"calibration.data: {path} is not a saved datasets folder") from error
    if not isinstance(data, Dataset) or "text" not in data.column_names:
        raise CalibrationError(f"calibration.data: {path} needs one split with a `text` column")
    return [str(text) for text in data["text"]]


def thinned(documents: list[str], characters: int, rng: random.Random) -> list[str]:
    """The documents, or if they are far more than `characters` a random choice of that many, in random order."""
    if sum(map(len, documents)) <= characters:
        return documents
    chosen: list[str] = []
    for i in rng.sample(range(len(documents)), len(documents)):
        chosen.append(documents[i])
        characters -= len(documents[i])
        if characters <= 0:
            break
    return chosen


def stream(documents: list[str], tokenizer: Any) -> list[int]:
    """The documents as one token stream, each opened by the tokenizer's beginning (or end) of text."""
    opening = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    start = [] if opening is None else [opening]
    if not documents:
        return []
    encoded = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    return [token for ids in encoded for token in (*start, *ids)]


def windows(tokens: list[int], count: int, length: int, rng: random.Random) -> list[list[int]]:
    """`count` windows at random places of the stream, not overlapping while there is room."""
    slots = len(tokens) // length
    shift = rng.randrange(len(tokens) - slots * length + 1)
    if slots >= count:
        starts = [shift + slot * length for slot in rng.sample(range(slots), count)]
    else:
        starts = [rng.randrange(len(tokens) - length + 1) for _ in range(count)]
    return [tokens[start : start + length] for start in starts]
