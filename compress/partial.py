"""Folders that take the place of others: what is written elsewhere is put in place by renaming, whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from compress.errors import ArtifactError


def exchange(made: Path, out: Path) -> None:
    """Rename a folder to `out`; what was there before goes last, and stays on failure."""
    before = made.with_name(f"{made.name}-replaced")
    replaced = out.exists()
    if replaced:
        out.rename(before)
    try:
        made.rename(out)
    except BaseException as error:
        if replaced:
            before.rename(out)
        if isinstance(error, OSError):
            raise ArtifactError(f"{out}: cannot be put in place: {error}") from error
        raise
    flush(out.parent)
    shutil.rmtree(before, ignore_errors=True)


def missing_parents(out: Path) -> list[Path]:
    """The folders above `out` that are not there yet, innermost first."""
    return [parent for parent in out.parents if not parent.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders that hold nothing, in this order."""
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def flush(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
