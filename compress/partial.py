"""What is being made lies in `OUT.partial-<id>`, beside OUT, whose place it takes by renaming, whole or not at all.

In that folder is `lock`, held by who makes something there and let go by the kernel when that dies. Whoever wants OUT
next removes the folders of it that nobody holds, and only those: without a lock they are not known to be of ours. They
have random names, since several may be at work for one OUT. Not here: a run that is gone on with (`journal.py`).
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from pathlib import Path
from uuid import uuid4

from compress.errors import ArtifactError

LOCK = "lock"
REPLACED = "-replaced"  # behind the name of what takes the place of what was there
ATTEMPTS = 8  # to lock a folder that another process may be removing


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A folder next to `out`, held while this lives, that is gone at the end, as are empty ones made above `out`.

    What is finished is moved out of it. Raises ArtifactError if it cannot be made.
    """
    above = missing_parents(out)
    with ExitStack() as end:
        end.callback(remove_empty, above)
        folder, handle = take(out)
        end.callback(os.close, handle)
        end.callback(settle, folder, out)
        yield folder


def take(out: Path) -> tuple[Path, int]:
    """A new folder next to `out` and the handle of its lock; raises ArtifactError if it cannot be made."""
    for _ in range(ATTEMPTS):
        folder = out.with_name(f"{out.name}.partial-{uuid4().hex[:8]}")
        try:
            folder.mkdir(parents=True)
            with suppress(BlockingIOError, FileNotFoundError):  # somebody took it for dead before it was held
                return folder, hold(folder / LOCK, os.O_CREAT)
        except OSError as error:
            remove(folder)
            raise ArtifactError(f"{out.parent}: cannot write there: {error.strerror}") from error
    raise ArtifactError(f"{out.parent}: what is made there is removed at once; other processes are using {out.name}")


def hold(lock: Path, flags: int = 0) -> int:
    """The handle of a lock, held. Raises BlockingIOError if anybody has it, FileNotFoundError if it is gone."""
    handle = os.open(lock, os.O_RDWR | flags, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not same(handle, lock):
            raise FileNotFoundError(lock)
    except OSError:
        os.close(handle)
        raise
    return handle


def same(handle: int, path: Path) -> bool:
    """Whether an open file is still the one of this name."""
    return path.exists() and os.path.samestat(os.fstat(handle), path.stat())


def clear(out: Path) -> None:
    """Remove what dead processes have left of making `out`, once a replacement that one died in is undone."""
    found = out.parent.glob(f"{escape(out.name)}.partial-{'[0-9a-f]' * 8}")
    for folder in [path for path in found if not path.is_symlink()]:
        with suppress(OSError):  # it is held, or somebody else's, or has just been removed
            if not any(folder.iterdir()):  # killed before there was a lock, or when it was gone
                folder.rmdir()
                continue
            handle = hold(folder / LOCK)
            try:
                settle(folder, out)
            finally:
                os.close(handle)


def settle(folder: Path, out: Path) -> None:
    """Undo a replacement of `out` that ended half-way, and remove the folder, unless that cannot be undone now."""
    with suppress(OSError):
        for before in folder.glob(f"*{REPLACED}"):
            put_back(before.with_name(before.name.removesuffix(REPLACED)), out)
        remove(folder)


def remove(folder: Path) -> None:
    """Remove a folder, the lock last: what a kill or the disk leaves of it is still known as one of ours."""
    with suppress(OSError):
        for path in [path for path in folder.iterdir() if path.name != LOCK]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()


def put_back(made: Path, out: Path) -> None:
    """Undo `exchange` if it was killed between its two renames: then alone are both folders there, and `out` is not."""
    before = made.with_name(f"{made.name}{REPLACED}")
    if made.exists() and before.exists() and not out.exists():
        before.rename(out)


def exchange(made: Path, out: Path) -> None:
    """Rename a folder to `out`; what was there before goes last, and stays on failure."""
    before = made.with_name(f"{made.name}{REPLACED}")
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


def put(path: Path, write: Callable[[Path], object]) -> None:
    """Put a file in place once `write` has written all of it beside `path`; of what fails nothing is left.

    Nothing is flushed: after a power cut it may be missing, or be as it was before. Where several write one file, the
    last to end has written all of it.
    """
    made = path.with_name(f"{path.name}.partial-{uuid4().hex[:8]}")
    try:
        write(made)
        made.replace(path)
    except BaseException:
        made.unlink(missing_ok=True)
        raise


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
