"""Times functions against each other, in alternation, so that other load affects all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

FEWEST, MOST = 9, 400  # rounds


def race(
    runners: Sequence[Callable[[], object]],
    *,
    warm: int = 1,
    seconds: float = 0.0,
    fewest: int = FEWEST,
    most: int = MOST,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Seconds of each call of each runner; in every round, all runners are called once, until `seconds` have passed.

    There are between `fewest` and `most` rounds, after `warm` rounds that are not counted. Every other round runs in
    reverse order, so that what one call leaves in the caches for the next favours no runner.
    """
    for _ in range(warm):
        for run in runners:
            run()
    times: list[list[float]] = [[] for _ in runners]
    started = clock()
    done = 0
    while done < fewest or (done < most and clock() - started < seconds):
        order = range(len(runners))
        for i in order if done % 2 == 0 else reversed(order):
            began = clock()
            runners[i]()
            times[i].append(clock() - began)
        done += 1
    return times
