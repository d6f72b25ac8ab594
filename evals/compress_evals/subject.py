"""A model that is asked: loaded only when a question has no stored answer, and let go as soon as it can be.

Not here: what it is asked (`questions.py`) and what is kept of its answers (`cache.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache as once
from importlib.metadata import version
from typing import Any

from compress_evals.cache import Cache
from compress_evals.questions import Exam
from compress_evals.quiet import quiet
from compress_evals.results import Engine, ModelFacts

Rows = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Known:
    """What can only be said of a loaded model, and is stored so that it need not be loaded again."""

    parameters: int
    device: str
    dtype: str
    max_length: int


class Subject:
    """A model by its name. `identity` is the hash of all that its folder says; without one nothing is stored of it.

    `description` holds what the model cannot say of itself, as `ModelFacts` calls it.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], Any],
        *,
        device: str,
        description: dict[str, Any] | None = None,
        identity: str | None = None,
    ) -> None:
        """Nothing is loaded yet."""
        self.name, self.device, self.identity = name, device, identity
        self.description = description or {}
        self._load = load
        self._model: Any = None
        self._scorer: Any = None
        self._known: Known | None = None

    @property
    def model(self) -> Any:
        """The model, loaded at the first call."""
        if self._model is None:
            self._model = self._load()
        return self._model

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory."""
        return self._model is not None

    def release(self) -> None:
        """Let the model go."""
        self._model = self._scorer = None

    def scorer(self, exam: Exam, batch_size: int, on_rows: Rows | None = None) -> Any:
        """The model as lm-eval asks it, so many requests at once; `on_rows` hears of each batch that was computed."""
        if self._scorer is None:
            with quiet():
                from compress_evals.scorer import Scorer

                self._scorer = Scorer(self.model, exam.tokenizer, batch_size)
            self._heard = hear(self._scorer)
        self._scorer.batch_size_per_gpu = batch_size
        self._heard[:] = [] if on_rows is None else [on_rows]
        return self._scorer

    def known(self, exam: Exam, cache: Cache | None = None) -> Known:
        """What the loaded model says of itself, from the cache if it is there."""
        if self._known is None:
            parts = {"model": self.identity, "tokenizer": exam.tokenizer_sha, "on": self.device, **software()}
            stored = cache.get("model", parts) if cache is not None and self.identity else None
            found = Known(**stored) if stored is not None else self._look(exam)
            if stored is None and cache is not None and self.identity:
                cache.put("model", parts, asdict(found))
            self._known = found
        return self._known

    def facts(self, exam: Exam, cache: Cache | None = None) -> ModelFacts:
        """The model as results describe it."""
        counted = self.known(exam, cache).parameters
        return ModelFacts.model_validate({"name": self.name, "parameters": counted, **self.description})

    def _look(self, exam: Exam) -> Known:
        model = self.model
        return Known(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            max_length=int(self.scorer(exam, 1).max_length),
        )


def engine(subject: Subject, exam: Exam, batch_size: int, cache: Cache | None = None) -> Engine:
    """What a model is asked with: all that may change an answer, beside model and questions."""
    known, versions = subject.known(exam, cache), software()
    return Engine(
        suite=exam.suite.name,
        lm_eval=versions["lm_eval"],
        torch=versions["torch"],
        transformers=versions["transformers"],
        device=known.device,
        dtype=known.dtype,
        batch_size=batch_size,
        max_length=known.max_length,
        bos=exam.tokenizer.bos_token_id is not None,
        chat_template=exam.chat_template,
    )


@once
def software() -> dict[str, str]:
    """The versions that may change an answer."""
    names = ("compress-llm", "lm_eval", "torch", "transformers", "tokenizers")
    return {name: version(name) for name in names}


def hear(scorer: Any) -> list[Rows]:
    """A list to put listeners into: each is told the rows of every batch that the scorer computes."""
    listeners: list[Rows] = []
    for name, argument in (("_model_call", "inps"), ("_model_generate", "context")):
        setattr(scorer, name, told(getattr(scorer, name), argument, listeners))
    return listeners


def told(compute: Callable[..., Any], argument: str, listeners: list[Rows]) -> Callable[..., Any]:
    """The function, that tells the listeners how many rows its batch had."""

    def computed(*positional: Any, **named: Any) -> Any:
        result = compute(*positional, **named)
        batch = positional[0] if positional else named[argument]
        for listener in listeners:
            listener(len(batch))
        return result

    return computed
