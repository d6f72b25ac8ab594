"""Timing functions against each other: in turn, so that other load meets all alike."""

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
    """Seconds of each call of each runner; all run once a round, in turn, until `seconds` are over.

    Between `fewest` and `most` rounds, after `warm` that do not count. Every other round goes backwards: what a call
    leaves in the caches for the next one then favours nobody.
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
