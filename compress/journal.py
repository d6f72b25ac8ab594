"""The journal of a run: its finished blocks on disk, so that the run can be killed at any moment and resumed.

The folder is `OUT.partial` beside the target, so it is found again by name. It holds `artifact` (the shards so far),
`records` (one JSON file for each finished block, with the hidden states after that block), `scratch-N` (offloaded
states) and `lock`, which the writing process keeps locked and the kernel releases when that process dies. A record is
renamed into place once everything it names is on disk, and only then are the files that only the previous record
needed removed: at every moment one complete record exists. On a GPU, a block is recorded while the next one is
computed, but never two at once. Hidden states are stored rather than recomputed, because recomputed states would not
be bit-identical.
Of several processes, the first writes the journal; the others add files with the states they hold, and read it.
Not here: what makes two runs the same (`identity.py`).
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Container, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from compress.errors import ArtifactError, CompressError, LostProcess, RecipeError, causes, out_of_memory, why
from compress.events import BlockRecorded, RunInterrupted, RunRestarted, Sink
from compress.identity import Identity, difference
from compress.model.memory import apart, staged
from compress.model.source import DTYPES, NAMES, READERS, digest
from compress.model.travellers import Travellers, read_raw
from compress.partial import ATTEMPTS, LOCK, flush, missing_parents, put_back, remove_empty, same
from compress.shards import Entry, WriteError, split, write_tensors
from compress.team import ALONE, Team
from compress.writer import refusal

IDENTITY = "identity.json"
PART = 1 << 28  # bytes of hidden states per file; larger states are split, then hashed and written by several threads
Record = dict[str, Any]
Write = Callable[[], Record]  # writes what is packed and returns the facts that the record needs
Writing = tuple[Path, Callable[[], str]]  # a file, and a function that waits until it is on disk and returns its sha256


class Journal:
    """The locked folder of a run; when its `with` block ends, it is removed unless the run can be resumed from it.

    It is kept after a failure that is not the user's fault or that can be remedied: an interrupt, too little memory, a
    full disk, an unreadable file. It is removed after success, after a failure that would recur (an exceeded limit, an
    option that does not fit), and if no block was finished.
    """

    def __init__(self, target: Path, emit: Sink, restart: bool = False, team: Team = ALONE) -> None:
        """With `restart`, the work of an earlier run is discarded. All processes of a `team` must see this folder."""
        self.target, self.emit, self.restart, self.team = target, emit, restart, team
        self.folder = target.with_name(f"{target.name}.partial")
        self.artifact, self.place = self.folder / "artifact", self.folder / "records"
        self.records: list[Record] = []  # the first record is that of the tensors outside all blocks
        self.count = 0
        self.matched = self.unavailable = False
        self.beside: torch.device | None = None  # the GPU that continues computing while a block is recorded
        self.pending: Future[None] | None = None
        self.spare: list[Path] = []  # files of states that no record needs any more, to be reused or removed
        # one thread records beside the GPU, several write large states, and one removes files no longer needed
        self.aside, self.writers, self.remover = (ThreadPoolExecutor(threads) for threads in (1, READERS, 1))

    @property
    def done(self) -> int:
        """The number of finished blocks."""
        return max(0, len(self.records) - 1)

    @property
    def nbytes(self) -> int:
        """The size of all files in the folder, in bytes."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    # -- the folder --------------------------------------------------------------------------------

    def __enter__(self) -> Journal:
        """Create and lock the folder.

        Raises ArtifactError if it cannot be written, RecipeError if another process has it or it is not ours.
        """
        self.team.first(self._take)
        return self

    def _take(self) -> None:
        """Create the folder and lock it; undo a replacement of the target that an earlier run left half-done."""
        self.made = missing_parents(self.target)
        try:
            self.handle = locked(self.folder, self.target)
            put_back(self.artifact, self.target)
        except OSError as error:
            with suppress(OSError):  # a full disk takes the folder, but not what belongs into it
                if {path.name for path in self.folder.iterdir()} <= {LOCK}:
                    (self.folder / LOCK).unlink(missing_ok=True)
                    remove_empty([self.folder, *self.made])
            raise ArtifactError(f"{self.target.parent}: cannot write there: {error.strerror}") from error
        self.fresh = not (self.folder / IDENTITY).exists()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Release the folder, and remove it unless the run can be resumed; a failed write becomes an ArtifactError."""
        self._end_threads()
        refused = refusal(self.target, error) if error is not None else None
        if self.team.chief:
            kept = (ArtifactError, LostProcess)
            mended = bool(refused) or isinstance(error, kept) or not isinstance(error, CompressError)
            self._leave(error is None, mended or any(map(out_of_memory, causes(error))))
        if refused:
            raise refused from error

    def _end_threads(self) -> None:
        """Wait for all writing threads, however often the user presses Ctrl-C, before the folder is released.

        A block that is being recorded beside a GPU still reaches the disk.
        """
        if self.beside is None:
            self.writers.shutdown(wait=False, cancel_futures=True)
        for pool in (self.aside, self.writers, self.remover):
            ended = False
            while not ended:
                with suppress(KeyboardInterrupt):
                    if pool is self.remover:
                        self._remove_aside()
                    pool.shutdown()
                    ended = True

    def _leave(self, complete: bool, mended: bool) -> None:
        """Release the folder, and remove it unless blocks are finished and the failure can be remedied (`mended`)."""
        done = max(
            self.done, sum(1 for _ in self.place.glob("*.json")) - 1
        )  # a record may have been written that is not counted yet
        useful = mended and done and self.artifact.is_dir() if self.matched else not self.fresh
        try:
            if complete or not useful:
                self._remove()
            elif self.matched:
                self.emit(RunInterrupted(done=done, count=self.count))
        finally:
            os.close(self.handle)

    def _remove(self) -> None:
        """Remove the folder: first the file that makes it resumable, last the lock."""
        self._clear()
        (self.folder / LOCK).unlink(missing_ok=True)
        remove_empty([self.folder, *self.made])

    def _clear(self) -> None:
        """Remove everything but the lock."""
        (self.folder / IDENTITY).unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK:
                path.unlink()
        self.records = []

    def scratch(self) -> Path:
        """A new folder for the hidden states of this process alone; records may refer to its files."""
        for number in count(1 + sum(1 for _ in self.folder.glob("scratch-*"))):
            folder = self.folder / f"scratch-{number}"
            with suppress(FileExistsError):  # another process of the team was faster
                folder.mkdir()
                break
        return folder

    # -- going on ----------------------------------------------------------------------------------

    def follow(self, lead: Callable[[], None]) -> None:
        """Let the first process of the team run `lead`, which may change the records, then copy them to all others."""

        def led() -> list[Record]:
            lead()
            return self.records

        self.records = self.team.first(led)

    def match(self, identity: Identity) -> None:
        """Load the records of an earlier run if it is the same run; otherwise start with an empty folder.

        Damaged records are discarded, and RunRestarted is emitted. Raises RecipeError, naming what differs, if another
        run has finished blocks here.
        """
        lost = ""
        if self.restart or not self.artifact.is_dir():
            self._clear()
        elif (known := read(self.folder / IDENTITY)) is None:
            lost = f"{IDENTITY} is missing or damaged"
        elif (told := difference(known, identity)) and len([*self.place.glob("*.json")]) > 1:
            raise RecipeError(
                f"{self.folder}: holds a different run: {told}; use the same settings to resume it, "
                "or --restart to discard it"
            )
        elif told:
            self._clear()
        else:
            lost = self._load()
        self.matched = True
        for folder in (self.artifact, self.place):
            folder.mkdir(exist_ok=True)
        if lost:
            self.discard(lost)
        self._sweep()
        write(self.folder / IDENTITY, identity)

    def discard(self, reason: str) -> None:
        """Discard all records and shards; emit RunRestarted with the reason if there was anything."""
        if any(self.artifact.iterdir()):
            self.emit(RunRestarted(reason=f"{self.folder}: {reason}"))
        self.records = []
        for folder in (self.artifact, self.place):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()

    def _load(self) -> str:
        """Read the records and check the hash of every file they name; return what is damaged, or an empty string."""
        for path in self.artifact.glob("model-*-of-*.safetensors"):  # it was stopped while renaming the shards
            path.rename(self.artifact / f"part-{path.name.split('-')[1]}.safetensors")
        for number, path in enumerate(sorted(self.place.glob("*.json"))):
            record = read(path)
            if record is None or path.name != f"{number:05d}.json":
                return f"{path.name} is damaged, or one before it is missing"
            self.records.append(record)
        for path, known in self._named().items():
            if not path.is_file() or digest(path) != known:
                return f"{path.name} is missing or damaged"
        return ""

    def _named(self) -> dict[Path, str]:
        """Every file that the records need, with its sha256."""
        shards = {self.artifact / name: sha for r in self.records for name, sha in r["part"]["digests"].items()}
        held = [state for record in (*self.records[:1], *self.records[-1:]) for state in record["state"]]
        return shards | {self.folder / state["file"]: state["sha256"] for state in held}

    def _sweep(self) -> None:
        """Remove files that no record needs, such as those that were being written when the run was stopped."""
        named = {*self._named(), *(self.place / f"{number:05d}.json" for number in range(len(self.records)))}
        for folder in (self.artifact, *self.folder.glob("scratch-*"), self.place):
            for path in folder.iterdir():
                if path not in named:
                    path.unlink()

    def restore(self, streams: Mapping[str, Travellers]) -> None:
        """Load the recorded hidden states after the last finished block into these streams.

        Which process held them when they were recorded does not matter.
        """
        carried: dict[str, dict[str, Tensor]] = {}
        for state in self.records[-1]["state"] if self.done else ():
            if "stream" in state:
                if (stream := streams.get(state["stream"])) is not None:
                    raw = read_raw(self.folder / state["file"], DTYPES[state["dtype"]], state["shape"])
                    stream.hidden_BTD = raw.to(stream.device)
                continue
            for name, tensor in self.tensors(state["file"], streams).items():
                which, _, left = name.partition("/")
                if left:
                    carried.setdefault(which, {})[left] = tensor
                else:
                    streams[which].hidden_BTD = tensor.to(streams[which].device)
        for which, tensors in carried.items():
            streams[which].carry(tensors)

    def tensors(self, file: str, wanted: Container[str]) -> dict[str, Tensor]:
        """The tensors of `wanted` in a file of this folder, copied, because mapped tensors may be badly aligned."""
        with safe_open(self.folder / file, framework="pt") as opened:
            names = [name for name in opened.keys() if name.partition("/")[0] in wanted]  # noqa: SIM118
            return {name: opened.get_tensor(name).clone() for name in names}

    # -- recording ---------------------------------------------------------------------------------

    def record(
        self, make: Callable[[], Write], streams: Mapping[str, Travellers], more: Mapping[str, Tensor] | None = None
    ) -> None:
        """Record one block: the first process packs (`make`) and writes it, then it is noted with the hidden states.

        Hidden states of more than PART bytes are written in parallel. Each process of a team passes its own `streams`,
        and the record names those of all. If `beside` is set, this returns as soon as everything is packed and copied
        and the previous record is safe; otherwise once this record is on disk. Raises WriteError or OSError if the
        disk refuses, now or at the next record.
        """
        self.settle()
        if self.unavailable and self.records:
            self.team.first(lambda: make()())
            return
        stored = {name: stream for name, stream in streams.items() if stream.file is not None}
        tensors = {name: stream.hidden_BTD for name, stream in streams.items() if name not in stored} | dict(more or {})
        tensors |= {f"{name}/{key}": left for name, s in streams.items() for key, left in s.carried().items()}
        if self.beside is not None and not stored:
            self.pending = self.aside.submit(self._record_beside, self.beside, make(), staged(tensors, self.beside))
            return
        writing = self._writing(tensors)
        facts = self.team.first(lambda: make()())
        began = time.monotonic()
        held = self.team.share(lambda: ([self._stored(*of) for of in stored.items()] + self._written(writing), []))
        self._seal({**facts, "state": [state for states, _ in held for state in states]})
        self._tell(began)

    def settle(self) -> None:
        """Wait until the record being written is safe on disk; raises the error if writing it failed."""
        if self.pending is not None:
            began, pending = time.monotonic(), self.pending
            pending.result()
            self.pending = None
            self._tell(began)

    def _record_beside(self, device: torch.device, write: Write, tensors: Mapping[str, Tensor]) -> None:
        """Write a packed block and its states; runs in a thread of its own."""
        with apart(device):
            writing = self._writing(tensors)
            facts = write()
            self._seal({**facts, "state": self._written(writing)})

    def _writing(self, tensors: Mapping[str, Tensor]) -> list[Writing]:
        """Start writing hidden states: by several threads if they need several files, else when they are waited for."""
        number, whose = len(self.records), "" if self.team.chief else f"-{self.team.rank}"
        parts = list(split([Entry.of(name, tensor) for name, tensor in tensors.items()], PART))
        paths = [self.place / f"{number:05d}{whose}{f'.{i}' if i else ''}.safetensors" for i in range(len(parts))]
        spare, self.spare = self.spare[: len(paths)], self.spare[len(paths) :]
        self._remove_aside()
        for old, path in zip(spare, paths, strict=False):  # overwriting reuses their cached pages and disk blocks
            old.rename(path)
        tasks = [partial(write_tensors, path, part) for path, part in zip(paths, parts, strict=True)]
        begun = [self.writers.submit(task).result for task in tasks] if len(parts) > 1 else tasks
        return list(zip(paths, begun, strict=True))

    def _written(self, writing: list[Writing]) -> list[Record]:
        """Wait until the states are on disk, and return the files that hold them."""
        return [{"file": f"{self.place.name}/{path.name}", "sha256": finish()} for path, finish in writing]

    def _seal(self, record: Record) -> None:
        """Write the record itself, then remove the files that only the previous record needed.

        If those are several files, as for large states, they are kept to be overwritten next: freeing their pages and
        allocating them again costs as much as writing.
        """
        number = len(self.records)
        if self.team.chief:
            for folder in (self.artifact, *self.folder.glob("scratch-*")):
                flush(folder)
            write(self.place / f"{number:05d}.json", record)
            old = [self.folder / state["file"] for state in (self.records[-1]["state"] if number > 1 else ())]
            self.spare = [path for path in old if path.parent == self.place and len(old) > 1]
            for path in old:
                if path not in self.spare:
                    path.unlink(missing_ok=True)
            if len(record["state"]) <= 1:
                self._remove_aside()
        self.records.append(record)

    def _remove_aside(self) -> None:
        """Let a thread remove the spare files, which nothing needs any more."""
        for path in self.spare:
            self.remover.submit(path.unlink, missing_ok=True)
        self.spare = []

    def _tell(self, began: float) -> None:
        """Emit BlockRecorded; `began` is the time from which the run only waited for the disk."""
        if self.team.chief:
            nbytes = sum(path.stat().st_size for path in self.place.glob(f"{self.done:05d}*"))
            self.emit(BlockRecorded(done=self.done, nbytes=nbytes, seconds=time.monotonic() - began))

    def _stored(self, name: str, stream: Travellers) -> Record:
        """The record's entry for an offloaded state, whose file is from now on kept until the next record."""
        stream.kept = file = stream.file or Path()
        flush(file)
        return {
            "stream": name, "file": str(file.relative_to(self.folder)), "sha256": stream.sha256,
            "dtype": NAMES[stream.dtype], "shape": list(stream.shape),
        }  # fmt: skip


def locked(folder: Path, target: Path) -> int:
    """Lock a folder and return the handle of its lock; folder and lock are created if they do not exist.

    Raises RecipeError if another process holds the lock or the folder is not ours, OSError if it cannot be written.
    """
    for _ in range(ATTEMPTS):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / LOCK).exists() and any(folder.iterdir()):
            raise RecipeError(
                f"--out: {folder} is needed as the working folder for {target.name}, but is not empty; move it away"
            )
        try:
            handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the process that had the folder has just removed it
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if same(handle, folder / LOCK):
                os.ftruncate(handle, 0)
                os.write(handle, str(os.getpid()).encode())
                return handle
        except BlockingIOError as error:
            owner = os.pread(handle, 20, 0).decode(errors="replace")
            os.close(handle)
            raise RecipeError(
                f"--out: process {owner} is writing {target}; wait for it, or choose another folder"
            ) from error
        except OSError:
            os.close(handle)
            raise
        os.close(handle)
    raise RecipeError(f"--out: {folder} is repeatedly created and removed by other processes; choose another folder")


def write(path: Path, value: Any) -> None:
    """Write JSON with its own hash, atomically and flushed to disk; raises WriteError if the disk refuses."""
    new = path.with_suffix(".new")
    body = json.dumps(value)
    try:
        with new.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"sha256": sha256(body.encode()).hexdigest(), "record": value}))
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        flush(path.parent)
    except OSError as error:
        raise WriteError(str(path)) from error


def read(path: Path) -> Any:
    """The value that `write` wrote; None if the file is missing or damaged.

    Raises ArtifactError if it cannot be read for another reason: it may be whole, and must not be discarded.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        whole = sha256(json.dumps(found["record"]).encode()).hexdigest() == found["sha256"]
        return found["record"] if whole else None
    except (FileNotFoundError, IsADirectoryError, ValueError, KeyError, TypeError, RecursionError):
        return None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {why(error)}") from error
