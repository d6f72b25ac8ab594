"""An on-disk cache of measurements: a folder of entries, each named by the hash of everything that determines it.

Not here: what an entry holds. An entry is JSON, is written atomically, and carries the hash of its content: a damaged
entry is reported and treated as missing. Nothing is ever looked up by a name that two models could share.
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

LAYOUT = 1  # version of the entry format; part of every key, so that a new one invalidates all entries
Say = Callable[[str], None]


class Cache:
    """Cache entries under `folder`.

    With `fresh`, entries that this object has not written itself are ignored. `say` receives a note about each damaged
    entry.
    """

    def __init__(self, folder: Path, *, fresh: bool = False, say: Say = lambda text: None) -> None:
        """Create the folder; raises RecipeError if it cannot be created."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(f"--cache: {folder} cannot be created: {error.strerror}") from error
        self.folder, self.say = folder, say
        self._fresh = fresh
        self._written: set[Path] = set()

    def path(self, kind: str, parts: dict[str, Any], ending: str = ".json.gz") -> Path:
        """The path of the entry of this kind that is determined by `parts`, which must be plain data."""
        return self.folder / kind / f"{key(kind, parts)}{ending}"

    def get(self, kind: str, parts: dict[str, Any]) -> Any | None:
        """The stored content; None if there is none, it is damaged, or `fresh` excludes it."""
        path = self.path(kind, parts)
        if self._fresh and path not in self._written:
            return None
        try:
            entry = json.loads(gzip.decompress(path.read_bytes()))
            content = entry["content"]
            damaged = entry["sha256"] != _sha(content) or entry["key"] != key(kind, parts)
        except FileNotFoundError:
            return None
        except (gzip.BadGzipFile, EOFError, zlib.error, ValueError, RecursionError, KeyError, TypeError):
            damaged = True
        except OSError as error:
            raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
        if damaged:
            self.damaged(path)
            return None
        return content

    def put(self, kind: str, parts: dict[str, Any], content: Any) -> None:
        """Store plain data atomically; raises RecipeError if it cannot be written."""
        path = self.path(kind, parts)
        entry = {"key": key(kind, parts), "sha256": _sha(content), "decided_by": parts, "content": content}
        raw = gzip.compress(json.dumps(entry, default=str).encode(), mtime=0)
        self.place(path, lambda partial: partial.write_bytes(raw))

    def place(self, path: Path, write: Callable[[Path], Any]) -> None:
        """Let `write` write a temporary file and then move it to `path`; raises RecipeError if that fails."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            put(path, write)
        except OSError as error:
            raise RecipeError(f"--cache: {path} cannot be written: {why(error)}") from error
        self._written.add(path)

    def damaged(self, path: Path) -> None:
        """Report that an entry is damaged and is measured again."""
        self.say(f"note: {path} is damaged; measuring again")


def key(kind: str, parts: dict[str, Any]) -> str:
    """The name of an entry: the hash of everything that determines it."""
    return _sha([LAYOUT, kind, parts])


def _sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
