"""Ask a model a suite of tasks through lm-eval and give its results.

Not here: comparing two results (`comparison.py`) and what the questions are (`tasks/`). lm-eval is entered
by `evaluate`, one task at a time, not by `simple_evaluate`: the latter does the same after collecting the
environment with a dozen subprocesses (0.8 s here, more with a GPU, on every call) and reseeding the caller's
random numbers. Neither lm-eval's response cache nor its request cache is ever used: they know neither the model
nor the data.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

from compress.builtin.facts import TIERS
from compress.errors import ArtifactError
from compress_evals import stats
from compress_evals.data import subset
from compress_evals.results import Data, Engine, Metric, ModelFacts, Results, Row, TaskResult, TierScore, task_hash
from compress_evals.suite import FACTS, Suite, Task, find


@dataclass(frozen=True, kw_only=True)
class Session:
    """A model wrapped for lm-eval and the options that hold for every task of one run."""

    scorer: Any
    tokenizer: Any
    limit: int | None
    seed: int


def evaluate(
    model: Any,
    tokenizer: Any,
    *,
    name: str,
    description: dict[str, Any] | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    suite: str = FACTS.name,
    only: Sequence[str] | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> Results:
    """A suite's results for a causal language model of transformers, on the device where it is.

    `description` holds what the model cannot say of itself: `sha`, `bytes_on_disk`, `bits_per_weight`, `recipe`,
    `calibration`, and `parameters` where counting tensors would be wrong. `limit` asks that many questions a task:
    the same ones for every model with the same `seed`, in proportion to the tiers, and a larger limit only adds
    questions. `only` names the tasks of `suite` to ask, by default all. Every prompt begins with the BOS token if the
    tokenizer has one. The model is put into eval mode.
    """
    began = time.perf_counter()
    prepared, of = beginning_with_bos(tokenizer), find(suite)
    asked = of.chosen(only)
    with _quiet():
        tasks, scorer = load_tasks(of), _wrap(model, prepared, batch_size)
    session = Session(scorer=scorer, tokenizer=prepared, limit=limit, seed=seed)
    found: dict[str, TaskResult] = {}
    rows: dict[str, tuple[Row, ...]] = {}
    for i, task in enumerate(asked, start=1):
        if on_progress is not None:
            on_progress(f"{i}/{len(asked)} {task.title}")
        found[task.name], rows[task.name] = _run_task(session, task, tasks[task.name])
    return Results(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seed=seed,
        limit=limit,
        model=_model_facts(model, name, description or {}),
        engine=_engine(of, model, prepared, scorer, batch_size),
        tasks=found,
        seconds=round(time.perf_counter() - began, 2),
        rows=rows,
    )


def load_tasks(suite: Suite = FACTS) -> dict[str, Any]:
    """The suite's lm-eval tasks by name.

    Raises ArtifactError if one is missing: lm-eval drops a task file that it cannot read without a word.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(suite.folder), include_defaults=False)
    missing = {suite.name, *(task.name for task in suite.tasks)} - set(manager.all_tasks)
    if missing:
        raise ArtifactError(f"{suite.folder}: lm-eval could not read the task files of {', '.join(sorted(missing))}")
    return dict(manager.load([suite.name])["tasks"])


def beginning_with_bos(tokenizer: Any) -> Any:
    """The tokenizer, or a copy of it, that puts the BOS token before every text; as it is if it has none.

    lm-eval's `add_bos_token` only asks for special tokens, and a fast tokenizer without a post-processor adds none.
    """
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("a").input_ids[:1] == [bos]:
        return tokenizer
    prepared = copy.deepcopy(tokenizer)
    prepared.add_bos_token = True
    if prepared("a").input_ids[:1] != [bos]:
        raise ArtifactError(f"{type(tokenizer).__name__} cannot be made to begin a text with {tokenizer.bos_token!r}")
    return prepared


def _wrap(model: Any, tokenizer: Any, batch_size: int) -> Any:
    import torch
    from lm_eval.models.huggingface import HFLM

    bos = tokenizer.bos_token_id
    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        add_bos_token=bos is not None,
        prefix_token_id=bos,
        softmax_dtype=torch.float32,  # log-softmax in bfloat16 makes ties that the logits do not have
    )


def _run_task(session: Session, task: Task, loaded: Any) -> tuple[TaskResult, tuple[Row, ...]]:
    from lm_eval.evaluator import evaluate as lm_evaluate

    began = time.perf_counter()
    chosen = subset(list(loaded.eval_docs), session.limit, session.seed)
    with _quiet():
        raw = lm_evaluate(
            lm=session.scorer,
            task_dict={"tasks": {task.name: loaded}, "groups": {}},
            samples={task.name: chosen},
            bootstrap_iters=0,
            log_samples=True,
        )
    samples = raw["samples"][task.name]
    rows = tuple(_row(sample) for sample in samples)
    higher = raw["higher_is_better"][task.name]
    result = TaskResult(
        title=task.title,
        family=task.family,
        headline=task.headline,
        chance=task.chance,
        version=str(loaded.VERSION),
        n=len(rows),
        shots=loaded.config.num_fewshot,
        task_hash=task_hash(rows),
        metrics={metric: _metric(rows, metric, bool(better), session.seed) for metric, better in higher.items()},
        tiers=_tiers(rows, task.headline, session.seed),
        truncated=_truncated(session, samples),
        seconds=round(time.perf_counter() - began, 2),
        data=Data(source="built in", name="compress.builtin", sha256=_digest(loaded.eval_docs)),
        control=task.control,
    )
    return result, rows


def _row(sample: dict[str, Any]) -> Row:
    hashes = "".join(sample[part] for part in ("doc_hash", "prompt_hash", "target_hash"))
    [response] = sample["filtered_resps"][:1]
    return Row(
        id=sample["doc"]["id"],
        cluster=sample["doc"]["cluster"],
        tier=sample["doc"]["tier"],
        hash=hashlib.sha256(hashes.encode()).hexdigest(),
        scores={metric: float(sample[metric]) for metric in sample["metrics"]},
        said=response if isinstance(response, str) else None,
    )


def _metric(rows: Sequence[Row], metric: str, higher: bool, seed: int) -> Metric:
    scores = [row.scores[metric] for row in rows]
    low, high = stats.mean_interval(scores, [row.cluster for row in rows], seed=seed)
    return Metric(value=sum(scores) / len(scores), low=low, high=high, higher=higher)


def _tiers(rows: Sequence[Row], headline: str, seed: int) -> dict[str, TierScore]:
    scores = {}
    for tier in TIERS:
        chosen = [row for row in rows if row.tier == tier]
        if chosen:
            metric = _metric(chosen, headline, True, seed)
            scores[tier] = TierScore(n=len(chosen), value=metric.value, low=metric.low, high=metric.high)
    return scores


def _truncated(session: Session, samples: Sequence[dict[str, Any]]) -> int:
    """How many questions are longer than the model's context: lm-eval cuts their beginning with only a warning."""
    texts = [sample["doc"]["prompt"] + sample["doc"]["target"] for sample in samples]
    lengths = (len(ids) for ids in session.tokenizer(texts, verbose=False).input_ids)
    return sum(length > session.scorer.max_length + 1 for length in lengths)


def _model_facts(model: Any, name: str, description: dict[str, Any]) -> ModelFacts:
    counted = sum(parameter.numel() for parameter in model.parameters())
    return ModelFacts.model_validate({"name": name, "parameters": counted, **description})


def _digest(documents: Iterable[dict[str, Any]]) -> str:
    return hashlib.sha256(
        "\n".join(json.dumps(document, sort_keys=True) for document in documents).encode()
    ).hexdigest()


def _engine(suite: Suite, model: Any, tokenizer: Any, scorer: Any, batch_size: int) -> Engine:
    return Engine(
        suite=suite.name,
        lm_eval=version("lm_eval"),
        torch=version("torch"),
        transformers=version("transformers"),
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        batch_size=batch_size,
        max_length=scorer.max_length,
        bos=tokenizer.bos_token_id is not None,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's messages and progress bars; the bars have no other switch than where stderr goes."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
