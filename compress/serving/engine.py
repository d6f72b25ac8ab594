"""The engine: one thread that computes all running sequences together, with continuous batching.

Sequences of all tenants share each step; new sequences join between steps, and finished ones leave.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from compress.runtime.tenants import Tenants
from compress.runtime.tenants.tenants import left_padded
from compress.serving.running import Piece, Running, Sequence, by_tenant, logits_of
from compress.serving.sampling import choose

LOG = logging.getLogger("compress.serving")
FEW = 32  # prompts up to this many tokens are grouped whatever their length: a step reads all weights in any case
FAILED = "the server failed while computing this answer"


class Full(Exception):
    """The queue is full."""


class Closed(Exception):
    """The engine accepts no more sequences."""


class Engine:
    """Runs up to `max_batch` sequences at once; up to `max_queue` more wait.

    The tenant of each row is looked up by name again at every step.
    """

    def __init__(self, tenants: Tenants, *, max_batch: int, max_queue: int) -> None:
        self.tenants, self.max_batch, self.max_queue = tenants, max_batch, max_queue
        self.waiting: deque[Sequence] = deque()
        self.running: Running | None = None
        self.changed = threading.Condition()
        self.closed = False
        self.observe: Callable[[int], None] = lambda rows: None  # called with the number of rows of every step
        self.thread = threading.Thread(target=self._loop, name="compress-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self.thread.start()

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence; raises Full or Closed."""
        with self.changed:
            if self.closed:
                raise Closed
            self.waiting = deque(one for one in self.waiting if not one.cancelled)
            if len(self.waiting) >= self.max_queue:
                raise Full
            self.waiting.append(sequence)
            self.changed.notify()

    def close(self, timeout: float = 10.0) -> None:
        """Accept no more sequences, fail the unfinished ones and stop; waits for the thread up to `timeout` seconds."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        if self.thread.is_alive():
            self.thread.join(timeout)

    @property
    def active(self) -> int:
        """The number of running sequences."""
        running = self.running
        return 0 if running is None else len(running.sequences)

    def _loop(self) -> None:
        while True:
            with self.changed:
                while not self.closed and not self.waiting and self.running is None:
                    self.changed.wait()
                if self.closed:
                    break
                new = self._admitted()
            for alike in of_like_length(new):
                self._admit(alike)
            self._advance()
        left = [*(self.running.sequences if self.running else ()), *self.waiting]
        self.running = None
        fail(left, "the server is shutting down")

    def _admitted(self) -> list[Sequence]:
        """Take from the queue the sequences that can run now: the batch has room, and their tenants fit in memory."""
        active = [] if self.running is None else self.running.sequences
        names = {sequence.tenant for sequence in active if sequence.tenant is not None}
        found: list[Sequence] = []
        while self.waiting and len(active) + len(found) < self.max_batch:
            following = self.waiting[0]
            more = names if following.tenant is None else names | {following.tenant}
            if not following.cancelled:
                if (active or found) and not self._fits(more):
                    break
                names = more
                found.append(following)
            self.waiting.popleft()
        return found

    def _fits(self, names: set[str]) -> bool:
        known = [name for name in names if name in self.tenants.entries]  # unknown tenants fail when they are run
        return self.tenants.fits(known)

    def _admit(self, new: list[Sequence]) -> None:
        """Start new sequences; if they fail together, each is tried alone, so that none fails because of another."""
        try:
            self._join(new)
            return
        except Exception:  # whatever the error, the affected requests must be answered and the others must go on
            if len(new) == 1:
                LOG.exception("computing a prompt of %d tokens failed", len(new[0].prompt))
        unheard = [sequence for sequence in new if not sequence.made]  # the exception no longer holds what it computed
        if len(new) > 1:
            for sequence in unheard:
                self._admit([sequence])
        else:
            fail(unheard, FAILED)
        fail([sequence for sequence in new if sequence not in unheard and not self._runs(sequence)], FAILED)

    def _runs(self, sequence: Sequence) -> bool:
        return self.running is not None and sequence in self.running.sequences

    def _advance(self) -> None:
        """Compute one more token for all running sequences; if the step fails, all of them fail."""
        sequences = [] if self.running is None else self.running.sequences
        try:
            self._step()
        except Exception:  # as above; which sequence caused it cannot be known
            LOG.exception("computing a step of %d sequences failed", len(sequences))
            self.running = None
            fail(sequences, FAILED)

    def _join(self, new: list[Sequence]) -> None:
        """Compute the prompts of new sequences, then add them to the running ones."""
        new = [new[row] for row in by_tenant(new)]
        device = next(self.tenants.model.parameters()).device
        ids_BS, mask_BS = left_padded([sequence.prompt for sequence in new], device)
        fresh = Running(new, ids_BS[:, :0], mask_BS, [])
        left = self._advanced(fresh, ids_BS)
        if left is not None:
            self.running = left if self.running is None else self.running.joined(left)

    def _step(self) -> None:
        """Compute one more token for every running sequence that has not been cancelled."""
        running = self.running
        if running is None:
            return
        with self.tenants.lock:  # so that no tenant is dropped between the check and the step
            self._fail_dropped(running.sequences)
            if any(sequence.cancelled for sequence in running.sequences):
                running = running.select([row for row, one in enumerate(running.sequences) if not one.cancelled])
                self.running = running
            if running is not None:
                more_B1 = running.mask_BT.new_ones(len(running.sequences), 1)
                running.mask_BT = torch.cat((running.mask_BT, more_B1), 1)
                self.running = self._advanced(running, running.last_B1)

    def _fail_dropped(self, sequences: list[Sequence]) -> None:
        """Fail the sequences whose tenant has been dropped."""
        known = self.tenants.entries
        fail([s for s in sequences if s.tenant is not None and s.tenant not in known], "this model is no longer served")

    def _advanced(self, running: Running, ids_BS: Tensor) -> Running | None:
        """Choose one more token for each sequence, and return those that continue; None if none does."""
        self.observe(len(running.sequences))
        logits_BV = logits_of(self.tenants, running, ids_BS)
        finite = torch.isfinite(logits_BV).all(1).tolist()
        likeliest = logits_BV.argmax(1).tolist()
        going, tokens = [], []
        for row, sequence in enumerate(running.sequences):
            if sequence.cancelled:
                continue
            if not finite[row]:
                fail([sequence], "the model computed logits that are not finite")
                continue
            greedy = sequence.sampling.temperature == 0
            token = likeliest[row] if greedy else choose(logits_BV[row], sequence.sampling, sequence.generator)
            tokens.append(token)
            if not sequence.take(token):
                going.append(row)
            else:
                tokens.pop()
        running.last_B1 = logits_BV.new_zeros(len(running.sequences), 1, dtype=torch.long)
        running.last_B1[going, 0] = torch.tensor(tokens, dtype=torch.long, device=logits_BV.device)
        return running if len(going) == len(running.sequences) else running.select(going)


def of_like_length(new: Iterable[Sequence]) -> list[list[Sequence]]:
    """Group sequences by prompt length, for prompts that are computed together, padded to the longest of the group.

    Padding at most doubles the shortest prompt of a group, or fills it up to FEW tokens.
    """
    groups: list[list[Sequence]] = []
    for sequence in sorted(new, key=lambda one: len(one.prompt)):
        if groups and len(sequence.prompt) <= max(FEW, 2 * len(groups[-1][0].prompt)):
            groups[-1].append(sequence)
        else:
            groups.append([sequence])
    return groups


def fail(sequences: list[Sequence], why: str) -> None:
    """Cancel sequences and send each the error `why`."""
    for sequence in sequences:
        sequence.cancelled = True
        sequence.emit(Piece(error=why))
