"""Finds the batch size: the largest that fits in memory, and the same one for all models that are compared.

Not here: the evaluation itself. The batch size can flip answers that are nearly tied, so it is recorded in every
result, and two results with different batch sizes are not compared.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from compress.errors import PlanError, RecipeError, out_of_memory
from compress_evals.cache import Cache
from compress_evals.questions import Exam, lengths
from compress_evals.references import asked_as
from compress_evals.subject import Subject

LARGEST = {"cpu": 64}  # by device type; on a CPU, larger batches are not faster
LARGEST_ELSEWHERE = 256
COPIES = 12  # maximum bytes per logit: as computed, in float32, and its log-softmax
MEMINFO = Path("/proc/meminfo")

BatchSize = int | Literal["auto"]
Result = TypeVar("Result")


def parse(text: str) -> BatchSize:
    """`auto` or a number from 1 to 65536; raises RecipeError for anything else."""
    if text != "auto" and not (text.isdecimal() and 1 <= int(text) <= 65536):
        raise RecipeError(f"--batch-size: {text!r} is neither auto nor a number from 1 to 65536")
    return "auto" if text == "auto" else int(text)


def find(subject: Subject, exam: Exam, cache: Cache | None = None) -> int:
    """The largest batch size, a power of two, at which the exam's longest question fits in memory.

    Sizes are tried on the model at that length and halved while memory runs out. The result is cached so that later
    evaluations use the same size. Raises PlanError if a batch of one does not fit.
    """
    known = subject.known(exam, cache)
    longest = min(known.max_length, max(max(lengths(asked, exam.tokenizer)) for asked in exam.tasks))
    rows = max(sum(map(len, asked.requests)) for asked in exam.tasks)
    parts = {**asked_as(subject, exam, cache), "longest": longest, "rows": rows}
    kept = cache if subject.identity is not None else None
    stored = kept.get("batch", parts) if kept is not None else None
    if stored is not None:
        return int(stored)
    kind = torch.device(known.device).type
    most, free = LARGEST.get(kind, LARGEST_ELSEWHERE), free_memory() if kind == "cpu" else None
    found = fitting(subject.model, longest, rows, most, free)
    if kept is not None:
        kept.put("batch", parts, found)
    return found


def fitting(model: Any, longest: int, rows: int, most: int, free: int | None) -> int:
    """The largest batch size, from `most` down, at which a forward pass of `longest` tokens does not run out of memory.

    No batch has more than `rows` rows. `free` is the memory available in bytes on a device where running out kills the
    process instead of raising in the forward pass (a CPU): at most half of it is planned for logits.
    """
    row, size = longest * model.config.vocab_size * COPIES, most
    while free is not None and size > 1 and min(size, rows) * row > free // 2:
        size //= 2
    return halving(size, lambda size: attempt(model, min(size, rows), longest), lambda text: None)[1]


@torch.inference_mode()
def attempt(model: Any, size: int, longest: int) -> None:
    """One forward pass and log-softmax, with the memory that a batch of likelihood requests needs."""
    logits = model(torch.zeros(size, longest, dtype=torch.long, device=model.device)).logits
    torch.log_softmax(logits, dim=-1, dtype=torch.float32)


def halving(size: int, run: Callable[[int], Result], say: Callable[[str], None]) -> tuple[Result, int]:
    """The result of `run` at the largest size, halving from `size`, at which it does not run out of memory; that size.

    `say` is told of every halving. Raises PlanError if memory runs out at size 1.
    """
    while True:
        try:
            return run(size), size
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
        size = halved(size)
        say(f"note: out of memory; retrying with batch size {size}")


def halved(size: int) -> int:
    """Half the size, after freeing cached memory; raises PlanError if `size` is 1."""
    if size == 1:
        raise PlanError("out of memory with one question at a time: the model needs a device with more memory")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return size // 2


def free_memory() -> int | None:
    """Bytes that can be allocated without swapping; None where the system does not report them."""
    try:
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None
