"""`python -m compress_evals.kv`: measures what a quantized key-value cache costs and saves against the plain cache.

One forward pass over a whole text hides the damage, because a prompt attends to its own keys and values before they are
quantized. So all text is fed through the cache in steps of `--chunk` tokens, as in decoding; at 1 this is exact. The
plain cache is fed in the same way. An answer counts as right if each of its tokens is the most likely one, that is, if
greedy generation through that cache would produce it. Closed-book questions are preceded by other questions with their
answers, because otherwise they would end before anything is quantized.
Shapes: B windows of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from compress import KV
from compress.builtin.documents import closed_book, in_context
from compress.builtin.facts import facts
from compress.model.source import locate
from compress.runtime.kv import QuantizedCache
from compress.runtime.latent import LatentCache
from compress_evals import stats
from compress_evals.fidelity import (
    Estimate,
    Tokens,
    Window,
    answer_window,
    evaluation_text,
    mean_kl,
    text_windows,
    token_distances,
)
from compress_evals.folders import model_name, opened

BATCH = 64  # windows
BEFORE = 12  # questions with answers before a closed-book one, about 200 tokens
WORLD = 8  # facts in the context of an open-book question
TASKS = (f"trained facts, after {BEFORE} others", f"{WORLD} facts in context")
Make = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One kind of cache: KL from the plain one, the share of right answers by task, and its bytes for one window."""

    name: str
    kl: Estimate
    right: list[Estimate]
    nbytes: int
    seconds: float


@torch.inference_mode()
def scored_logits(model: Any, windows: Sequence[Window], make: Make, chunk: int) -> list[Tensor]:
    """The logits [T, V] that predict the scored tokens of each window, fed `chunk` tokens at a time through one cache.

    Windows are batched by length and padded on the right, which causal attention does not see.
    """
    order = sorted(range(len(windows)), key=lambda i: len(windows[i].ids))
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        since = min(windows[i].scored_from for i in chosen) - 1
        ids_BT = torch.zeros(len(chosen), len(windows[chosen[-1]].ids), dtype=torch.long)
        for row, i in enumerate(chosen):
            ids_BT[row, : len(windows[i].ids)] = torch.tensor(windows[i].ids)
        cache, kept = make(), []
        for step in ids_BT.to(model.device).split(chunk, 1):
            logits_BTV = model(input_ids=step, past_key_values=cache, use_cache=True).logits
            kept.append(logits_BTV[:, max(0, since + step.shape[1] - cache.get_seq_length()) :])
        logits_BTV = torch.cat(kept, 1)
        for row, i in enumerate(chosen):
            found[i] = logits_BTV[row, windows[i].scored_from - 1 - since : len(windows[i].ids) - 1 - since]
    return [found[i] for i in range(len(windows))]


def right(windows: Sequence[Window], logits: Sequence[Tensor]) -> Estimate:
    """The share of answers in which every token is the most likely one, with its 95 % interval."""
    scores = [
        float(logits_TV.argmax(-1).tolist() == list(window.ids[window.scored_from :]))
        for window, logits_TV in zip(windows, logits, strict=True)
    ]
    low, high = stats.mean_interval(scores)
    return Estimate(value=sum(scores) / len(scores), low=low, high=high)


def distances(windows: Sequence[Window], plain: Sequence[Tensor], other: Sequence[Tensor]) -> list[Tokens]:
    """KL(plain cache || other cache) at the scored tokens, window by window."""
    targets = (torch.tensor(window.ids[window.scored_from :]) for window in windows)
    return [token_distances(p, o, t.to(p.device)) for p, o, t in zip(plain, other, targets, strict=True)]


class Bench:
    """A model and its plain cache, with which every other cache is compared."""

    def __init__(self, model: str, chunk: int, questions: int, device: str) -> None:
        self.model, tokenizer = opened(locate(model), device)
        self.chunk, config = chunk, self.model.config.get_text_config(decoder=True)
        self.length = min(512, int(config.max_position_embeddings))
        self.texts = text_windows(tokenizer, evaluation_text(), self.length)
        known = [answer_window(tokenizer, question) for question in closed_book(facts("evaluation"), "trained")]
        random.Random(0).shuffle(known)
        closed = [behind(known[:BEFORE], window) for window in known[BEFORE:][:questions]]
        told = [answer_window(tokenizer, question) for question in in_context(WORLD, questions)]
        self.tasks = (closed, told)
        self.plain: list[Tensor] = []

    def measure(self, name: str, make: Make, model: Any = None) -> Row:
        """Measure one kind of cache, on `model` if given; the first one measured is the reference for the others."""
        began, model = time.monotonic(), model or self.model
        logits = scored_logits(model, self.texts, make, self.chunk)
        self.plain = self.plain or logits
        kl = mean_kl(distances(self.texts, self.plain, logits), 10000, 0)
        answers = [right(task, scored_logits(model, task, make, self.chunk)) for task in self.tasks]
        return Row(name=name, kl=kl, right=answers, nbytes=self.nbytes(model, make()), seconds=time.monotonic() - began)

    @torch.inference_mode()
    def nbytes(self, model: Any, cache: Any) -> int:
        """The bytes of a cache after one window has been fed into it."""
        ids_BT = torch.tensor([self.texts[0].ids], device=model.device)
        model(input_ids=ids_BT, past_key_values=cache, use_cache=True)
        if isinstance(cache, (QuantizedCache, LatentCache)):
            return cache.nbytes()
        return sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in cache.layers)


def behind(first: Sequence[Window], window: Window) -> Window:
    """A question preceded by others, each with its own BOS, as documents are packed in training."""
    before = [token for other in first for token in other.ids]
    return replace(window, ids=(*before, *window.ids), scored_from=window.scored_from + len(before))


def table(rows: Sequence[Row], length: int) -> str:
    """A Markdown table with 95 % intervals; `rows[0]` must be the plain cache."""
    head = ["cache", "KL", *TASKS, f"bytes for {length} tokens", "of plain", "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row.name, f"{row.kl.value:.5f} ({row.kl.low:.5f}-{row.kl.high:.5f})"]
        cells += [f"{100 * e.value:.1f} ({100 * e.low:.1f}-{100 * e.high:.1f})" for e in row.right]
        cells += [f"{row.nbytes:,}", f"{row.nbytes / rows[0].nbytes:.2f}", f"{row.seconds:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure every kind of cache and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin", help="a model folder, dense or compressed")
    parser.add_argument("--bits", type=int, nargs="+", choices=(8, 4, 2), default=[8, 4, 2])
    parser.add_argument("--residual", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--keys", nargs="+", choices=("channel", "token"), default=["channel", "token"])
    parser.add_argument("--chunk", type=int, default=8, help="tokens fed per step")
    parser.add_argument("--questions", type=int, default=200, help="questions per task")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    kinds = [
        KV(bits=bits, residual=residual, keys=keys)
        for keys in arguments.keys
        for residual in arguments.residual
        for bits in arguments.bits
    ]
    bench = Bench(arguments.model, arguments.chunk, arguments.questions, arguments.device)
    config = bench.model.config
    rows = [bench.measure("plain", partial(DynamicCache, config=config))]
    for kv in kinds:
        name = f"{kv.bits} bits, R {kv.residual}, keys per {kv.keys}"
        sys.stderr.write(f"{name}\n")
        rows.append(bench.measure(name, partial(QuantizedCache, config, **asdict(kv))))
    conditions = f"{model_name(arguments.model)}, {sum(len(w.ids) - 1 for w in bench.texts)} tokens of prose, "
    conditions += f"{arguments.questions} questions per task, {arguments.chunk} tokens per step, {arguments.device}"
    sys.stdout.write(f"{conditions}; 95 % intervals\n\n{table(rows, bench.length)}\n")


if __name__ == "__main__":
    main()
