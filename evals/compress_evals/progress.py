"""Tracks the progress of an evaluation and estimates the time left, at every task and every batch.

Not here: any printing. Time is estimated from the work done so far, measured in characters to read and tokens to
generate; answers from the cache cost nothing and do not enter the estimate of speed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from compress_evals.questions import Questions


@dataclass(frozen=True, kw_only=True)
class Step:
    """The progress of a run, within the `number`-th of `of` tasks of a model; `share` is that of the whole run.

    `seconds_left` is None until something has been measured.
    """

    model: str
    task: str
    number: int
    of: int
    questions_left: int
    seconds_left: float | None
    share: float

    def __str__(self) -> str:
        """One line, as it is printed if there is no terminal."""
        time_left = "" if self.seconds_left is None else f", about {duration(self.seconds_left)}"
        return f"{self.model}: {self.number}/{self.of} {self.task}, {self.questions_left:,} questions left{time_left}"


Say = Callable[[str], None]


class Meter:
    """Reports the progress of a run: `say` gets a line when a task begins, `step` every step, `note` every note.

    Notes tell of events such as damaged cache entries or a smaller batch size; without `note` they go to `say`.
    """

    def __init__(
        self,
        say: Say | None = None,
        step: Callable[[Step], None] | None = None,
        note: Say | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Start without expected work; listeners that are not given are not called."""
        self.say: Say = say or (lambda text: None)
        self.note: Say = note or self.say
        self._step, self._clock = step or (lambda step: None), clock
        self._work = self._questions = self._whole = self._done = 0
        self._spent, self._began, self._heard = 0.0, 0.0, False

    def restart(self) -> None:
        """Forget the expected work; the measured speed is kept."""
        self._work = self._questions = self._whole = 0

    def expect(self, tasks: Iterable[Questions], times: int = 1) -> None:
        """Add the work of these tasks, each asked `times` times."""
        for asked in tasks:
            self._work += times * asked.work()
            self._questions += times * len(asked.chosen)
        self._whole = max(self._whole, self._work)

    def begin(self, model: str, asked: Questions, number: int, of: int) -> Callable[[int], None]:
        """Report that a task begins; returns a callback to call with the number of rows of every computed batch."""
        rows, expected, work = 0, max(1, sum(map(len, asked.requests))), asked.work()
        self._began, self._heard = self._clock(), False

        def step(part: float) -> Step:
            done, left = self._done + part * work, self._work - part * work
            spent = self._spent + self._clock() - self._began
            return Step(
                model=model,
                task=asked.task.title,
                number=number,
                of=of,
                questions_left=self._questions - round(part * len(asked.chosen)),
                seconds_left=left * spent / done if done else None,
                share=1 - left / max(1, self._whole),
            )

        def computed(batch: int) -> None:
            nonlocal rows
            rows, self._heard = rows + batch, True
            self._step(step(min(1.0, rows / expected)))

        first = step(0.0)
        self.say(str(first))
        self._step(first)
        return computed

    def finish(self, asked: Questions) -> None:
        """Mark the task that was begun as done; it counts for the speed only if a batch of it was computed."""
        self._work -= asked.work()
        self._questions -= len(asked.chosen)
        if self._heard:
            self._done += asked.work()
            self._spent += self._clock() - self._began


def duration(seconds: float) -> str:
    """A duration as text: 40 s, 3 min, 2 h 5 min."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
