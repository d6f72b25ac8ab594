"""Tenants as on a GPU: signs and low ranks are stacked in slots with one launch for all, by the ops' CPU reference."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compress
from compress import Calibration, Delta, Dense, Grid, Masked, Product, Recipe, Signs, Sum, Weight, pattern
from compress.artifact import Artifact
from compress.codecs import recipes_of
from compress.errors import ArtifactError, PlanError, UnsupportedWeight
from compress.runtime.tenants import Difference, Tenants, slots
from compress.runtime.tenants import tenants as module_of_tenants
from compress.runtime.tenants.part import Part, placed
from compress.runtime.tenants.parts import resident
from compress.tenants import load_tenants
from compress_kernels import segments

Close = Callable[[str, Tensor, Tensor, float], None]
SAME = 1e-5  # relative, of logits in float32
ROUNDED = 2e-2  # of logits of a model that rounds to bfloat16 after every layer
SITE = "model.layers.0.mlp.down_proj"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose as on a GPU; ops then compute by their reference, since tensors are on the CPU."""
    monkeypatch.setattr(module_of_tenants, "on_gpu", lambda like: True)


@pytest.fixture
def fresh(tiny_llama: Path) -> Any:
    return compress.load(tiny_llama)


def signs(w: Tensor) -> Weight:
    return Signs(w > 0, w.abs().mean()[None, None].half())


def signs_by_row(w: Tensor) -> Weight:
    return Signs(w > 0, w.abs().mean(1, keepdim=True))


def low_rank(rank: int) -> Callable[[Tensor], Weight]:
    def factors(w: Tensor) -> Weight:
        u, s, v = torch.linalg.svd(w)
        return Product(Dense((u[:, :rank] * s[:rank]).bfloat16()), Dense(v[:rank].bfloat16()))

    return factors


def two_signs(w: Tensor) -> Weight:
    first = signs(w)
    return Sum((first, signs_by_row(w - first.dense())))


def both(w: Tensor) -> Weight:
    return Sum((signs(w), Sum((low_rank(5)(w), low_rank(2)(w.flip(0))))))


def sparse(w: Tensor) -> Weight:
    return Masked(Grid(bits=4, group=8, symmetric=True).quantize(w), pattern("2:4").keep(w.abs()), "2:4")


def bands(w: Tensor) -> Weight:
    coded = Grid(bits=3, group=0, symmetric=True).quantize
    u, s, v = torch.linalg.svd(w)
    return Product(coded(u[:, :8] * s[:8]), coded(v[:8]))


STACKED: dict[str, Callable[[Tensor], Weight]] = {
    "signs": signs, "signs by row": signs_by_row, "low rank 3": low_rank(3), "low rank 8": low_rank(8),
    "low rank 20": low_rank(20), "two signs": two_signs, "signs and low ranks": both,
}  # fmt: skip
OTHERS = {"2:4": sparse, "bands": bands, "dense": Dense}
KINDS = STACKED | OTHERS


def sites_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is nn.Linear and name != "lm_head"]


def made(model: nn.Module, kind: str, seed: int, only: str = "") -> Difference:
    """A difference of one kind at every site whose name has `only`, and norms of its own."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator) * like.detach().float().std() * 0.3

    weights = {name: KINDS[kind](noise(model.get_submodule(name).weight)) for name in sites_of(model) if only in name}
    vectors = {n: p.detach() + noise(p).to(p.dtype) for n, p in model.named_parameters() if p.ndim == 1}
    return Difference.of(weights, vectors)


def exact(model: nn.Module, difference: Difference | None) -> Any:
    """The fine-tuned model in float64, of the weights that the difference decodes to."""
    tuned = copy.deepcopy(model).double()
    for site in difference.sites if difference else ():
        tuned.get_submodule(site).weight.data += difference.weight(site).dense().double()
    for name in difference.names if difference else ():
        tuned.get_parameter(name).data.copy_(difference.tensor(name))
    return tuned


def tenants_on_cpu(model: nn.Module, known: dict[str, Difference]) -> Tenants:
    """What they are without a GPU."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module_of_tenants, "on_gpu", slots.on_gpu)
        return Tenants(copy.deepcopy(model), known)


def tokens(rows: int, length: int = 11) -> Tensor:
    return torch.randint(4, 200, (rows, length), generator=torch.Generator().manual_seed(rows))


def logits_of(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=ids[None]).logits[0]
    return found


def check(
    close: Close, tenants: Tenants, base: Any, known: dict[str, Difference], names: list[str | None], ratio: float
) -> None:
    ids = tokens(len(names))
    got = tenants(ids, names).logits
    for row, name in enumerate(names):
        want = logits_of(exact(base, known[name] if name else None), ids[row])
        close(f"{name} in row {row}", got[row].double(), want, ratio)


# -- what is computed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STACKED)
def test_every_stacked_kind_equals_its_decoded_weights(gpu: None, kind: str, fresh: Any, assert_close: Close) -> None:
    fresh.bfloat16().float()  # factors in bfloat16 then are the base's own dtype, and nothing is rounded
    known = {name: made(fresh, kind, seed) for seed, name in enumerate("ab")}
    tenants = Tenants(fresh, known)

    check(assert_close, tenants, copy.deepcopy(fresh), known, ["a", "b", "b", None, "a"], SAME)

    assert tenants.explain()["a"][SITE].startswith("stacked ")
    assert not tenants.entries["a"].resident.shared


@pytest.mark.parametrize("order", range(3))
def test_kinds_mix_in_any_order_as_on_the_cpu(order: int, fresh: Any, gpu: None, assert_close: Close) -> None:
    known = {kind: made(fresh, kind, seed) for seed, kind in enumerate(KINDS)}
    rows = [*KINDS, None, *KINDS, None]
    shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(order)).tolist()
    names = [rows[row] for row in shuffled]
    on_cpu = tenants_on_cpu(fresh, known)

    check(assert_close, Tenants(fresh, known), copy.deepcopy(fresh), known, names, SAME)
    assert_close("cpu", Tenants(fresh, known)(tokens(4), names[:4]).logits, on_cpu(tokens(4), names[:4]).logits, SAME)


def test_halves_are_as_near_as_on_the_cpu(gpu: None, fresh: Any, assert_close: Close) -> None:
    fresh.bfloat16()
    kinds = ["signs", "low rank 3", "low rank 20", "signs and low ranks"]
    known = {kind: made(fresh, kind, seed) for seed, kind in enumerate(kinds)}

    check(assert_close, Tenants(fresh, known), copy.deepcopy(fresh), known, [*kinds, None], ROUNDED)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_computes_what_the_decoded_weights_do(fresh: Any, assert_close: Close) -> None:
    fresh.bfloat16()
    known = {kind: made(fresh, kind, seed) for seed, kind in enumerate(KINDS)}
    names, ids = [*KINDS, None], tokens(len(KINDS) + 1)

    got = Tenants(copy.deepcopy(fresh).cuda(), known)(ids.cuda(), names).logits.cpu()

    for row, name in enumerate(names):
        want = logits_of(exact(fresh, known[name] if name else None), ids[row])
        assert_close(str(name), got[row].double(), want, ROUNDED)


def test_sites_that_a_tenant_lacks_are_the_base_there(gpu: None, fresh: Any, assert_close: Close) -> None:
    known = {"mlp": made(fresh, "signs", 1, "mlp"), "q": made(fresh, "low rank 8", 2, "layers.1.self_attn.q"),
             "all": made(fresh, "signs", 3)}  # fmt: skip
    tenants = Tenants(fresh, known)

    check(assert_close, tenants, copy.deepcopy(fresh), known, ["all", "q", None, "mlp", "q", "all"], SAME)

    assert "model.layers.0.self_attn.q_proj" not in tenants.explain()["mlp"]


def test_decoding_equals_the_cpu(gpu: None, fresh: Any) -> None:
    known = {"a": made(fresh, "signs", 1), "b": made(fresh, "low rank 8", 2)}
    prompts, names = [[5, 9, 31], [7], [50, 51, 52, 8], [11, 12]], ["b", "a", None, "b"]
    on_cpu = tenants_on_cpu(fresh, known)

    assert Tenants(fresh, known).generate(prompts, names, 8) == on_cpu.generate(prompts, names, 8)


def test_all_tenants_are_added_in_one_launch(gpu: None, fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {f"{kind}{seed}": made(fresh, kind, seed) for kind in ("signs", "low rank 3") for seed in range(3)}
    tenants, names = Tenants(fresh, known), [*known, None]
    tenants(tokens(7), names)
    calls: list[tuple[str, Tensor]] = []

    def counted(name: str) -> Callable[..., None]:
        op = getattr(segments, name)
        return lambda y, x, a, b, table, tile: (calls.append((name, table)), op(y, x, a, b, table, tile))[1]

    for name in ("sign_segments", "low_rank_segments"):
        monkeypatch.setattr(segments, name, counted(name))
    tenants(tokens(7), names)

    each = len(sites_of(fresh))
    assert [name for name, _ in calls].count("sign_segments") == each
    assert [name for name, _ in calls].count("low_rank_segments") == each
    assert len({id(table) for _, table in calls}) == 2  # one for each kind, for all layers


def test_a_table_names_the_slots_of_runs_of_rows() -> None:
    table, tile = slots.table_of((3, 3, -1, 0, 3), 5, torch.device("cpu"))

    assert (table.tolist(), tile) == ([[0, 10, 3], [15, 20, 0], [20, 25, 3]], 16)
    assert slots.table_of((1, -1), 70, torch.device("cpu"))[0].tolist() == [[0, 64, 1], [64, 70, 1]]


# -- slots -------------------------------------------------------------------------------------------------------


def stacked_bytes(model: nn.Module, count: int, rank: int) -> int:
    """Bytes of so many tenants of signs, or of factors of a rank; written out from the layout."""
    shapes = [model.get_submodule(site).weight.shape for site in sites_of(model)]
    if rank:
        return count * sum((out + inputs) * rank * 4 for out, inputs in shapes)
    return count * sum(-(-inputs // 512) * -(-out // 64) * 64 * 64 + out * 4 for out, inputs in shapes)


def own_bytes(difference: Difference) -> int:
    return sum(int(difference.tensor(name).nbytes) for name in difference.names)


def test_nothing_moves_for_a_request_and_slots_are_used_again(gpu: None, fresh: Any) -> None:
    tenants = Tenants(fresh, {name: made(fresh, "signs", seed) for seed, name in enumerate("abc")})
    tenants(tokens(2), ["a", "b"])
    held = [tensor.data_ptr() for stack in tenants.stacks.found.values() for tensor in stack.held]

    tenants(tokens(3), ["b", None, "a"])
    tenants.drop("a")
    tenants(tokens(2), ["c", "b"])

    assert held == [tensor.data_ptr() for stack in tenants.stacks.found.values() for tensor in stack.held]
    assert tenants.entries["c"].resident.slots[SITE][0].number == 0


def test_ranks_are_padded_to_the_largest_in_memory(gpu: None, fresh: Any, assert_close: Close) -> None:
    known = {f"r{rank}": made(fresh, f"low rank {rank}", rank) for rank in (3, 8, 20)}
    tenants = Tenants(fresh, known, budget=10**9)
    own = own_bytes(known["r3"])

    for names, rank in ((["r3"], 16), (["r8", "r3"], 16), (["r20"], 32), (["r3", "r20", "r8"], 32)):
        check(assert_close, tenants, copy.deepcopy(fresh), known, names, SAME)
        count = len(tenants.loaded())
        assert tenants.delta_bytes() == stacked_bytes(fresh, count, rank) + count * own
    tenants.drop("r20")
    tenants.add("new", made(fresh, "low rank 3", 9))
    check(assert_close, tenants, copy.deepcopy(fresh), known | {"new": made(fresh, "low rank 3", 9)},
          ["new", "r8", "r3"], SAME)  # fmt: skip
    assert tenants.delta_bytes() == stacked_bytes(fresh, 3, 16) + 3 * own


def test_the_least_recently_used_leave_a_budget_in_bytes(gpu: None, fresh: Any, assert_close: Close) -> None:
    known = {name: made(fresh, "signs", seed) for seed, name in enumerate("abc")}
    known["r"] = made(fresh, "low rank 8", 4)
    own = own_bytes(known["a"])
    one, wide = stacked_bytes(fresh, 1, 0) + own, stacked_bytes(fresh, 1, 16) + own
    tenants = Tenants(fresh, known, budget=one + max(one, wide))

    for names, left, taken in (
        (["a", "b"], ["a", "b"], 2 * one), (["c"], ["b", "c"], 2 * one), (["r"], ["c", "r"], one + wide),
        (["a", "r"], ["a", "r"], one + wide), (["b", "c"], ["b", "c"], 2 * one),
    ):  # fmt: skip
        check(assert_close, tenants, copy.deepcopy(fresh), known, [*names, None], SAME)
        assert sorted(tenants.loaded()) == sorted(left)
        assert tenants.delta_bytes() == taken <= tenants.budget
    assert tenants.fits(["a", "r"]) and not tenants.fits(["a", "b", "c"])
    with pytest.raises(PlanError, match=f"3 tenants of this batch take {3 * one} bytes"):
        tenants(tokens(3), ["a", "b", "c"])


def test_one_tenant_above_the_budget_is_refused_as_stacked(gpu: None, fresh: Any) -> None:
    difference = made(fresh, "signs", 1)
    taken = stacked_bytes(fresh, 1, 0) + own_bytes(difference)

    with pytest.raises(PlanError, match=f"'a' takes {taken} bytes, the budget is {taken - 1}"):
        Tenants(fresh, {"a": difference}, budget=taken - 1)


def test_tenants_come_and_go(gpu: None, fresh: Any, assert_close: Close) -> None:
    base, known = copy.deepcopy(fresh), {"a": made(fresh, "signs", 1), "b": made(fresh, "signs by row", 2)}
    tenants = Tenants(fresh, {"a": known["a"]})
    check(assert_close, tenants, base, known, ["a", None], SAME)
    tenants.add("b", known["b"])
    check(assert_close, tenants, base, known, ["b", "a", None], SAME)
    tenants.drop("a")
    check(assert_close, tenants, base, known, ["b", None], SAME)
    tenants.add("a", known["a"])
    check(assert_close, tenants, base, known, ["a", "b", "a"], SAME)


def failing(difference: Difference, site: str) -> Weight:
    """As from a damaged disk: the last site cannot be read."""
    if site == difference.sites[-1]:
        raise ArtifactError(f"{site}: damaged")
    return difference.weight(site)


def test_a_tenant_that_cannot_be_read_leaves_its_slots_free(gpu: None, fresh: Any, assert_close: Close) -> None:
    known = {"a": made(fresh, "signs", 1), "b": made(fresh, "signs", 2)}
    tenants = Tenants(fresh, {**known, "broken": replace(known["a"], weight=partial(failing, known["a"]))})

    with pytest.raises(ArtifactError, match="damaged"):
        tenants(tokens(2), ["a", "broken"])

    check(assert_close, tenants, copy.deepcopy(fresh), known, ["a", "b"], SAME)
    assert all(len(stack.slots) == 2 for stack in tenants.stacks.found.values())


def test_what_does_not_fit_the_base_is_refused_when_added(gpu: None, fresh: Any) -> None:
    tenants = Tenants(fresh, {})
    for site, error, said in (("model.layers.9", UnsupportedWeight, "no module"), (SITE, ArtifactError, "matrix")):
        with pytest.raises(error, match=said):
            tenants.add("a", Difference.of({site: signs(torch.randn(2, 2))}))
    assert tenants.names() == []


# -- what is not stacked ------------------------------------------------------------------------------------------


def test_a_difference_of_tied_embeddings_is_looked_up(
    gpu: None, model_folder: Callable[..., Path], assert_close: Close
) -> None:
    model = compress.load(model_folder("llama_tied"))
    site = "model.embed_tokens"
    known = {"a": Difference.of({site: signs(torch.randn(model.get_input_embeddings().weight.shape) * 0.1)})}
    tenants = Tenants(model, known)

    check(assert_close, tenants, copy.deepcopy(model), known, ["a", None, "a"], SAME)

    assert "looked up" in tenants.explain()["a"][site] and not tenants.stacks.found


@pytest.mark.parametrize("kind", [*KINDS, "unpacked"])
def test_parts_go_where_the_base_is(kind: str) -> None:
    w = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    weight = Masked(Dense(w), w > 1, "unstructured") if kind == "unpacked" else KINDS[kind](w)
    part = resident(weight)

    moved: Part = placed(part, torch.device("meta"))

    assert all(tensor.is_meta for tensor in moved.tensors()) and moved.nbytes() == part.nbytes()
    assert moved.kind == part.kind


def test_on_a_cpu_nothing_is_stacked(fresh: Any) -> None:
    assert Tenants(fresh, {}).stacks is None
    assert not slots.on_gpu(torch.empty(0, dtype=torch.bfloat16))


# -- folders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["bitdelta", "lowrank"])
def test_folders_are_measured_by_their_headers(
    gpu: None, method: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = compress.load(tiny_llama)
    for parameter in tuned.parameters():
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.02
    shutil.copytree(tiny_llama, tmp_path / "tuned")
    tuned.save_pretrained(tmp_path / "tuned")
    (passes,) = recipes_of(method, 1.0)
    recipe = Recipe(passes=passes, calibration=Calibration(samples=2, length=16), delta=Delta(base=str(tiny_llama)))
    folder = compress.run(tmp_path / "tuned", recipe, tmp_path / "out").out
    read, found = Artifact.stored_tensor, []
    monkeypatch.setattr(Artifact, "stored_tensor", lambda self, name: (found.append(name), read(self, name))[1])

    tenants = load_tenants(tiny_llama, {"a": folder}, budget=10**9)
    assert found == []
    told = tenants.cost([tenants.entries["a"]])
    ids = tokens(2)

    got = tenants(ids, ["a", None]).logits

    assert tenants.delta_bytes() == told
    assert set(tenants.explain()["a"]) >= set(sites_of(tenants.model)) - {"lm_head"}
    assert all("stacked" in tenants.explain()["a"][site] for site in sites_of(tenants.model))
    with torch.inference_mode():
        want = compress.load(folder, base=tiny_llama)(input_ids=ids[:1]).logits[0]
    assert float((got[0] - want).norm() / want.norm()) < SAME
