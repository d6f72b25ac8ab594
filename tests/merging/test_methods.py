"""Merging methods: identities, independence of order, and a reference that treats whole models as one vector."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.merging import METHODS, merge
from compress.merging import method as machinery
from compress.merging.della import Della
from compress.merging.method import Change
from compress.merging.threshold import level

Tensors = dict[str, Tensor]
Odd = Callable[[str], Path]
Read = Callable[[Path], Tensors]
Same = Callable[[Tensors, Tensors], bool]
WHOLE: dict[str, dict[str, Any]] = {  # options under which a model merged alone must be itself
    "average": {}, "breadcrumbs": {"density": 1, "gamma": 0}, "dare-linear": {"density": 1},
    "dare-ties": {"density": 1}, "della": {"density": 1, "epsilon": 0}, "task-arithmetic": {}, "ties": {"density": 1},
}  # fmt: skip
STREAMED = sorted(WHOLE)


def change(base: Tensor, own: Tensor) -> Tensor:
    return own.double() - base.double()


def vectors(folder: Path, base: Path, read: Read) -> Tensor:
    """What a model changed, all floating-point tensors end to end, in the order of their names."""
    mine, theirs = read(folder), read(base)
    return torch.cat([change(theirs[n], mine[n]).flatten() for n in sorted(mine) if mine[n].is_floating_point()])


def expected(base: Path, moved: Tensor, read: Read) -> Tensors:
    """The base with a change of everything added, rounded once."""
    made, start = {}, 0
    for name, tensor in sorted(read(base).items()):
        size = tensor.numel() if tensor.is_floating_point() else 0
        part = moved[start : start + size].view(tensor.shape) if size else 0
        made[name] = (tensor.double() + part).to(tensor.dtype)
        start += size
    return made


def test_every_method_is_tested_here() -> None:
    assert set(METHODS) == {*STREAMED, "regmean"}


# -- identities ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", STREAMED)
def test_one_model_whole_is_itself_bit_for_bit(method: str, odd: Odd, read: Read, same: Same, tmp_path: Path) -> None:
    merge(odd("base"), [odd("a")], tmp_path / "o", method=method, **WHOLE[method])
    assert same(read(tmp_path / "o"), read(odd("a")))


def test_regmean_of_one_model_is_itself(
    tiny_llama: Path, tuned_llamas: dict[str, Path], read: Read, same: Same, tmp_path: Path
) -> None:
    from compress import Calibration

    calibration = Calibration(data="text", samples=2, length=16)
    merge(tiny_llama, [tuned_llamas["left"]], tmp_path / "o", method="regmean", calibration=calibration)
    assert same(read(tmp_path / "o"), read(tuned_llamas["left"]))


@pytest.mark.parametrize("method", STREAMED)
def test_values_that_a_difference_cannot_hold_come_back(
    method: str, changed: Callable[..., Path], read: Read, same: Same, tmp_path: Path
) -> None:
    """1 + (1e-30 - 1) is 0 even in float64, and -0 + 0 is +0."""
    base = changed({"norm.weight": torch.ones(33), "scalar": torch.tensor(-0.0)}, "base", name="b")
    tuned = changed({"norm.weight": torch.full((33,), 1e-30), "scalar": torch.tensor(-0.0)}, name="t")
    merge(base, [tuned], tmp_path / "o", method=method, **WHOLE[method])
    assert same(read(tmp_path / "o"), read(tuned))


@pytest.mark.slow
@pytest.mark.parametrize("method", STREAMED)
@pytest.mark.parametrize("options", [{}, {"weights": {"a": 0.3, "b": 0.7, "c": 1.1}}], ids=["equal", "weighted"])
def test_neither_order_nor_shards_change_a_bit(
    options: dict[str, Any], method: str, odd: Odd, read: Read, same: Same, tmp_path: Path
) -> None:
    orders = ("abc", "cab", "bca")
    for order in orders:
        shard_size = 1 << (10 if order == "cab" else 30)
        folders = [odd(name) for name in order]
        merge(odd("base"), folders, tmp_path / order, method=method, shard_size=shard_size, **options)
    made = [read(tmp_path / order) for order in orders]
    assert same(made[0], made[1])
    assert same(made[0], made[2])


def test_names_do_not_change_what_is_drawn(odd: Odd, read: Read, same: Same, tmp_path: Path) -> None:
    merge(odd("base"), [odd("a"), odd("b")], tmp_path / "x", method="dare-linear")
    merge(odd("base"), {"q": odd("b"), "p": odd("a")}, tmp_path / "y", method="dare-linear")
    merge(odd("base"), [odd("a"), odd("b")], tmp_path / "z", method="dare-linear", seed=1)
    assert same(read(tmp_path / "x"), read(tmp_path / "y"))
    assert not same(read(tmp_path / "x"), read(tmp_path / "z"))


@pytest.mark.parametrize("method", STREAMED)
def test_parts_of_a_tensor_do_not_show(
    method: str, odd: Odd, read: Read, same: Same, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [odd("a"), odd("b")]
    merge(odd("base"), models, tmp_path / "whole", method=method)
    monkeypatch.setattr(machinery, "AT_ONCE", 150)
    merge(odd("base"), models, tmp_path / "parts", method=method)
    assert same(read(tmp_path / "whole"), read(tmp_path / "parts"))


# -- sums ------------------------------------------------------------------------------------------


def test_task_arithmetic_is_the_weighted_sum(odd: Odd, read: Read, same: Same, tmp_path: Path) -> None:
    a, b = (vectors(odd(name), odd("base"), read) for name in "ab")
    merge(odd("base"), [odd("a"), odd("b")], tmp_path / "o", weights={"a": 0.5, "b": -2}, scale=0.25)
    assert same(read(tmp_path / "o"), expected(odd("base"), 0.25 * (0.5 * a - 2 * b), read))


def test_an_average_is_the_mean_of_the_models(odd: Odd, read: Read, same: Same, tmp_path: Path) -> None:
    merge(odd("base"), [odd(name) for name in "abc"], tmp_path / "o", method="average", weights={"c": 2})
    a, b, c = (read(odd(name)) for name in "abc")
    want = {n: ((a[n].double() + b[n].double() + 2 * c[n].double()) / 4).to(a[n].dtype) for n in a}
    got = read(tmp_path / "o")
    for name in want:  # a mean of models and a base with a mean of changes differ by float64's rounding
        torch.testing.assert_close(got[name], want[name], rtol=1e-6 if a[name].dtype == torch.float32 else 0, atol=0)


def test_weights_by_glob_count_from_the_last(odd: Odd, read: Read, same: Same, tmp_path: Path) -> None:
    weights = {"a": {"*": 0, "layers.*": 1, "layers.1.*": 0.5}, "b": 0}
    merge(odd("base"), [odd("a"), odd("b")], tmp_path / "o", weights=weights)
    base, a, made = read(odd("base")), read(odd("a")), read(tmp_path / "o")
    half = base["layers.1.up.weight"].double() + 0.5 * change(base["layers.1.up.weight"], a["layers.1.up.weight"])
    assert torch.equal(made["embed.weight"], base["embed.weight"])
    assert torch.equal(made["layers.0.up.weight"], a["layers.0.up.weight"])
    assert torch.equal(made["layers.1.up.weight"], half.float())


# -- TIES ------------------------------------------------------------------------------------------


def trimmed(change_N: Tensor, kept: int) -> Tensor:
    """Everything at least as large as the `kept`-th largest."""
    least = change_N.abs().float().sort(descending=True).values[kept - 1]
    return torch.where(change_N.abs().float() >= least, change_N, 0)


def disjoint_mean(changes: list[Tensor], weights: list[float]) -> Tensor:
    """TIES' steps 2 and 3, an entry at a time."""
    out = torch.zeros_like(changes[0])
    for i in range(len(out)):
        here = [(w, float(c[i])) for w, c in zip(weights, changes, strict=True)]
        sign = 1 if sum(w * c for w, c in here) >= 0 else -1
        agree = [(w, c) for w, c in here if c * sign > 0]
        out[i] = sum(w * c for w, c in agree) / sum(w for w, _ in agree) if agree else 0
    return out


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("density", [0.03, 0.4, 0.9])
def test_ties_is_its_specification(
    density: float, scope: str, odd: Odd, read: Read, tmp_path: Path, assert_close: Any
) -> None:
    changes = [vectors(odd(name), odd("base"), read) for name in "abc"]
    sizes = [t.numel() for _, t in sorted(read(odd("base")).items()) if t.is_floating_point()]
    pieces = sizes if scope == "tensor" else [sum(sizes)]
    thin = [torch.cat([trimmed(p, max(1, round(density * len(p)))) for p in c.split(pieces)]) for c in changes]
    want = expected(odd("base"), 0.7 * disjoint_mean(thin, [1.0, 0.5, 2.0]), read)
    merge(
        odd("base"), [odd(name) for name in "abc"], tmp_path / "o", method="ties", scope=scope, density=density,
        scale=0.7, weights={"b": 0.5, "c": 2},
    )  # fmt: skip
    got = read(tmp_path / "o")
    for name in want:
        ulp = 0 if got[name].dtype == torch.int64 else torch.finfo(got[name].dtype).eps
        torch.testing.assert_close(got[name], want[name], rtol=ulp, atol=0)  # of a sum in another order


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_ties_of_equal_models_is_the_trimmed_model(
    count: int, scope: str, odd: Odd, read: Read, same: Same, tmp_path: Path
) -> None:
    options = {"method": "ties", "scope": scope, "density": 0.3}
    merge(odd("base"), [odd("a")], tmp_path / "one", **options)
    merge(odd("base"), {f"m{i}": odd("a") for i in range(count)}, tmp_path / "many", **options)
    assert same(read(tmp_path / "one"), read(tmp_path / "many"))
    assert not same(read(tmp_path / "one"), read(odd("a")))


def test_opposite_changes_do_not_cancel(changed: Callable[..., Path], read: Read, tmp_path: Path) -> None:
    """Two say +1, one says -5: the sum elects the one, and only it counts; where two oppose one, they outvote it."""
    base = changed({"norm.weight": torch.zeros(33)}, "base", name="b")
    steps = {"x": (1.0, 1.0), "y": (1.0, 1.0), "z": (-5.0, -1.0)}
    models = {}
    for name, (first, second) in steps.items():
        tensor = torch.zeros(33)
        tensor[0], tensor[1] = first, second
        models[name] = changed({"norm.weight": tensor}, "base", name=name)
    merge(base, models, tmp_path / "o", method="ties", density=1)
    assert read(tmp_path / "o")["norm.weight"][:3].tolist() == [-5, 1, 0]


@pytest.mark.parametrize("seed", range(3))
def test_a_level_is_the_kth_largest(seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(4100, generator=draws) * torch.randint(-40, 38, (4100,), generator=draws).double().exp2().float()
    x = torch.cat((x.abs(), torch.tensor([0.0, 0.0, 1e-45, torch.inf, 2.0, 2.0, 2.0])))
    ordered = x.sort(descending=True).values
    for rank in (1, 2, 3, 100, 2048, len(x) - 2, len(x)):
        assert level(lambda: x.split(100), rank) == float(ordered[rank - 1])


# -- random dropping -------------------------------------------------------------------------------


def random_change(seed: int = 0, rows: int = 40, width: int = 100) -> Change:
    draws = torch.Generator().manual_seed(seed)
    return Change(
        name=f"t{seed}", model="m", base_RN=torch.zeros(rows, width), own_RN=torch.randn(rows, width, generator=draws)
    )


@pytest.mark.parametrize("method", [METHODS["dare-linear"](density=0.3), METHODS["della"](density=0.4, epsilon=0.3)])  # type: ignore[call-arg]
def test_what_is_drawn_is_unbiased(method: Any) -> None:
    made = random_change()
    whole = made.part(slice(None))
    trials = torch.stack([type(method)(**{**method.options(), "seed": s}).sieve(made, None)(whole) for s in range(400)])
    keep = method.probabilities(whole) if isinstance(method, Della) else torch.full_like(whole, method.density)
    deviation = whole.abs() * ((1 - keep) / keep / len(trials)).sqrt()  # of the mean of Bernoulli(keep) / keep
    score = (trials.mean(0) - whole) / deviation
    assert float(score.square().mean()) == pytest.approx(1, abs=0.1)  # 4000 entries: 4 standard errors are 0.09
    assert torch.all((trials == 0) | ((trials - whole / keep).abs() <= 1e-12 * whole.abs() / keep))


def test_dare_keeps_its_density(odd: Odd, tmp_path: Path) -> None:
    done = merge(odd("base"), [odd("a"), odd("b")], tmp_path / "o", method="dare-ties", density=0.35)
    for name in "ab":
        size = done.changed[name]
        assert abs(done.kept[name] / size - 0.35) < 4 * (0.35 * 0.65 / size) ** 0.5


def test_each_tensor_and_model_has_draws_of_its_own() -> None:
    dare = METHODS["dare-linear"](density=0.5)  # type: ignore[call-arg]
    one = random_change()
    others = [Change(name="u", model="m", base_RN=one.base_RN, own_RN=one.own_RN),
              Change(name="t0", model="n", base_RN=one.base_RN, own_RN=one.own_RN)]  # fmt: skip
    part = one.part(slice(None))
    masks = [dare.sieve(c, None)(part) != 0 for c in (one, *others)]
    assert torch.equal(masks[0], dare.sieve(one, None)(part) != 0)
    for other in masks[1:]:
        assert abs(float((masks[0] == other).double().mean()) - 0.5) < 4 * 0.5 / 4000**0.5


def test_della_keeps_large_entries_more_often() -> None:
    row = torch.tensor([[0.5, -3.0, 0.0, 1.0, -2.0]], dtype=torch.float64)
    keep = Della(density=0.5, epsilon=0.2).probabilities(row)
    torch.testing.assert_close(keep, torch.tensor([[0.4, 0.7, 0.3, 0.5, 0.6]], dtype=torch.float64))


def test_della_is_its_specification(odd: Odd, read: Read, tmp_path: Path) -> None:
    """Ranks row by row from the draws of the change; signs and means as in TIES."""
    from compress.merging.inputs import open_inputs

    inputs, base = open_inputs(odd("base"), {name: odd(name) for name in "ab"}), read(odd("base"))
    merge(odd("base"), [odd("a"), odd("b")], tmp_path / "o", method="della", density=0.6, epsilon=0.3, seed=7)
    got = read(tmp_path / "o")
    for name in ("layers.0.up.weight", "norm.weight", "scalar"):
        thin = []
        for member in inputs.members:
            theirs, own = (t.reshape(-1, t.shape[-1] if t.ndim else 1) for t in (base[name], member.tensor(name)))
            made = Change(name=name, model=member.key, base_RN=theirs, own_RN=own)
            uniform = torch.rand(theirs.shape, generator=made.generator(7))
            out = change(theirs, own)
            for i, row in enumerate(out):
                order = sorted(range(len(row)), key=lambda j: (float(row[j].float().abs()), j))
                for rank, j in enumerate(order):
                    keep = 0.3 + 0.6 * rank / (len(row) - 1) if len(row) > 1 else 0.6
                    out[i, j] = row[j] / keep if float(uniform[i, j]) < keep else 0
            thin.append(out.flatten())
        want = base[name].double() + disjoint_mean(thin, [1, 1]).view(base[name].shape)
        torch.testing.assert_close(got[name], want.to(got[name].dtype), rtol=torch.finfo(got[name].dtype).eps, atol=0)


# -- breadcrumbs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("density", "gamma"), [(0.9, 0.01), (0.5, 0.1), (0.2, 0.8), (1.0, 0.0)])
def test_breadcrumbs_is_its_specification(
    density: float, gamma: float, changed: Callable[..., Path], odd: Odd, read: Read, tmp_path: Path
) -> None:
    """On changes that are all different in size; the smallest tensors have no outlier to drop."""
    models, base = {}, read(odd("base"))
    for seed, label in enumerate("xy"):
        draws = torch.Generator().manual_seed(seed)
        tensors = {n: torch.randn(t.shape, generator=draws) for n, t in base.items() if t.dtype == torch.float32}
        models[label] = changed(tensors, "base", name=label)
    merge(odd("base"), models, tmp_path / "o", method="breadcrumbs", density=density, gamma=gamma)
    got = read(tmp_path / "o")
    for name in ("layers.1.up.weight", "norm.weight", "scalar"):
        total = base[name].double().flatten()
        for folder in models.values():
            moved = change(base[name], read(folder)[name]).flatten()
            order = moved.abs().argsort(descending=True)
            top = min(round(gamma * len(moved)), len(moved) - 1)
            kept = order[top : top + max(1, round(density * len(moved)))]
            total[kept] += moved[kept]
        torch.testing.assert_close(got[name].flatten(), total.float(), rtol=2e-7, atol=1e-7)
