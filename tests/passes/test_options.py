"""Options are strict: a wrong one is refused at construction, with a message that names the pass and the option."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pytest

from compress import GPTQ, RTN, Magnitude, RecipeError, Wanda, WeightPass
from compress.options import describe
from compress.passes import PASSES

WRONG = [
    (GPTQ, "bits", 1), (GPTQ, "bits", 9), (GPTQ, "bits", 4.0), (GPTQ, "bits", "4"), (GPTQ, "bits", True),
    (GPTQ, "bits", None), (GPTQ, "group", -2), (GPTQ, "group", 64.0), (GPTQ, "damping", 0), (GPTQ, "damping", 1.5),
    (GPTQ, "damping", float("nan")), (GPTQ, "order", "random"), (GPTQ, "target", 3), (GPTQ, "static", "yes"),
    (GPTQ, "sites", 7), (RTN, "symmetric", 1), (RTN, "search", None), (Wanda, "sparsity", None),
    (Wanda, "sparsity", True), (Wanda, "sparsity", [0.5]), (Magnitude, "scope", 16),
]  # fmt: skip
MEANINGLESS = [
    (Wanda, "sparsity", "4:2"), (Wanda, "sparsity", 1.5), (Wanda, "sparsity", "half"), (Magnitude, "scope", "column"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "value"), WRONG)
def test_a_wrong_option_is_refused_by_pass_and_name(kind: type[WeightPass], name: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=rf"^{kind.name}\.{name}: .* is not allowed; it must be "):
        kind(**{name: value})


@pytest.mark.parametrize(("kind", "name", "value"), MEANINGLESS)
def test_a_meaningless_pattern_is_refused_by_pass_and_name(kind: type[WeightPass], name: str, value: Any) -> None:
    with pytest.raises(RecipeError) as refused:
        kind(**{name: value})
    if not str(refused.value).startswith(f"{kind.name}.{name}: "):
        pytest.fail(f"the message names no `{kind.name}.{name}`: {refused.value}")


@pytest.mark.parametrize("sparsity", [0, 1, 0.5, "2:4"])
def test_a_fraction_may_be_a_whole_number(sparsity: float | str) -> None:
    assert Wanda(sparsity=sparsity).sparsity == sparsity


@pytest.mark.parametrize("kind", PASSES.values(), ids=PASSES)
def test_options_are_every_field_with_its_value(kind: type[WeightPass]) -> None:
    assert kind(**kind().options()) == kind()
    assert set(kind().options()) == {f.name for f in fields(kind)}


@pytest.mark.parametrize("kind", PASSES.values(), ids=PASSES)
def test_every_option_is_described(kind: type[WeightPass]) -> None:
    rows = describe(kind)
    assert [row["name"] for row in rows] == [f.name for f in fields(kind)]
    assert all(row["type"] and row["help"] for row in rows)


def test_ranges_and_choices_are_told() -> None:
    rows = {row["name"]: row for row in describe(GPTQ)}
    assert rows["bits"]["type"] == "integer >= 2 <= 8"
    assert rows["order"]["type"] == "natural | activation | groups"
    assert rows["damping"]["type"] == "number > 0 <= 1"
    assert rows["bits"]["default"] == 4


def test_a_pass_prints_what_differs_from_its_defaults() -> None:
    assert str(GPTQ()) == "gptq()"
    assert str(GPTQ(bits=3, group=128)) == "gptq(bits=3, group=128)"


def test_a_pass_is_immutable() -> None:
    with pytest.raises(AttributeError):
        Wanda().sparsity = 0.1  # type: ignore[misc]


def test_passes_compare_by_value() -> None:
    assert Wanda(sparsity="2:4") == Wanda(sparsity="2:4") != Wanda()


def test_two_passes_cannot_share_a_name(registry: dict[str, Any]) -> None:
    @dataclass(frozen=True, kw_only=True)
    class First(WeightPass, name="twice"):
        """One."""

    with pytest.raises(TypeError, match="two passes are named 'twice'"):

        @dataclass(frozen=True, kw_only=True)
        class Second(WeightPass, name="twice"):
            """Two."""

    assert registry["twice"].__qualname__.endswith("First")


@pytest.mark.parametrize(
    ("step", "shape", "message"),
    [
        (RTN(), (33, 72), "rtn: blocks.0.proj: group 64 does not divide its width of 72"),
        (Wanda(sparsity="2:4"), (33, 30), "wanda: blocks.0.proj: 2:4 needs a width divisible by 4, got 30"),
        (Magnitude(scope="16x16"), (33, 32), "magnitude: blocks.0.proj: blocks of 16x16 do not tile a matrix of 33x32"),
    ],
)
def test_a_shape_that_does_not_fit_is_named(step: WeightPass, shape: tuple[int, int], message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        step.check("blocks.0.proj", shape)
    assert str(refused.value) == message
