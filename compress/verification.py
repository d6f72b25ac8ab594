"""Verification: before an artifact is put in place, it is loaded again and must compute what was meant.

The artifact is walked block by block with the same modules that users get, so that a family whose code does something
unforeseen with them fails here and not when a user loads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.artifact import Artifact, keys
from compress.errors import CompressError, VerificationError, in_short, out_of_memory
from compress.model.memory import give_back
from compress.model.reshaped import walk_over
from compress.model.source import Checkpoint
from compress.model.walk import Walk, forget
from compress.runtime.experts import CompressedExperts, compress_experts
from compress.runtime.linear import CompressedLinear, StoredWeight
from compress.weights import rounded_for

RUNTIME_ERROR = 0.02  # relative; bf16 products and bf16 scales of packed forms stay below 0.01
SAME = 1e-4  # relative, of float32 logits computed twice
ROUNDINGS = 4  # roundings of the model's dtype, for families that add a bias in another order
ROWS = 1024  # rows of a matrix that are held in float64 at once


class RuntimeWalk(Walk):
    """A walk through an artifact that runs its sites with the modules users get on loading; it can be done once."""

    def __init__(self, artifact: Artifact, walk: Walk) -> None:
        super().__init__(artifact.config, artifact, artifact.dtype, walk.device)
        self.artifact, self.rest, self.fit = artifact, walk.rest, walk.fit

    def load_block(self, index: int) -> None:
        """Load a block's plain tensors and put the runtime modules of its sites in place."""
        places = [p for p in self.anatomy.of_block(index) if p.site in self.artifact.specs]
        held = {f"{place.module}.{place.parameter}" for place in places}
        self.look_ahead(index + 1)
        prefix = f"{self.path}.{index}."
        names = [name for name in self.anatomy.parameters_of(index) if name not in held]
        state = self.anatomy.layout.state(names, self.tensor)
        self.assign(self.blocks[index], {name.removeprefix(prefix): t for name, t in state.items()})
        stacked: dict[str, list[Any]] = {}
        for place in places:
            if place.expert is not None:
                stacked.setdefault(place.module, []).append((place, self.artifact.specs[place.site]))
                continue
            old = self.model.get_submodule(place.module)
            module = CompressedLinear(self.artifact.specs[place.site], getattr(old, "bias", None), self.dtype)
            self._fill(module, place.site)
            module.prepare(self.dtype, floats=True, park=False)
            parent, _, leaf = place.module.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, module)
        for path, stored in stacked.items():
            experts = self.model.get_submodule(path)
            compress_experts(experts, stored, self.dtype)
            for (place, _), part in zip(stored, experts.stored, strict=True):
                self._fill(part, place.site)
            experts.prepare(self.dtype)

    def look_ahead(self, index: int) -> None:
        """Start reading ahead the stored tensors of a block."""
        if index < len(self.blocks):
            specs = {place.site: self.artifact.specs.get(place.site) for place in self.anatomy.of_block(index)}
            stored = [key for site, spec in specs.items() if spec for key in keys(site, spec).values()]
            self.artifact.ahead([*stored, *self.anatomy.tensors_of(index)])

    def _fill(self, module: StoredWeight, site: str) -> None:
        """Give a module the stored tensors of its site."""
        stored = keys(site, self.artifact.specs[site])
        module.fill({p: self.artifact.stored_tensor(key).to(self.device) for p, key in stored.items()})

    def drop_block(self, index: int) -> None:
        """Free a block; it cannot be loaded again."""
        for module in self.blocks[index].modules():
            forget(module)
            if isinstance(module, CompressedLinear):
                module.lowered = None
            if isinstance(module, StoredWeight):
                module.fill(dict.fromkeys(module.names, torch.empty(0)))
            if isinstance(module, CompressedExperts):
                module.decoded = {}
        give_back()


def check_whole(
    folder: Path, source: Checkpoint, walk: Walk, probe_NT: Tensor, logits: Tensor, base: Path | None = None
) -> None:
    """Read the artifact back block by block and check its tensor names and its logits on the probe against the run's.

    Untouched tensors are checked as far as these logits depend on them. A delta is read with its `base`, as the plain
    model it denotes. Raises VerificationError at the first difference.
    """
    artifact = Artifact(folder, base)
    if set(artifact.names()) != set(source.names()):
        raise VerificationError(f"tensors differ from the source: {set(artifact.names()) ^ set(source.names())}")
    if base is None:
        check_runtime(artifact, walk)
    try:
        replay = RuntimeWalk(artifact, walk) if base is None else walk_over(artifact, walk)
        probe = replay.enter(probe_NT)
        replay.drop_frame()
        again = replay.replay(probe)
    except CompressError:
        raise
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:  # from the family's code, with our modules
        if out_of_memory(error):
            raise
        raise VerificationError(
            f"{type(walk.model).__name__} does not run with compressed modules: {in_short(error)}"
        ) from error
    pairs = zip(again, logits, strict=True)  # a window at a time: vocabularies are large
    worst = max(relative(one.float(), other.float()) for one, other in pairs)
    if not worst <= max(SAME, ROUNDINGS * torch.finfo(artifact.dtype).eps):
        raise VerificationError(f"the reloaded model's logits differ from those of the compressed model by {worst:.3g}")


def relative(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|."""
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def check_runtime(artifact: Artifact, walk: Walk) -> None:
    """Run the modules of the first compressed block's sites, unprepared and prepared, and compare with their weights.

    Runs on the walk's device, so on a GPU this checks the GPU kernels. Raises VerificationError if the module of a
    site computes something other than `x @ W.T`.
    """
    blocks = ([p.site for p in walk.anatomy.of_block(i) if p.site in artifact.specs] for i in range(len(walk.blocks)))
    for site in next((sites for sites in blocks if sites), []):
        module = CompressedLinear(artifact.specs[site], None, artifact.dtype)
        artifact.check(site)
        stored = keys(site, artifact.specs[site])
        module.fill({path: artifact.stored_tensor(key).to(walk.device) for path, key in stored.items()})
        x_TI = torch.randn(7, module.in_features, generator=torch.Generator().manual_seed(0))
        x_TI = x_TI.to(walk.device, artifact.dtype)
        inputs, weight = artifact.specs[site].get("inputs"), module.expression
        read_TI = rounded_for(weight, x_TI, inputs) if inputs else x_TI
        rows = weight.dense().split(ROWS)
        wanted = torch.cat([F.linear(read_TI.double(), w_OI.double()) for w_OI in rows], 1)
        for prepared in (False, True):
            if prepared:
                module.prepare(artifact.dtype)
            error = relative(module(x_TI).double(), wanted)
            if not error <= RUNTIME_ERROR:
                raise VerificationError(f"{site}: the output of its runtime module differs by {error:.3g}")


__all__ = ["RuntimeWalk", "check_runtime", "check_whole"]
