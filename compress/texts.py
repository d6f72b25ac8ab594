"""The documents of a user's calibration source: a text file, JSON lines, a datasets folder, or a dataset on the hub.

A document is a text or a conversation; a conversation is a list of messages, each with `role` and `content`. The hub
is contacted only for sources named `hub:NAME`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from compress.errors import CalibrationError, in_short

HUB = "hub:"
PLAIN, LINES = (".txt", ".text", ".md"), (".jsonl", ".ndjson", ".json")
ALLOWED = "allowed: text, mixed, a .txt, .jsonl or .json file, a datasets folder, hub:NAME"
MOST = 200_000  # documents read from a stream; far more than any calibration draws

Conversation = list[dict[str, str]]
Document = str | Conversation


def read_documents(data: str | Path, field: str = "text", split: str = "train") -> list[Document]:
    """The documents of a source; `field` is the key or column that holds them, `split` the split of a dataset.

    Raises CalibrationError if the source cannot be read, or if a document is neither a text nor a conversation.
    """
    if str(data).startswith(HUB):
        return read_hub(str(data).removeprefix(HUB), field, split)
    path = Path(data)
    try:
        if path.is_dir():
            return read_dataset(path, field, split)
        if path.exists() and not path.is_file():  # a device or a pipe may never end
            raise CalibrationError(f"calibration.data: {str(path)[:200]!r} is not a regular file; {ALLOWED}")
        raw = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # missing, name too long, NUL in the name, not UTF-8
        raise CalibrationError(
            f"calibration.data: {str(path)[:200]!r} cannot be read ({type(error).__name__}); {ALLOWED}"
        ) from error
    if "\0" in raw:
        raise CalibrationError(f"calibration.data: {path} contains NUL bytes; it is not text")
    kind = path.suffix.lower()
    if kind in PLAIN:
        return [part for part in raw.split("\n\n") if part.strip()]
    if kind == ".json" and raw.lstrip().startswith("["):
        return [of_entry(entry, f"{path}[{i}]", field) for i, entry in enumerate(entries(raw, path))]
    if kind not in LINES:
        raise CalibrationError(f"calibration.data: {path}: {kind or 'a file without suffix'} is not read; {ALLOWED}")
    lines = enumerate(raw.split("\n"), start=1)
    return [document_of(line, f"{path}:{number}", field) for number, line in lines if line.strip()]


def entries(raw: str, path: Path) -> list[Any]:
    """The entries of a JSON list; raises CalibrationError if it is none."""
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"calibration.data: {path} is not readable as JSON: {str(error)[:120]}") from error
    return list(found)


def document_of(line: str, where: str, field: str = "text") -> Document:
    """The document in `field` of a JSON line; raises CalibrationError, naming `where`, if there is none."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where}: expected a JSON object with a `{field}` field") from error
    return of_entry(entry, where, field)


def of_entry(entry: Any, where: str, field: str) -> Document:
    """The document in `field` of an object; raises CalibrationError, naming `where`, if there is none."""
    if not isinstance(entry, dict) or field not in entry:
        raise CalibrationError(f"{where}: expected a JSON object with a `{field}` field")
    return checked(entry[field], where, field)


def checked(value: Any, where: str, field: str) -> Document:
    """The value, if it is a text or a conversation; raises CalibrationError otherwise."""
    if isinstance(value, str):
        if not value.isprintable() and any("\ud800" <= c <= "\udfff" for c in value):
            raise CalibrationError(f"{where}: `{field}` contains half of a surrogate pair, which is not a character")
        return value
    turns = value if isinstance(value, list) else []
    if turns and all(isinstance(t, dict) and {"role", "content"} <= t.keys() for t in turns):
        return [{"role": checked_text(t["role"], where), "content": checked_text(t["content"], where)} for t in turns]
    raise CalibrationError(f"{where}: `{field}` is neither a string nor a list of messages with role and content")


def checked_text(value: Any, where: str) -> str:
    """The role or content of a message; raises CalibrationError unless it is a string."""
    if not isinstance(value, str):
        raise CalibrationError(f"{where}: role and content of a message must be strings")
    return value


def rows_of(rows: Iterable[Any], where: str, field: str) -> list[Document]:
    """The documents in the column `field` of a dataset's rows, at most MOST."""
    found: list[Document] = []
    for number, row in enumerate(islice(rows, MOST)):
        if field not in row:
            raise CalibrationError(f"{where}: no column {field!r}; it has {', '.join(sorted(row))}")
        found.append(checked(row[field], f"{where}, row {number}", field))
    return found


def read_dataset(path: Path, field: str = "text", split: str = "train") -> list[Document]:
    """The documents of a folder written by `save_to_disk`, or of one with parquet, JSON, CSV or text files."""
    datasets = library()
    where = f"calibration.data: {path}"
    try:
        data = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError):
        return rows_of(streamed(datasets, str(path), None, split, f"{where} is not a datasets folder"), where, field)
    except Exception as error:  # a damaged folder may raise anything
        raise CalibrationError(f"{where} is a damaged datasets folder: {type(error).__name__}: {error}") from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise CalibrationError(f"{where}: no split {split!r}; it has {', '.join(sorted(map(str, data)))}")
        data = data[split]
    return rows_of(data, where, field)


def read_hub(name: str, field: str, split: str) -> list[Document]:
    """The documents of the hub's dataset `NAME` or `NAME:CONFIGURATION`, streamed."""
    name, _, configuration = name.partition(":")
    where = f"calibration.data: hub:{name}"
    return rows_of(streamed(library(), name, configuration or None, split, f"{where} cannot be loaded"), where, field)


def streamed(datasets: Any, name: str, configuration: str | None, split: str, complaint: str) -> Iterator[Any]:
    """The rows of a dataset, streamed; raises CalibrationError that begins with `complaint` if this fails."""
    try:
        yield from datasets.load_dataset(name, configuration, split=split, streaming=True)
    except Exception as error:  # network, names, formats: datasets and its readers raise many types
        raise CalibrationError(f"{complaint}: {in_short(error)}") from error


def library() -> Any:
    """The package `datasets`; raises CalibrationError if it is not installed."""
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError("calibration.data: this source needs `pip install datasets`") from error
    return datasets
