"""The questions of an evaluation: its tasks, their documents and requests, and the hash that identifies them.

Not here: any model. A task is loaded through lm-eval, and its prompts are built exactly as they will be asked, so that
cached answers can be found by their hash. lm-eval's own caches are never used, because their keys include neither the
data nor the model.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from compress.errors import ArtifactError, RecipeError
from compress_evals.data import available, check_folder, subset
from compress_evals.quiet import quiet
from compress_evals.results import Data, Skipped
from compress_evals.suite import FACTS, Suite, Task

PACKAGE = Path(__file__).parent
DEFAULT_GENERATED = 256  # lm-eval's default for a task without a limit
SHOWN = 3  # names that are listed for one reason
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
GENERATED = 8  # characters of a prompt that take about as long as one generated token

Arguments = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Questions:
    """One task, ready to be asked: lm-eval's task, the chosen documents, and their requests, grouped by document.

    A request holds the arguments that lm-eval passes to a model: (prompt, continuation) to score, or (prompt, options)
    to generate. `sha256` covers the documents, the requests, and the code that makes and scores them.
    """

    task: Task
    loaded: Any
    chosen: tuple[int, ...]
    requests: tuple[tuple[Arguments, ...], ...] = field(repr=False)
    data: Data
    sha256: str

    def document(self, i: int) -> dict[str, Any]:
        """The i-th of the chosen documents."""
        found: dict[str, Any] = self.loaded.eval_docs[self.chosen[i]]
        return found

    def prompt(self, i: int) -> str:
        """The prompt of the i-th question's first request."""
        return str(self.requests[i][0][0])

    def work(self) -> int:
        """The amount to read and generate, in characters, for the estimate of time."""
        every = (pair for requests in self.requests for pair in map(prompt_and_then, requests))
        return sum(len(prompt) + GENERATED * tokens_to_generate(then) for prompt, then in every)


@dataclass(frozen=True, kw_only=True)
class Exam:
    """All questions of an evaluation, the same for every model.

    `tokenizer` is the dense model's, which begins every text with BOS if it has one. `chat_template` is the sha256 of
    the chat template, None if prompts are asked without one.
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
    """The exam of a suite; tasks whose data are not available are skipped.

    Raises RecipeError for an unknown task, if no task is left, or if the tokenizer does not have exactly one chat
    template although `chat_template` is set.
    """
    had, skipped = availability(suite.chosen(only), data_dir, online)
    if not had:
        reasons = grouped(skip.reason for skip in skipped.values())
        raise RecipeError(
            f"{suite.name}: no task can be asked: {reasons or 'the suite is empty'}; give --data-dir FOLDER or "
            "--online; --suite facts is the built-in counterpart and needs neither"
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
    """The exam without the tasks that may generate as many tokens as the model's context, which lm-eval cannot ask.

    Raises RecipeError if no task is left.
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
    """The data source of each task that can be asked (None: built in), and the other tasks with the reason.

    Raises RecipeError if `data_dir` is not a folder, even if no task reads it.
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
    """Reasons such as `mmlu/test: no data folder was given`, each given once after the data sets it applies to."""
    lacking: dict[str, list[str]] = {}
    for reason in dict.fromkeys(reasons):
        name, _, why = reason.partition(": ")
        lacking.setdefault(why, []).append(name)
    return "; ".join(f"{few(names)}: {why}" for why, names in lacking.items())


def few(names: Sequence[str]) -> str:
    """The first SHOWN names, and the number of further ones."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def load_tasks(
    suite: Suite = FACTS, data_dir: Path | None = None, online: bool = False, only: Sequence[str] | None = None
) -> dict[str, Any]:
    """The suite's lm-eval tasks by name, all or those in `only`; their data must be available.

    Raises ArtifactError if one is missing, because lm-eval silently drops a task file that it cannot read.
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
    """One task with its chosen documents and their requests."""
    documents = list(loaded.eval_docs)
    chosen = subset(documents, limit, seed)
    if chat:
        begin_replies(loaded)
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
    """A fixed sample of at most `n` of a task's questions, stratified in proportion to their tiers."""
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


def begin_replies(loaded: Any) -> None:
    """Take the space before a scored target away: it separates words, and a reply to a chat begins without one.

    lm-eval itself leaves out its delimiter before choices, but scores the target of a likelihood as it is.
    """
    plain = loaded.doc_to_target

    def target(document: Any, *others: Any) -> Any:
        found = plain(document, *others)
        return found.removeprefix(" ") if isinstance(found, str) else found

    if loaded.OUTPUT_TYPE == "loglikelihood":
        loaded.doc_to_target = target


def build(loaded: Any, chosen: Sequence[int], tokenizer: Any | None) -> tuple[tuple[Arguments, ...], ...]:
    """The requests of the chosen documents, grouped by document; with a tokenizer, its chat template is applied."""
    loaded.build_all_requests(
        samples=some(loaded, chosen),
        apply_chat_template=tokenizer is not None,
        chat_template=None if tokenizer is None else templating(tokenizer),
    )
    grouped: dict[int, list[Any]] = {}
    for instance in loaded.instances:
        grouped.setdefault(instance.doc_id, []).append(instance)
    loaded._instances = None  # lm-eval would otherwise keep them in memory
    ordered = (sorted(grouped[i], key=lambda instance: instance.idx) for i in range(len(chosen)))
    return tuple(tuple(tuple(instance.args) for instance in of_one) for of_one in ordered)


def some(loaded: Any, chosen: Sequence[int]) -> list[int] | None:
    """The document indices to pass to lm-eval; None for all, because lm-eval searches the list for every document."""
    return None if len(chosen) == len(loaded.eval_docs) else list(chosen)


def templating(tokenizer: Any) -> Callable[..., str]:
    """A function that applies the chat template as lm-eval's model wrapper does, but without a model."""

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
    """The sha256 of the tokenizer's chat template; raises RecipeError if it has none or several."""
    template = getattr(tokenizer, "chat_template", None)
    if not isinstance(template, str):
        kind = "several chat templates" if template else "no chat template"
        raise RecipeError(f"--chat-template: the dense model's tokenizer has {kind}; leave it out")
    return hashlib.sha256(template.encode()).hexdigest()


def beginning_with_bos(tokenizer: Any) -> Any:
    """The tokenizer, or a copy of it, that puts a BOS token before every text and no EOS token after it.

    A tokenizer without BOS is returned unchanged: lm-eval then asks for no special tokens at all. lm-eval's
    `add_bos_token` only asks for special tokens, and a fast tokenizer without a post-processor adds none. A tokenizer
    saved with `add_eos_token`, as some are after fine-tuning, would end every prompt before its answer.
    Raises ArtifactError if the tokenizer cannot be changed in this way.
    """
    if tokenizer.bos_token_id is None or _begins(tokenizer):
        return tokenizer
    prepared = copy.deepcopy(tokenizer)
    prepared.add_bos_token, prepared.add_eos_token = True, False
    if not _begins(prepared):
        raise ArtifactError(
            f"{type(tokenizer).__name__} cannot be set to begin a text with {tokenizer.bos_token!r} but not end it"
        )
    return prepared


def _begins(tokenizer: Any) -> bool:
    """Whether the tokenizer begins a text with BOS and does not end it with EOS."""
    ids = tokenizer("a").input_ids
    return bool(ids[:1] == [tokenizer.bos_token_id] and ids[-1:] != [tokenizer.eos_token_id])


def prompt_and_then(arguments: Arguments) -> tuple[str, Any]:
    """A request's prompt and what follows: a continuation, generation options, or "" for a text scored by itself."""
    return str(arguments[0]), arguments[1] if len(arguments) > 1 else ""


def identity(tokenizer: Any) -> str:
    """The hash of a tokenizer's behaviour, without padding and truncation, which calls change."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    does = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    does = {key: value for key, value in does.items() if key not in ("padding", "truncation")}
    return hashed([type(tokenizer).__name__, does, tokenizer.bos_token, tokenizer.eos_token])


def tokens_to_generate(then: Any) -> int:
    """The largest number of tokens that a request generates; 0 if its continuation is only scored."""
    return int(then.get("max_gen_toks", DEFAULT_GENERATED)) if isinstance(then, dict) else 0


def lengths(asked: Questions, tokenizer: Any) -> list[int]:
    """The number of tokens that the longest request of each question needs in a model's context.

    The last token of a scored continuation is not counted, because the model never reads it.
    """
    pairs = [[prompt_and_then(arguments) for arguments in requests] for requests in asked.requests]
    texts = [prompt if isinstance(then, dict) else prompt + then for of_one in pairs for prompt, then in of_one]
    counted = iter(token_counts(texts, tokenizer))
    return [
        max(next(counted) + (tokens_to_generate(then) if isinstance(then, dict) else -1) for _, then in of_one)
        for of_one in pairs
    ]


def token_counts(texts: Sequence[str], tokenizer: Any) -> list[int]:
    """The number of tokens of each text as lm-eval encodes it: with BOS, unless the text already begins with it."""
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
    """The first accepted answer to the i-th question, as it is shown to readers."""
    document = asked.document(i)
    target = asked.loaded.doc_to_target(document)
    if asked.loaded.OUTPUT_TYPE == "multiple_choice":  # not by the target: WinoGrande's is what follows
        return str(asked.loaded.doc_to_choice(document)[document["gold"]]).strip()
    accepted = document.get("answers") or document.get("answer") or target
    return str(accepted[0] if isinstance(accepted, list) and accepted else accepted).strip()


def code(suite: Suite) -> str:
    """The hash of the code that makes and scores a suite's questions: its files, and all of `tasks` and `metrics`.

    Comments, docstrings and layout of Python files do not count.
    """
    shared = (path for folder in ("metrics", "tasks") for path in sorted((PACKAGE / folder).rglob("*.py")))
    files = [*sorted(path for path in suite.folder.iterdir() if path.suffix in (".py", ".yaml")), *shared]
    return meaning(tuple((path.name, path.read_bytes()) for path in files))


@lru_cache(maxsize=8)
def meaning(files: tuple[tuple[str, bytes], ...]) -> str:
    """The hash of what files of these names and bytes do; parsing them takes longer than asking a tiny model."""
    return hashed([[name, content(name, raw)] for name, raw in files])


def content(name: str, raw: bytes) -> Any:
    """What a file does, as plain data: the syntax tree of a Python file, else the hash of its bytes."""
    return syntax(ast.parse(raw)) if name.endswith(".py") else hashlib.sha256(raw).hexdigest()


def syntax(value: Any) -> Any:
    """A syntax tree as plain data, without docstrings and positions.

    Empty fields are left out, because Python versions differ in which ones they have.
    """
    if isinstance(value, list):
        return [syntax(each) for each in value]
    if not isinstance(value, ast.AST):
        return repr(value)
    fields = {name: each for name, each in ast.iter_fields(value) if each is not None and each != []}
    if isinstance(value, DOCUMENTED) and ast.get_docstring(value, clean=False) is not None:
        fields["body"] = value.body[1:]
    return [type(value).__name__, {name: syntax(each) for name, each in fields.items()}]


def hashed(value: Any) -> str:
    """The sha256 of plain data; values that JSON does not support are converted with `str`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
