"""Mixed bit widths: the mean is met, the solver is exact on the convex hull, and both measures see the same parts."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

import compress
from compress import GPTQ, OWL, RTN, Calibration, PassManager, Quantized, RecipeError, Sensitivity, Wanda
from compress.artifact import Artifact
from compress.passes.budget import governed
from compress.passes.pruning.sensitivity import Part, spend

FEW = Calibration(samples=6, length=32)


def bits_of(found: dict[str, Any]) -> float:
    codes = [weight for weight in found.values() if isinstance(weight, Quantized)]
    return sum(w.bits * w.codes.numel() for w in codes) / sum(w.codes.numel() for w in codes)


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["kl", "gram"])
@pytest.mark.parametrize(("asked", "mean"), [(3, None), (4, 2.5), (2, 6.75)])
def test_the_mean_is_met(
    measure: Any, asked: int, mean: float | None, tiny_llama: Path, hugging_face: Any, ids: Tensor
) -> None:
    budget = Sensitivity(measure=measure, bits=mean)
    found = PassManager([budget, GPTQ(bits=asked, group=8)]).apply(hugging_face(tiny_llama), ids)
    got, want = bits_of(found), mean or asked
    assert want - 0.5 < got <= want  # a part holds at most 2 in 7 of the parameters; steps are whole bits of one
    assert len({weight.bits for weight in found.values()}) > 1 or want == 3  # random parts may all cost alike
    assert all(abs(weight.bits - want) <= 2 for weight in found.values())


def test_sites_that_read_one_input_get_the_same_bits(tiny_llama: Path, hugging_face: Any, ids: Tensor) -> None:
    found = PassManager([Sensitivity(), RTN(bits=3, group=8)]).apply(hugging_face(tiny_llama), ids)
    for block in range(2):
        for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({found[f"model.layers.{block}.{name}"].bits for name in names}) == 1


def test_the_solver_is_the_best_of_all_choices_within_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        parts = []
        for i in range(4):
            costs = (torch.rand(4, generator=generator) + 0.05).cumsum(0).exp() - 1  # convex enough; rises as bits fall
            parts.append(Part(sites=(str(i),), size=10, options=(5, 4, 3, 2), costs=tuple(sorted(costs.tolist()))))
        chosen = spend(parts, 3.0)
        spent = sum(int(c) for c in chosen)
        got = sum(p.costs[p.options.index(c)] for p, c in zip(parts, chosen, strict=True))
        same = [
            sum(p.costs[p.options.index(c)] for p, c in zip(parts, choice, strict=True))
            for choice in itertools.product((5, 4, 3, 2), repeat=4)
            if sum(choice) <= spent
        ]
        hull_gap = max(p.costs[-1] for p in parts)  # greedy is exact at the breakpoints of the hull
        assert min(same) <= got <= min(same) + hull_gap
        assert spent <= 12


def test_a_mean_at_the_quantizers_own_bits_is_never_worse_by_its_measure() -> None:
    parts = [
        Part(sites=("a",), size=10, options=(4, 3, 2), costs=(0.1, 0.2, 0.9)),
        Part(sites=("b",), size=10, options=(4, 3, 2), costs=(0.01, 0.02, 0.03)),
    ]
    assert spend(parts, 3.0) == [4, 2]  # 0.13 against 0.22


def test_what_the_last_step_cut_too_much_is_given_back() -> None:
    parts = [
        Part(sites=("large",), size=30, options=(4, 3, 2), costs=(0.0, 0.1, 9.0)),
        Part(sites=("small",), size=10, options=(4, 3, 2), costs=(0.0, 1.0, 3.0)),
    ]
    # cutting a bit of the large part costs least and cuts 10 parameter bits too much; the small one keeps its 4 bits
    assert spend(parts, 3.5) == [3, 4]
    # here the small one was cut first, and what the large one cut too much pays for having it back
    cheap = [Part(sites=("s",), size=10, options=(4, 3, 2), costs=(0.0, 0.01, 9.0)), parts[0]]
    assert spend(cheap, 3.5) == [4, 3]


@pytest.mark.slow
def test_both_measures_rank_the_parts_of_the_built_in_model_alike(tmp_path: Path) -> None:
    """The cheap measure against the true KL of rounding each part alone, 16 parts at three widths."""
    costs = {measure: costs_of(measure) for measure in ("kl", "gram")}
    assert spearmanr(costs["kl"], costs["gram"]).statistic > 0.6


def costs_of(measure: Any) -> list[float]:
    from compress.calibration import draw
    from compress.model.source import Checkpoint, dtype_of, locate
    from compress.model.walk import Walk
    from compress.model.whole import Whole
    from compress.passes.pruning import sensitivity
    from compress.plan import tokenizer_of

    folder = locate("builtin")
    source = Checkpoint(folder)
    walk = Walk(source.config, source, dtype_of(source.config), torch.device("cpu"))
    drawn = draw(Calibration(samples=16, length=128), tokenizer_of(folder), 256)
    seen: list[float] = []
    plain = sensitivity.spend
    sensitivity.spend = lambda parts, mean: (seen.extend(c for p in parts for c in p.costs), plain(parts, mean))[1]
    try:
        with torch.no_grad():
            Sensitivity(measure=measure).allocate(Whole(walk, drawn.windows, drawn.probe_NT[:2]), RTN(bits=3))
    finally:
        sensitivity.spend = plain
    return seen


@pytest.mark.slow
def test_mixed_bits_run_save_load_and_count(tiny_llama: Path, tmp_path: Path, ids: Tensor) -> None:
    report = compress.run(tiny_llama, [Sensitivity(bits=2.75), GPTQ(group=8)], tmp_path / "out", calibration=FEW)
    artifact = Artifact(report.out)
    names = {spec["name"] for spec in artifact.specs.values()}
    assert len(names) > 1
    assert compress.load(report.out)(ids).logits.isfinite().all()


def test_a_mean_of_bits_is_only_for_quantizers() -> None:
    with pytest.raises(RecipeError, match=r"passes\[0\]\.sensitivity\.bits: wanda follows and has no bits"):
        governed((Sensitivity(bits=3), Wanda()))


def test_a_sensitivity_governs_the_next_pruner_or_quantizer() -> None:
    steps = (Sensitivity(), Wanda(), Sensitivity(), GPTQ())
    assert governed(steps) == [(steps[0], 0), (steps[2], 1)]
    with pytest.raises(RecipeError, match="no pass follows whose sparsity or bits or removed"):
        governed((Wanda(), Sensitivity()))
    with pytest.raises(RecipeError, match="no pass follows whose sparsity"):
        governed((OWL(), GPTQ()))


@pytest.mark.parametrize("bits", [1.5, 8.5])
def test_a_mean_out_of_range_is_refused(bits: float) -> None:
    with pytest.raises(RecipeError, match=r"sensitivity\.bits"):
        Sensitivity(bits=bits)
