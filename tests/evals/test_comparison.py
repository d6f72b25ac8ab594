"""Comparisons: verdicts on constructed data, refusals, acceptance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from compress.errors import ArtifactError
from compress_evals.comparison import accept, compare, disagreement, worst_family
from compress_evals.fidelity import Estimate, Fidelity
from compress_evals.results import Results, Row

DENSE = {"facts_trained": [1] * 400, "facts_copy": [1] * 400, "facts_open": ([1] * 200 + [0] * 200)}
SMALL = {
    "facts_trained": [1] * 300 + [0] * 100,
    "facts_copy": [1] * 399 + [0],
    "facts_open": [1] * 250 + [0] * 150,
}


@pytest.fixture
def dense(make_results: Callable[..., Results]) -> Results:
    return make_results("dense", DENSE, bytes_on_disk=100)


@pytest.fixture
def small(make_results: Callable[..., Results]) -> Results:
    return make_results("small", SMALL)


def changed(results: Results, **engine: Any) -> Results:
    return results.model_copy(update={"engine": results.engine.model_copy(update=engine)})


def test_each_task_gets_its_verdict(dense: Results, small: Results) -> None:
    comparison = compare(dense, small)
    verdicts = {task: cell.paired.verdict for task, cell in comparison.tasks.items()}
    assert verdicts == {"facts_trained": "fails", "facts_copy": "matching", "facts_open": "improved"}
    assert (comparison.dense, comparison.compressed, comparison.dense_bytes) == ("dense", "small", 100)


def bits(before: float, after: float) -> Fidelity:
    far = Estimate(value=math.inf, low=math.inf, high=math.inf)
    return Fidelity(
        text_sha256="",
        tokens=1,
        windows=1,
        kl=far,
        kl_p50=math.inf,
        kl_p99=math.inf,
        top1=0.0,
        dense_bits_per_byte=before,
        compressed_bits_per_byte=after,
        bits_per_byte_difference=far,
        answers=1,
        answer_kl=far,
        answer_top1=0.0,
    )


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [(1.5, 1.5, []), (math.inf, 1.5, ["dense"]), (1.5, math.inf, ["small"]), (math.inf, math.inf, ["dense", "small"])],
)
def test_a_model_without_finite_logits_is_named(
    dense: Results, small: Results, before: float, after: float, named: list[str]
) -> None:
    notes = compare(dense, small, bits(before, after)).notes
    assert [note.split()[0] for note in notes if "non-finite logits" in note] == named


def test_p_is_adjusted_over_the_tasks(dense: Results, small: Results) -> None:
    cells = compare(dense, small).tasks
    assert cells["facts_copy"].p_holm == 1.0
    assert cells["facts_open"].p_holm == pytest.approx(2 * cells["facts_open"].paired.p)
    assert cells["facts_trained"].p_holm == pytest.approx(3 * cells["facts_trained"].paired.p)


def test_flips_in_both_directions_are_counted_though_the_mean_stays(make_results: Callable[..., Results]) -> None:
    before, after = [1, 0] * 200, [0, 1] * 40 + [1, 0] * 160
    pair = compare(make_results("a", {"t": before}), make_results("b", {"t": after})).tasks["t"].paired
    assert (pair.delta, pair.lost, pair.gained, pair.flips) == (0.0, 40, 40, 0.2)


def test_clusters_reach_the_statistics(make_results: Callable[..., Results]) -> None:
    clusters = [f"subject {i // 10}" for i in range(400)]
    dense, small = (
        make_results("a", {"t": [1] * 400}, clusters),
        make_results("b", {"t": SMALL["facts_copy"]}, clusters),
    )
    assert compare(dense, small).tasks["t"].paired.clusters == 40


def test_the_worst_family_is_named_with_what_it_kept(dense: Results, small: Results) -> None:
    worst = compare(dense, small).worst
    assert worst is not None
    assert (worst.family, worst.retained) == ("closed book", 0.75)


def test_a_family_at_chance_has_nothing_to_lose(make_results: Callable[..., Results]) -> None:
    hopeless = make_results("a", {"t": [0] * 50})
    assert worst_family(hopeless.tasks, hopeless.tasks) is None


def test_a_family_hardly_above_chance_is_not_the_worst(make_results: Callable[..., Results]) -> None:
    def guessed(name: str, right: int, known: int) -> Results:
        made = make_results(
            name, {"guessed": [1] * right + [0] * (200 - right), "known": [1] * known + [0] * (200 - known)}
        )
        tasks = {task: result.model_copy(update={"family": task}) for task, result in made.tasks.items()}
        tasks["guessed"] = tasks["guessed"].model_copy(update={"chance": 0.25})
        return made.model_copy(update={"tasks": tasks})

    dense, small = guessed("dense", 52, 200), guessed("small", 48, 100)
    assert (small.tasks["guessed"].score.value - 0.25) / (dense.tasks["guessed"].score.value - 0.25) == pytest.approx(
        -1
    )
    worst = worst_family(dense.tasks, small.tasks)
    assert worst is not None and (worst.family, worst.retained) == ("known", 0.5)


def test_different_questions_are_refused(dense: Results, make_results: Callable[..., Results]) -> None:
    other = make_results("small", SMALL | {"facts_open": [1] * 399})
    with pytest.raises(ArtifactError, match="different questions in facts_open"):
        compare(dense, other)


def test_different_tasks_are_refused(dense: Results, make_results: Callable[..., Results]) -> None:
    with pytest.raises(ArtifactError, match="only one has facts_copy, facts_open"):
        compare(dense, make_results("small", {"facts_trained": SMALL["facts_trained"]}))


@pytest.mark.parametrize("field", [{"batch_size": 8}, {"max_length": 256}, {"lm_eval": "0.4.9"}, {"bos": False}])
def test_measured_otherwise_is_refused(dense: Results, small: Results, field: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match=f"different {next(iter(field))}"):
        compare(dense, changed(small, **field))


@pytest.mark.parametrize("field", [{"version": "2"}, {"shots": 5}])
def test_a_task_of_another_version_is_refused(dense: Results, small: Results, field: dict[str, Any]) -> None:
    tasks = small.tasks | {"facts_copy": small.tasks["facts_copy"].model_copy(update=field)}
    with pytest.raises(ArtifactError, match="different questions in facts_copy; use the same limit, seed and version"):
        compare(dense, small.model_copy(update={"tasks": tasks}))


def test_another_dtype_is_noted(dense: Results, small: Results) -> None:
    assert compare(dense, changed(small, dtype="bfloat16")).notes == ("dtype: dense float32, compressed bfloat16",)
    assert compare(dense, small).notes == ()


def test_results_without_their_rows_are_refused(dense: Results, small: Results) -> None:
    with pytest.raises(ArtifactError, match="not loaded"):
        compare(dense, small.model_copy(update={"rows": {}}))


def test_acceptance_names_the_tasks_that_may_have_lost_too_much(dense: Results, small: Results) -> None:
    comparison = compare(dense, small)
    [line] = accept(comparison, max_drop=0.05, confidence=0.95)
    assert line.startswith("facts_trained: -25.0 points")
    assert accept(comparison, max_drop=0.35, confidence=0.95) == []


def test_a_measurement_too_small_to_exclude_the_loss_is_not_accepted(make_results: Callable[..., Results]) -> None:
    few, many = (compare(make_results("a", {"t": [1] * n}), make_results("b", {"t": [1] * n})) for n in (10, 400))
    assert len(accept(few, max_drop=0.05, confidence=0.95)) == 1
    assert accept(many, max_drop=0.05, confidence=0.95) == []


def test_more_confidence_accepts_less(make_results: Callable[..., Results]) -> None:
    lost = np.ones(400)
    lost[:16] = 0
    comparison = compare(make_results("a", {"t": [1] * 400}), make_results("b", {"t": lost.tolist()}))
    assert accept(comparison, max_drop=0.06, confidence=0.9) == []
    assert len(accept(comparison, max_drop=0.06, confidence=0.999)) == 1
    with pytest.raises(ValueError, match="confidence"):
        accept(comparison, max_drop=0.06, confidence=1.0)


def test_disagreement_counts_two_wrong_answers_that_differ() -> None:
    def row(said: str | None) -> Row:
        return Row(id="a:1", cluster="1", hash="0", scores={"acc": 0.0}, said=said)

    dense, compressed = [row("Rome"), row("Oslo"), row("the Oslo!")], [row("Rome"), row("Bern"), row("oslo")]
    assert disagreement(dense, compressed) == 1 / 3
    assert disagreement([*dense, row(None)], [*compressed, row("x")]) is None


@pytest.mark.parametrize(
    ("said", "differs"), [("A", 0.0), (" A", 0.0), ("B", 1.0), ("", 1.0), (".", 1.0), ("The", 1.0)]
)
def test_the_letter_a_is_an_answer_and_no_article(said: str, differs: float) -> None:
    rows = [[Row(id="a:1", cluster="1", hash="0", scores={"acc": 0.0}, said=text)] for text in ("A", said)]
    assert disagreement(*rows) == differs


def test_the_worth_of_a_passage_is_compared_on_the_questions_asked_both_ways(
    make_results: Callable[..., Results],
) -> None:
    dense = make_results("dense", {"facts_open": [1, 1, 1, 1], "facts_trained": [0, 1, 1, 0]})
    compressed = make_results("small", {"facts_open": [1, 1, 0, 1], "facts_trained": [0, 0, 0, 0]})
    [gap] = compare(dense, compressed).gaps.values()
    assert (gap.dense, gap.compressed, gap.delta) == (0.5, 0.75, 0.25)
    assert gap.low <= gap.delta <= gap.high


def test_the_worth_of_a_passage_is_not_certain_because_no_answer_changed(make_results: Callable[..., Results]) -> None:
    scores = {"facts_open": [1, 1, 1, 0], "facts_trained": [0, 1, 0, 1]}  # worth -1 at one question
    [gap] = compare(make_results("dense", scores), make_results("same", scores)).gaps.values()
    assert gap.delta == 0 and gap.low < 0 < gap.high


def test_a_control_is_compared_and_counts_for_nothing(make_results: Callable[..., Results]) -> None:
    def controlled(results: Results) -> Results:
        tasks = {n: t.model_copy(update={"control": n == "facts_mc"}) for n, t in results.tasks.items()}
        return results.model_copy(update={"tasks": tasks})

    dense, compressed = (
        controlled(make_results(name, {"facts_open": [1, 1, 1, 1], "facts_mc": scores}))
        for name, scores in (("dense", [1, 1, 1, 1]), ("small", [0, 0, 0, 0]))
    )
    comparison = compare(dense, compressed)
    assert comparison.tasks["facts_mc"].control and comparison.worst is not None
    assert comparison.worst.family == "facts_open"
