"""The model under evaluation: it is loaded only when something is not cached, and can be released afterwards.

Not here: its questions (`questions.py`) and the cache of its answers (`cache.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache as once
from importlib.metadata import version
from typing import Any

from compress.identity import PACKAGES, code_hash
from compress_evals.cache import Cache
from compress_evals.questions import Exam
from compress_evals.quiet import quiet
from compress_evals.results import Engine, ModelFacts

Rows = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Known:
    """Facts that only a loaded model gives; they are cached so that it need not be loaded again for them."""

    parameters: int
    device: str
    dtype: str
    max_length: int


class Subject:
    """A named model that is loaded on first use.

    `identity` is the hash of everything in its folder that determines its answers; without one, nothing about it is
    cached. `description` holds fields of `ModelFacts` that cannot be read from the model.
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
        """Store the arguments; nothing is loaded yet."""
        self.name, self.device, self.identity = name, device, identity
        self.description = description or {}
        self._load = load
        self._model: Any = None
        self._scorer: Any = None
        self._known: Known | None = None

    @property
    def model(self) -> Any:
        """The model, loaded on first access."""
        if self._model is None:
            self._model = self._load()
        return self._model

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory."""
        return self._model is not None

    def release(self) -> None:
        """Drop the model and its scorer, so that their memory can be freed; the next access loads the model again."""
        self._model = self._scorer = None

    def scorer(self, exam: Exam, batch_size: int, on_rows: Rows | None = None) -> Any:
        """The model wrapped for lm-eval, at this batch size; `on_rows` gets the row count of each computed batch."""
        if self._scorer is None:
            with quiet():
                from compress_evals.scorer import Scorer

                self._scorer = Scorer(self.model, exam.tokenizer, batch_size)
            self._heard = hear(self._scorer)
        self._scorer.batch_size_per_gpu = batch_size
        self._heard[:] = [] if on_rows is None else [on_rows]
        return self._scorer

    def known(self, exam: Exam, cache: Cache | None = None) -> Known:
        """Facts about the loaded model, from the cache if they are there."""
        if self._known is None:
            parts = {"model": self.identity, "tokenizer": exam.tokenizer_sha, "on": self.device, **software()}
            stored = cache.get("model", parts) if cache is not None and self.identity else None
            found = Known(**stored) if stored is not None else self._look(exam)
            if stored is None and cache is not None and self.identity:
                cache.put("model", parts, asdict(found))
            self._known = found
        return self._known

    def facts(self, exam: Exam, cache: Cache | None = None) -> ModelFacts:
        """The description of the model in results."""
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
    """The software and settings of an evaluation: everything but model and questions that may change an answer."""
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
    """The versions of the packages that may change an answer, and the hash of our own code."""
    names = ("compress-llm", "lm_eval", "torch", "transformers", "tokenizers")
    return {"code": code_hash((*PACKAGES, "compress_evals")), **{name: version(name) for name in names}}


def hear(scorer: Any) -> list[Rows]:
    """Patch the scorer to call listeners with the number of rows of every batch; returns the list to put them in."""
    listeners: list[Rows] = []
    for name, argument in (("_model_call", "inps"), ("_model_generate", "context")):
        setattr(scorer, name, told(getattr(scorer, name), argument, listeners))
    return listeners


def told(compute: Callable[..., Any], argument: str, listeners: list[Rows]) -> Callable[..., Any]:
    """The function `compute`, wrapped so that it calls the listeners with the number of rows of its batch."""

    def computed(*positional: Any, **named: Any) -> Any:
        result = compute(*positional, **named)
        batch = positional[0] if positional else named[argument]
        for listener in listeners:
            listener(len(batch))
        return result

    return computed
