"""Measures how far a compressed model's next-token distributions are from the dense model's.

Not here: whether its answers are right (`run.py`). Fidelity is reported next to the scores, never instead of them: KL
and bits per byte rank badly damaged models well but cannot rank nearly lossless ones, and on plain text they can move
in the opposite direction to knowledge. Everything after the logits is float32.
Shapes: T tokens of one window, V vocabulary; B windows of a batch.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.builtin.documents import Question, closed_book
from compress.builtin.facts import facts
from compress.errors import ArtifactError
from compress_evals.stats import Floats, bootstrap_interval

_LOGITS = 1 << 24  # logits of one model held at a time: 64 MB as float32


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Distances of a compressed model from its dense original, on text that neither was calibrated on.

    `kl` is KL(dense || compressed) in nats per token over the text, `answer_kl` the same over the tokens of the answers
    to the trained questions. `top1` is the share of tokens where both models have the same most likely token,
    `answer_top1` the same over the answers. Bits per byte measure how well the text is compressed and are not a quality
    metric. Values are infinite where a model's output is not a probability distribution.
    With `top`, KL is computed over the dense model's `top` most likely tokens and one bin for all others, which is a
    lower bound of the full KL.
    """

    text_sha256: str
    tokens: int
    windows: int
    kl: Estimate
    kl_p50: float
    kl_p99: float
    top1: float
    dense_bits_per_byte: float
    compressed_bits_per_byte: float
    bits_per_byte_difference: Estimate
    answers: int
    answer_kl: Estimate
    answer_top1: float
    top: int | None = None

    @property
    def way(self) -> tuple[str, int, int | None]:
        """The text, its number of tokens and `top`: figures that were measured in different ways are not comparable."""
        return self.text_sha256, self.tokens, self.top


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The figures at each scored token: KL, agreement of the most likely token, and both models' losses, in nats."""

    kl: Floats
    same: Floats
    dense_loss: Floats
    compressed_loss: Floats


@dataclass(frozen=True, kw_only=True)
class Window:
    """Token ids, the first `scored_from` of which are unscored context; `size` is the scored text in UTF-8 bytes."""

    ids: tuple[int, ...]
    scored_from: int
    size: int


def usual_way(found: Iterable[Fidelity]) -> tuple[str, int, int | None] | None:
    """The way in which most of these were measured, the first of several; None if there are none."""
    counts = Counter(one.way for one in found)
    return counts.most_common(1)[0][0] if counts else None


def evaluation_text() -> str:
    """The built-in text that no calibration set contains."""
    return resources.files("compress.builtin").joinpath("texts/evaluation.txt").read_text(encoding="utf-8")


def measure_fidelity(
    dense: Any,
    compressed: Any,
    tokenizer: Any,
    *,
    text: str | None = None,
    questions: Sequence[Question] | None = None,
    length: int = 256,
    iters: int = 10000,
    seed: int = 0,
) -> Fidelity:
    """Compare two causal language models with the same vocabulary on a text and on the answers to questions.

    `text` and `questions` default to the built-in ones. `length` is the number of tokens in a window, BOS included;
    windows do not overlap. Confidence intervals resample windows (questions for `answer_kl`) `iters` times.
    """
    text = evaluation_text() if text is None else text
    pieces, asked = all_windows(tokenizer, text, questions, length)
    found, answers = (compare_windows(dense, compressed, windows) for windows in (pieces, asked))
    return summarise(text, pieces, found, answers, iters, seed)


def all_windows(
    tokenizer: Any, text: str, questions: Sequence[Question] | None = None, length: int = 256
) -> tuple[list[Window], list[Window]]:
    """The windows of a text and of questions (by default the trained ones); raises ArtifactError if either is empty."""
    questions = closed_book(facts("evaluation"), "trained") if questions is None else questions
    pieces = text_windows(tokenizer, text, length)
    asked = [answer_window(tokenizer, question) for question in questions]
    if not pieces or not asked:
        raise ArtifactError("fidelity needs a text of at least two tokens and at least one question")
    return pieces, asked


def summarise(
    text: str,
    pieces: Sequence[Window],
    found: Sequence[Tokens],
    answers: Sequence[Tokens],
    iters: int,
    seed: int,
    top: int | None = None,
) -> Fidelity:
    """Summarise the token figures of the text windows (`found`) and of the answers."""
    kl = np.concatenate([f.kl for f in found])
    sizes = np.array([window.size for window in pieces], dtype=np.float64)
    dense_bits = np.array([f.dense_loss.sum() for f in found]) / math.log(2)
    compressed_bits = np.array([f.compressed_loss.sum() for f in found]) / math.log(2)
    with np.errstate(invalid="ignore"):  # infinity minus infinity is NaN; `ratio` then gives infinity
        more_bits = compressed_bits - dense_bits
    return Fidelity(
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
        tokens=len(kl),
        windows=len(pieces),
        kl=mean_kl(found, iters, seed),
        kl_p50=_quantile(kl, 0.5),
        kl_p99=_quantile(kl, 0.99),
        top1=float(np.concatenate([f.same for f in found]).mean()),
        dense_bits_per_byte=float(dense_bits.sum() / sizes.sum()),
        compressed_bits_per_byte=float(compressed_bits.sum() / sizes.sum()),
        bits_per_byte_difference=ratio(more_bits, sizes, iters, seed),
        answers=len(answers),
        answer_kl=mean_kl(answers, iters, seed),
        answer_top1=float(np.concatenate([a.same for a in answers]).mean()),
        top=top,
    )


def text_windows(tokenizer: Any, text: str, length: int) -> list[Window]:
    """The text cut into windows of `length` tokens, BOS included; their sizes add up to the bytes of the text.

    For a tokenizer without a BOS token, windows are one token shorter, their first token is unscored context, and its
    bytes are not counted. Raises ArtifactError for a tokenizer that gives no token offsets (one that is not "fast").
    """
    if not tokenizer.is_fast:
        raise ArtifactError("fidelity needs a fast tokenizer: bytes per window come from its token offsets")
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, starts = encoded.input_ids, [start for start, _ in encoded.offset_mapping]
    step = length - 1
    windows = []
    for begin in range(0, len(ids), step):
        piece = (*first, *ids[begin : begin + step])
        scored = begin + 1 - len(first)  # without a BOS, the first token is unscored context
        if len(piece) > 1:
            since = starts[scored] if scored else 0
            until = starts[begin + step] if begin + step < len(ids) else len(text)
            windows.append(Window(ids=piece, scored_from=1, size=len(text[since:until].encode())))
    return windows


def answer_window(tokenizer: Any, question: Question) -> Window:
    """A window with a question and its answer, of which only ` {answer}.` is scored."""
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    answer = f" {question.answer}."
    prompt = tokenizer(question.prompt, add_special_tokens=False).input_ids
    whole = tokenizer(question.prompt + answer, add_special_tokens=False).input_ids
    return Window(ids=(*first, *whole), scored_from=len(first) + len(prompt), size=len(answer.encode()))


def compare_windows(dense: Any, compressed: Any, windows: Sequence[Window]) -> list[Tokens]:
    """Compare both models at the scored tokens of each window; results are in the order of the windows."""
    found: dict[int, Tokens] = {}
    for chosen in batches(windows, dense.config.vocab_size):
        found |= zip(chosen, compare_batch(dense, compressed, [windows[i] for i in chosen]), strict=True)
    return [found[i] for i in range(len(windows))]


def batches(windows: Sequence[Window], vocabulary: int) -> Iterator[list[int]]:
    """Batches of window indices, sorted by falling length, with at most `_LOGITS` logits per batch (or one window)."""
    order = sorted(range(len(windows)), key=lambda i: len(windows[i].ids), reverse=True)
    most = max(1, _LOGITS // (len(windows[order[0]].ids) * vocabulary))
    for start in range(0, len(order), most):
        yield order[start : start + most]


def compare_batch(dense: Any, compressed: Any, batch: Sequence[Window]) -> list[Tokens]:
    """Compare both models at the scored tokens of each window, in one forward pass of each model."""
    ours, theirs = (log_probabilities(model, batch) for model in (dense, compressed))
    same_vocabulary(ours[0].shape[-1], theirs[0].shape[-1])
    return [
        distances(p_TV, q_TV.to(p_TV.device), targets(window).to(p_TV.device))
        for window, p_TV, q_TV in zip(batch, ours, theirs, strict=True)
    ]


@torch.inference_mode()
def log_probabilities(model: Any, batch: Sequence[Window]) -> list[Tensor]:
    """The model's log-probabilities [T, V], float32, at the scored tokens of each window, padded on the right."""
    ids_BT = torch.zeros(len(batch), max(len(window.ids) for window in batch), dtype=torch.long)
    for i, window in enumerate(batch):
        ids_BT[i, : len(window.ids)] = torch.tensor(window.ids)
    logits_BTV = model(input_ids=ids_BT.to(model.device), use_cache=False).logits
    return [
        logits_BTV[i, window.scored_from - 1 : len(window.ids) - 1].float().log_softmax(-1)
        for i, window in enumerate(batch)
    ]


def targets(window: Window) -> Tensor:
    """The scored tokens [T] of a window."""
    return torch.tensor(window.ids[window.scored_from :])


def same_vocabulary(dense: int, compressed: int) -> None:
    """Raise ArtifactError unless both vocabularies have the same size."""
    if dense != compressed:
        raise ArtifactError(
            f"the models have vocabularies of {dense} and {compressed} tokens, so one is not a compressed version of "
            "the other"
        )


def token_distances(dense_TV: Tensor, compressed_TV: Tensor, target_T: Tensor) -> Tokens:
    """`distances` between two sets of logits."""
    return distances(dense_TV.float().log_softmax(-1), compressed_TV.float().log_softmax(-1), target_T)


def distances(p_TV: Tensor, q_TV: Tensor, target_T: Tensor) -> Tokens:
    """KL(dense || compressed), top-1 agreement and losses of two sets of log-probabilities.

    Where either is not a distribution (NaN), the distance is infinite and they count as disagreeing.
    """
    kl_T = torch.where(p_TV.isneginf(), 0.0, p_TV.exp() * (p_TV - q_TV)).sum(-1)
    losses = [-x_TV.gather(-1, target_T.unsqueeze(-1)).squeeze(-1) for x_TV in (p_TV, q_TV)]
    broken_T = (p_TV.isnan() | q_TV.isnan()).any(-1)
    return tokens_of(kl_T, p_TV.argmax(-1) == q_TV.argmax(-1), losses[0], losses[1], broken_T)


def tokens_of(kl_T: Tensor, same_T: Tensor, dense_T: Tensor, compressed_T: Tensor, broken_T: Tensor) -> Tokens:
    """The figures at scored tokens; KL is infinite where `broken_T` says that a model gives no distribution."""
    return Tokens(
        kl=_array(kl_T.clamp_min(0).masked_fill(broken_T, math.inf)),
        same=_array(same_T & ~broken_T),
        dense_loss=_array(dense_T.nan_to_num(nan=math.inf, posinf=math.inf)),
        compressed_loss=_array(compressed_T.nan_to_num(nan=math.inf, posinf=math.inf)),
    )


def mean_kl(found: Sequence[Tokens], iters: int, seed: int) -> Estimate:
    """The mean KL per token over all windows, with its 95 % interval."""
    sums = np.array([tokens.kl.sum() for tokens in found])
    mean = ratio(sums, np.array([len(tokens.kl) for tokens in found], dtype=np.float64), iters, seed)
    return replace(mean, low=max(0.0, mean.low))


def ratio(sums: Floats, sizes: Floats, iters: int, seed: int) -> Estimate:
    """The sum of `sums` over the sum of `sizes`, with a 95 % bootstrap interval that resamples windows.

    Infinite if any sum is not finite.
    """
    if not np.isfinite(sums).all():
        return Estimate(value=math.inf, low=math.inf, high=math.inf)
    table = tuple((total, size, 1) for total, size in zip(sums.tolist(), sizes.tolist(), strict=True))
    low, high = bootstrap_interval(table, iters, seed)
    return Estimate(value=float(sums.sum() / sizes.sum()), low=low, high=high)


def _array(x_T: Tensor) -> Floats:
    return x_T.double().cpu().numpy()


def _quantile(values: Floats, share: float) -> float:
    # "lower": interpolating between a finite and an infinite value would give NaN
    return float(np.quantile(values, share, method="lower"))
