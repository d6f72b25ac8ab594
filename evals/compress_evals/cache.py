"""What was measured once and need not be again: a folder of entries, each named by the hash of what decides it.

Not here: what an entry holds. An entry is JSON, written whole or not at all, and carries the hash of its content: one
that is damaged is said to be and counts as missing. Nothing is ever looked up by a name that two models could share.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress.errors import RecipeError, why
from compress.partial import put

LAYOUT = 1  # of the entries; another is another key
Say = Callable[[str], None]


class Cache:
    """Stored entries under `folder`; `fresh` ignores those that are there, `say` hears of damaged ones."""

    def __init__(self, folder: Path, *, fresh: bool = False, say: Say = lambda text: None) -> None:
        """Make the folder; raises RecipeError if that cannot be done."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(f"--cache: {folder} cannot be made: {error.strerror}") from error
        self.folder, self.say = folder, say
        self._fresh = fresh
        self._written: set[Path] = set()

    def path(self, kind: str, parts: dict[str, Any], ending: str = ".json.gz") -> Path:
        """Where the entry of a kind stands that `parts`, plain data, decide."""
        return self.folder / kind / f"{key(kind, parts)}{ending}"

    def get(self, kind: str, parts: dict[str, Any]) -> Any | None:
        """What was put, or None: nothing, damaged, or from before a fresh start."""
        path = self.path(kind, parts)
        if self._fresh and path not in self._written:
            return None
        try:
            entry = json.loads(gzip.decompress(path.read_bytes()))
            content = entry["content"]
            damaged = entry["sha256"] != _sha(content) or entry["key"] != key(kind, parts)
        except FileNotFoundError:
            return None
        except (OSError, EOFError, zlib.error, ValueError, RecursionError, KeyError, TypeError):  # gzip, JSON, layout
            damaged = True
        if damaged:
            self.damaged(path)
            return None
        return content

    def put(self, kind: str, parts: dict[str, Any], content: Any) -> None:
        """Store plain data; an entry appears whole or not at all."""
        path = self.path(kind, parts)
        entry = {"key": key(kind, parts), "sha256": _sha(content), "decided_by": parts, "content": content}
        raw = gzip.compress(json.dumps(entry, default=str).encode(), mtime=0)
        self.place(path, lambda partial: partial.write_bytes(raw))

    def place(self, path: Path, write: Callable[[Path], Any]) -> None:
        """Put a file in place once `write` has written all of it elsewhere; raises RecipeError if it cannot be."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            put(path, write)
        except OSError as error:
            raise RecipeError(f"--cache: {path} cannot be written: {why(error)}") from error
        self._written.add(path)

    def damaged(self, path: Path) -> None:
        """Say that an entry cannot be trusted."""
        self.say(f"note: {path} is damaged; measured again")


def key(kind: str, parts: dict[str, Any]) -> str:
    """The name of an entry: the hash of all that decides it."""
    return _sha([LAYOUT, kind, parts])


def _sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
