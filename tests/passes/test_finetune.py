"""Fine-tuning: real-valued parameters change, codes and masks do not, and the stored values are those learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress import (
    RTN,
    Codebook,
    Dense,
    Diagonal,
    External,
    Grid,
    Hadamard,
    Masked,
    Permutation,
    Quantized,
    Signs,
    UnsupportedWeight,
    Weight,
    pattern,
)
from compress.passes import VQ, BitDelta, FineTune
from compress.passes.hybrid.finetune import Reals, is_shared, with_reals
from compress.weights import pack

BlockMaker = Callable[..., Any]
QUICK: dict[str, Any] = {"steps": 40, "held_out": 4, "batch": 2}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def book(rows: int = 6) -> Codebook:
    codes = torch.randint(16, (rows, 8), generator=torch.Generator().manual_seed(3))
    return Codebook(codes, normal(16, 2).half(), Dense(normal(rows, 1).abs().half()))


def lattice() -> Codebook:
    found = VQ(rotate=False).nearest(normal(6, 16))
    assert isinstance(found, Codebook)
    return found


EVERY: dict[str, tuple[Weight, int]] = {  # the expression, how many tensors of it are real numbers
    "fitted book": (book(), 2),
    "lattice book": (lattice(), 1),
    "two lattice books": (VQ(bits=3, rotate=False).nearest(normal(6, 16)), 2),
    "rotated": (lattice() @ Hadamard(normal(16) > 0), 1),
    "permuted": (lattice() @ Permutation(normal(16).argsort()), 1),
    "scaled inputs": (Grid(bits=4, group=8).quantize(normal(6, 16)) @ Diagonal(normal(16).exp()), 2),
    "codes and factors": (lattice() + Dense(normal(6, 2).half()) @ Dense(normal(2, 16).half()), 3),
    "masked": (Masked(Grid(bits=4).quantize(normal(6, 16)), normal(6, 16) > 0, "50%"), 1),
    "signs": (Signs(normal(6, 16) > 0, normal(6, 1).abs()), 1),
    "two levels of signs": (BitDelta(levels=2).signs(normal(6, 16), None, None), 2),
    "scales of a power of two": (
        Codebook(torch.zeros(6, 16).long(), normal(4, 1), Dense(normal(6, 1).exp().to(torch.float8_e8m0fnu))),
        1,
    ),
}
every = pytest.mark.parametrize("name", EVERY)


def moved(name: str) -> Reals:
    found = Reals(EVERY[name][0])
    with torch.no_grad():
        for i, each in enumerate(found.moved):
            each += 0.1 * normal(*each.shape, seed=i)
    return found


@every
def test_the_start_is_the_weight_as_it_was(name: str) -> None:
    weight, count = EVERY[name]
    found = Reals(weight)
    assert len(found.moved) == count
    assert torch.equal(found(), weight.dense().float())


@every
def test_what_is_stored_denotes_exactly_what_was_computed(name: str) -> None:
    found = moved(name)
    result = found.result()
    assert torch.equal(result.dense().float(), found())
    assert not torch.equal(result.dense(), EVERY[name][0].dense())
    assert not any(t.requires_grad for t in pack(result).values())
    assert result.describe() == EVERY[name][0].describe()
    assert result.nbytes() == EVERY[name][0].nbytes()


@every
def test_every_number_has_the_gradient_of_its_matrix(name: str) -> None:
    """By the difference between two points far enough apart for what is stored in 16 bits."""
    found, g = Reals(EVERY[name][0]), normal(6, 16, seed=9)
    with torch.enable_grad():
        (found() * g).sum().backward()
    for each in found.moved:
        assert each.grad is not None
        towards = normal(*each.shape, seed=4)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                each.copy_(sign * 0.25 * towards)
            ends.append(float((found().detach() * g).sum()))
            each.data.zero_()
        slope = (ends[0] - ends[1]) / 0.5
        assert slope == pytest.approx(float((each.grad * towards).sum()), rel=0.02, abs=0.02)


def test_an_unknown_node_is_refused() -> None:
    with pytest.raises(UnsupportedWeight, match="the real numbers of base cannot be learned"):
        with_reals(External(normal(6, 16), "a", "b"), lambda held: held)


# -- one block -------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two matrices with a bend between them."""

    def __init__(self) -> None:
        super().__init__()
        for i, (name, shape) in enumerate((("up", (40, 48)), ("down", (48, 40)))):
            linear = nn.Linear(shape[1], shape[0], bias=False)
            linear.weight.data = normal(*shape, seed=i) / shape[1] ** 0.5
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.down(nn.functional.silu(self.up(x)))
        return x + hidden


def coded_block(block_of: BlockMaker, make: Callable[[Any], Weight]) -> Any:
    x = normal(40, 10, 48, seed=1) @ (torch.eye(48) + normal(48, 48, seed=2) / 48**0.5)
    block = block_of(Two(), x + 0.1 * normal(*x.shape, seed=3), x, batch=2)
    for site in block.sites.values():
        site.weight = make(site)
    return block


def with_factors(site: Any) -> Weight:
    w_OI = site.original.data
    u, s, v = torch.linalg.svd(w_OI, full_matrices=False)
    left, right = (u[:, :4] * s[:4]).half(), v[:4].half()
    return VQ().round(w_OI - left.float() @ right.float(), None, site) + Dense(left) @ Dense(right)


MAKERS: dict[str, Callable[[Any], Weight]] = {
    "lattice": lambda site: VQ().rewrite_unfed(site),
    "kmeans": lambda site: VQ(book="kmeans", rotate=False).rewrite_unfed(site),
    "codes and factors": with_factors,
    "signs": lambda site: BitDelta(fit="mean").rewrite(site),
    "three levels of signs": lambda site: BitDelta(fit="mean", levels=3).rewrite(site),
    "2 bits": lambda site: RTN(bits=2, group=8).rewrite(site),
}


@pytest.mark.parametrize("name", MAKERS)
def test_learning_brings_the_block_nearer_and_leaves_codes(name: str, block_of: BlockMaker) -> None:
    block = coded_block(block_of, MAKERS[name])
    before = {site.name: site.weight for site in block.sites.values()}
    made = FineTune(**QUICK).rewrite(block, list(block.sites.values()))
    row = block.sites["blocks.0.up"].ledger["learned"]
    assert row["after"] < 0.95 * row["before"]
    for site, weight in made.items():
        was, now = pack(before[site]), pack(weight)
        assert was.keys() == now.keys()
        for key, tensor in was.items():
            assert torch.equal(tensor, now[key]) or tensor.is_floating_point()


def test_a_mask_survives(block_of: BlockMaker) -> None:
    def pruned(site: Any) -> Weight:
        mask_OI = pattern("2:4").keep(site.original.data.abs())
        values: Quantized = Grid(bits=4, group=8).quantize(site.original.data.masked_fill(~mask_OI, 0))
        return Masked(values, mask_OI, "2:4")

    block = coded_block(block_of, pruned)
    masks = {site.name: site.weight.mask_OI for site in block.sites.values()}
    for site, weight in FineTune(**QUICK).rewrite(block, list(block.sites.values())).items():
        assert isinstance(weight, Masked)
        assert torch.equal(weight.mask_OI, masks[site])
        assert int(weight.dense()[~masks[site]].count_nonzero()) == 0


def distance(block: Any) -> float:
    """Of what the block computes now from what it should, over all windows."""
    outputs = [batch.through(block.module, 0) for batch in block.batches]
    pairs = zip(outputs, block.targets(), strict=True)
    return sum(float((out.float() - target.float()).square().mean()) for out, target in pairs)


def test_of_a_difference_the_scales_alone_are_learned(block_of: BlockMaker) -> None:
    """The signs denote the difference, the block computes with base plus difference, before and after."""
    base = {
        f"blocks.0.{name}": External(part.weight.data.clone(), "base", name) for name, part in Two().named_children()
    }
    tuned = Two()
    with torch.no_grad():
        for i, part in enumerate(tuned.children()):
            part.weight += 0.05 * normal(*part.weight.shape, seed=10 + i)
    x = normal(40, 10, 48, seed=1) @ (torch.eye(48) + normal(48, 48, seed=2) / 48**0.5)
    block = block_of(tuned, x, batch=2, base=base)
    for site in block.sites.values():
        site.weight = BitDelta(fit="mean").rewrite(site)
    signs = {name: site.weight.positive for name, site in block.sites.items()}
    before = distance(block)
    made = FineTune(**QUICK).rewrite(block, list(block.sites.values()))
    for name, site in block.sites.items():
        assert isinstance(made[name], Signs)
        assert torch.equal(made[name].positive, signs[name])
        site.weight = made[name]
        torch.testing.assert_close(site.view(), base[name].data + made[name].dense())
    assert distance(block) < 0.98 * before


def test_scales_that_are_equal_by_chance_are_learned_apart() -> None:
    """One factor of several sites is stored once; single scales are stored for each."""
    assert is_shared(torch.ones(1, 1), torch.ones(1, 1)) is False
    one = torch.ones(16, 16)
    assert is_shared(one, one.clone()) and is_shared(one[:1, :1], one) is False
    small = torch.ones(1, 1)
    assert is_shared(small, small)
