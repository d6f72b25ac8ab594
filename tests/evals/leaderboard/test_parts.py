"""Parts of the leaderboard: methods from recipes, safe names, marked words, shades, Pareto fronts."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from compress_evals.leaderboard.curves import by_method, usual
from compress_evals.leaderboard.examples import marked
from compress_evals.leaderboard.figures import Point, front
from compress_evals.leaderboard.heat import shade
from compress_evals.leaderboard.methods import Method, method_of
from compress_evals.leaderboard.naming import readable, slugs


def recipe(method: str, **options: object) -> str:
    inner = ", ".join(f"{key}: {value}" for key, value in options.items())
    return f"passes:\n- {method}: {{{inner}}}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (recipe("wanda", sparsity=0.5), Method(label="wanda", family="pruning", removed=0.5)),
        (recipe("wanda", sparsity="'2:4'"), Method(label="wanda n:m", family="pruning", removed=0.5)),
        (recipe("svd", removed=0.2), Method(label="svd", family="low rank", removed=0.2)),
        ("passes:\n- wanda: {sparsity: 0.5}\n- gptq: {bits: 4}\n",
         Method(label="wanda + gptq", family="pruning + quantization", removed=0.5)),
        ("passes:\n- theirs\n", Method(label="theirs", family="other")),
        ("passes: [", Method(label="other", family="other")),
        ("passes:\n- [1]\n", Method(label="other", family="other")),
        ("just text", Method(label="other", family="other")),
        (None, Method(label="other", family="other")),
    ],
)  # fmt: skip
def test_the_method_is_read_from_the_recipe(text: str | None, expected: Method) -> None:
    assert replace(method_of(text), settings="") == expected


def test_only_models_that_differ_in_their_budget_alone_are_joined() -> None:
    def line(sparsity: float | str, samples: int = 128, seed: int = 0, **options: Any) -> Any:
        calibration = f"calibration: {{samples: {samples}, seed: {seed}}}\n"
        method = method_of(calibration + recipe("wanda", sparsity=sparsity, **options))
        return SimpleNamespace(method=method, name=f"{sparsity}-{samples}")

    def removed(line: Any) -> float | None:
        return line.method.removed if line.method.removed is None else 100 * line.method.removed

    joined = [line(0.5), line(0.6, seed=1), line(0.7)]
    others = [line(0.7, samples=8), line(0.5, alpha="true"), line(0.7, alpha="true")]
    found = by_method([*others, *joined], removed)["wanda"]
    assert len(found) == 6 and usual(found, removed) == joined
    assert by_method([line(0.5), line(0.7, samples=8)], removed) == {}
    patterns = [line(pattern) for pattern in ("'2:4'", "'4:8'", "'1:4'")]
    assert usual(by_method(patterns, removed)["wanda n:m"], removed) == [patterns[0], patterns[2]]


def test_recipes_that_cannot_be_read_are_on_no_curve() -> None:
    def line(recipe: str | None, bits: float) -> Any:
        return SimpleNamespace(method=method_of(recipe), bits=bits, name=f"{bits}")

    lines = [line(None, 2), line("just text", 4), *(line(recipe("gptq", bits=bits), bits) for bits in (4, 3))]
    found = by_method(lines, lambda line: line.bits)
    assert {method: [line.bits for line in those] for method, those in found.items()} == {"gptq": [3, 4]}


def test_file_names_are_safe_short_and_distinct(hostile: tuple[str, ...]) -> None:
    names = [*hostile, *hostile, "index", "CON", "a/b", "a-b", "A B", ""]
    found = slugs(names)
    assert all(re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", slug) and len(slug) < 80 for slug in found)
    assert max(Counter(found).values()) == 1
    assert not {"index", "con"} & set(found)


def test_marks_that_turn_text_around_are_not_written() -> None:
    assert readable("a\u202eb\x00c\u2028d") == "a\ufffdb\ufffdc\ufffdd"
    assert readable("line\n\tline 👩‍🚀 عربي") == "line\n\tline 👩‍🚀 عربي"


def test_the_words_that_differ_are_marked() -> None:
    assert marked("It is Paris.", "It is Rome.") == (
        (("It is ", False), ("Paris", True), (".", False)),
        (("It is ", False), ("Rome", True), (".", False)),
    )
    assert marked("", "x") == ((), (("x", True),))
    assert "".join(text for text, _ in marked("a  b\nc", "a b")[0]) == "a  b\nc"


def test_a_very_long_answer_is_cut() -> None:
    assert len("".join(text for text, _ in marked("word " * 5000, "x")[0])) < 5000


@pytest.mark.parametrize(("points", "step"), [(0, 0), (-0.9, 0), (-1, -1), (7.9, 2), (-8, -3), (-50, -4), (20, 4)])
def test_shades_are_fixed_ranges(points: float, step: int) -> None:
    assert shade(points) == step


def test_the_front_holds_what_nothing_beats() -> None:
    def at(name: str, x: float, y: float) -> Point:
        return Point(name=name, x=x, y=y, low=y, high=y, link="")

    spots = [at("small", 1, 50), at("worse", 2, 40), at("good", 3, 90), at("same", 4, 90), at("twin", 3, 80)]
    assert [p.name for p in front(spots, less=True)] == ["small", "good"]
    assert [p.name for p in front(spots, less=False)] == ["same"]
