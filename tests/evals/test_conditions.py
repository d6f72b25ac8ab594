"""What `--accept` may say, and what a comparison must show to meet it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from compress.errors import RecipeError
from compress_evals.comparison import accept, compare
from compress_evals.conditions import Condition, broken, parse, parse_all
from compress_evals.results import Comparison, Results

FAMILIES = ["closed book", "choice"]


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("drop<=0.02@95%", Condition(family=None, max_drop=0.02, confidence=0.95)),
        (" drop <= .5 @ 99.5 % ", Condition(family=None, max_drop=0.5, confidence=0.995)),
        ("closed book:drop<=1@50%", Condition(family="closed book", max_drop=1.0, confidence=0.5)),
    ],
)
def test_a_condition_is_read(text: str, meant: Condition) -> None:
    assert parse(text, FAMILIES) == meant


@pytest.mark.parametrize(
    "text",
    ["", "drop", "drop<0.02@95%", "drop<=0.02", "drop<=0.02@95", "drop<=-1@95%", "drop<=2@95%", "drop<=0@95%",
     "drop<=0.02@100%", "drop<=0.02@20%", "loss<=0.02@95%", ":drop<=0.02@95%"],
)  # fmt: skip
def test_anything_else_is_refused_with_the_form_that_is_allowed(text: str) -> None:
    with pytest.raises(RecipeError, match=r"--accept: .*drop<=0\.02@95%"):
        parse(text, FAMILIES)


def test_a_family_that_does_not_exist_is_named_with_its_nearest() -> None:
    with pytest.raises(RecipeError, match="no family 'closd book'; did you mean 'closed book'"):
        parse_all(["closd book:drop<=0.02@95%"], "facts")


def test_a_condition_on_nothing_that_is_asked_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"'choice:drop<=0.02@95%' applies to none of the tasks in --tasks"):
        parse_all(["choice:drop<=0.02@95%"], "facts", ["facts_trained"])
    assert parse_all(["drop<=0.02@95%"], "facts", ["facts_trained"])


@pytest.fixture
def compared(make_results: Callable[..., Results]) -> Results:
    dense = make_results("dense", {"facts_trained": [1] * 400, "facts_mc": [1] * 400})
    small = make_results("small", {"facts_trained": [1] * 300 + [0] * 100, "facts_mc": [1] * 400})
    return small.model_copy(update={"vs": compare(dense, small)})


def test_all_conditions_must_hold(compared: Results) -> None:
    loose, strict = (Condition(family=None, max_drop=drop, confidence=0.95) for drop in (0.5, 0.1))
    assert broken(compared, [loose]) == []
    [line] = broken(compared, [loose, strict])
    assert line.startswith("small: facts_trained: -25.0 points")


def test_a_condition_on_a_family_is_about_its_tasks_alone(compared: Results) -> None:
    strict = {"max_drop": 0.1, "confidence": 0.95}
    assert broken(compared, [Condition(family="facts_mc", **strict)]) == []
    assert len(broken(compared, [Condition(family="closed book", **strict)])) == 1


def test_a_family_that_was_not_asked_is_not_accepted(compared: Results) -> None:
    [line] = broken(compared, [Condition(family="summaries", max_drop=0.5, confidence=0.95)])
    assert "summaries: not asked" in line


def test_a_control_does_not_decide(compared: Results) -> None:
    cells = {name: cell.model_copy(update={"control": True}) for name, cell in compared.vs.tasks.items()}
    control: Comparison = compared.vs.model_copy(update={"tasks": {**compared.vs.tasks, "c": cells["facts_trained"]}})
    assert [line[:2] for line in accept(control, 0.1, 0.95)] == ["fa"]
