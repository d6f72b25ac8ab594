"""Statistics against closed forms, scipy and brute force, and the simulated coverage of the intervals."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binomtest

from compress_evals import stats


def test_wilson_is_the_interval_scipy_computes() -> None:
    for successes, n in [(0, 10), (3, 10), (10, 10), (481, 960)]:
        expected = binomtest(successes, n).proportion_ci(method="wilson")
        assert stats.wilson(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_of_nothing_is_everything() -> None:
    assert stats.wilson(0, 0) == (0.0, 1.0)


def test_mcnemar_is_the_exact_binomial_test() -> None:
    for lost, gained in [(1, 0), (5, 5), (9, 2), (0, 12), (210, 88), (1500, 1300)]:
        assert stats.mcnemar(lost, gained) == pytest.approx(binomtest(lost, lost + gained).pvalue, rel=1e-9)
        assert stats.mcnemar(lost, gained) == stats.mcnemar(gained, lost)


def test_no_flips_are_no_evidence() -> None:
    assert stats.mcnemar(0, 0) == 1.0
    assert stats.sign_flip([0, 0, 0]) == 1.0


def test_sign_flip_of_single_questions_is_mcnemar() -> None:
    assert stats.sign_flip([-1] * 9 + [1] * 2 + [0] * 50) == pytest.approx(stats.mcnemar(9, 2), rel=1e-12)


def test_sign_flip_of_clusters_is_the_share_of_all_sign_vectors() -> None:
    sums = [-4, -3, 2, -1, -1, 0, 1]
    reached = [
        abs(sum(s * v for s, v in zip(signs, sums, strict=True))) for signs in itertools.product([-1, 1], repeat=7)
    ]
    assert stats.sign_flip(sums) == pytest.approx(np.mean([r >= abs(sum(sums)) for r in reached]), rel=1e-12)


def test_sign_flip_of_fractions_is_near_the_exact_share_and_never_zero() -> None:
    sums = [-0.4, -0.35, 0.2, -0.15, -0.1, 0.12]
    reached = [
        abs(sum(s * v for s, v in zip(signs, sums, strict=True))) for signs in itertools.product([-1, 1], repeat=6)
    ]
    exact = np.mean([r >= abs(sum(sums)) - 1e-12 for r in reached])
    assert stats.sign_flip(sums, iters=20000) == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 20000))
    assert 2 / 2**60 < stats.sign_flip([-0.5] * 60, iters=1000) < 1e-12  # beyond what draws can show: Hoeffding's bound
    assert stats.sign_flip([-0.5] * 12, iters=1000) >= 1 / 1001  # the bound is larger


def test_holm_multiplies_by_the_tests_not_yet_rejected_and_keeps_order() -> None:
    assert stats.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert stats.holm([0.6, 0.7]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_sample_sizes_are_those_of_the_specification() -> None:
    table = {(0.02, 0.005): 6277, (0.05, 0.02): 979, (0.10, 0.02): 1960, (0.10, 0.05): 312}
    table |= {(0.20, 0.05): 626, (0.25, 0.10): 194}
    assert {case: stats.needed_questions(*case) for case in table} == table
    # 3922 there: 3922.08, rounded to the nearest instead of up
    assert stats.needed_questions(0.05, 0.01) == 3923


def test_detectable_effect_inverts_the_sample_size() -> None:
    for discordant, effect in [(0.02, 0.005), (0.05, 0.01), (0.05, 0.02), (0.1, 0.05), (0.2, 0.05), (0.25, 0.1)]:
        n = stats.needed_questions(discordant, effect)
        assert stats.detectable_effect(n, discordant) <= effect < stats.detectable_effect(n - 1, discordant)


def test_an_effect_beyond_the_flips_is_never_detectable() -> None:
    assert stats.detectable_effect(20, 0.05) == math.inf
    with pytest.raises(ValueError, match="discordant"):
        stats.needed_questions(0.05, 0.06)


def test_grouped_bootstrap_has_the_moments_of_resampling_clusters() -> None:
    table = ((-2.0, 3.0, 40), (0.0, 1.0, 100), (1.0, 2.0, 30))
    drawn = stats.bootstrap(table, iters=40000, seed=1)
    sums, sizes = np.repeat([-2.0, 0.0, 1.0], [40, 100, 30]), np.repeat([3.0, 1.0, 2.0], [40, 100, 30])
    mean = sums.sum() / sizes.sum()
    error = np.sqrt(((sums - mean * sizes) ** 2).sum()) / sizes.sum()  # the delta method for a ratio
    assert drawn.mean() == pytest.approx(mean, abs=0.05 * error)
    assert drawn.std() == pytest.approx(error, rel=0.05)


def test_bootstrap_is_chunked_without_changing_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "_CHUNK", 7)
    assert len(stats.bootstrap(((1.0, 1.0, 3), (0.0, 1.0, 2)), iters=100)) == 100


def test_same_seed_same_interval() -> None:
    rng = np.random.default_rng(0)
    dense, compressed = rng.integers(0, 2, 80), rng.integers(0, 2, 80)
    assert stats.paired(dense, compressed, seed=3) == stats.paired(dense, compressed, seed=3)
    assert stats.paired(dense, compressed, seed=3).detectable != stats.paired(dense, compressed, seed=4).detectable


def test_paired_counts_flips_and_difference() -> None:
    pair = stats.paired([1, 1, 1, 0, 0, 1, 1, 0], [0, 0, 1, 1, 0, 1, 1, 0])
    assert (pair.lost, pair.gained, pair.flips, pair.delta) == (2, 1, 3 / 8, -1 / 8)
    assert (pair.dense, pair.compressed, pair.p) == (5 / 8, 4 / 8, 1.0)


def test_nothing_lost_in_five_questions_does_not_prove_matching() -> None:
    assert stats.paired(np.ones(5), np.ones(5)).verdict == "inconclusive"
    assert stats.paired(np.ones(300), np.ones(300)).verdict == "matching"


def test_every_answer_lost_fails() -> None:
    pair = stats.paired(np.ones(100), np.zeros(100))
    assert (pair.verdict, pair.delta, pair.low) == ("fails", -1.0, -1.0)


def test_a_dense_model_that_knows_nothing_is_never_matched() -> None:
    pair = stats.paired(np.zeros(500), np.zeros(500))
    assert (pair.margin, pair.verdict, pair.needed) == (0.0, "inconclusive", None)
    assert stats.paired(np.zeros(500), np.r_[np.ones(50), np.zeros(450)]).verdict == "improved"


def test_verdicts_follow_the_interval() -> None:
    cases = {(0.01, 0.03): "improved", (-0.04, 0.02): "matching", (-0.03, -0.01): "matching"}
    cases |= {(-0.09, -0.06): "fails", (-0.08, -0.01): "drop", (-0.06, 0.01): "inconclusive"}
    assert {bounds: stats.judge(*bounds, margin=0.05) for bounds in cases} == cases


def test_an_inconclusive_verdict_names_a_number_that_would_settle_it() -> None:
    dense = np.tile([1.0] * 9 + [0.0], 8)
    compressed = dense.copy()
    compressed[[0, 10, 20, 30, 41]] = 0
    compressed[[9, 19, 29]] = 1
    pair = stats.paired(dense, compressed)
    assert pair.verdict == "inconclusive"
    assert stats.verdict_text(pair) == f"inconclusive (need n>={pair.needed})"
    repeats = math.ceil(2 * pair.needed / len(dense))  # twice, since the power is 80 % and not 100 %
    assert stats.paired(np.tile(dense, repeats), np.tile(compressed, repeats)).verdict != "inconclusive"


def test_clusters_widen_the_interval() -> None:
    rng = np.random.default_rng(2)
    lost = np.repeat(rng.random(100) < 0.1, 4)  # four questions on one subject live and die together
    names = [f"subject {i // 4}" for i in range(400)]
    alone, together = (stats.paired(np.ones(400), 1.0 - lost, cluster) for cluster in (None, names))
    assert together.high - together.low > 1.7 * (alone.high - alone.low)
    assert together.p > alone.p
    assert (together.clusters, together.n) == (100, 400)


def test_scores_that_are_not_finite_or_not_paired_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        stats.paired([1.0, math.nan], [1.0, 1.0])
    with pytest.raises(ValueError, match="pair 2 dense with 3"):
        stats.paired([1, 0], [1, 0, 1])
    with pytest.raises(ValueError, match="clusters"):
        stats.paired([1, 0], [1, 0], ["a"])


def test_intervals_of_scores_count_clusters() -> None:
    scores, names = np.repeat([1.0, 0.0], 200), [f"{i // 20}" for i in range(400)]
    assert stats.mean_interval(scores) == stats.wilson(200, 400)
    assert stats.mean_interval(scores, names) == pytest.approx(stats.wilson(10, 20), abs=1e-9)
    assert stats.mean_interval(np.ones(400), names) == stats.wilson(20, 20)


@pytest.mark.parametrize("clusters", [3, 5])
def test_intervals_of_few_fractions_cover_the_truth(clusters: int) -> None:
    rng, inside, score = np.random.default_rng(clusters), 0, 0
    for _ in range(400):
        dense, compressed = rng.beta(2, 2, clusters), rng.beta(2, 3, clusters)
        pair = stats.paired(dense, compressed, iters=1000)
        inside += pair.low <= 0.4 - 0.5 <= pair.high
        low, high = stats.mean_interval(dense)
        score += low <= 0.5 <= high
    assert inside / 400 > 0.91  # of the percentile bootstrap .75 and .84
    assert score / 400 > 0.91


def test_one_fraction_and_equal_fractions_prove_nothing() -> None:
    assert stats.paired([0.8], [0.5]).verdict == "inconclusive"
    assert stats.paired([0.8], [0.8]).verdict == "inconclusive"
    assert stats.paired([0.8, 0.3, 0.4, 0.6, 0.1], [0.8, 0.3, 0.4, 0.6, 0.1]).verdict == "inconclusive"
    assert stats.mean_interval([0.8]) == stats.wilson(0.8, 1)
    assert stats.mean_interval([0.25] * 4) == stats.wilson(1, 4)
    assert stats.bootstrap_interval(((0.3, 1.0, 1),)) == (-math.inf, math.inf)


def test_student_stretches_an_interval_of_few_clusters() -> None:
    assert stats.stretch(5) == pytest.approx(2.776445 / 1.959964 * math.sqrt(5 / 4), rel=1e-6)
    assert stats.stretch(5, 0.5) == pytest.approx(math.sqrt(5 / 4))
    assert stats.stretch(100_000) == pytest.approx(1, abs=1e-4)
    assert stats.stretch(1) == math.inf
    pair = stats.paired([0.8, 0.3, 0.4], [0.7, 0.1, 0.45], seed=7)
    assert stats.lower_bound(pair, 0.975, seed=7) == pytest.approx(pair.low, abs=1e-12)
    assert stats.lower_bound(pair, 0.5, seed=7) == pytest.approx(pair.delta, abs=0.03)


def test_lower_bound_at_97_and_a_half_is_the_lower_end_of_the_interval() -> None:
    rng = np.random.default_rng(5)
    pair = stats.paired(rng.integers(0, 2, 90), rng.integers(0, 2, 90), seed=7)
    assert stats.lower_bound(pair, 0.975, seed=7) == pytest.approx(pair.low, abs=1e-12)
    assert stats.lower_bound(pair, 0.8, seed=7) > pair.low


@pytest.mark.parametrize(("lost", "gained"), [(0.0, 0.0), (0.01, 0.0), (0.05, 0.05), (0.2, 0.05)])
def test_intervals_cover_the_truth(lost: float, gained: float) -> None:
    rng, covered, runs = np.random.default_rng(11), 0, 300
    for seed in range(runs):
        draw = rng.random(200)
        dense = np.where(draw < lost, 1.0, np.where(draw < lost + gained, 0.0, 1.0))
        compressed = np.where(draw < lost, 0.0, 1.0)
        pair = stats.paired(dense, compressed, iters=1000, seed=seed)
        covered += pair.low <= gained - lost <= pair.high
    assert covered / runs >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / runs)


def test_a_loss_at_the_margin_is_rarely_called_matching() -> None:
    rng, wrong, runs = np.random.default_rng(12), 0, 300
    for seed in range(runs):
        draw = rng.random(500)
        dense = (draw < 0.8).astype(float)
        compressed = np.where(draw < 0.07, 0.0, np.where(draw > 0.97, 1.0, dense))  # truth: -0.07 + 0.03 = -0.05 * 0.8
        wrong += stats.paired(dense, compressed, iters=1000, seed=seed).verdict == "matching"
    assert wrong / runs <= 0.025 + 3 * math.sqrt(0.025 * 0.975 / runs)


def noisy(rng: np.random.Generator, truth: list[float], n: int = 400, size: int = 2) -> tuple[list, list[str]]:
    """Binary scores of models with these true means; `size` questions of a cluster are as hard as one another."""
    clusters = np.repeat(np.arange(n // size), size)
    hard = rng.normal(0, 0.15, n // size)[clusters]
    return [(rng.random(n) < np.clip(mean + hard, 0, 1)).astype(float) for mean in truth], [str(c) for c in clusters]


@pytest.mark.parametrize("models", [2, 5, 12])
def test_equal_models_share_a_rank(models: int) -> None:
    rng, shared, runs = np.random.default_rng(models), 0, 300
    for _ in range(runs):
        columns, clusters = noisy(rng, [0.6] * models)
        shared += stats.significance_groups(columns, clusters) == [1] * models
    assert shared / runs >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / runs)


def test_models_far_apart_are_ranked_and_those_between_share() -> None:
    rng = np.random.default_rng(0)
    columns, clusters = noisy(rng, [0.3, 0.9, 0.89, 0.6], n=2000)
    assert stats.significance_groups(columns, clusters) == [4, 1, 1, 3]


def test_ranks_do_not_depend_on_the_order_of_models_and_fractions_are_ranked_too() -> None:
    rng = np.random.default_rng(1)
    columns = [rng.random(300), rng.random(300) - 0.3, rng.random(300) + 0.3]
    assert stats.significance_groups(columns) == [2, 3, 1]
    assert stats.significance_groups(columns[::-1]) == [1, 3, 2]


def test_pairs_are_tested_as_mcnemar_does() -> None:
    dense = np.ones(400)
    for lost, gained in [(12, 2), (30, 11), (90, 60)]:
        other = np.r_[np.zeros(lost), np.ones(400 - lost)]
        base = np.r_[dense[: 400 - gained], np.zeros(gained)]
        [p] = stats._pairwise_p(np.stack([base, other]))[np.triu_indices(2, k=1)]
        assert p == pytest.approx(stats.mcnemar(lost, gained), rel=0.3)  # 14 flips; nearer with more


def test_no_models_or_identical_ones_or_ragged_ones() -> None:
    assert stats.significance_groups([]) == []
    assert stats.significance_groups([np.ones(5)] * 3) == [1, 1, 1]
    with pytest.raises(ValueError, match="aligned"):
        stats.significance_groups([np.ones(5), np.ones(6)])


def clustered(rng: np.random.Generator, clusters: int, lost: float, gained: float) -> tuple[np.ndarray, np.ndarray]:
    """Dense and compressed scores, three questions a cluster, whose rates of loss and gain vary from one to another."""
    factor = np.repeat(rng.choice([0.25, 1.75], clusters), 3)
    dense = (rng.random(3 * clusters) < 0.7).astype(float)
    draw = rng.random(3 * clusters)
    return dense, np.where(dense == 1, draw >= lost * factor, draw < gained * factor).astype(float)


@pytest.mark.slow
@pytest.mark.parametrize("questions", [201, 501, 999])
def test_intervals_of_clustered_questions_cover_the_truth(questions: int) -> None:
    rng, covered, runs = np.random.default_rng(questions), 0, 400
    names = [str(i // 3) for i in range(questions)]
    for seed in range(runs):
        dense, compressed = clustered(rng, questions // 3, 0.2, 0.1)
        pair = stats.paired(dense, compressed, names, iters=1000, seed=seed)
        covered += pair.low <= 0.3 * 0.1 - 0.7 * 0.2 <= pair.high
    noise = 2 * math.sqrt(0.95 * 0.05 / runs)
    assert 0.93 - noise <= covered / runs <= 0.97 + noise


@pytest.mark.slow
def test_a_clustered_loss_at_the_margin_is_rarely_called_matching() -> None:
    rng, wrong, runs = np.random.default_rng(13), 0, 400
    names = [str(i // 3) for i in range(600)]
    for seed in range(runs):
        dense, compressed = clustered(rng, 200, 0.1, 0.35 / 3)  # truth: 0.3 * 0.35 / 3 - 0.7 * 0.1 = -0.05 * 0.7
        wrong += stats.paired(dense, compressed, names, iters=1000, seed=seed).verdict == "matching"
    assert wrong / runs <= 0.05


def test_mcnemar_of_few_flips_has_its_closed_form() -> None:
    assert stats.mcnemar(5, 0) == 2 * 0.5**5
    assert stats.mcnemar(7, 1) == 2 * (1 + 8) * 0.5**8
    assert stats.mcnemar(2, 2) == 1.0


def test_holm_of_a_textbook_example() -> None:
    # Holm 1979 by hand: 4 * .005, 3 * .01, 2 * .03, then .04 raised to the one before it
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
