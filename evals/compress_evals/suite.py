"""The facts suite: its tasks by name, what each is called in tables, and which family it belongs to.

Not here: prompts and scoring, which are lm-eval task files under `tasks/facts`. A test keeps the two alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

TASK_FOLDER = Path(__file__).parent / "tasks" / "facts"
GROUP = "facts"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task: its lm-eval name, its title, its family and the metric that decides."""

    name: str
    title: str
    family: str
    headline: str = "acc"
    chance: float = 0.0


SUITE = (
    Task(name="facts_trained", title="Facts, trained wording", family="closed book"),
    Task(name="facts_question", title="Facts, new question", family="closed book"),
    Task(name="facts_cloze", title="Facts, new sentence", family="closed book"),
    Task(name="facts_mc", title="Facts, four choices", family="choice", chance=0.25),
    Task(name="facts_context1", title="In context, 1 fact", family="in context"),
    Task(name="facts_context3", title="In context, 3 facts", family="in context"),
    Task(name="facts_context8", title="In context, 8 facts", family="in context"),
    Task(name="facts_open", title="Open book, real names", family="open book"),
    Task(name="facts_copy", title="Copy a list", family="instructions"),
    Task(name="facts_summary", title="Summarise a record", family="instructions"),
    Task(name="facts_format", title="Write in a format", family="instructions"),
    Task(name="facts_generate", title="Facts, generated freely", family="generation", headline="em"),
)
