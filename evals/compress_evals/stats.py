"""Statistics of a comparison: confidence intervals, paired tests, verdicts and minimal detectable effects.

Not here: which tasks are compared (`comparison.py`) and how results are stored (`results.py`).
Everything is plain numpy in float64. The independent unit is the *cluster* of questions (a subject that is asked about
in several ways counts once), and every comparison is paired: both models answer the same questions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri, stdtrit

from compress_evals.runs import CONFIDENCE, ONE, Interval, Runs, between_runs, two_sided, with_runs

Floats = NDArray[np.float64]
Table = tuple[tuple[float, float, int], ...]

POWER = 0.80
_UPPER = 0.5 + CONFIDENCE / 2  # the one-sided level of each bound of an interval
_CHUNK = 1 << 22  # random numbers drawn at once: 32 MB


@dataclass(frozen=True, kw_only=True)
class Paired:
    """The paired comparison of a compressed model with its dense original on the same questions.

    `delta` is the mean paired difference, compressed minus dense, and `low` and `high` are its 95 % confidence
    interval. `lost` and `gained` count the questions whose score fell or rose, `flips` is their share; only of binary
    scores are these answers that turned wrong or right. `margin` is the
    largest absolute loss that still counts as matching; `p` is two-sided. `needed` is the number of questions at which
    an inconclusive result would be decided (80 % power at the observed effect); None if it is decided or no number
    would be enough. `detectable` is the minimal detectable effect: the smallest true difference that this comparison
    detects with 80 % power. `binary`: all scores are 0 or 1, or differences of such. `table` holds the clusters as (sum
    of differences, questions, number of such clusters), which is all that the bootstrap needs, so that other bounds can
    be computed later.
    """

    n: int
    clusters: int
    dense: float
    compressed: float
    delta: float
    low: float
    high: float
    lost: int
    gained: int
    flips: float
    p: float
    margin: float
    verdict: str
    needed: int | None
    detectable: float
    binary: bool
    table: Table


def quantile(confidence: float) -> float:
    """The standard normal quantile of a two-sided interval of this confidence: 1.96 for 0.95."""
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def wilson(successes: float, n: float) -> Interval:
    """The 95 % Wilson score interval of a proportion; (0, 1) if `n` is 0.

    `n` may be fractional, as an effective sample size is. Source: Wilson, JASA 1927.
    """
    if n <= 0:
        return 0.0, 1.0
    z, share = quantile(CONFIDENCE), successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (0.0 if share == 0 else max(0.0, centre - half)), (1.0 if share == 1 else min(1.0, centre + half))


def mean_interval(values: ArrayLike, cluster: Sequence[str] | None = None, seed: int = 0) -> Interval:
    """A 95 % interval of the mean: Wilson on the effective sample size if binary, else a cluster bootstrap.

    The effective sample size is n divided by the design effect of the clusters (at least 1). If all scores are equal,
    the design effect cannot be estimated, and the effective sample size is the number of clusters. Equal means of all
    clusters are treated as if binary, which no share can spread more than.
    """
    scores = _floats(values)
    sums, sizes = _by_cluster(scores, cluster)
    n, mean, table = len(scores), float(scores.mean()), _table(sums, sizes)
    if not _is_binary(scores):
        share = bool(scores.min() >= 0 and scores.max() <= 1)
        if share and _is_constant(table):
            return wilson(mean * len(sums), len(sums))
        low, high = bootstrap_interval(table, seed=seed)
        return (max(0.0, low), min(1.0, high)) if share else (low, high)
    naive = mean * (1 - mean) / n
    clustered = float(((sums - mean * sizes) ** 2).sum()) / n**2
    effective = n / max(1.0, clustered / naive) if naive > 0 else float(len(sums))
    return wilson(mean * effective, effective)


def mcnemar(lost: int, gained: int) -> float:
    """The exact two-sided p value of McNemar's test on the flips of independent questions; 1 if nothing flipped.

    It is the binomial test at one half, computed in integers and so exact for any number of flips.
    Source: McNemar, 1947.
    """
    flips, term, tail = lost + gained, 1, 0
    for i in range(min(lost, gained) + 1):
        tail += term
        term = term * (flips - i) // (i + 1)
    return min(1.0, 2 * tail / (1 << flips))


def sign_flip(sums: ArrayLike, iters: int = 10000, seed: int = 0) -> float:
    """The two-sided p value of the sign-flip test on the differences summed by cluster.

    Under the null hypothesis, the sum of each cluster may have either sign. The test is exact for integer sums (binary
    scores), by convolution of the clusters' distributions; for clusters of one question it equals McNemar's exact test.
    Otherwise it draws `iters` random sign vectors, and p is at least 1 / (iters + 1), unless Hoeffding's bound on such
    sums is below that: a floor would be multiplied by the number of comparisons.
    Source: Fisher's randomisation test, with whole clusters exchanged; Hoeffding, JASA 1963, theorem 2.
    """
    steps = np.abs(_floats(sums))
    observed, steps = abs(float(_floats(sums).sum())), steps[steps > 0]
    if not len(steps):
        return 1.0
    if np.array_equal(steps, np.round(steps)):
        return _exact_sign_flip(steps.astype(np.int64), round(observed))
    rng, hits = np.random.default_rng(seed), 0
    for rows in _chunks(iters, len(steps)):
        signs = rng.integers(0, 2, size=(rows, len(steps))) * 2.0 - 1.0
        hits += int((np.abs(signs @ steps) >= observed - 1e-9).sum())
    bound = 2 * math.exp(-(observed**2) / (2 * float((steps**2).sum())))
    return bound if bound < 1 / (iters + 1) else (hits + 1) / (iters + 1)


def holm(ps: Sequence[float]) -> list[float]:
    """The p values adjusted for multiple comparisons, in the given order. Source: Holm, Scand. J. Stat. 1979."""
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = highest
    return adjusted


def needed_questions(discordant: float, effect: float) -> int:
    """The number of independent questions that detects `effect` with 80 % power if the share `discordant` flips.

    Raises ValueError unless 0 < |effect| <= discordant <= 1.
    Source: Connor, Biometrics 1987, sample size of McNemar's test.
    """
    if not 0 < abs(effect) <= discordant <= 1:
        raise ValueError(f"an effect of {effect} needs 0 < |effect| <= discordant <= 1, not {discordant}")
    spread = quantile(CONFIDENCE) * math.sqrt(discordant)
    spread += NormalDist().inv_cdf(POWER) * math.sqrt(discordant - effect**2)
    return math.ceil((spread / effect) ** 2)


def detectable_effect(n: int, discordant: float) -> float:
    """The minimal detectable effect of `n` independent questions, with 80 % power, if the share `discordant` flips.

    It is the inverse of `needed_questions`; infinite if not even flips in a single direction could be detected.
    """
    a, b, d = quantile(CONFIDENCE), NormalDist().inv_cdf(POWER), discordant
    # (D√n - a√d)² = b²(d - D²), its larger root in D
    quadratic, linear, constant = n + b * b, -2 * a * math.sqrt(n * d), (a * a - b * b) * d
    root = (-linear + math.sqrt(max(0.0, linear**2 - 4 * quadratic * constant))) / (2 * quadratic)
    return root if root <= d else math.inf


def bootstrap(table: Table, iters: int = 10000, seed: int = 0) -> Floats:
    """The means of `iters` bootstrap resamples of the clusters of `table`.

    Equal clusters are drawn together, by a multinomial over the distinct ones: this has the same distribution as
    drawing them one by one, and takes a few milliseconds for binary scores. Memory is bounded for any table.
    """
    sums, sizes, counts = (np.array(column, dtype=np.float64) for column in zip(*table, strict=True))
    total, rng = int(counts.sum()), np.random.default_rng(seed)
    means = []
    for rows in _chunks(iters, len(counts)):
        drawn = rng.multinomial(total, counts / total, size=rows)
        means.append((drawn @ sums) / (drawn @ sizes))
    return np.concatenate(means)


def bootstrap_interval(table: Table, iters: int = 10000, seed: int = 0) -> Interval:
    """The 95 % bootstrap interval of the mean of `table`, wide enough for few clusters; everything for one cluster."""
    return _between(table, bootstrap(table, iters, seed), stretch(sum(count for _, _, count in table)))


def stretch(clusters: int, level: float = _UPPER) -> float:
    """The factor by which Student's one-sided bound exceeds that of the percentile bootstrap; infinite for one cluster.

    Resampled means of k clusters have (k - 1) / k of the variance of the mean, and their quantiles are those of a known
    variance. Source: Hesterberg, The American Statistician 2015 (expanded percentile intervals).
    """
    if clusters < 2:
        return math.inf
    normal = float(ndtri(level))
    student = float(stdtrit(clusters - 1, level)) / normal if normal else 1.0
    return student * math.sqrt(clusters / (clusters - 1))


def lower_bound(pair: Paired, confidence: float, iters: int = 10000, seed: int = 0) -> float:
    """The one-sided lower confidence bound of the difference, at level `confidence`, by the cluster bootstrap."""
    draws, factor = _resampled(pair.table, pair.binary, iters, seed, confidence)
    return _between(pair.table, draws, factor, confidence)[0]


def paired(
    dense: ArrayLike,
    compressed: ArrayLike,
    cluster: Sequence[str] | None = None,
    margin: float = 0.05,
    iters: int = 10000,
    seed: int = 0,
) -> Paired:
    """The paired comparison of per-question scores; `margin` is a fraction of the dense mean.

    It differs from the snippet in the specification where that is wrong:
    - its bootstrap p value can be 0 and is not centred under the null hypothesis; here p comes from `sign_flip` if
      there are clusters;
    - without flips its interval has zero width, so that five questions would prove "matching"; here the bootstrap of
      binary scores includes two pseudo-clusters of mean size, one lost and one gained (Bonett and Price, 2012), which
      leaves about ±1.5 points at 200 questions and hardly changes intervals with many flips;
    - scores that are not binary get an interval that is wide enough for few clusters (`stretch`);
    - a dense score of 0 leaves no margin and nothing to lose: the verdict is "inconclusive" unless the gain is
      significant;
    - identical clusters are drawn together, so memory does not grow with `iters` x clusters;
    - scores that are not finite, or of different length, raise ValueError (a NaN would compare as "no loss").
    """
    before, after = _floats(dense), _floats(compressed)
    if before.shape != after.shape or not len(before):
        raise ValueError(f"cannot pair {len(before)} dense with {len(after)} compressed scores")
    return paired_runs(before, after[None], cluster, margin, iters, seed)[0]


def paired_runs(
    dense: ArrayLike,
    runs: ArrayLike,
    cluster: Sequence[str] | None = None,
    margin: float = 0.05,
    iters: int = 10000,
    seed: int = 0,
) -> tuple[Paired, Runs]:
    """`paired` for several runs of one recipe, with intervals that generalize to other questions and other runs.

    `runs` has the shape [runs, questions]. `dense` is one model [questions], or, as [runs, questions], what each run is
    compared with, such as another recipe's run with the same calibration. `compressed`, `delta` and `table` are those
    of the mean over runs; `low`, `high`, `p` and the verdict include the spread between runs, which is also returned.
    `flips` is the mean over runs, `lost` and `gained` are rounded means. `needed` is None also if no number of
    questions would be enough because the runs differ too much.

    Raises ValueError for scores that cannot be paired.
    """
    before, after = _floats(dense), _floats(runs)
    if after.ndim != 2 or before.shape not in (after.shape, after.shape[1:]) or not after.size:
        raise ValueError(f"cannot pair {before.shape[-1:]} dense scores with runs of shape {after.shape}")
    differences, questions = after - before, after.shape[1]
    sums = np.stack([_by_cluster(row, cluster)[0] for row in differences])
    sizes = _by_cluster(differences[0], cluster)[1]
    deltas, delta = differences.mean(axis=1), float(differences.mean())
    spread = between_runs(deltas, (sums - np.outer(deltas, sizes)) / questions)
    table, scores = _table(sums.mean(axis=0), sizes), np.concatenate([before.ravel(), after.ravel()])
    binary = _is_binary(np.abs(scores))
    draws, factor = _resampled(table, binary, iters, seed)
    low, high = with_runs(delta, _between(table, draws, factor), spread)
    lost, gained = float((differences < 0).sum()) / len(after), float((differences > 0).sum()) / len(after)
    single = _is_binary(scores) and len(sizes) == questions and len(after) == 1
    allowed, error = margin * float(before.mean()), float(draws.std()) * factor
    verdict = judge(low, high, allowed)
    p = mcnemar(round(lost), round(gained)) if single else sign_flip(sums.sum(axis=0), iters, seed)
    if spread.half:
        p = max(p, float(two_sided([delta], [error**2], [[spread]])[0]))
    return Paired(
        n=questions,
        clusters=len(sizes),
        dense=float(before.mean()),
        compressed=float(after.mean()),
        delta=delta,
        low=low,
        high=high,
        lost=round(lost),
        gained=round(gained),
        flips=(lost + gained) / questions,
        p=p,
        margin=allowed,
        verdict=verdict,
        needed=_needed(questions, delta, allowed, error, spread) if verdict == "inconclusive" else None,
        detectable=_both_quantiles() * math.hypot(error, spread.half / quantile(CONFIDENCE)),
        binary=binary,
        table=table,
    ), spread


def significance_groups(
    columns: Sequence[ArrayLike], cluster: Sequence[str] | None = None, runs: Sequence[Runs] | None = None
) -> list[int]:
    """The rank of each model from per-question scores (one column per model, rows aligned).

    Models that cannot be told apart share a rank. They are taken in order of falling mean. The first is the anchor of a
    group; the models after it belong to that group until one differs significantly from the anchor, which then becomes
    the anchor of the next group. A rank is 1 plus the number of models in better groups. All pairs are tested and
    adjusted together (Holm), because the anchor is selected for being the best: tests against it alone would find a
    difference among ten equal models one time in eight.

    The test is the normal approximation of `sign_flip`, with a continuity correction for integer sums. It is close to
    the exact test from about ten flips on, and a Gram matrix gives all pairs at once. For a column that is a mean over
    `runs`, their spread is included (`runs.two_sided`). Raises ValueError for columns of different lengths.
    """
    scores = [_floats(column) for column in columns]
    if len({len(column) for column in scores}) > 1:
        raise ValueError(f"columns of {sorted({len(column) for column in scores})} questions cannot be aligned")
    if not scores:
        return []
    sums = np.stack([_by_cluster(column, cluster)[0] for column in scores])
    apart = _pairwise_p(sums, runs) < 1 - CONFIDENCE
    order = sorted(range(len(scores)), key=lambda i: -float(sums[i].sum()))
    ranks, anchor = [1] * len(scores), 0
    for place, i in enumerate(order):
        anchor = place if apart[order[anchor], i] else anchor
        ranks[i] = anchor + 1
    return ranks


def judge(low: float, high: float, margin: float) -> str:
    """The non-inferiority verdict on an interval of the difference; `margin` is absolute."""
    if low > 0:
        return "improved"
    if low > -margin:
        return "matching"
    if high < -margin:
        return "fails"
    return "drop" if high < 0 else "inconclusive"


def verdict_text(pair: Paired) -> str:
    """The verdict as printed; an inconclusive one says how many questions would decide it, if any number would."""
    if pair.verdict != "inconclusive" or pair.needed is None:
        return pair.verdict
    return f"inconclusive (need n>={pair.needed})"


def _needed(n: int, delta: float, margin: float, error: float, spread: Runs) -> int | None:
    """The number of questions that shows, with 80 % power, either a loss within the margin or that there is a loss.

    More questions reduce `error` and the part of `spread` that flips explain, but not the rest of it. None if no number
    of questions would be enough.
    """
    distance, lasting = max(delta + margin, -delta) / _both_quantiles(), spread.lasting / quantile(CONFIDENCE)
    lessened = error**2 + (spread.half / quantile(CONFIDENCE)) ** 2 - lasting**2
    return max(n + 1, math.ceil(n * lessened / (distance**2 - lasting**2))) if distance > lasting else None


def _both_quantiles() -> float:
    return quantile(CONFIDENCE) + NormalDist().inv_cdf(POWER)


def _exact_sign_flip(steps: NDArray[np.int64], observed: int) -> float:
    size = int(steps.sum())
    chance = np.zeros(2 * size + 1)  # chance[size + t]: probability of the signed sum t
    chance[size] = 1.0
    for step in steps:
        chance = 0.5 * (np.roll(chance, step) + np.roll(chance, -step))
    reached = np.abs(np.arange(-size, size + 1)) >= observed
    return min(1.0, float(chance[reached].sum()))


def _resampled(table: Table, binary: bool, iters: int, seed: int, level: float = _UPPER) -> tuple[Floats, float]:
    """Resampled means of differences, and the factor by which to stretch them.

    Binary scores get two pseudo-clusters, and so do differences that are equal in all clusters, which tell nothing
    about how much others would differ.
    """
    if binary or _is_constant(table):
        return bootstrap(_with_pseudo_clusters(table), iters, seed), 1.0
    return bootstrap(table, iters, seed), stretch(sum(count for _, _, count in table), level)


def _between(table: Table, draws: Floats, factor: float, level: float = _UPPER) -> Interval:
    """The mean of `table` plus and minus the distances of its resampled means' quantiles, times `factor`."""
    if math.isinf(factor):
        return -math.inf, math.inf
    low, high = (float(bound) for bound in np.quantile(draws, [1 - level, level]))
    if factor == 1:
        return low, high
    value = sum(total * count for total, _, count in table) / sum(size * count for _, size, count in table)
    return value - factor * (value - low), value + factor * (high - value)


def _is_constant(table: Table) -> bool:
    return len({round(total / size, 12) for total, size, _ in table}) == 1


def _with_pseudo_clusters(table: Table) -> Table:
    questions = sum(size * count for _, size, count in table)
    mean = questions / sum(count for _, _, count in table)
    return (*table, (-mean, mean, 1), (mean, mean, 1))


def _table(sums: Floats, sizes: Floats) -> Table:
    kinds = Counter(zip(sums.tolist(), sizes.tolist(), strict=True))
    return tuple((total, size, count) for (total, size), count in sorted(kinds.items()))


def _by_cluster(values: Floats, cluster: Sequence[str] | None) -> tuple[Floats, Floats]:
    if cluster is None:
        return values, np.ones(len(values))
    if len(cluster) != len(values):
        raise ValueError(f"{len(values)} scores but {len(cluster)} clusters")
    ids = np.unique(np.asarray(cluster), return_inverse=True)[1]
    return np.bincount(ids, values).astype(np.float64), np.bincount(ids).astype(np.float64)


def _pairwise_p(sums: Floats, runs: Sequence[Runs] | None = None) -> Floats:
    """The two-sided p of every pair of rows (scores summed by cluster), Holm-adjusted over all pairs; 1 for i = j."""
    runs = runs or [ONE] * len(sums)
    gram, totals = sums @ sums.T, sums.sum(axis=1)
    squares = np.add.outer(gram.diagonal(), gram.diagonal()) - 2 * gram  # sums of squared differences over clusters
    whole = bool(np.array_equal(sums, np.round(sums)))
    upper = np.triu_indices(len(sums), k=1)
    distance = np.maximum(np.abs(np.subtract.outer(totals, totals)) - whole, 0.0)[upper]
    variance = np.maximum(squares, 1e-12)[upper]
    ps = 2 * ndtr(-distance / np.sqrt(variance))
    wider = np.array([spread.half > 0 for spread in runs], dtype=bool)
    several = np.flatnonzero(wider[upper[0]] | wider[upper[1]])
    sides = [[runs[i] for i in side[several]] for side in upper]
    ps[several] = two_sided(distance[several], variance[several], sides)
    adjusted: Floats = np.ones((len(sums), len(sums)))
    adjusted[upper] = holm(ps.tolist())
    paired_p: Floats = np.minimum(adjusted, adjusted.T)
    return paired_p


def _floats(values: ArrayLike) -> Floats:
    floats = np.asarray(values, dtype=np.float64)
    if not np.isfinite(floats).all():
        raise ValueError("scores must be finite: a NaN would compare as no loss")
    return floats


def _is_binary(values: Floats) -> bool:
    return set(np.unique(values).tolist()) <= {0.0, 1.0}


def _chunks(rows: int, columns: int) -> Iterator[int]:
    most = max(1, _CHUNK // columns)
    for start in range(0, rows, most):
        yield min(most, rows - start)
