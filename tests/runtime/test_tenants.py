"""Tenants: a mixed batch computes for every row what a dense model of its tenant would."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compress
from compress import Dense, Grid, Masked, Product, Signs, Sum, Weight, pattern
from compress.errors import ArtifactError, PlanError, RecipeError
from compress.runtime.tenants import Difference, Tenants
from compress.runtime.tenants.parts import resident
from compress.runtime.tenants.tenants import positions
from compress_kernels import planes

SAME = 1e-3  # relative, of logits; the issue's own bound. In float32 it is 1e-6 in truth
Close = Callable[[str, Tensor, Tensor, float], None]


def bits(w: Tensor) -> Weight:
    return Signs(w > 0, w.abs().mean()[None, None].half())


def bits_by_row(w: Tensor) -> Weight:
    return Signs(w > 0, w.abs().mean(1, keepdim=True))


def low_rank(w: Tensor) -> Weight:
    u, s, v = torch.linalg.svd(w)
    return Product(Dense((u[:, :8] * s[:8]).bfloat16()), Dense(v[:8].bfloat16()))


def coded(bits: int, group: int = 0, symmetric: bool = True) -> Callable[[Tensor], Weight]:
    return Grid(bits=bits, group=group, symmetric=symmetric).quantize


def banded(w: Tensor) -> Weight:
    u, s, v = torch.linalg.svd(w)
    bands = [(slice(0, 2), 8), (slice(2, 18), 3)]
    return Sum(tuple(Product(coded(b)(u[:, r] * s[r]), coded(b, 0, False)(v[r])) for r, b in bands))


def sparse(w: Tensor) -> Weight:
    return Masked(coded(4, 8)(w), pattern("2:4").keep(w.abs()), "2:4")


def few(w: Tensor) -> Weight:
    return Masked(coded(4)(w), pattern(0.9).keep(w.abs()), "90%")


KINDS: dict[str, Callable[[Tensor], Weight]] = {
    "signs": bits, "signs by row": bits_by_row, "low rank": low_rank, "int4": coded(4), "int4 groups": coded(4, 8),
    "int3 asymmetric": coded(3, 8, False), "int8 tensor": coded(8, -1), "int5": coded(5), "bands": banded,
    "2:4 int4": sparse, "few int4": few, "dense": Dense,
}  # fmt: skip


def linear_sites(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and n != "lm_head"]


def matrix(model: nn.Module, site: str) -> Tensor:
    """The matrix [out, in] of a site."""
    module = model.get_submodule(site)
    held = module.weight.detach()
    return held.T if type(module).__name__ == "Conv1D" else held


def made(model: nn.Module, kind: str, seed: int, size: float = 0.3, own: bool = True) -> Difference:
    """A difference of one kind at every site, and norms and biases of its own."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator) * like.float().std() * size

    weights = {site: KINDS[kind](noise(matrix(model, site))) for site in linear_sites(model)}
    vectors = {n: p.detach() + noise(p).to(p.dtype) for n, p in model.named_parameters() if p.ndim == 1}
    return Difference.of(weights, vectors if own else {})


def dense_of(model: nn.Module, difference: Difference) -> Any:
    """The fine-tuned model that a difference denotes."""
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for site in difference.sites:
            held = matrix(tuned, site)
            held += difference.weight(site).dense().to(held.dtype)
        for name in difference.names:
            tuned.get_parameter(name).copy_(difference.tensor(name))
    return tuned


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> Any:
    return compress.load(tiny_llama)


@pytest.fixture
def fresh(base: Any) -> Any:
    return copy.deepcopy(base)


@pytest.fixture(scope="module")
def tuned(base: Any) -> dict[str, Difference]:
    """A tenant of each kind."""
    return {kind: made(base, kind, seed) for seed, kind in enumerate(KINDS)}


def padded(rows: int, length: int = 11) -> tuple[Tensor, Tensor]:
    """Random tokens, and a mask that leaves out some on the left."""
    ids = torch.randint(4, 200, (rows, length), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    for row in range(0, rows, 3):
        mask[row, : 1 + row % 5] = 0
    return ids, mask


def alone(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The logits of one model, a row at a time."""
    with torch.inference_mode():
        return torch.cat(
            [
                model(input_ids=i[None], attention_mask=m[None], position_ids=positions(m[None])).logits
                for i, m in zip(ids, mask, strict=True)
            ]
        )


def check(close: Close, tenants: Tenants, dense: dict[str | None, Any], names: list[str | None]) -> None:
    ids, mask = padded(len(names))
    got = tenants(ids, names, attention_mask=mask).logits
    for row, name in enumerate(names):
        want = alone(dense[name], ids[row : row + 1], mask[row : row + 1])[0]
        kept = mask[row].bool()
        close(f"{name} in row {row}", got[row][kept], want[kept], SAME)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_its_dense_model(kind: str, fresh: Any, assert_close: Close) -> None:
    differences = {"a": made(fresh, kind, 1), "b": made(fresh, kind, 2)}
    dense = {None: copy.deepcopy(fresh), **{n: dense_of(fresh, d) for n, d in differences.items()}}
    check(assert_close, Tenants(fresh, differences), dense, ["a", "b", "b", None, "a"])


@pytest.mark.parametrize("order", range(3))
def test_kinds_mix_in_any_order(order: int, fresh: Any, tuned: dict[str, Difference], assert_close: Close) -> None:
    dense = {None: copy.deepcopy(fresh), **{n: dense_of(fresh, d) for n, d in tuned.items()}}
    names = [*tuned, None, *tuned, None]
    shuffled = torch.randperm(len(names), generator=torch.Generator().manual_seed(order)).tolist()
    check(assert_close, Tenants(fresh, tuned), dense, [names[i] for i in shuffled])


def test_a_batch_of_the_base_alone_is_the_base(fresh: Any, tuned: dict[str, Difference]) -> None:
    ids, mask = padded(3)
    want = fresh(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).logits
    tenants = Tenants(fresh, tuned)
    tenants(ids, ["signs", "int4", None], attention_mask=mask)
    assert torch.equal(tenants(ids, [None] * 3, attention_mask=mask).logits, want)


def test_a_tenant_touching_one_site_only_leaves_the_rest(fresh: Any, assert_close: Close) -> None:
    site = "model.layers.1.self_attn.k_proj"
    one = Difference.of({site: bits(torch.randn(matrix(fresh, site).shape))})
    dense = {None: copy.deepcopy(fresh), "one": dense_of(fresh, one), "all": dense_of(fresh, made(fresh, "signs", 3))}
    tenants = Tenants(fresh, {"one": one, "all": made(fresh, "signs", 3)})
    check(assert_close, tenants, dense, ["all", "one", None, "one"])
    assert list(tenants.explain()["one"]) == [site]


def test_the_same_batch_gives_the_same_bits(fresh: Any, tuned: dict[str, Difference]) -> None:
    tenants, names = Tenants(fresh, tuned), ["signs", None, "bands", "signs"]
    ids, mask = padded(4)
    assert torch.equal(*(tenants(ids, names, attention_mask=mask).logits for _ in range(2)))


@pytest.mark.parametrize("kind", ["signs", "low rank", "2:4 int4"])
def test_decoding_equals_the_dense_models(kind: str, fresh: Any) -> None:
    differences = {"a": made(fresh, kind, 1), "b": made(fresh, kind, 2)}
    dense = {n: dense_of(fresh, d) for n, d in differences.items()}
    prompts = [[5, 9, 31], [7], [50, 51, 52, 53, 54, 8], [11, 12]]
    names = ["b", "a", "b", "a"]
    got = Tenants(fresh, differences).generate(prompts, names, 8)
    for prompt, name, answer in zip(prompts, names, got, strict=True):
        want = dense[name].generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert answer == want[0, len(prompt) :].tolist()


def test_generation_stops_at_the_token_asked_for(fresh: Any, tuned: dict[str, Difference]) -> None:
    tenants = Tenants(fresh, tuned)
    whole = tenants.generate([[5, 6, 7]], ["signs"], 8)[0]
    assert tenants.generate([[5, 6, 7]], ["signs"], 8, stop=whole[3])[0] == whole[: whole.index(whole[3])]


# -- own tensors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gemma", "qwen3"])
def test_embeddings_and_heads_of_its_own(kind: str, model_folder: Callable[..., Path], assert_close: Close) -> None:
    model = compress.load(model_folder(kind))
    names = [n for n, p in model.named_parameters() if p.ndim == 2 and ("embed" in n or "lm_head" in n)]
    own = {n: model.get_parameter(n).detach() + torch.randn(model.get_parameter(n).shape) * 0.1 for n in names}
    rest = made(model, "signs", 1)
    own |= {n: rest.tensor(n) for n in rest.names}
    both = {"own": Difference.of({site: rest.weight(site) for site in rest.sites}, own)}
    dense = {None: copy.deepcopy(model), "own": dense_of(model, both["own"])}
    check(assert_close, Tenants(model, both), dense, ["own", None, "own"])


@pytest.mark.parametrize("kind", ["llama_tied", "gemma"])
@pytest.mark.parametrize("codec", ["int8 tensor", "signs by row", "int5", "low rank", "few int4", "dense"])
def test_a_coded_embedding_is_looked_up(
    kind: str, codec: str, model_folder: Callable[..., Path], assert_close: Close
) -> None:
    model = compress.load(model_folder(kind))
    table = model.get_input_embeddings().weight.detach()
    differences = {"a": Difference.of({"model.embed_tokens": KINDS[codec](torch.randn(table.shape) * 0.1)})}
    dense = {None: copy.deepcopy(model), "a": dense_of(model, differences["a"])}
    tenants = Tenants(model, differences)
    check(assert_close, tenants, dense, ["a", None, "a"])
    assert tenants.delta_bytes() < 1.1 * differences["a"].nbytes + 64  # one copy serves embedding and head


def test_biases_move_what_a_layer_puts_out(model_folder: Callable[..., Path], assert_close: Close) -> None:
    model = compress.load(model_folder("qwen2"))
    difference = made(model, "int4", 1)
    dense = {None: copy.deepcopy(model), "a": dense_of(model, difference)}
    tenants = Tenants(model, {"a": difference})
    check(assert_close, tenants, dense, ["a", None])
    assert "additive" in tenants.explain()["a"]["model.layers.0.self_attn.q_proj"]
    assert "rowwise" in tenants.explain()["a"]["model.norm"]


def test_transposed_layers_and_layer_norms(assert_close: Close) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=211, n_positions=64, n_embd=48, n_layer=2, n_head=4)).eval()
    difference = made(model, "signs", 1)
    dense = {None: copy.deepcopy(model), "a": dense_of(model, difference)}
    check(assert_close, Tenants(model, {"a": difference}), dense, ["a", None, "a"])


@pytest.mark.parametrize("masked", [True, False])
def test_learned_positions_of_one_tenant_are_not_those_of_other_rows(masked: bool, assert_close: Close) -> None:
    """Without a mask, the model looks them up once for all rows."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=211, n_positions=64, n_embd=48, n_layer=1, n_head=4)).eval()
    own = {"transformer.wpe.weight": model.transformer.wpe.weight.detach() + torch.randn(64, 48)}
    differences = {
        name: Difference.of({}, {k: t * sign for k, t in own.items()}) for name, sign in (("a", 1), ("b", -1))
    }
    dense: dict[str | None, Any] = {name: dense_of(model, difference) for name, difference in differences.items()}
    dense[None], names = copy.deepcopy(model), [None, "a", "b", "a", None]
    tenants = Tenants(model, differences)
    if masked:
        check(assert_close, tenants, dense, names)
        return
    ids, _ = padded(len(names))
    got = tenants(ids, names).logits
    for row, name in enumerate(names):
        with torch.inference_mode():
            want = dense[name](input_ids=ids[row : row + 1]).logits[0]
        assert_close(f"{name} in row {row}", got[row], want, SAME)


# -- refusals -------------------------------------------------------------------------------------------


def test_a_grown_vocabulary_is_refused(fresh: Any) -> None:
    grown = Difference.of({}, {"model.embed_tokens.weight": torch.zeros(220, 48)})
    with pytest.raises(ArtifactError, match="grown vocabulary"):
        Tenants(fresh, {"a": grown})  # before anybody asks


def test_what_the_base_lacks_is_refused(fresh: Any) -> None:
    tenants, ids = Tenants(fresh, {}), torch.zeros(1, 2, dtype=torch.long)
    for said, lacking in {
        "no module": Difference.of({"model.layers.9.mlp": Dense(torch.zeros(2, 2))}),
        "base's matrix": Difference.of({"model.layers.0.mlp.up_proj": Dense(torch.zeros(2, 2))}),
        "no tensor": Difference.of({}, {"model.other": torch.zeros(2)}),
    }.items():
        with pytest.raises(compress.CompressError, match=said):
            tenants.add("lacking", lacking)
    with pytest.raises(RecipeError, match="no tenant 'lacking'"):
        tenants(ids, ["lacking"])
    with pytest.raises(RecipeError, match="2 names for 1 rows"):
        tenants(ids, [None, None])
    assert tenants(ids, [None]).logits.isfinite().all()  # and the base still answers


def test_experts_are_refused() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                           num_attention_heads=2, num_key_value_heads=1, num_local_experts=2)  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    gate = next(n for n, p in model.named_parameters() if n.endswith("gate.weight") and p.ndim == 2)
    site = gate.removesuffix(".weight")
    for difference in (
        Difference.of({site: Dense(torch.zeros(2, 16))}),
        Difference.of({}, {gate: torch.zeros(2, 16)}),  # its input is the tokens of all rows
        Difference.of({}, {f"{site.removesuffix('.gate')}.experts.down_proj": torch.zeros(2, 16, 24)}),
    ):
        with pytest.raises(compress.UnsupportedWeight, match="experts"):
            Tenants(model, {"a": difference})


def test_a_failed_pass_keeps_nothing_in_memory(fresh: Any, tuned: dict[str, Difference]) -> None:
    tenants = Tenants(fresh, {"int4": tuned["int4"]})
    ids = torch.zeros(1, 2, dtype=torch.long)
    steps = []

    def fails(*_: Any) -> None:
        steps.append((tenants.current(), len(tenants.current().results)))  # type: ignore[union-attr]
        raise MemoryError

    hook = fresh.lm_head.register_forward_pre_hook(fails)
    with pytest.raises(MemoryError):
        tenants(ids, ["int4"])
    hook.remove()
    [(step, kept)] = steps
    assert kept and step is not None and not step.results
    assert tenants(ids, ["int4"]).logits.isfinite().all()


# -- coming and going ---------------------------------------------------------------------------------------


def test_tenants_come_and_go(fresh: Any, tuned: dict[str, Difference], assert_close: Close) -> None:
    dense = {None: copy.deepcopy(fresh), **{n: dense_of(fresh, tuned[n]) for n in ("signs", "int4")}}
    tenants = Tenants(fresh, {"signs": tuned["signs"]})
    check(assert_close, tenants, dense, ["signs", None])
    tenants.add("int4", tuned["int4"])
    check(assert_close, tenants, dense, ["int4", None, "signs"])
    tenants.drop("signs")
    assert tenants.names() == ["int4"]
    check(assert_close, tenants, dense, ["int4", None])
    with pytest.raises(RecipeError, match="signs"):
        tenants(torch.zeros(1, 2, dtype=torch.long), ["signs"])
    with pytest.raises(RecipeError, match="exists"):
        tenants.add("int4", tuned["int4"])


def test_the_least_recently_used_leave(fresh: Any, assert_close: Close) -> None:
    differences = {name: made(fresh, "signs", seed) for seed, name in enumerate("abc")}
    dense = {None: copy.deepcopy(fresh), **{n: dense_of(fresh, d) for n, d in differences.items()}}
    tenants = Tenants(fresh, differences, budget=2 * differences["a"].nbytes)
    assert tenants.loaded() == []
    for names, left in ((["a", "b"], ["a", "b"]), (["a"], ["b", "a"]), (["c"], ["a", "c"]), (["b", "c"], ["b", "c"])):
        check(assert_close, tenants, dense, [*names, None])
        assert tenants.loaded() == left
        assert tenants.delta_bytes() <= tenants.budget
    with pytest.raises(PlanError, match="3 tenants of this batch"):
        tenants(torch.zeros(3, 2, dtype=torch.long), ["a", "b", "c"])
    assert not tenants.fits(["a", "b", "c"])


def test_codes_that_lose_their_mask_count_as_large_as_they_become(fresh: Any) -> None:
    differences = {name: made(fresh, "2:4 int4", seed, own=False) for seed, name in enumerate("ab")}
    stored = differences["a"].nbytes
    with pytest.raises(PlanError, match="the budget is"):
        Tenants(fresh, differences, budget=stored)
    tenants = Tenants(fresh, differences, budget=3 * stored)
    tenants.load(["a", "b"])
    assert 2 * stored < tenants.delta_bytes() <= 3 * stored
    tight = Tenants(copy.deepcopy(fresh), differences, budget=2 * stored)
    with pytest.raises(PlanError, match="2 tenants of this batch"):
        tight.load(["a", "b"])


def test_one_delta_above_the_budget_is_refused(fresh: Any) -> None:
    difference = made(fresh, "signs", 1)
    with pytest.raises(PlanError, match=f"'a' takes {difference.nbytes} bytes"):
        Tenants(fresh, {"a": difference}, budget=difference.nbytes - 1)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("int3 asymmetric", "bands", "2:4 int4")])
def test_memory_grows_by_the_stored_bytes_only(kind: str, fresh: Any) -> None:
    tenants = Tenants(fresh, {name: made(fresh, kind, seed) for seed, name in enumerate("ab")})
    before = tenants.nbytes()
    tenants(torch.zeros(2, 2, dtype=torch.long), ["a", "b"])
    assert tenants.nbytes() - before == sum(tenants.entries[name].difference.nbytes for name in "ab")


@pytest.mark.slow
def test_the_builtin_model_computes_what_its_dense_fine_tunes_do(assert_close: Close) -> None:
    model = compress.load("builtin").float()
    kinds = {"a": "signs by row", "b": "low rank", "c": "2:4 int4"}
    differences = {name: made(model, kind, seed, size=0.05) for seed, (name, kind) in enumerate(kinds.items())}
    dense = {None: copy.deepcopy(model), **{name: dense_of(model, d) for name, d in differences.items()}}
    tenants = Tenants(model, differences)
    for names in (["a", "b", "c", None], ["c", "a", "c", "b"], [None, "b", "b", "a"]):
        check(assert_close, tenants, dense, names)


def test_half_of_the_codes_stay_as_all_of_them(fresh: Any) -> None:
    """Four bits an entry instead of four for half of them and a mask: many times faster for a third more."""
    tenants = Tenants(fresh, {"a": made(fresh, "2:4 int4", 1)})
    tenants(torch.zeros(1, 2, dtype=torch.long), ["a"])
    entries = sum(matrix(fresh, site).numel() for site in linear_sites(fresh))
    assert tenants.delta_bytes() - tenants.entries["a"].difference.nbytes == entries // 8


def test_zeros_that_are_codes_take_a_byte_each(fresh: Any) -> None:
    tenants = Tenants(fresh, {"a": made(fresh, "int3 asymmetric", 1)})
    tenants(torch.zeros(1, 2, dtype=torch.long), ["a"])
    zeros = sum(matrix(fresh, site).numel() // 8 for site in linear_sites(fresh))
    assert 0 < tenants.delta_bytes() - tenants.entries["a"].difference.nbytes <= zeros


def test_explain_names_the_path_of_every_site(fresh: Any, tuned: dict[str, Difference]) -> None:
    tenants = Tenants(fresh, tuned)
    tenants(torch.zeros(4, 2, dtype=torch.long), ["signs", "low rank", "2:4 int4", "few int4"])
    site = "model.layers.0.mlp.down_proj"
    said = {name: ways[site] for name, ways in tenants.explain().items()}
    assert said == {
        "signs": "packed 1-bit codes", "low rank": "plain @ plain", "2:4 int4": "packed 4-bit codes",
        "few int4": "unpacked 90%·int4rows",
    }  # fmt: skip


# -- packed codes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(16, 24), (63, 8), (5, 99)])
def test_packed_codes_come_back(bits: int, shape: tuple[int, int]) -> None:
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    words = planes.pack(codes, bits)
    assert words.numel() == -(-shape[1] * bits // 8) * shape[0]
    assert torch.equal(planes.unpack(words, bits, shape[1]), codes)


@pytest.mark.parametrize("kind", ["signs", "int4", "int4 groups", "int8 tensor"])
@pytest.mark.parametrize("width", [96, 256])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_products_round_nothing(kind: str, tokens: int, width: int, assert_close: Close) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = KINDS[kind](torch.randn(64, width, generator=generator))
    x = torch.randn(tokens, width, generator=generator).bfloat16()
    got = resident(weight).linear(x)
    assert_close(
        kind, got, x.float() @ weight.dense().T, 2**-7
    )  # half a unit, of codes up to 4 times their distance from the zero
