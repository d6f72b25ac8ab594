"""Progress of an evaluation: tasks done, questions left, and a time estimate that follows the work measured so far."""

from __future__ import annotations

from typing import Any

import pytest

from compress_evals.progress import Meter, Step, duration
from compress_evals.questions import prepare
from compress_evals.suite import FACTS


def test_time_left_is_the_work_left_at_the_speed_so_far(tokenizer: Any) -> None:
    exam = prepare(FACTS, tokenizer, only=["facts_trained", "facts_context8"], limit=10)
    first, second = exam.tasks
    now, lines, steps = [0.0], list[str](), list[Step]()
    meter = Meter(lines.append, steps.append, clock=lambda: now[0])
    meter.expect(exam.tasks, 2)
    heard = meter.begin("m", first, 1, 2)
    assert (steps[-1].questions_left, steps[-1].seconds_left, steps[-1].share) == (40, None, 0.0)
    now[0] = 3.0
    heard(10)
    speed = first.work() / 3.0
    assert steps[-1].seconds_left == pytest.approx((first.work() + 2 * second.work()) / speed)
    meter.finish(first)
    now[0] = 5.0  # nothing is measured between tasks
    meter.begin("m", second, 2, 2)
    assert steps[-1].questions_left == 30
    assert steps[-1].seconds_left == pytest.approx((first.work() + 2 * second.work()) / speed)
    assert lines[0] == "m: 1/2 Facts, trained wording, 40 questions left"
    assert lines[1].startswith("m: 2/2 In context, 8 facts, 30 questions left, about ")
    assert len(lines) == 2


def test_what_was_stored_tells_nothing_of_speed(tokenizer: Any) -> None:
    exam = prepare(FACTS, tokenizer, only=["facts_trained", "facts_mc"], limit=10)
    now, steps = [0.0], list[Step]()
    meter = Meter(step=steps.append, clock=lambda: now[0])
    meter.expect(exam.tasks)
    meter.begin("m", exam.tasks[0], 1, 2)
    now[0] = 0.01
    meter.finish(exam.tasks[0])
    meter.begin("m", exam.tasks[1], 2, 2)
    assert steps[-1].seconds_left is None
    assert steps[-1].share > 0


def test_notes_are_heard_by_whoever_hears_most() -> None:
    lines, notes = list[str](), list[str]()
    Meter(lines.append).note("a")
    Meter(lines.append, note=notes.append).note("b")
    assert (lines, notes) == (["a"], ["b"])


def test_times_are_said_in_words() -> None:
    assert [duration(s) for s in (0.2, 89, 100, 3700, 9000)] == ["1 s", "89 s", "2 min", "62 min", "2 h 30 min"]
