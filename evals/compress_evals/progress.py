"""How far a run is and how long it will take, told at every task and at every batch in between.

Not here: any printing. Time is estimated from the work done so far, in characters to read and tokens to write; what
was stored costs nothing and is not counted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from compress_evals.questions import Questions


@dataclass(frozen=True, kw_only=True)
class Step:
    """Where a run stands, within the `number`-th task of a model; `share` is of the whole run.

    `seconds_left` is None until something was measured.
    """

    model: str
    task: str
    number: int
    of: int
    questions_left: int
    seconds_left: float | None
    share: float

    def __str__(self) -> str:
        """One line, as it is printed where there is no terminal."""
        time_left = "" if self.seconds_left is None else f", about {duration(self.seconds_left)}"
        return f"{self.model}: {self.number}/{self.of} {self.task}, {self.questions_left:,} questions left{time_left}"


Say = Callable[[str], None]


class Meter:
    """The steps of a run: `say` hears a line when a task begins, `step` every step, `note` what went another way.

    Notes go to `say` where nobody else hears them.
    """

    def __init__(
        self,
        say: Say | None = None,
        step: Callable[[Step], None] | None = None,
        note: Say | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Nothing is expected yet; without listeners nobody is told."""
        self.say: Say = say or (lambda text: None)
        self.note: Say = note or self.say
        self._step, self._clock = step or (lambda step: None), clock
        self._work = self._questions = self._whole = self._done = 0
        self._spent, self._began, self._heard = 0.0, 0.0, False

    def restart(self) -> None:
        """Nothing is expected any more; what is known of the speed stays."""
        self._work = self._questions = self._whole = 0

    def expect(self, tasks: Iterable[Questions], times: int = 1) -> None:
        """These tasks will be asked, so many times."""
        for asked in tasks:
            self._work += times * asked.work()
            self._questions += times * len(asked.chosen)
        self._whole = max(self._whole, self._work)

    def begin(self, model: str, asked: Questions, number: int, of: int) -> Callable[[int], None]:
        """Tell that a task begins; what is given is to hear of the rows of every batch, and tells of them, too."""
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
        """The task that was begun is done; one whose answers were stored tells nothing of speed."""
        self._work -= asked.work()
        self._questions -= len(asked.chosen)
        if self._heard:
            self._done += asked.work()
            self._spent += self._clock() - self._began


def duration(seconds: float) -> str:
    """A time in words: 40 s, 3 min, 2 h 5 min."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
