"""What a done part of a block gave is handed out again: fewer products, the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compress
from compress import AWQ, GPTQ, RTN, Calibration, Realign, Recipe, Wanda
from compress.model.memo import Memo
from compress.passes import PassManager

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


@pytest.mark.parametrize(("kind", "steps"), [("llama", "awq"), ("llama", "realign"), ("gemma", "gptq")])
def test_the_bytes_are_those_of_computing_all_again(
    kind: str, steps: str, model_folder: Any, tmp_path: Path, without: Any
) -> None:
    recipe = Recipe(passes=PASSES[steps], calibration=FEW)
    kept = compress.run(model_folder(kind), recipe, tmp_path / "kept" / "out").out
    without()
    again = compress.run(model_folder(kind), recipe, tmp_path / "again" / "out").out
    assert files(kept) == files(again)


def calls_of(walk: Any, ids: Tensor, manager: PassManager) -> int:
    """How many windows pass the output projection of the first block's attention while a batch goes through it."""
    seen: list[int] = []
    with torch.no_grad():
        batch, probe = walk.enter(ids), walk.enter(ids[:1])
        blocks = walk.visit([batch], probe)
        module: nn.Module = walk.blocks[0].self_attn.o_proj
        hook = module.register_forward_hook(lambda module, args, out: seen.append(args[0].numel() // args[0].shape[-1]))
        next(manager.run(blocks))
        hook.remove()
    return sum(rows == ids.numel() for rows in seen)


def test_an_attention_that_is_done_is_computed_once(tiny_llama: Path, walk_of: Any, ids: Tensor, without: Any) -> None:
    manager = PassManager([GPTQ(bits=4, group=8)])
    assert calls_of(walk_of(tiny_llama), ids, manager) == 1
    without()
    assert calls_of(walk_of(tiny_llama), ids, manager) == 3  # for what gate and up read, for what down reads, to go on


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
