"""The compiler driver: checkpoint -> walk -> passes -> artifact, verified before it is put in place."""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compress import __version__
from compress.artifact import Artifact, ArtifactWriter, Stored, keys
from compress.calibration import Tokens
from compress.card import card
from compress.errors import AcceptanceError, VerificationError
from compress.events import BlockFinished, BlockStarted, Event, RunFinished, RunStarted
from compress.model.anatomy import Coverage
from compress.model.block import Block
from compress.model.family import TESTED
from compress.model.source import Checkpoint, display_name, dtype_of, locate
from compress.model.travellers import Travellers, batched
from compress.model.walk import Walk
from compress.passes.manager import PassManager, ignore
from compress.plan import check_disk, check_tensors, check_values, free_place, plan, tokens_for, usable
from compress.recipe import Calibration, Recipe
from compress.runtime.linear import CompressedLinear
from compress.shards import SHARD_SIZE, Entry
from compress.sources import open_source
from compress.texts import HUB

PROVED = 16  # tokens on which the replay of a family no test covers is compared with the model itself
RUNTIME_ERROR = 0.02  # relative; bf16 products and bf16 scales of packed forms stay below 0.01


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run did; sizes in bytes, `kl` in nats on the probe, `starved` experts' matrices."""

    out: Path
    source_bytes: int
    artifact_bytes: int
    bits_per_weight: float
    kl: float
    fallbacks: int
    starved: int
    coverage: Coverage


@torch.no_grad()
def compress(
    model: str | Path,
    recipe: Recipe,
    out: str | Path,
    *,
    emit: Callable[[Event], None] = ignore,
    device: str = "cpu",
    force: bool = False,
    shard_size: int = SHARD_SIZE,
    offload: bool = False,
    dequantize: bool = False,
) -> Report:
    """Compress a model folder by a recipe into a new folder `out`.

    Shards hold at most `shard_size` bytes. With `offload`, the hidden states of calibration windows lie beside `out`
    on disk instead of in memory. With `dequantize`, a model that a known method has quantized is decoded first.

    Raises CompressError children for everything a user can cause; `out` is then as it was before.
    """
    began = time.monotonic()
    source = open_source(locate(model), dequantize)
    target = free_place(Path(out), source.path, force)
    check_disk(target, source)
    with ArtifactWriter(target, shard_size) as writer:  # first of all: a place that cannot be written costs no time
        walk = Walk(source.config, source, dtype_of(source.config), usable(device))
        check_tensors(walk, source)
        covered = plan(walk, recipe)
        tokens = tokens_for(walk, source.path, recipe)
        check_values(walk, source)
        if offload:
            walk.store = writer.scratch()
        if str(source.config.get("model_type")) not in TESTED:
            walk.prove(tokens.probe_NT[:1, :PROVED])
        job = Job(source=source, walk=walk, recipe=recipe, tokens=tokens, covered=covered, emit=emit)
        report = job.run(writer)
        writer.commit()
    emit(
        RunFinished(
            out=str(report.out),
            source_bytes=report.source_bytes,
            artifact_bytes=report.artifact_bytes,
            bits_per_weight=report.bits_per_weight,
            kl=report.kl,
            fallbacks=report.fallbacks,
            starved=report.starved,
            seconds=time.monotonic() - began,
            peak_bytes=peak_bytes(),
        )
    )
    return report


@dataclass
class Job:
    """One run, after planning."""

    source: Checkpoint
    walk: Walk
    recipe: Recipe
    tokens: Tokens
    covered: Coverage
    emit: Callable[[Event], None]

    def run(self, writer: ArtifactWriter) -> Report:
        """Walk, rewrite, write and verify; the artifact is complete but not yet in place."""
        walk, recipe = self.walk, self.recipe
        self.announce()
        writer.add({}, self.entries(walk.anatomy.frame()))
        batches = [walk.enter(ids, stored=True) for ids in batched(self.tokens.windows)]
        probe = walk.enter(self.tokens.probe_NT)
        walk.drop_frame()
        ledger: dict[str, Any] = {}
        stored = weights = 0
        since = time.monotonic()
        for block in PassManager(recipe.passes, self.emit, recipe.ordering).run(self.opened(batches, probe)):
            nbytes = writer.add(*self.divide(block))
            ledger |= {site.name: record(site) for site in block.sites.values() if site.weight is not site.original}
            stored += sum(site.weight.nbytes() for site in block.sites.values())
            weights += sum(site.shape[0] * site.shape[1] for site in block.sites.values())
            self.check_limits(ledger)
            self.finish_block(block, nbytes, time.monotonic() - since)
            since = time.monotonic()
        return self.conclude(writer, ledger, 8 * stored / weights, probe)

    def check_limits(self, ledger: dict[str, Any]) -> None:
        """Raise AcceptanceError as soon as the run can no longer stay within the recipe's limits."""
        limits = self.recipe.limits
        fallbacks = sum(len(row["fallbacks"]) for row in ledger.values())
        if fallbacks > limits.max_fallbacks:
            raise AcceptanceError(
                f"{fallbacks} fallbacks, limits.max_fallbacks allows {limits.max_fallbacks}; nothing was kept"
            )
        routed = sum(place.routed for place in self.walk.anatomy.places.values())
        starved = sum(bool(row["starved"]) for row in ledger.values())
        if routed and starved > limits.max_starved * routed:
            raise AcceptanceError(
                f"too few calibration tokens reach {starved} of the experts' {routed} matrices, limits.max_starved "
                f"allows {limits.max_starved:.0%}; give more samples; nothing was kept"
            )

    def announce(self) -> None:
        """Emit RunStarted."""
        steps = tuple(str(step) for step in self.recipe.passes)
        self.emit(
            RunStarted(
                model=display_name(self.source.path),
                blocks=len(self.walk.blocks),
                sites=len(self.covered.touched),
                steps=steps,
                calibration=self.tokens.name,
                tokens=self.tokens.count,
                untouched=self.covered.reasons(),
            )
        )

    def opened(self, batches: list[Travellers], probe: Travellers) -> Any:
        """The blocks of the walk, announced one by one."""
        for block in self.walk.visit(batches, probe):
            self.emit(BlockStarted(block=block.name, index=block.index, count=len(self.walk.blocks)))
            yield block

    def divide(self, block: Block) -> tuple[dict[str, Stored], list[Entry]]:
        """What a block stores: its rewritten sites, and every other tensor as the source has it.

        Experts whose stack was touched anywhere are stored one by one, also those that were left as they were.
        """
        places = {site.name: site.place for site in block.sites.values()}
        rewritten = {s.name for s in block.sites.values() if s.weight is not s.original}
        opened = {places[name].module for name in rewritten if places[name].expert is not None}
        sites = {
            site.name: Stored(
                weight=site.weight,
                tensor=site.place.tensor,
                transposed=site.transposed,
                expert=site.place.expert if site.place.stacked else None,
                part=site.place.expert is not None,
            )
            for site in block.sites.values()
            if site.name in rewritten or (site.place.expert is not None and site.place.module in opened)
        }
        taken = {stored.tensor for stored in sites.values()}
        return sites, self.entries([n for n in self.walk.anatomy.tensors_of(block.index) if n not in taken])

    def entries(self, names: list[str]) -> list[Entry]:
        """The source's own tensors, to be copied as they are."""
        headers = self.source.headers
        return [
            Entry(
                name=name,
                make=partial(self.source.tensor, name),
                **headers[name]._asdict(),
                nbytes=headers[name].nbytes,
            )
            for name in names
        ]

    def finish_block(self, block: Block, nbytes: int, seconds: float) -> None:
        """Emit BlockFinished."""
        self.emit(
            BlockFinished(
                block=block.name,
                index=block.index,
                count=len(self.walk.blocks),
                error=block.drift,
                nbytes=nbytes,
                seconds=seconds,
                peak_bytes=peak_bytes(),
            )
        )

    def conclude(self, writer: ArtifactWriter, ledger: dict[str, Any], bits: float, probe: Travellers) -> Report:
        """Write the descriptions, verify the whole folder, and report."""
        logits = self.walk.leave(probe)
        self.walk.drop_frame()
        kl = mean_kl(self.walk.dense_logits, logits)
        sizes: dict[str, Any] = {
            "bytes": writer.size,
            "source_bytes": self.source.nbytes(),
            "bits_per_weight": bits,
        }
        provenance = self.provenance(ledger, sizes, kl)
        config = {k: v for k, v in self.source.config.items() if k not in ("auto_map", "quantization_config")}
        writer.describe(self.source.path, config, provenance, card(provenance))
        check_whole(writer.partial, self.source, self.walk, probe.ids_BT, logits)
        return Report(
            out=writer.out,
            source_bytes=sizes["source_bytes"],
            artifact_bytes=writer.size,
            bits_per_weight=bits,
            kl=kl,
            fallbacks=sum(len(row["fallbacks"]) for row in ledger.values()),
            starved=sum(bool(row["starved"]) for row in ledger.values()),
            coverage=self.covered,
        )

    def named(self) -> Calibration:
        """The calibration without the place where a file of the user's lies."""
        data = self.recipe.calibration.data
        return replace(self.recipe.calibration, data=data if data.startswith(HUB) else Path(data).name)

    def provenance(self, ledger: dict[str, Any], sizes: dict[str, Any], kl: float) -> dict[str, Any]:
        """compress.json without the shard hashes."""
        family = str(self.source.config.get("model_type"))
        packages = {name: version(name) for name in ("torch", "transformers", "safetensors")}
        return {
            "versions": {"compress": __version__, "python": platform.python_version(), **packages},
            "source": {
                "name": display_name(self.source.path),
                "family": family,
                "tested_family": family in TESTED,
                "sha256": self.source.digests(),
                "decoded_from": self.source.decoded_from,
            },
            "machine": {"threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability(),
                        "device": self.walk.device.type},
            "recipe": replace(self.recipe, model=display_name(self.source.path), calibration=self.named()).to_yaml(),
            "calibration": {
                "name": self.tokens.name, "sha256": self.tokens.sha256, "tokens": self.tokens.count,
            },
            "sizes": sizes,
            "probe": {"tokens": self.tokens.probe_NT.numel(), "kl": kl},
            "sites": ledger,
            "untouched": self.covered.untouched,
            "tensors": self.source.shapes(),
        }  # fmt: skip


def record(site: Any) -> dict[str, Any]:
    """What is kept about a site in compress.json."""
    return {
        "weight": site.weight.describe(),
        "bytes": site.weight.nbytes(),
        "weight_error": site.weight_error,
        "output_error": site.output_error,
        "tokens": site.stats.tokens,
        "fallbacks": [list(fallback) for fallback in site.fallbacks],
        "starved": site.starving,
        **site.ledger,
    }


def mean_kl(dense: Tensor, compressed: Tensor) -> float:
    """Mean over tokens of KL(dense || compressed) in nats, float32."""
    total = 0.0
    for dense_TV, compressed_TV in zip(dense, compressed, strict=True):  # a window at a time: vocabularies are large
        left, right = F.log_softmax(dense_TV.float(), -1), F.log_softmax(compressed_TV.float(), -1)
        total += float((left.exp() * (left - right)).sum(-1).mean())
    return total / len(dense)


def check_whole(folder: Path, source: Checkpoint, walk: Walk, probe_NT: Tensor, logits: Tensor) -> None:
    """Read the artifact back block by block; its names, untouched tensors and logits must be the intended ones.

    Raises VerificationError at the first difference.
    """
    artifact = Artifact(folder)
    if set(artifact.names()) != set(source.names()):
        raise VerificationError(f"tensors differ from the source: {set(artifact.names()) ^ set(source.names())}")
    check_runtime(artifact, walk)
    replay = Walk(artifact.config, artifact, artifact.dtype, walk.device)
    probe = replay.enter(probe_NT)
    replay.drop_frame()
    again = replay.replay(probe)
    pairs = zip(again, logits, strict=True)  # a window at a time: vocabularies are large
    if not all(torch.allclose(one, other, rtol=1e-3, atol=1e-3) for one, other in pairs):
        worst = max(float((one - other).abs().max()) for one, other in zip(again, logits, strict=True))
        raise VerificationError(f"the reloaded model's logits differ from the compressed ones by {worst:.3g}")


def check_runtime(artifact: Artifact, walk: Walk) -> None:
    """Compute with the modules users get, for the sites of the first compressed block, and compare with the weights.

    Raises VerificationError if a stored site computes something else than `x @ W.T`.
    """
    count = len(walk.blocks)
    blocks = ([p.site for p in walk.anatomy.of_block(i) if p.site in artifact.specs] for i in range(count))
    first = next((sites for sites in blocks if sites), [])
    for site in first:
        module = CompressedLinear(artifact.specs[site], None)
        module.fill({path: artifact.stored_tensor(key) for path, key in keys(site, artifact.specs[site]).items()})
        x_TI = torch.randn(7, module.in_features, generator=torch.Generator().manual_seed(0)).to(artifact.dtype)
        rows = (
            artifact.expression(site).dense().split(1024)
        )  # float64 of a whole matrix would be the largest thing here
        wanted = torch.cat([F.linear(x_TI.double(), w_OI.double()) for w_OI in rows], 1)
        for prepared in (False, True):
            if prepared:
                module.prepare(artifact.dtype)
            error = float((module(x_TI).double() - wanted).norm() / wanted.norm().clamp(min=1e-30))
            if not error <= RUNTIME_ERROR:
                raise VerificationError(f"{site}: the module that runs it is off by {error:.3g}")


def peak_bytes() -> int:
    """The largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
