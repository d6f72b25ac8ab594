"""The questions of a run: which tasks can be asked, of which documents, and the hash of all that decides an answer.

Not here: any model. A task is loaded through lm-eval, and its prompts are built as they will be asked, so that what
was asked before is known again without asking. lm-eval's own caches know neither data nor model and are never used.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compress.errors import ArtifactError, RecipeError
from compress_evals.data import available, check_folder, subset
from compress_evals.quiet import quiet
from compress_evals.results import Data, Skipped
from compress_evals.suite import FACTS, Suite, Task

PACKAGE = Path(__file__).parent
DEFAULT_GENERATED = 256  # lm-eval's, where a task does not say
SHOWN = 3  # names of one reason
GENERATED = 8  # characters of a prompt that take about as long as one generated token

Arguments = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Questions:
    """One task ready to be asked: lm-eval's task, the documents chosen, and its requests, those of one together.

    A request is what lm-eval gives a model: (prompt, continuation), or (prompt, options) to generate. `sha256` covers
    documents, requests and the code that scores them.
    """

    task: Task
    loaded: Any
    chosen: tuple[int, ...]
    requests: tuple[tuple[Arguments, ...], ...] = field(repr=False)
    data: Data
    sha256: str

    def document(self, i: int) -> dict[str, Any]:
        """The i-th of the documents that are asked."""
        found: dict[str, Any] = self.loaded.eval_docs[self.chosen[i]]
        return found

    def prompt(self, i: int) -> str:
        """What the i-th question puts before a model, as it is asked."""
        return str(self.requests[i][0][0])

    def work(self) -> int:
        """How much there is to read and write, in characters: what time is estimated by."""
        every = (pair for requests in self.requests for pair in map(prompt_and_then, requests))
        return sum(len(prompt) + GENERATED * tokens_to_generate(then) for prompt, then in every)


@dataclass(frozen=True, kw_only=True)
class Exam:
    """All questions of a run, the same for every model; `tokenizer` is the dense model's, beginning with BOS.

    `chat_template` is the template's sha256, None if prompts are asked as they are.
    """

    suite: Suite
    tokenizer: Any
    tokenizer_sha: str
    limit: int | None
    seed: int
    chat_template: str | None
    tasks: tuple[Questions, ...]
    skipped: dict[str, Skipped]


def prepare(
    suite: Suite,
    tokenizer: Any,
    *,
    only: Sequence[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    data_dir: Path | None = None,
    online: bool = False,
    chat_template: bool = False,
) -> Exam:
    """The exam that a suite makes; tasks whose data cannot be had are skipped.

    Raises RecipeError for an unknown task, if no task is left, or for a chat template that the tokenizer has not.
    """
    had, skipped = availability(suite.chosen(only), data_dir, online)
    if not had:
        reasons = grouped(skip.reason for skip in skipped.values())
        raise RecipeError(
            f"{suite.name}: no task can be asked: {reasons or 'the suite is empty'}. Give --data-dir FOLDER, or "
            "--online; --suite facts is the twin that needs neither"
        )
    prepared = beginning_with_bos(tokenizer)
    template = template_hash(prepared) if chat_template else None
    names = [task.name for task in suite.chosen(only) if task.name in had]
    with quiet():
        tasks = load_tasks(suite, data_dir, online, names)
        asked = tuple(
            questions(suite, task, tasks[task.name], had[task.name], prepared, limit, seed, template is not None)
            for task in suite.chosen(names)
        )
    return Exam(
        suite=suite,
        tokenizer=prepared,
        tokenizer_sha=identity(prepared),
        limit=limit,
        seed=seed,
        chat_template=template,
        tasks=asked,
        skipped=skipped,
    )


def within(exam: Exam, context: int) -> Exam:
    """The exam without the tasks that generate as much as a model's whole context, which lm-eval cannot ask.

    Raises RecipeError if none is left.
    """
    longest = {
        asked.task.name: max(
            tokens_to_generate(prompt_and_then(arguments)[1]) for requests in asked.requests for arguments in requests
        )
        for asked in exam.tasks
    }
    skipped = {
        asked.task.name: Skipped(
            title=asked.task.title,
            family=asked.task.family,
            reason=f"it generates up to {longest[asked.task.name]:,} tokens, and the model's context is {context:,}",
        )
        for asked in exam.tasks
        if longest[asked.task.name] >= context
    }
    if len(skipped) == len(exam.tasks):
        reasons = "; ".join(f"{name}: {skip.reason}" for name, skip in skipped.items())
        raise RecipeError(f"{exam.suite.name}: no task fits this model: {reasons}")
    left = tuple(asked for asked in exam.tasks if asked.task.name not in skipped)
    return replace(exam, tasks=left, skipped={**exam.skipped, **skipped})


def availability(
    tasks: Iterable[Task], data_dir: Path | None, online: bool
) -> tuple[dict[str, Data | None], dict[str, Skipped]]:
    """Where the data of each task come from (None: built in), and which tasks cannot be asked, and why.

    Raises RecipeError for a data folder that is none, also where no task reads it.
    """
    check_folder(data_dir)
    had: dict[str, Data | None] = {}
    skipped = {}
    for task in tasks:
        found = available(task.needs, data_dir, online) if task.needs else None
        if isinstance(found, str):
            skipped[task.name] = Skipped(title=task.title, family=task.family, reason=found)
        else:
            had[task.name] = found
    return had, skipped


def grouped(reasons: Iterable[str]) -> str:
    """Reasons such as `mmlu/test: no data folder was given`, each said once behind the data it is true of."""
    lacking: dict[str, list[str]] = {}
    for reason in dict.fromkeys(reasons):
        name, _, why = reason.partition(": ")
        lacking.setdefault(why, []).append(name)
    return "; ".join(f"{few(names)}: {why}" for why, names in lacking.items())


def few(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def load_tasks(
    suite: Suite = FACTS, data_dir: Path | None = None, online: bool = False, only: Sequence[str] | None = None
) -> dict[str, Any]:
    """The suite's lm-eval tasks by name, or those called so; their data must be available.

    Raises ArtifactError if one is missing: lm-eval drops a task file that it cannot read without a word.
    """
    from lm_eval.tasks import TaskManager

    metadata: dict[str, Any] = {"data_dir": "" if data_dir is None else str(data_dir), "online": online}
    manager = TaskManager(include_path=str(suite.folder), include_defaults=False, metadata=metadata)
    missing = {suite.name, *(task.name for task in suite.tasks)} - set(manager.all_tasks)
    if missing:
        raise ArtifactError(f"{suite.folder}: lm-eval could not read the task files of {', '.join(sorted(missing))}")
    loaded = manager.load([task.name for task in suite.chosen(only)])["tasks"]
    return {task.name: loaded[task.name] for task in suite.chosen(only)}


def questions(
    suite: Suite,
    task: Task,
    loaded: Any,
    data: Data | None,
    tokenizer: Any,
    limit: int | None,
    seed: int,
    chat: bool,
) -> Questions:
    """One task with the documents that are asked and their requests."""
    documents = list(loaded.eval_docs)
    chosen = subset(documents, limit, seed)
    requests = build(loaded, chosen, tokenizer if chat else None)
    return Questions(
        task=task,
        loaded=loaded,
        chosen=tuple(chosen),
        requests=requests,
        data=data or Data(source="built in", name="compress.builtin", sha256=hashed(documents)),
        sha256=hashed([code(suite), [documents[i] for i in chosen], requests]),
    )


def sample(asked: Questions, exam: Exam, n: int) -> Questions:
    """A fixed sample of at most `n` of the questions asked, in proportion to their tiers."""
    documents = [asked.document(i) for i in range(len(asked.chosen))]
    places = subset(documents, n, exam.seed)
    requests = tuple(asked.requests[i] for i in places)
    return Questions(
        task=asked.task,
        loaded=asked.loaded,
        chosen=tuple(asked.chosen[i] for i in places),
        requests=requests,
        data=asked.data,
        sha256=hashed([code(exam.suite), [documents[i] for i in places], requests]),
    )


def build(loaded: Any, chosen: Sequence[int], tokenizer: Any | None) -> tuple[tuple[Arguments, ...], ...]:
    """The requests of the documents chosen, those of one document together; a tokenizer applies its chat template."""
    loaded.build_all_requests(
        samples=some(loaded, chosen),
        apply_chat_template=tokenizer is not None,
        chat_template=None if tokenizer is None else templating(tokenizer),
    )
    grouped: dict[int, list[Any]] = {}
    for instance in loaded.instances:
        grouped.setdefault(instance.doc_id, []).append(instance)
    loaded._instances = None  # lm-eval would keep them until it is asked again
    ordered = (sorted(grouped[i], key=lambda instance: instance.idx) for i in range(len(chosen)))
    return tuple(tuple(tuple(instance.args) for instance in of_one) for of_one in ordered)


def some(loaded: Any, chosen: Sequence[int]) -> list[int] | None:
    """The documents to name to lm-eval, None for all: it looks for every document in the list, one after another."""
    return None if len(chosen) == len(loaded.eval_docs) else list(chosen)


def templating(tokenizer: Any) -> Callable[..., str]:
    """What lm-eval's wrapper of a model does to a conversation, without a model."""

    def apply(history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            tokenizer.apply_chat_template(
                history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    return apply


def template_hash(tokenizer: Any) -> str:
    """The sha256 of the tokenizer's chat template; raises RecipeError if it has none."""
    template = getattr(tokenizer, "chat_template", None)
    if not isinstance(template, str):
        kind = "several chat templates" if template else "no chat template"
        raise RecipeError(f"--chat-template: the dense model's tokenizer has {kind}; leave it out")
    return hashlib.sha256(template.encode()).hexdigest()


def beginning_with_bos(tokenizer: Any) -> Any:
    """The tokenizer, or a copy of it, that puts the BOS token before every text and no EOS behind it.

    It is as it is if it has no BOS: lm-eval then asks for no special tokens at all. Its `add_bos_token` only asks for
    them, and a fast tokenizer without a post-processor adds none; one saved with `add_eos_token`, as some are after
    fine-tuning, would end every prompt before its answer.
    """
    if tokenizer.bos_token_id is None or _begins(tokenizer):
        return tokenizer
    prepared = copy.deepcopy(tokenizer)
    prepared.add_bos_token, prepared.add_eos_token = True, False
    if not _begins(prepared):
        raise ArtifactError(
            f"{type(tokenizer).__name__} cannot be made to begin a text with {tokenizer.bos_token!r} and not to end it"
        )
    return prepared


def _begins(tokenizer: Any) -> bool:
    """Whether a text begins with BOS and goes on behind its last word."""
    ids = tokenizer("a").input_ids
    return bool(ids[:1] == [tokenizer.bos_token_id] and ids[-1:] != [tokenizer.eos_token_id])


def prompt_and_then(arguments: Arguments) -> tuple[str, Any]:
    """A request's prompt and what follows it: a continuation, options to generate, or nothing to a text by itself."""
    return str(arguments[0]), arguments[1] if len(arguments) > 1 else ""


def identity(tokenizer: Any) -> str:
    """The hash of what a tokenizer does to a text; padding and truncation, which calls change, are left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    does = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    does = {key: value for key, value in does.items() if key not in ("padding", "truncation")}
    return hashed([type(tokenizer).__name__, does, tokenizer.bos_token, tokenizer.eos_token])


def tokens_to_generate(then: Any) -> int:
    """The tokens that a request generates at most; none if its continuation is only scored."""
    return int(then.get("max_gen_toks", DEFAULT_GENERATED)) if isinstance(then, dict) else 0


def lengths(asked: Questions, tokenizer: Any) -> list[int]:
    """The tokens that each question needs of a model's context, its longest request counted.

    A scored continuation's last token is never read, so it is not counted.
    """
    pairs = [[prompt_and_then(arguments) for arguments in requests] for requests in asked.requests]
    texts = [prompt if isinstance(then, dict) else prompt + then for of_one in pairs for prompt, then in of_one]
    counted = iter(token_counts(texts, tokenizer))
    return [
        max(next(counted) + (tokens_to_generate(then) if isinstance(then, dict) else -1) for _, then in of_one)
        for of_one in pairs
    ]


def token_counts(texts: Sequence[str], tokenizer: Any) -> list[int]:
    """The tokens of each text as lm-eval encodes it: with BOS, unless the text brings its own."""
    bos = tokenizer.bos_token
    own = [bos is not None and text.startswith(bos) for text in texts]
    counts = [0] * len(texts)
    for special in (True, False):
        places = [i for i, brings in enumerate(own) if brings is not special]
        if places:
            encoded = tokenizer([texts[i] for i in places], add_special_tokens=special, verbose=False).input_ids
            for i, ids in zip(places, encoded, strict=True):
                counts[i] = len(ids)
    return counts


def wanted(asked: Questions, i: int) -> str:
    """The first accepted answer to the i-th question, as a reader wants to see it."""
    document = asked.document(i)
    target = asked.loaded.doc_to_target(document)
    if asked.loaded.OUTPUT_TYPE == "multiple_choice":  # by the choices: WinoGrande's target is what follows them
        return str(asked.loaded.doc_to_choice(document)[document["gold"]]).strip()
    accepted = document.get("answers") or document.get("answer") or target
    return str(accepted[0] if isinstance(accepted, list) and accepted else accepted).strip()


def code(suite: Suite) -> str:
    """The hash of what makes and scores a suite's questions: its files, and the Python of all suites and metrics."""
    shared = (path for folder in ("metrics", "tasks") for path in sorted((PACKAGE / folder).rglob("*.py")))
    files = [*sorted(path for path in suite.folder.iterdir() if path.suffix in (".py", ".yaml")), *shared]
    return hashed([[path.name, path.read_text(encoding="utf-8")] for path in files])


def hashed(value: Any) -> str:
    """The sha256 of plain data; what JSON does not know is taken by its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
