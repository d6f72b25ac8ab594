"""The scores that the built-in model must reach before it may be shipped, by greedy exact match.

This is a quick teacher-forced scorer for the training script; published numbers come from `compress eval`,
which asks the same questions through lm-eval.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from compress.builtin.documents import Question, closed_book, in_context, open_book, task_questions
from compress.builtin.facts import facts

GATES = {"trained": 0.95, "question": 0.75, "cloze": 0.60, "context3": 0.85, "open": 0.80}


@torch.no_grad()
def exact_match(model: Any, tokenizer: Any, questions: Sequence[Question], batch: int = 64) -> list[bool]:
    """Whether greedy decoding from each prompt yields ` {answer}.`; costs one forward pass per `batch` questions."""
    rows = []
    for question in questions:
        prompt = tokenizer(question.prompt, add_special_tokens=False).input_ids
        whole = tokenizer(f"{question.prompt} {question.answer}.", add_special_tokens=False).input_ids
        shared = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
        rows.append(([tokenizer.bos_token_id, *whole], shared + 1))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    right = [False] * len(rows)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        length = max(len(rows[i][0]) for i in chosen)
        ids = torch.full((len(chosen), length), tokenizer.pad_token_id)
        for j, i in enumerate(chosen):
            ids[j, : len(rows[i][0])] = torch.tensor(rows[i][0])
        best = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
        for j, i in enumerate(chosen):
            begin, end = rows[i][1], len(rows[i][0])
            right[i] = bool((best[j, begin - 1 : end - 1] == ids[j, begin:end]).all())
    return right


def scores(model: Any, tokenizer: Any, limit: int | None = None) -> dict[str, float]:
    """Exact match by kind of question, on the evaluation facts (the first `limit` after a fixed shuffle)."""
    table = sorted(facts("evaluation"), key=lambda f: hash_order(f.id))[:limit]
    n = min(200, limit or 200)
    sets: list[Sequence[Question]] = [open_book(table)]
    sets += [closed_book(table, form) for form in ("trained", "question", "cloze")]
    sets += [in_context(size, n) for size in (1, 3, 8)] + [task_questions(t, n) for t in ("copy", "summary", "format")]
    results = {}
    for questions in sets:
        right = exact_match(model, tokenizer, questions)
        results[questions[0].kind] = sum(right) / len(right)
    return results


def hash_order(text: str) -> int:
    """A sort key that shuffles in the same way on every run."""
    import zlib

    return zlib.crc32(text.encode())


def failures(results: dict[str, float]) -> list[str]:
    """The gates that `results` misses, one readable line each."""
    return [f"{name} {results[name]:.3f} < {floor}" for name, floor in GATES.items() if results[name] < floor]
