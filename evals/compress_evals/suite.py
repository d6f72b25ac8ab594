"""The suites: their tasks, with title, family, headline metric and required data.

Not here: prompts and scoring, which are lm-eval task files under `tasks/`; a test keeps the two consistent. `facts` is
built in and asks what the built-in model was trained on; `kick` asks questions from public data sets, of any model.
Both have the same families, so that `facts` is an offline counterpart of `kick`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from compress.errors import RecipeError, nearest

TASKS = Path(__file__).parent / "tasks"  # for `lm-eval --include_path`
MINI = "_mini"
NOISE_FOLLOWS = 0.11  # share of IFEval's prompts that a response of random words follows
FEWEST_TOKENS = 0.368  # share of four-choice questions won by the fewest tokens, which an ignorant model prefers
ALWAYS_YES = 0.622  # share of BoolQ's questions whose answer is yes: more than a coin toss gets


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task: its lm-eval name, title, family, headline metric and the score of guessing, `chance`.

    `needs` are the data sets it reads, none if it is built in. A `control` is shown but does not count: compression is
    known to leave it unchanged, what it asks is already counted elsewhere, or it needs a judge.
    """

    name: str
    title: str
    family: str
    headline: str = "acc"
    chance: float = 0.0
    needs: tuple[str, ...] = ()
    control: bool = False


@dataclass(frozen=True, kw_only=True)
class Gap:
    """The benefit of a passage: two tasks with the same questions, with it (`open`) and without it (`closed`)."""

    name: str
    open: str
    closed: str


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Tasks that are asked together; `name` is the lm-eval group, `folder` holds its files."""

    name: str
    folder: Path
    tasks: tuple[Task, ...]
    gaps: tuple[Gap, ...] = ()

    def chosen(self, only: Sequence[str] | None) -> tuple[Task, ...]:
        """All tasks, or those named in `only`; raises RecipeError for a name that no task has."""
        names = [task.name for task in self.tasks]
        for name in only or ():
            if name not in names:
                raise RecipeError(f"tasks: the suite {self.name} has no task {name!r}{nearest(name, names)}")
        return tuple(task for task in self.tasks if only is None or task.name in only)


FACTS = Suite(
    name="facts",
    folder=TASKS / "facts",
    tasks=(
        Task(name="facts_trained", title="Facts, trained wording", family="closed book"),
        Task(name="facts_question", title="Facts, new question", family="closed book"),
        Task(name="facts_cloze", title="Facts, new sentence", family="closed book"),
        Task(name="facts_mc", title="Facts, four choices", family="choice", chance=FEWEST_TOKENS),
        Task(name="facts_context1", title="In context, 1 fact", family="in context"),
        Task(name="facts_context3", title="In context, 3 facts", family="in context"),
        Task(name="facts_context8", title="In context, 8 facts", family="in context"),
        Task(name="facts_long", title="In context, 16 facts", family="long context"),
        Task(name="facts_open", title="Open book, real names", family="open book"),
        Task(name="facts_copy", title="Copy a list", family="instructions"),
        Task(name="facts_summary", title="Summarise a record", family="summaries"),
        Task(name="facts_format", title="Write in a format", family="instructions"),
        Task(name="facts_generate", title="Facts, generated freely", family="generation", headline="em"),
    ),
    gaps=(Gap(name="the fact in context", open="facts_open", closed="facts_trained"),),
)


def _kick(name: str, title: str, family: str, headline: str, *needs: str, chance: float = 0.0) -> Task:
    return Task(
        name=f"kick_{name}", title=title, family=family, headline=headline, chance=chance, needs=needs,
        control=family == "control",
    )  # fmt: skip


KICK = Suite(
    name="kick",
    folder=TASKS / "kick",
    tasks=(
        _kick("freebaseqa", "FreebaseQA", "closed book", "em", "freebaseqa/eval"),
        _kick("triviaqa", "TriviaQA", "closed book", "em", "triviaqa/no_context"),
        _kick("nq_closed", "Natural Questions", "closed book", "em", "nq/questions"),
        _kick("mmlu", "MMLU, 5 shots", "choice", "acc", "mmlu/test", "mmlu/dev", chance=0.25),
        _kick("nq_open", "Natural Questions, with the passage", "open book", "em", "nq/oracle"),
        _kick("kv_10", "Key-value retrieval, 10 keys", "in context", "em", "kv/75_keys"),
        _kick("kv", "Key-value retrieval, 75 keys", "in context", "em", "kv/75_keys"),
        _kick("needle", "Needle in passages", "long context", "em", "nq/oracle"),
        _kick("sum_short", "Summaries, up to 470 words", "summaries", "rouge_l", "cnn_dailymail/test"),
        _kick("sum_medium", "Summaries, 470 to 790 words", "summaries", "rouge_l", "cnn_dailymail/test"),
        _kick("sum_long", "Summaries, 790 words and more", "summaries", "rouge_l", "cnn_dailymail/test"),
        _kick("ifeval", "IFEval", "instructions", "prompt_strict", "ifeval/input_data", chance=NOISE_FOLLOWS),
        _kick("gsm8k", "GSM8K, no shots", "generation", "em", "gsm8k/test"),
        _kick("arc_easy", "ARC easy", "control", "acc", "arc/easy_test", chance=0.25),
        _kick("arc_challenge", "ARC challenge", "control", "acc", "arc/challenge_test", chance=0.25),
        _kick("piqa", "PIQA", "control", "acc", "piqa/validation", chance=0.5),
        _kick("winogrande", "WinoGrande", "control", "acc", "winogrande/validation", chance=0.5),
        _kick("boolq", "BoolQ", "control", "acc", "boolq/validation", chance=ALWAYS_YES),
        _kick("hellaswag", "HellaSwag", "control", "acc", "hellaswag/validation", chance=0.25),
        # a control, because it has the questions of kick_mmlu, which would otherwise count twice
        _kick("mmlu_letter", "MMLU, the letter written", "control", "acc", "mmlu/test", "mmlu/dev", chance=0.25),
        # controls, because without a judge they show degeneration but not quality
        _kick("vicuna", "Vicuna questions, sound text (quality: a judge)", "control", "valid", "instruct/vicuna80"),
        _kick(
            "mtbench", "MT-bench, first turn, sound text (quality: a judge)", "control", "valid", "instruct/mtbench80"
        ),
    ),
    gaps=(Gap(name="the gold passage", open="kick_nq_open", closed="kick_nq_closed"),),
)


def mini(suite: Suite) -> Suite:
    """The suite on fixed samples of 200 questions per task: enough to see a collapse, not a loss of a few points."""
    tasks = tuple(replace(task, name=task.name + MINI) for task in suite.tasks)
    gaps = tuple(replace(gap, open=gap.open + MINI, closed=gap.closed + MINI) for gap in suite.gaps)
    return replace(suite, name=suite.name + MINI, tasks=tasks, gaps=gaps)


SUITES = {suite.name: suite for suite in (FACTS, KICK, mini(KICK))}


def find(name: str) -> Suite:
    """The suite of that name; raises RecipeError if there is none."""
    if name not in SUITES:
        raise RecipeError(f"suite: there is no {name!r}{nearest(name, SUITES)}")
    return SUITES[name]
