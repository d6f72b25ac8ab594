"""Caches the dense model's distributions on fixed windows, so that it need not be loaded again for comparisons.

Not here: the figures (`fidelity.py`). The full distribution at every scored token is stored if that takes no more than
512 MB. Otherwise the 64 most likely tokens and the total probability of all others are stored, and KL is computed over
these: merging outcomes never raises KL (the data-processing inequality), so the result is a lower bound.
Shapes: T tokens, V vocabulary, K tokens kept, N = K + 1 with all others as one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compress.model.source import digest
from compress_evals.cache import Cache
from compress_evals.fidelity import (
    Fidelity,
    Tokens,
    Window,
    all_windows,
    batches,
    distances,
    evaluation_text,
    log_probabilities,
    same_vocabulary,
    summarise,
    targets,
    tokens_of,
)
from compress_evals.questions import Exam, hashed
from compress_evals.subject import Subject, software

LARGEST = 512 * 1000 * 1000  # bytes that full distributions may take, in float32
TOP = 64
ITERS = 10000  # bootstrap resamples of an interval


@dataclass(frozen=True, kw_only=True)
class Held:
    """The dense model's stored distributions, the text and windows they are on, and the key that identifies them."""

    text: str
    windows: Mapping[str, Sequence[Window]]
    reference: Reference
    decided_by: dict[str, Any]


def hold(dense: Subject, exam: Exam, cache: Cache, text: str | None = None) -> Held:
    """The dense model's distributions on a text, by default the built-in one, and on the trained questions.

    The model must have an identity; it is loaded only if they are not stored yet.
    """
    text = evaluation_text() if text is None else text
    windows = dict(zip(("text", "answers"), all_windows(exam.tokenizer, text), strict=True))
    parts = {"model": asked_as(dense, exam, cache), "windows": hashed(windows), "largest": LARGEST}
    return Held(text=text, windows=windows, reference=of(dense, windows, cache, parts), decided_by=parts)


def fidelity(held: Held, compressed: Subject, exam: Exam, cache: Cache, seed: int = 0) -> Fidelity:
    """The fidelity of a model with an identity, as `measure_fidelity` gives it, but without loading the dense model.

    The figures are the same if full distributions are stored. The result is cached.
    """
    parts = {"reference": held.decided_by, "model": asked_as(compressed, exam, cache), "seed": seed, "iters": ITERS}
    stored = cache.get("fidelity", parts)
    if stored is not None:
        return TypeAdapter(Fidelity).validate_python(stored)
    found, answers = (held.reference.compare(compressed.model, name) for name in held.windows)
    result = summarise(held.text, held.windows["text"], found, answers, ITERS, seed, held.reference.top)
    cache.put("fidelity", parts, asdict(result))
    return result


def asked_as(subject: Subject, exam: Exam, cache: Cache | None) -> dict[str, Any]:
    """The key of a model together with the device, dtype and software versions it runs with."""
    known = subject.known(exam, cache)
    return {"identity": subject.identity, "device": known.device, "dtype": known.dtype, "software": software()}


class Reference:
    """A stored reference for several named lists of windows; it is read from disk window by window."""

    def __init__(self, path: Path, windows: Mapping[str, Sequence[Window]]) -> None:
        """Open the file; raises SafetensorError or OSError if it is missing or not a safetensors file."""
        self._file: Any = safe_open(path, framework="pt")
        self._windows = windows
        about: dict[str, str] = self._file.metadata()  # type: ignore[no-untyped-call]
        self.vocabulary, self.top = int(about["vocabulary"]), int(about["top"]) or None

    def compare(self, model: Any, name: str) -> list[Tokens]:
        """Compare a model with the reference at each window of the list `name`."""
        windows, found = self._windows[name], dict[int, Tokens]()
        starts = [0, *accumulate(len(window.ids) - window.scored_from for window in windows)]
        for chosen in batches(windows, self.vocabulary):
            for i, q_TV in zip(chosen, log_probabilities(model, [windows[i] for i in chosen]), strict=True):
                same_vocabulary(self.vocabulary, q_TV.shape[-1])
                found[i] = self._distances(name, slice(starts[i], starts[i + 1]), q_TV, targets(windows[i]))
        return [found[i] for i in range(len(windows))]

    def _distances(self, name: str, rows: slice, q_TV: Tensor, target_T: Tensor) -> Tokens:
        def stored(part: str) -> Tensor:
            tensor: Tensor = self._file.get_slice(f"{name}.{part}")[rows]
            return tensor.to(q_TV.device)

        if self.top is None:
            return distances(stored("whole"), q_TV, target_T.to(q_TV.device))
        p_TK, at_TK, rest_T = stored("top"), stored("indices").long(), stored("rest")
        q_TK = q_TV.gather(-1, at_TK)
        others_T = q_TV.scatter(-1, at_TK, -math.inf).logsumexp(-1)  # log of the mass of all other tokens
        p_TN, q_TN = (torch.cat([x_TK, x_T[:, None]], -1) for x_TK, x_T in ((p_TK, rest_T), (q_TK, others_T)))
        kl_T = torch.where(p_TN.isneginf(), 0.0, p_TN.exp() * (p_TN - q_TN)).sum(-1)
        # among tokens tied for the most likely, `topk` may put any first, but `argmax` gives the smallest id
        best_T = at_TK.where(p_TK == p_TK[:, :1], self.vocabulary).amin(-1)
        loss_T = -q_TV.gather(-1, target_T.to(q_TV.device)[:, None]).squeeze(-1)
        broken_T = p_TN.isnan().any(-1) | q_TV.isnan().any(-1)
        return tokens_of(kl_T, best_T == q_TV.argmax(-1), stored("loss"), loss_T, broken_T)


def of(dense: Subject, windows: Mapping[str, Sequence[Window]], cache: Cache, parts: dict[str, Any]) -> Reference:
    """The dense model's reference, from the cache if it is there and undamaged, else measured and stored."""
    path = cache.path("references", parts, ".safetensors")
    known = cache.get("references", parts)
    if known is not None:
        if path.is_file() and known["sha256"] == digest(path):
            return Reference(path, windows)
        cache.damaged(path)
    tensors, about = measured(dense.model, windows)

    def write(partial: Path) -> None:
        try:
            save_file(tensors, partial, about)
        except SafetensorError as error:  # safetensors converts an OSError to this
            raise OSError(str(error)) from error
        partial.chmod(0o644)  # safetensors makes it readable by its owner only, but a cache is shared

    cache.place(path, write)
    cache.put("references", parts, {"sha256": digest(path)})
    return Reference(path, windows)


def measured(model: Any, windows: Mapping[str, Sequence[Window]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a reference, prefixed with the name of their list of windows, and its metadata.

    They are either `whole` [T, V], or `top` and `indices` [T, K] (the most likely first) with `rest` (the log of the
    total probability of all others) and `loss` (in nats), both [T].
    """
    vocabulary = model.config.vocab_size
    tokens = sum(len(window.ids) - window.scored_from for every in windows.values() for window in every)
    top = None if 4 * tokens * vocabulary <= LARGEST else TOP
    tensors = {}
    for name, listed in windows.items():
        found: dict[int, dict[str, Tensor]] = {}
        for chosen in batches(listed, vocabulary):
            for i, p_TV in zip(chosen, log_probabilities(model, [listed[i] for i in chosen]), strict=True):
                kept = {"whole": p_TV} if top is None else reduced(p_TV, targets(listed[i]).to(p_TV.device), top)
                found[i] = {part: tensor.cpu() for part, tensor in kept.items()}
        for part in found[0]:
            tensors[f"{name}.{part}"] = torch.cat([found[i][part] for i in range(len(listed))])
    return tensors, {"vocabulary": str(vocabulary), "top": str(top or 0)}


def reduced(p_TV: Tensor, target_T: Tensor, top: int) -> dict[str, Tensor]:
    """The parts that are stored of log-probabilities [T, V] if they are too large to be stored in full."""
    top_TK, at_TK = p_TV.topk(min(top, p_TV.shape[-1]), dim=-1)
    return {
        "top": top_TK,
        "indices": at_TK.int(),
        "rest": p_TV.scatter(-1, at_TK, -math.inf).logsumexp(-1),
        "loss": -p_TV.gather(-1, target_T[:, None]).squeeze(-1),
    }
