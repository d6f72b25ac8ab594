"""Calibration tokens: windows drawn deterministically from a named source, and hashed.

Built-in sets: `text` (prose written for this project) and `mixed` (half of it that prose, half of it facts that no
evaluation asks for and documents that answer questions from a context). A few extra windows, the probe, never enter
a statistic; drift and the final verification are measured on them.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compress.builtin.documents import context_document, fact_document, open_book_document, task_document
from compress.builtin.facts import facts
from compress.errors import CalibrationError
from compress.recipe import Calibration
from compress.texts import Document, read_documents

TEXTS = Path(__file__).parent / "builtin" / "texts"
LONGEST = 2048  # tokens of a default window; longer ones cost quadratic memory and must be asked for explicitly
LARGE = 4_000_000  # characters; only a source larger than this is subsampled before it is tokenized
PROBE = 4  # windows in the probe
SHORTEST = 8  # tokens; a shorter document gets no window
PROBE_LENGTH = 256  # most tokens of a probe window: its logits are kept in memory, and vocabularies are large


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The drawn windows, one int64 tensor [N, T] per length, the probe, a readable name and the windows' hash."""

    windows: tuple[Tensor, ...]
    probe_NT: Tensor
    name: str
    sha256: str

    @property
    def count(self) -> int:
        """The number of tokens in all windows, without the probe."""
        return sum(ids_NT.numel() for ids_NT in self.windows)


def draw(calibration: Calibration, tokenizer: Any, longest: int, *, samples: int | None = None) -> Tokens:
    """Draw the windows of a calibration with a tokenizer; `longest` is the longest context the model takes, in tokens.

    `samples` replaces the calibration's number of windows. Raises CalibrationError if the source is missing, empty or
    too short, or if a window is too long.
    """
    length = calibration.length or min(LONGEST, longest)
    if length > longest:
        raise CalibrationError(f"calibration.length: windows of {length} tokens, but the model takes {longest}")
    count = calibration.samples if samples is None else samples
    rng = random.Random(calibration.seed)
    if calibration.data == "mixed":
        asked = count // 2
        documents: list[Document] = [*builtin_documents(rng, (asked + PROBE) * length)]
        parts = [(documents, asked, PROBE // 2), (source_of(calibration, "text"), count - asked, PROBE - PROBE // 2)]
    else:
        parts = [(source_of(calibration, calibration.data), count, PROBE)]
    rows: list[list[int]] = []
    probes: list[list[int]] = []
    notes = ""
    for documents, wanted, probed in parts:
        some = thinned(documents, max(LARGE, 64 * (wanted + probed) * length), rng)
        encoded = encode(some, tokenizer, calibration.chat)
        cut = by_document if calibration.layout == "documents" else packed
        drawn = cut(encoded, wanted, probed, length, rng, calibration.data)
        rows += drawn.rows
        probes += drawn.probes
        notes += drawn.note
    rng.shuffle(rows)
    by_length: dict[int, list[list[int]]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    found = tuple(torch.tensor(by_length[n], dtype=torch.long) for n in sorted(by_length))
    sha = hashlib.sha256()
    for ids_NT in found:
        sha.update(ids_NT.to(torch.int32).numpy().tobytes())
    how = "".join(f" {word}" for word in (("chat",) if calibration.chat else ()))
    how += " documents up to" if calibration.layout == "documents" else ""
    name = f"{Path(calibration.data).name}{how} {count}x{length} seed {calibration.seed}{notes}"
    return Tokens(windows=found, probe_NT=torch.tensor(probes), name=name, sha256=sha.hexdigest())


class Drawn(NamedTuple):
    """Windows, probe windows, and a note for the calibration's name (empty, or that windows overlap)."""

    rows: list[list[int]]
    probes: list[list[int]]
    note: str = ""


def packed(documents: list[list[int]], wanted: int, probed: int, length: int, rng: random.Random, where: str) -> Drawn:
    """Windows of `length` tokens from the concatenated documents; the probe is taken from the end."""
    tokens = [token for ids in documents for token in ids]
    reserved = probed * min(length, PROBE_LENGTH)  # at the end, so that no window can overlap the probe
    if len(tokens) < reserved + length:
        raise CalibrationError(
            f"calibration.data: {where} has {len(tokens)} tokens, but {reserved + length} are needed"
        )
    free = len(tokens) - reserved
    note = f", windows overlap: {free} tokens for {wanted} of them" if free < wanted * length else ""
    return Drawn(windows(tokens[:-reserved], wanted, length, rng), probe_rows(tokens, reserved, probed), note)


def by_document(
    documents: list[list[int]], wanted: int, probed: int, length: int, rng: random.Random, where: str
) -> Drawn:
    """Windows of one document each, cut at `length` and never padded; the probe is taken from the last documents."""
    width = min(length, PROBE_LENGTH)
    kept = list(documents)
    tail: list[int] = []
    while kept and len(tail) < probed * width:
        tail = kept.pop() + tail
    long_enough = [ids[:length] for ids in kept if len(ids) >= SHORTEST]
    if len(tail) < probed * width or len(long_enough) < max(1, wanted):
        raise CalibrationError(
            f"calibration.data: {where} has {len(long_enough)} documents of at least {SHORTEST} tokens beside the "
            f"{probed * width} tokens of the probe; {max(1, wanted)} are needed"
        )
    return Drawn(rng.sample(long_enough, wanted), probe_rows(tail, probed * width, probed))


def probe_rows(tokens: list[int], reserved: int, probed: int) -> list[list[int]]:
    """`probed` windows of equal length from the last `reserved` tokens."""
    width = reserved // probed
    return [tokens[-reserved:][i * width :][:width] for i in range(probed)]


def source_of(calibration: Calibration, data: str) -> list[Document]:
    """The documents of a source by name."""
    if data == "text":
        return [*builtin_text()]
    return read_documents(data, calibration.field or ("messages" if calibration.chat else "text"), calibration.split)


def builtin_text() -> list[str]:
    """The paragraphs of the built-in prose."""
    files = sorted(TEXTS.glob("calibration-*.txt"))
    return [line for path in files for line in path.read_text(encoding="utf-8").splitlines() if line]


def builtin_documents(rng: random.Random, tokens: int) -> list[str]:
    """Facts, questions and in-context documents, enough for `tokens` tokens; no evaluation asks for any of them."""
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


def thinned(documents: list[Document], characters: int, rng: random.Random) -> list[Document]:
    """The documents, or, if they hold more than `characters`, a random subset of about that size, in random order."""
    if sum(map(size_of, documents)) <= characters:
        return documents
    chosen: list[Document] = []
    for i in rng.sample(range(len(documents)), len(documents)):
        chosen.append(documents[i])
        characters -= size_of(documents[i])
        if characters <= 0:
            break
    return chosen


def size_of(document: Document) -> int:
    """The number of characters of a document."""
    return len(document) if isinstance(document, str) else sum(len(turn["content"]) for turn in document)


def encode(documents: list[Document], tokenizer: Any, chat: bool = False) -> list[list[int]]:
    """The tokens of each document, preceded by the tokenizer's BOS token (EOS if it has no BOS).

    With `chat`, each document goes through the tokenizer's chat template instead; a plain text counts as a user
    message. Raises CalibrationError if there is no template, or if a document is a conversation and `chat` is false.
    """
    if not documents:
        return []
    if chat:
        return [templated(document, tokenizer) for document in documents]
    texts = [document for document in documents if isinstance(document, str)]
    if len(texts) < len(documents):
        raise CalibrationError("calibration.data holds conversations; set calibration.chat to true to read them")
    opening = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    start = [] if opening is None else [opening]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [[*start, *ids] for ids in encoded]


def templated(document: Document, tokenizer: Any) -> list[int]:
    """The tokens of a document after the tokenizer's chat template; raises CalibrationError if that is not possible."""
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError("calibration.chat: the tokenizer of this model has no chat template")
    messages = [{"role": "user", "content": document}] if isinstance(document, str) else document
    try:
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    except Exception as error:  # a template is the model author's program and may raise anything
        raise CalibrationError(f"calibration.chat: the chat template refuses a conversation: {error}") from error
    return [int(token) for token in ids]


def windows(tokens: list[int], count: int, length: int, rng: random.Random) -> list[list[int]]:
    """`count` windows at random places of the stream; they overlap only if they do not all fit side by side."""
    slots = len(tokens) // length
    shift = rng.randrange(len(tokens) - slots * length + 1)
    if slots >= count:
        starts = [shift + slot * length for slot in rng.sample(range(slots), count)]
    else:
        starts = [rng.randrange(len(tokens) - length + 1) for _ in range(count)]
    return [tokens[start : start + length] for start in starts]
