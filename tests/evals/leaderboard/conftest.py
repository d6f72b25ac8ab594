"""Handmade results on disk, and the site that is made from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from compress_evals.comparison import compare
from compress_evals.fidelity import Estimate, Fidelity
from compress_evals.leaderboard import publish
from compress_evals.results import Comparison, Example, Noise, Results, Speed, save

SCRIPT = "<script>alert(1)</script>"
IMAGE = '"><img src=x onerror=alert(2)>'
HOSTILE = (
    SCRIPT,
    IMAGE,
    "../../etc/passwd",
    "long-" + "name" * 200,
    "עברית و عربي",
    "🦙👩‍🚀 emoji",
    "\u202eturned",
    "$\\frac{$",
)
ROWS = 500
QUESTIONS = 40
ITERS = 200
SPEED = Speed(prompt=8, new=8, runs=3, dense=10, compressed=10, ratio=1, low=0.9, high=2)


def one(value: float) -> Estimate:
    return Estimate(value=value, low=value, high=value)


def fidelity(kl: float) -> Fidelity:
    return Fidelity(
        text_sha256="0" * 64, tokens=1000, windows=10, kl=one(kl), kl_p50=kl, kl_p99=kl, top1=0.9,
        dense_bits_per_byte=1.75, compressed_bits_per_byte=1.75 + kl, bits_per_byte_difference=one(kl), answers=10,
        answer_kl=one(kl), answer_top1=0.9,
    )  # fmt: skip


def recipe(method: str, **options: Any) -> str:
    inner = ", ".join(f"{key}: {value}" for key, value in options.items())
    return f"model: builtin\npasses:\n- {method}: {{{inner}}}\n"


@pytest.fixture(scope="session")
def dense(make_results: Callable[..., Results]) -> Results:
    scores = {task: [1.0] * QUESTIONS for task in ("facts_trained", "facts_mc", "facts_copy")}
    made = make_results("dense", scores, bytes_on_disk=8_000_000, sha="d" * 64)
    return made.model_copy(update={"noise": {"facts_mc": Noise(batch_size=32, n=QUESTIONS, flips=1)}})


@pytest.fixture(scope="session")
def versus(dense: Results, make_results: Callable[..., Results]) -> Callable[..., Results]:
    """A compressed result that lost a given number of questions of each task, compared with dense."""

    def make(
        name: str,
        lost: Mapping[str, int],
        *,
        original: Results = dense,
        changes: Mapping[str, Any] | None = None,
        **model: Any,
    ) -> Results:
        scores = {
            task: [0.0] * lost.get(task, 0) + [1.0] * (result.n - lost.get(task, 0))
            for task, result in original.tasks.items()
        }
        model = {"bytes_on_disk": 4_000_000, "bits_per_weight": 4.25, "recipe": recipe("rtn", bits=4), **model}
        made = make_results(name, scores, **model)
        made = made.model_copy(update={"engine": original.engine})
        found = compare(original, made, fidelity(0.01 * sum(lost.values())), iters=ITERS)
        return made.model_copy(update={"vs": found.model_copy(update=dict(changes or {}))})

    return make


@pytest.fixture(scope="session")
def stored() -> Callable[[Path, Sequence[Results]], Path]:
    """Write results below a folder as `compress eval` does."""

    def write(folder: Path, results: Sequence[Results]) -> Path:
        for i, result in enumerate(results):
            save(result, folder / f"r{i}")
        return folder

    return write


@pytest.fixture(scope="session")
def hostile() -> tuple[str, ...]:
    """Hostile names, as untrusted input may contain them."""
    return HOSTILE


@pytest.fixture(scope="session")
def cell() -> Callable[..., None]:
    """Write a sweep's record of one cell, by default a failed one."""
    return write_cell


def write_cell(folder: Path, **fields: Any) -> None:
    """Write a sweep's record of one cell."""
    known = {
        "schema": 1, "id": "cell-1", "model": "builtin", "recipe": "wanda-99", "seed": 0, "changes": {},
        "status": "failed", "error": "boom", "seconds": 1.0, "key": "k",
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cell.json").write_text(json.dumps(known | fields), encoding="utf-8")


def with_examples(compared: Comparison) -> Comparison:
    """The comparison with hostile flips of its first task."""
    examples = tuple(
        Example(id=f"a:{i}", prompt=f"Q: {SCRIPT}\nA:", wanted=IMAGE, dense=f"It is {SCRIPT}.", compressed=IMAGE)
        for i in range(2)
    )
    task = compared.tasks["facts_trained"].model_copy(update={"lost": examples, "gained": examples[:1]})
    return compared.model_copy(update={"tasks": {**compared.tasks, "facts_trained": task}})


@pytest.fixture(scope="session")
def hostile_results(
    tmp_path_factory: pytest.TempPathFactory,
    dense: Results,
    versus: Callable[..., Results],
    stored: Callable[[Path, Sequence[Results]], Path],
) -> Path:
    """A handful of results with hostile names, recipes and answers, speeds, several budgets, and failed cells."""
    made = [dense]
    for i, name in enumerate(HOSTILE):
        text = f"{SCRIPT}: [" if i == 0 else recipe("wanda", sparsity=0.1 * (i + 1))
        result = versus(
            name, {"facts_trained": 3 * i, "facts_mc": i}, sha=f"{i:064x}", recipe=text,
            bytes_on_disk=1_000_000 * (i + 1), bits_per_weight=1.5 + i,
            changes={"speed": SPEED.model_copy(update={"compressed": 10 + i, "ratio": 1 + i / 10})},
        )  # fmt: skip
        made.append(result.model_copy(update={"vs": with_examples(result.vs)}) if result.vs and i < 2 else result)
    made.append(versus("unknown size", {}, bytes_on_disk=None, bits_per_weight=None, recipe=None))
    folder = stored(tmp_path_factory.mktemp("hostile"), made)
    write_cell(folder / "cells" / "x", id=SCRIPT, recipe=IMAGE, error=f"Traceback\n{SCRIPT}")
    return folder


@pytest.fixture(scope="session")
def hostile_site(hostile_results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("sites") / "hostile"
    publish([hostile_results], site)
    return site


@pytest.fixture(scope="session")
def large_site(
    tmp_path_factory: pytest.TempPathFactory,
    dense: Results,
    versus: Callable[..., Results],
    stored: Callable[[Path, Sequence[Results]], Path],
) -> Iterator[Path]:
    """A board of `ROWS` models."""
    made = [
        versus(
            f"model {i:03d}", {"facts_trained": i % 31, "facts_mc": i % 17, "facts_copy": i % 13}, sha=f"{i:064x}",
            bytes_on_disk=1_000_000 + 7919 * i, bits_per_weight=2 + i / 100,
        )
        for i in range(ROWS)
    ]  # fmt: skip
    site = tmp_path_factory.mktemp("sites") / "large"
    publish([stored(tmp_path_factory.mktemp("large"), [dense, *made])], site)
    yield site
