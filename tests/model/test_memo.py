"""Outputs of finished parts of a block are cached and reused: fewer matrix products, the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import compress
from compress import AWQ, GPTQ, RTN, Calibration, Realign, Recipe, Wanda
from compress.model.memo import Memo
from compress.passes import PassManager
from compress.planning.seconds import forwards_of
from compress.planning.sizes import plan_sites

FEW = Calibration(samples=6, length=32)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`without()`: from now on nothing is kept."""
    never = property(lambda self: False, lambda self, value: None)
    return lambda: monkeypatch.setattr(Memo, "active", never, raising=False)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


PASSES = {
    "gptq": (Wanda(sparsity=0.5), GPTQ(bits=4, group=8)),
    "awq": (AWQ(), RTN(bits=3, group=8)),
    "realign": (Realign(), GPTQ(bits=3, group=8)),
}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "steps"), [("llama", "awq"), ("llama", "realign"), ("gemma", "gptq")])
def test_the_bytes_are_those_of_computing_all_again(
    kind: str, steps: str, model_folder: Any, tmp_path: Path, without: Any
) -> None:
    recipe = Recipe(passes=PASSES[steps], calibration=FEW)
    kept = compress.run(model_folder(kind), recipe, tmp_path / "kept" / "out").out
    without()
    again = compress.run(model_folder(kind), recipe, tmp_path / "again" / "out").out
    assert files(kept) == files(again)


def calls_of(walk: Any, ids: Tensor, manager: PassManager, name: str = "o_proj") -> int:
    """How often a matrix of the first block's attention reads a batch while that goes through the block."""
    seen: list[int] = []
    with torch.no_grad():
        batch, probe = walk.enter(ids), walk.enter(ids[:1])
        blocks = walk.visit([batch], probe)
        module: nn.Module = walk.blocks[0].self_attn.get_submodule(name)
        hook = module.register_forward_hook(lambda module, args, out: seen.append(args[0].numel() // args[0].shape[-1]))
        next(manager.run(blocks))
        hook.remove()
    return sum(rows == ids.numel() for rows in seen)


def test_an_attention_that_is_done_is_computed_once(tiny_llama: Path, walk_of: Any, ids: Tensor, without: Any) -> None:
    manager = PassManager([GPTQ(bits=4, group=8)])
    assert calls_of(walk_of(tiny_llama), ids, manager) == 1
    assert calls_of(walk_of(tiny_llama), ids, manager, "k_proj") == 1
    without()
    assert calls_of(walk_of(tiny_llama), ids, manager) == 3  # for what gate and up read, for what down reads, to go on
    assert calls_of(walk_of(tiny_llama), ids, manager, "k_proj") == 4  # and for what the output projection reads


@pytest.mark.parametrize(("passes", "ordering"), [((GPTQ(bits=4, group=8),), "site"), ((GPTQ(group=8),), "block")])
def test_a_plan_counts_the_products_that_are_computed(
    passes: Any, ordering: str, tiny_llama: Path, walk_of: Any, ids: Tensor
) -> None:
    walk, recipe = walk_of(tiny_llama), Recipe(passes=passes, ordering=ordering)
    plans, done = plan_sites(walk, recipe), [0]

    def count(module: Any, args: Any, out: Tensor) -> None:
        rows = args[0].numel() // args[0].shape[-1]
        done[0] += rows * module.weight.numel() if rows == ids.numel() else 0  # else it is the probe

    sites = walk.anatomy.of_block(0)
    with torch.no_grad():
        batch, probe = walk.enter(ids), walk.enter(ids[:1])
        for place in sites:
            walk.model.get_submodule(place.module).register_forward_hook(count)
        next(PassManager(passes, ordering=ordering).run(walk.visit([batch], probe)))
    whole = ids.numel() * sum(place.shape[0] * place.shape[1] for place in sites)
    assert forwards_of(walk, recipe, plans, walk.model.config.hidden_size) == pytest.approx(done[0] / whole)


@pytest.mark.parametrize("hooked", ["an input that is scaled", "a workspace that is used again"])
def test_models_that_do_more_than_their_modules_say_are_computed_again(
    hooked: str, model_folder: Any, ids: Tensor, without: Any
) -> None:
    from transformers import AutoModelForCausalLM

    room = torch.zeros(1 << 20)

    def scaled(module: Any, args: Any) -> Any:
        return (args[0] * 1.7,)

    def written(module: Any, args: Any) -> Any:
        return (room[: args[0].numel()].view_as(args[0]).copy_(args[0]),)

    def rewritten() -> list[Tensor]:
        model = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
        for layer in model.model.layers:
            layer.self_attn.o_proj.register_forward_pre_hook(scaled if "scaled" in hooked else written)
        many = ids.repeat(40, 1) if ids.ndim == 2 else ids
        PassManager([GPTQ(bits=4, group=8)]).apply(model, (many + torch.arange(len(many))[:, None]) % 200)
        return [parameter.detach().clone() for parameter in model.parameters()]

    kept = rewritten()
    without()
    assert all(map(torch.equal, kept, rewritten()))


class Inner(nn.Module):
    """A child of which what it gives is made by `end` out of what its matrix gives."""

    def __init__(self, end: Any) -> None:
        super().__init__()
        self.up, self.down, self.end = nn.Linear(4, 8), nn.Linear(8, 4), end

    def forward(self, x: Tensor) -> Any:
        """Two in a row, and the end."""
        return self.end(self.down(self.up(x)))


class Named(NamedTuple):
    """What some models give."""

    y: Tensor
    weights: None = None


ENDS: dict[str, tuple[Any, bool]] = {
    "by name": (Named, False),
    "itself": (lambda y: y, True),
    "in a tuple": (lambda y: (y, None, None), True),
    "written over": (lambda y: y.mul_(2), False),
    "another": (lambda y: y + 1, False),
    "with more": (lambda y: (y, y), False),
}


@pytest.mark.parametrize("end", ENDS)
def test_only_a_child_that_gives_what_its_last_matrix_gives_has_a_tail(end: str) -> None:
    block, x = nn.Sequential(Inner(ENDS[end][0])), torch.randn(3, 4)
    memo = Memo(block)
    with torch.no_grad(), memo.watched({"0": [block[0].up, block[0].down]}):
        given = block(x)
    assert bool(memo.tails) == ENDS[end][1]
    assert not block[0]._forward_hooks and not block[0].down._forward_hooks
    if memo.tails:
        again = memo.tails["0"](block[0].up(x))
        assert type(again) is type(given)
        firsts = [out[0] if isinstance(out, tuple) else out for out in (given, again)]
        assert torch.equal(*firsts) and (not isinstance(given, tuple) or again[1:] == given[1:])


def test_what_a_tail_read_is_used_once_the_tail_is_final_and_not_if_something_before_it_changed() -> None:
    block, x, key = nn.Sequential(Inner(lambda y: y)), torch.randn(3, 4), (0, 0, 3)
    child, memo = block[0], Memo(block)
    memo.active = True
    seen: list[Tensor] = []
    child.up.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        with memo.watched({"0": [child.up, child.down]}):
            block(x)
        tail, reads = memo.tails["0"], child.up(x)
        for touched, calls in ((child.down, 0), (child.up, 1)):
            memo.forget()
            memo.keep_read(key, tail, reads, child.down.parameters())
            touched.weight.data = touched.weight.data + 1
            seen.clear()
            for _ in range(2):
                with memo.used(key, ["0"], ()):
                    given = block(x)
                assert torch.equal(given, tail(child.up.forward(x)))
            assert len(seen) == calls
        memo.forget()
        memo.keep_read(key, tail, reads, child.down.parameters())
        reads.add_(0)  # as if a workspace were used again
        seen.clear()
        with memo.used(key, ["0"], ()):
            block(x)
        assert len(seen) == 1
        memo.forget()
        memo.keep_read(key, tail, reads, child.down.parameters())
        memo.part((0, 0, 2))
        assert not memo.kept
        memo.keep_read(key, tail, reads, child.down.parameters())
        with memo.used(key, [], child.down.parameters()):  # the tail may still change: what it gives is not kept
            block(x)
        assert not memo.kept[key]


class Two(nn.Module):
    """A block of two children."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Both in a row."""
        return torch.as_tensor(self.b(self.a(x)))


def test_a_parameter_that_changes_or_an_output_that_is_written_over_is_noticed() -> None:
    block, x, key = Two(), torch.ones(2, 4), (0, 0, 2)
    memo = Memo(block)
    memo.active = True
    with torch.no_grad():
        for _ in range(2):
            with memo.used(key, ["a"], block.b.parameters()):
                first = block(x)
        [kept] = memo.kept[key].values()
        assert torch.equal(kept.outputs[0], block.a(x)) and len(kept.outputs) == 1
        block.a.weight.data = block.a.weight.data + 1
        with memo.used(key, ["a"], block.b.parameters()):
            assert not torch.equal(block(x), first)
        [kept] = memo.kept[key].values()
        with memo.used(key, ["a"], block.b.parameters()):
            block.a(x).mul_(2)
        assert not memo.active and not memo.kept
        assert "forward" not in block.a.__dict__
