"""Budgets: parts get unequal sparsities, and the model as a whole gets the requested one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import compress
from compress import (
    OWL,
    RTN,
    Calibration,
    CalibrationError,
    Global,
    Masked,
    PassManager,
    Recipe,
    RecipeError,
    Sensitivity,
    SparseGPT,
    Wanda,
)
from compress.artifact import Artifact
from compress.model.divergence import mean_kl as kl
from compress.passes import Budget, Pass, Pruner
from compress.passes.budget import as_asked, centred, density, governed
from compress.passes.pruning import sensitivity
from compress.passes.pruning.owl import keep_by_outliers
from compress.passes.pruning.sensitivity import FINE, Part, cheapest_cut, curve, law, next_step, spend

SITES, BLOCKS = 14, 2
BUDGETS = (OWL(), Sensitivity())
every_budget = pytest.mark.parametrize("budget", BUDGETS, ids=lambda b: b.name)
FEW = Calibration(samples=6, length=32)
shares = st.lists(st.floats(0, 0.2), min_size=2, max_size=6)


def named(values: Sequence[Any]) -> dict[str, Any]:
    return {f"blocks.{i}": value for i, value in enumerate(values)}


def mean(keep: dict[str, float], sizes: dict[str, int]) -> float:
    return sum(keep[name] * sizes[name] for name in keep) / sum(sizes.values())


# -- arithmetic ------------------------------------------------------------------------------------


@given(found=shares, asked=st.floats(0.05, 0.95), spread=st.floats(0, 0.5), seed=st.integers(0, 999))
def test_owl_keeps_the_mean_over_parameters(found: list[float], asked: float, spread: float, seed: int) -> None:
    draw = torch.randint(1, 10_000, (len(found),), generator=torch.Generator().manual_seed(seed))
    sizes = named(draw.tolist())
    keep = keep_by_outliers(named(found), sizes, asked, spread)
    assert mean(keep, sizes) == pytest.approx(asked, abs=1e-9)
    assert all(0.01 <= share <= 1 for share in keep.values())


@given(found=shares, spread=st.floats(0, 0.2))
def test_owl_stays_within_twice_its_spread(found: list[float], spread: float) -> None:
    keep = keep_by_outliers(named(found), named([7] * len(found)), 0.5, spread)
    assert all(abs(share - 0.5) <= 2 * spread + 1e-9 for share in keep.values())


@given(found=shares)
def test_more_outliers_keep_more(found: list[float]) -> None:
    keep = keep_by_outliers(named(found), named([7] * len(found)), 0.5, 0.08)
    ranked = [keep[name] for name in sorted(keep, key=lambda name: found[int(name[7:])])]
    assert ranked == sorted(ranked)


def test_owl_is_that_of_its_formula() -> None:
    """Section 15: D stretched to [0, 2 spread], keep = 1 - s + D - mean D; D = 0, 0.08, 0.16 here."""
    keep = keep_by_outliers(named([0.01, 0.02, 0.03]), named([5, 5, 5]), 0.4, 0.08)
    assert list(keep.values()) == pytest.approx([0.32, 0.40, 0.48])


def test_a_larger_block_moves_the_others() -> None:
    """D = 0, 0.16 with weights 3 and 1: their mean is 0.04."""
    keep = keep_by_outliers(named([0.01, 0.03]), named([300, 100]), 0.4, 0.08)
    assert list(keep.values()) == pytest.approx([0.36, 0.52])


@given(found=shares)
def test_no_spread_is_uniform(found: list[float]) -> None:
    keep = keep_by_outliers(named(found), named(range(1, len(found) + 1)), 0.3, 0.0)
    assert list(keep.values()) == pytest.approx([0.3] * len(found), abs=1e-9)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_blocks_with_equal_outliers_are_uniform(count: int) -> None:
    keep = keep_by_outliers(named([0.02] * count), named(range(1, count + 1)), 0.3, 0.08)
    assert list(keep.values()) == [0.3] * count


def test_a_block_at_its_bound_gives_the_rest_to_others() -> None:
    """Means of 0.9 with D = -0.2, 0.2: the second stops at 1, so the first gets 0.8 for the mean of 0.9."""
    keep = keep_by_outliers(named([0.01, 0.03]), named([5, 5]), 0.9, 0.2)
    assert list(keep.values()) == pytest.approx([0.8, 1.0], abs=1e-9)


@given(keep=st.lists(st.floats(-1, 1.5), min_size=1, max_size=6), asked=st.floats(0.02, 0.99))
def test_centring_keeps_differences_where_nothing_is_clamped(keep: list[float], asked: float) -> None:
    moved = centred(keep, [3] * len(keep), asked)
    free = [m - k for m, k in zip(moved, keep, strict=True) if 0.01 < m < 1]
    assert sum(moved) / len(moved) == pytest.approx(asked, abs=1e-9)
    assert free == pytest.approx([max(free, default=0)] * len(free), abs=1e-9)


@pytest.mark.parametrize(("sparsity", "share"), [(0.3, 0.7), (0.0, 1.0), ("2:4", 0.5), ("1:4", 0.25), ("5:8", 0.625)])
def test_density_is_the_share_kept(sparsity: float | str, share: float) -> None:
    assert density(sparsity) == pytest.approx(share)


def test_fractions_are_given_as_fractions() -> None:
    assert as_asked(0.5, named([0.25, 0.4]), named([1, 1])) == named([0.75, 0.6])


@given(
    keep=st.lists(st.floats(0.01, 1), min_size=1, max_size=6),
    sizes=st.lists(st.integers(1, 1000), min_size=6, max_size=6),
    m=st.sampled_from([2, 4, 8]),
)
def test_whole_n_keep_the_mean_within_one_part(keep: list[float], sizes: list[int], m: int) -> None:
    """The mean that was asked for, or the nearest that n from 1 to m - 1 can have."""
    sizes = sizes[: len(keep)]
    given_n = [int(str(s).split(":")[0]) for s in as_asked(f"1:{m}", named(keep), named(sizes)).values()]
    mean = sum(k * s for k, s in zip(keep, sizes, strict=True)) / sum(sizes)
    assert all(1 <= n <= m - 1 for n in given_n)
    wanted = m * min((m - 1) / m, max(1 / m, mean)) * sum(sizes)
    assert abs(sum(n * s for n, s in zip(given_n, sizes, strict=True)) - wanted) <= max(sizes) + 1e-6 * wanted


@pytest.mark.parametrize(("sparsity", "share"), [("1:4", 0.25), ("3:4", 0.75), ("1:8", 0.125)])
def test_the_ends_of_n_to_m_keep_their_mean(sparsity: str, share: float) -> None:
    given = as_asked(sparsity, named([share - 0.08, share + 0.08]), named([5, 5]))
    assert [density(s) for s in given.values()] == pytest.approx([share, share])


def test_the_largest_remainder_is_rounded_up_first() -> None:
    """2.4, 2.3 and 1.3 of 4 make 6: one of the three is rounded up."""
    assert as_asked("2:4", named([0.6, 0.575, 0.325]), named([9, 9, 9])) == named(["3:4", "2:4", "1:4"])


def test_what_is_whole_already_stays() -> None:
    assert as_asked("2:4", named([0.25, 0.5, 0.75]), named([1, 10, 100])) == named(["1:4", "2:4", "3:4"])


# -- spending --------------------------------------------------------------------------------------

OPTIONS = ("3:4", "2:4", "1:4")


def parts(costs: Sequence[Sequence[float]], sizes: Sequence[int]) -> list[Part]:
    return [
        Part(sites=(f"s{i}",), size=size, options=OPTIONS, costs=tuple(cost))
        for i, (cost, size) in enumerate(zip(costs, sizes, strict=True))
    ]


def kept_and_cost(chosen: Sequence[Any], found: Sequence[Part]) -> tuple[float, float]:
    kept = sum(p.size * density(c) for c, p in zip(chosen, found, strict=True)) / sum(p.size for p in found)
    return kept, sum(p.costs[p.options.index(c)] for c, p in zip(chosen, found, strict=True))


@pytest.mark.parametrize("keep", [0.25, 0.4, 0.6])
@settings(max_examples=30)
@given(
    costs=st.lists(st.lists(st.floats(1e-6, 1), min_size=3, max_size=3), min_size=1, max_size=5),
    sizes=st.lists(st.integers(1, 100), min_size=5, max_size=5),
)
def test_no_other_choice_that_keeps_as_little_costs_less(
    keep: float, costs: list[list[float]], sizes: list[int], naive: ModuleType
) -> None:
    """On rising curves, convex or not: what is chosen is the cheapest of all that cut as much."""
    found = parts([sorted(cost) for cost in costs], sizes[: len(costs)])
    kept, cost = kept_and_cost(cheapest_cut(found, keep), found)
    final_kept, final_cost = kept_and_cost(spend(found, keep), found)
    assert kept <= final_kept <= keep + 1e-6
    assert final_cost <= cost
    shares_of = [[density(option) for option in OPTIONS]] * len(found)
    least = naive.cheapest([list(p.costs) for p in found], shares_of, [p.size for p in found], kept)
    assert kept <= keep + 1e-6
    assert cost == pytest.approx(least, rel=1e-9)


def test_n_of_m_cuts_at_most_one_step_too_much() -> None:
    found = parts([[0.0, 0.1, 0.3], [0.0, 0.2, 0.5], [0.0, 0.01, 0.4]], [100, 100, 100])
    kept, _ = kept_and_cost(spend(found, 0.55), found)
    assert 0.55 - 0.25 / 3 <= kept <= 0.55


def test_the_cheapest_step_comes_first() -> None:
    """Slopes for each parameter: 0.1 / 25 and 0.3 / 100; the larger part is cut though it costs more."""
    found = parts([[0.0, 0.1, 1.0], [0.0, 0.3, 1.0]], [100, 400])
    assert spend(found, 0.75 - 0.25 * 400 / 500) == ["3:4", "2:4"]


def test_a_step_may_pass_over_an_expensive_option() -> None:
    """The middle of the first curve lies above its hull: 0.9 of 1.0 for half of the cut."""
    found = parts([[0.0, 0.9, 1.0], [0.0, 0.6, 1.3]], [100, 100])
    assert spend(found, 0.5) == ["1:4", "3:4"]


def test_nothing_to_spend_leaves_all_as_dense_as_may_be() -> None:
    found = parts([[0.0, 0.1, 1.0]] * 2, [3, 5])
    assert spend(found, 0.75) == ["3:4", "3:4"]


def test_more_than_there_is_ends_at_the_last_option() -> None:
    found = parts([[0.0, 0.1, 1.0]] * 2, [3, 5])
    assert spend(found, 0.1) == ["1:4", "1:4"]


MEASURED = (0.3, 0.5, 0.7)


def test_curves_of_fractions_are_straight_in_the_logarithm() -> None:
    part = curve(("s",), 10, MEASURED, [1e-4, 1e-2, 1e-1])
    assert len(part.options) == 2 * FINE + 1
    assert part.options[0] == 0.3
    assert part.options[-1] == 0.7
    assert [part.costs[i] for i in (0, FINE, 2 * FINE)] == pytest.approx([1e-4, 1e-2, 1e-1])
    assert part.costs[FINE // 2] == pytest.approx(1e-3)  # the geometric mean half way
    assert list(part.options) == sorted(part.options)


@given(
    logs=st.lists(st.lists(st.floats(-12, 0), min_size=3, max_size=3), min_size=1, max_size=6),
    sizes=st.lists(st.integers(1, 5000), min_size=6, max_size=6),
    asked=st.floats(0.31, 0.69),
)
def test_fractions_meet_the_mean_to_the_four_digits_they_are_given_in(
    logs: list[list[float]], sizes: list[int], asked: float
) -> None:
    found = [
        curve((f"s{i}",), size, MEASURED, [math.exp(x) for x in sorted(log)])
        for i, (log, size) in enumerate(zip(logs, sizes, strict=False))
    ]
    chosen = spend(found, 1 - asked)
    total = sum(p.size for p in found)
    assert sum(p.size * float(s) for s, p in zip(chosen, found, strict=True)) / total == pytest.approx(asked, abs=6e-5)
    assert all(MEASURED[0] <= float(s) <= MEASURED[-1] for s in chosen)


@pytest.mark.parametrize("ratio", [1.0, 2.0, 4.0, 8.0])
def test_marginal_costs_end_equal(ratio: float) -> None:
    """Costs exp(a s) and r exp(a s), equal sizes: their slopes are equal where the sparsities differ by ln(r) / a."""
    slope = 20.0
    costs = [[scale * math.exp(slope * s) for s in MEASURED] for scale in (1.0, ratio)]
    found = [curve((f"s{i}",), 10, MEASURED, cost) for i, cost in enumerate(costs)]
    one, other = (float(s) for s in spend(found, 0.5))
    step = (MEASURED[1] - MEASURED[0]) / FINE
    assert one - other == pytest.approx(math.log(ratio) / slope, abs=2 * step)
    assert one + other == pytest.approx(1.0, abs=6e-5)


def test_a_step_looks_at_no_part_but_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Part] = []
    monkeypatch.setattr(sensitivity, "next_step", lambda part, at: looked.append(part) or next_step(part, at))
    parts = [curve((f"{i}",), 100 + i, (0.3, 0.5, 0.7), [1.0, 2.0 + i / 40, 9.0]) for i in range(40)]
    spend(parts, 0.5)
    assert len(looked) <= len(parts) * (1 + 2 * FINE)


@pytest.mark.parametrize("bits", [0.5, 1.0, 2.0])
def test_the_bits_of_codecs_follow_a_power_law(bits: float) -> None:
    """Of costs c b**-p, what spends least gives each part bits in proportion to c**(1 / (p + 1))."""
    tried = tuple(1 - b / 16 for b in (1.0, 0.5, 0.25))
    scales, power = {"a": 1e-3, "b": 4e-3, "c": 2e-3}, 2.5
    parts = [law((name,), 4096, tried, [c * b**-power for b in (1.0, 0.5, 0.25)], bits) for name, c in scales.items()]
    for part, c in zip(parts, scales.values(), strict=True):
        assert part.costs == pytest.approx([c * (16 * (1 - float(o))) ** -power for o in part.options], rel=1e-2)
    given = [16 * (1 - float(option)) for option in spend(parts, bits / 16)]
    shares = [c ** (1 / (power + 1)) for c in scales.values()]
    assert given == pytest.approx([3 * bits * share / sum(shares) for share in shares], rel=0.05)
    assert sum(given) / 3 == pytest.approx(bits, rel=2e-3)


def test_kl_is_that_of_its_definition() -> None:
    logits = [torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(i)).double() for i in range(2)]
    p, q = (x.softmax(-1) for x in logits)
    want = float((p * (p / q).log()).sum(-1).mean())
    assert kl(*logits) == pytest.approx(want, rel=1e-5)
    assert kl(logits[0], logits[0]) == pytest.approx(0, abs=1e-7)


# -- who governs whom ------------------------------------------------------------------------------


def test_a_budget_governs_the_next_pruner() -> None:
    steps = (OWL(), RTN(group=8), Wanda(sites="*q_proj"), Sensitivity(), SparseGPT(sites="*down_proj"))
    assert governed(steps) == [(steps[0], 1), (steps[3], 2)]


def test_without_budgets_nothing_is_governed() -> None:
    assert governed((Wanda(), RTN(group=8))) == []


@pytest.mark.parametrize("steps", [(Wanda(), OWL()), (OWL(), RTN(group=8)), (OWL(),)], ids=str)
def test_a_budget_needs_a_pruner_after_it(steps: tuple[Pass, ...]) -> None:
    with pytest.raises(RecipeError, match=r"passes\[\d\]\.owl: no pass follows whose sparsity it could set"):
        governed(steps)


def test_a_pruner_has_one_budget() -> None:
    with pytest.raises(RecipeError, match=r"passes\[1\]\.sensitivity: passes\[2\]\.wanda has a budget already"):
        governed((OWL(), Sensitivity(), Wanda()))


@pytest.mark.parametrize(("kind", "spread"), [(OWL, -0.1), (OWL, 0.6), (Sensitivity, 0.0), (Sensitivity, 0.6)])
def test_spreads_out_of_range_are_refused(kind: type[OWL | Sensitivity], spread: float) -> None:
    with pytest.raises(RecipeError, match=rf"{kind.name}\.spread"):
        kind(spread=spread)


# -- whole runs ------------------------------------------------------------------------------------

RUNS: tuple[tuple[Budget, Pruner], ...] = (
    (OWL(), Wanda(sparsity=0.6, scope="matrix")),
    (Sensitivity(), Wanda(sparsity=0.6, scope="matrix")),
    (OWL(spread=0.2), Wanda(sparsity="4:8")),
    (Sensitivity(), Wanda(sparsity="4:8")),
)
Ran = Callable[[Budget, Pruner], Artifact]
every_run = pytest.mark.parametrize(("budget", "step"), RUNS, ids=str)


@pytest.fixture(scope="module")
def ran(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """`ran(budget, pruner)`: the artifact of that recipe."""
    made: dict[str, Artifact] = {}

    def make(budget: Budget, step: Pruner) -> Artifact:
        key = f"{budget} {step}"
        if key not in made:
            out = tmp_path_factory.mktemp("budget") / "out"
            compress.run(tiny_llama, Recipe(passes=(budget, step), calibration=FEW), out)
            made[key] = Artifact(out)
        return made[key]

    return make


def masks(artifact: Artifact) -> dict[str, Tensor]:
    found = {site: artifact.expression(site) for site in artifact.specs}
    return {site: weight.mask_OI for site, weight in found.items() if isinstance(weight, Masked)}


def cut(found: dict[str, Tensor]) -> float:
    return 1 - sum(int(m.sum()) for m in found.values()) / sum(m.numel() for m in found.values())


@pytest.mark.parametrize(("budget", "step"), RUNS[:2], ids=str)
def test_the_model_gets_the_sparsity_that_was_asked_for(budget: Budget, step: Pruner, ran: Ran) -> None:
    found = masks(ran(budget, step))
    assert len(found) == SITES
    assert cut(found) == pytest.approx(0.6, abs=0.002)
    each = {round(cut({site: mask}), 3) for site, mask in found.items()}
    assert len(each) > 1


@pytest.mark.slow
@every_budget
def test_rows_round_to_whole_inputs_and_no_further(budget: Budget, ran: Ran) -> None:
    """A row of 48 can only lose whole inputs, so every site may be half of one off what the budget gave it."""
    assert cut(masks(ran(budget, Wanda(sparsity=0.6)))) == pytest.approx(0.6, abs=0.5 / 48)


@pytest.mark.parametrize(("budget", "step"), RUNS[2:], ids=str)
def test_groups_are_n_of_m_with_the_mean_that_was_asked_for(budget: Budget, step: Pruner, ran: Ran) -> None:
    """One n for each site; a part of the model too much at most: a gate and up of 2 x 72 x 48, an eighth of which."""
    found = masks(ran(budget, step))
    kept = {site: mask.unflatten(1, (-1, 8)).sum(2).unique().tolist() for site, mask in found.items()}
    assert all(len(n) == 1 for n in kept.values())
    assert len({n[0] for n in kept.values()}) > 1
    largest = 1 / BLOCKS if isinstance(budget, OWL) else 2 * 72 * 48 / sum(m.numel() for m in found.values())
    assert cut(found) == pytest.approx(0.5, abs=largest / 8)


@every_run
def test_the_ledger_tells_what_masks_keep(budget: Budget, step: Pruner, ran: Ran) -> None:
    artifact = ran(budget, step)
    for site, mask in masks(artifact).items():
        rows = mask.sum(1)
        assert artifact.provenance["sites"][site]["mask"] == {
            "kept": pytest.approx(float(mask.double().mean())),
            "row": [int(rows.min()), int(rows.max())],
            "empty_rows": int((~mask.any(1)).sum()),
            "empty_inputs": int((~mask.any(0)).sum()),
        }


def test_owl_gives_all_sites_of_a_block_one_sparsity(ran: Ran) -> None:
    found = masks(ran(*RUNS[0]))
    blocks = [{round(cut({s: m}), 3) for s, m in found.items() if f"layers.{i}." in s} for i in range(BLOCKS)]
    assert [len(block) for block in blocks] == [1, 1]
    assert blocks[0] != blocks[1]


def test_two_blocks_of_owl_lie_its_spread_from_the_mean(ran: Ran) -> None:
    """Of two equal blocks one has the most outliers and one the fewest: D = 0 and 2 spread, centred."""
    found = masks(ran(*RUNS[0]))
    ends = sorted({round(cut({s: m}), 3) for s, m in found.items()})
    assert ends == pytest.approx([0.52, 0.68], abs=0.001)


@pytest.mark.parametrize("spread", [0.05, 0.2])
def test_sensitivity_gives_no_site_more_than_its_spread(spread: float, ran: Ran) -> None:
    found = masks(ran(Sensitivity(spread=spread), Wanda(sparsity=0.6, scope="matrix")))
    ends = [cut({site: mask}) for site, mask in found.items()]
    assert min(ends) >= 0.6 - spread - 1e-3
    assert max(ends) <= 0.6 + spread + 1e-3


def test_sensitivity_gives_sites_that_read_one_input_one_sparsity(ran: Ran) -> None:
    found = masks(ran(*RUNS[1]))
    for i in range(BLOCKS):
        for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            together = [m for s, m in found.items() if f"layers.{i}." in s and s.endswith(names)]
            assert len({round(cut({"": mask}), 3) for mask in together}) == 1


@pytest.mark.slow
@every_run
def test_a_second_run_gives_the_same_masks(
    budget: Budget, step: Pruner, ran: Ran, tiny_llama: Path, tmp_path: Path
) -> None:
    compress.run(tiny_llama, Recipe(passes=(budget, step), calibration=FEW), tmp_path / "again")
    first, second = masks(ran(budget, step)), masks(Artifact(tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[site], second[site]) for site in first)


def test_sensitivity_costs_less_kl_than_the_same_for_all(tiny_llama: Path, ran: Ran, tmp_path: Path) -> None:
    uniform = compress.run(tiny_llama, Recipe(passes=(RUNS[1][1],), calibration=FEW), tmp_path / "uniform")
    assert ran(*RUNS[1]).provenance["probe"]["kl"] < uniform.kl


# -- in memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda b: b.name)
def test_a_model_in_memory_is_given_a_budget_too(
    budget: Budget, tiny_llama: Path, hugging_face: Callable[[Path], Any], ids: Tensor
) -> None:
    model = hugging_face(tiny_llama)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = PassManager([budget, Wanda(sparsity=0.6, scope="matrix")]).apply(model, ids)
    assert cut({name: weight.mask_OI for name, weight in found.items() if isinstance(weight, Masked)}) == (
        pytest.approx(0.6, abs=0.002)
    )
    for name, value in model.state_dict().items():  # what was measured on the way left nothing behind
        assert bool(((value == before[name]) | (value == 0)).all())


@every_budget
def test_only_what_the_pruner_selects_is_budgeted(
    budget: Budget, tiny_llama: Path, hugging_face: Callable[[Path], Any], ids: Tensor
) -> None:
    step = Wanda(sparsity=0.6, scope="matrix", sites="*.mlp.*")
    manager = PassManager([budget, step])
    found = manager.apply(hugging_face(tiny_llama), ids)
    assert set(manager.budgets[0]) == set(found)
    assert len(found) == 3 * BLOCKS
    assert cut({name: weight.mask_OI for name, weight in found.items() if isinstance(weight, Masked)}) == (
        pytest.approx(0.6, abs=0.002)
    )


def test_sensitivity_measures_with_the_very_pruner(
    tiny_llama: Path, hugging_face: Callable[[Path], Any], ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each site at three sparsities, the outer two a spread away; the last rewrite is the run's own."""
    tried: dict[str, list[Any]] = {}
    plain = Wanda.rewrite

    def recorded(step: Wanda, site: Any) -> Any:
        tried.setdefault(site.name, []).append(step.sparsity)
        return plain(step, site)

    monkeypatch.setattr(Wanda, "rewrite", recorded)
    manager = PassManager([Sensitivity(spread=0.1), Wanda(sparsity=0.6)])
    manager.apply(hugging_face(tiny_llama), ids)
    assert len(tried) == SITES
    assert all(seen[:3] == [0.5, 0.6, 0.7] for seen in tried.values())
    assert {name: seen[3:] for name, seen in tried.items()} == {n: [s] for n, s in manager.budgets[0].items()}


@pytest.mark.parametrize("sparsity", [0.0, 0.005, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("spread", [0.01, 0.5])
def test_sensitivity_tries_rising_sparsities_around_any_mean(sparsity: float, spread: float) -> None:
    tried = [float(s) for s in Sensitivity(spread=spread).options_for(Wanda(sparsity=sparsity))]
    assert tried == sorted(set(tried))
    assert sparsity in tried
    assert tried[0] >= 0
    assert tried[-1] <= 1


def test_a_spread_too_small_to_measure_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"sensitivity\.spread: 0\.001 is not allowed"):
        Sensitivity(spread=0.001)


def test_owl_over_no_site_gives_nothing() -> None:
    assert keep_by_outliers({}, {}, 0.5, 0.08) == {}


def test_running_blocks_without_the_budgets_found_is_refused(tiny_llama: Path, walk_of: Any, ids: Tensor) -> None:
    walk = walk_of(tiny_llama)
    with pytest.raises(RecipeError, match="budgets: pass the result of `allocations`"):
        next(iter(PassManager([OWL(), Wanda()]).run(walk.visit([walk.enter(ids)], walk.enter(ids[:1])))))


def test_given_budgets_are_not_looked_for_again(tiny_llama: Path, hugging_face: Any, ids: Tensor) -> None:
    name = "model.layers.0.self_attn.q_proj"
    found = PassManager([OWL(), Wanda()], budgets={0: {name: 0.75}}).apply(hugging_face(tiny_llama), ids)
    assert found[name].describe() == "75%"
    assert found["model.layers.0.self_attn.k_proj"].describe() == "50%"


@pytest.mark.parametrize("budget", [OWL(), Sensitivity(), Global()], ids=lambda b: b.name)
def test_a_budget_measures_only_what_its_pruner_selects(
    budget: Any, tiny_llama: Path, hugging_face: Any, ids: Tensor
) -> None:
    model = hugging_face(tiny_llama)
    model.model.layers[0].mlp.spare = torch.nn.Linear(48, 48, bias=False)  # never called
    found = PassManager([budget, Wanda(sites="*self_attn*")]).apply(model, ids)
    assert {name.split(".")[3] for name in found} == {"self_attn"}


def test_a_part_that_ruins_the_model_is_named(tiny_llama: Path, hugging_face: Any, ids: Tensor) -> None:
    model = hugging_face(tiny_llama)
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    with pytest.raises(
        CalibrationError, match=r"sensitivity: rewriting model\.layers\.0\.self_attn\.q_proj alone makes"
    ):
        PassManager([Sensitivity(), Wanda()]).apply(model, ids)


def test_shapes_are_checked_before_a_budget_measures(tiny_llama: Path, hugging_face: Any, ids: Tensor) -> None:
    with pytest.raises(RecipeError, match=r"wanda: model\.layers\.0\.self_attn\.q_proj: 5:7 needs a width"):
        PassManager([Sensitivity(), Wanda(sparsity="5:7")]).apply(hugging_face(tiny_llama), ids)


def test_fractions_measured_close_together_are_one_step() -> None:
    part = curve(("s",), 10, (0.9995, 0.9996, 0.9997), [1e-4, 1e-2, 1e-1])
    assert len(set(part.options)) < len(part.options)
    for at in range(len(part.options)):
        _, reached = next_step(part, at)
        assert reached == 0 or part.options[reached] != part.options[at]
