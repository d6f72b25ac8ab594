"""The compiler driver: checkpoint -> walk -> passes -> artifact, verified before it is put in place."""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from compress import __version__
from compress.artifact import Artifact, ArtifactWriter
from compress.calibration import Tokens, draw
from compress.card import card
from compress.errors import (
    AcceptanceError,
    ArtifactError,
    CalibrationError,
    CompressError,
    PlanError,
    RecipeError,
    VerificationError,
)  # fmt: skip
from compress.events import BlockFinished, BlockStarted, Event, Fallback, RunFinished, RunStarted
from compress.model.block import Block, Travellers, batched
from compress.model.family import MISSED, TESTED, Coverage, coverage
from compress.model.source import Checkpoint, display_name, dtype_of, locate
from compress.model.walk import Walk
from compress.passes.manager import PassManager, ignore
from compress.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run did; sizes in bytes, `kl` in nats on the probe."""

    out: Path
    source_bytes: int
    artifact_bytes: int
    bits_per_weight: float
    kl: float
    fallbacks: int
    coverage: Coverage


@torch.inference_mode()
def compress(
    model: str | Path,
    recipe: Recipe,
    out: str | Path,
    *,
    emit: Callable[[Event], None] = ignore,
    device: str = "cpu",
    force: bool = False,
) -> Report:
    """Compress a model folder by a recipe into a new folder `out`.

    Raises CompressError children for everything a user can cause; `out` is then as it was before.
    """
    began = time.monotonic()
    source = Checkpoint(locate(model))
    target = free_place(Path(out), force)
    refuse_quantized(source)
    walk = Walk(source.config, source, dtype_of(source.config), usable(device))
    covered = plan(walk, source, recipe)
    tokens = tokens_for(walk, source.path, recipe)
    job = Job(source=source, walk=walk, recipe=recipe, tokens=tokens, covered=covered, emit=emit, began=began)
    writer = ArtifactWriter(target, shards=len(walk.blocks) + 1)
    try:
        report = job.run(writer)
        writer.commit()
    except (OSError, SafetensorError) as error:
        writer.abandon()
        raise ArtifactError(f"{target}: cannot be written: {error}") from error
    except BaseException:
        writer.abandon()
        raise
    return report


def usable(device: str) -> torch.device:
    """The torch device of a name; raises RecipeError if this machine has none such."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"--device: {device!r} cannot be used here: {str(error).splitlines()[0]}") from error


def free_place(out: Path, force: bool) -> Path:
    """The output path, absolute; raises RecipeError if something is there and `force` is not given."""
    out = out.expanduser().resolve()
    if out.exists() and not force:
        raise RecipeError(f"--out: {out} exists; choose another folder, or --force to replace it")
    if out.exists() and not out.is_dir():
        raise RecipeError(f"--out: {out} is a file")
    return out


def refuse_quantized(source: Checkpoint) -> None:
    """Raise ArtifactError for a checkpoint that is already compressed."""
    quantization = source.config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "an unnamed method") if isinstance(quantization, dict) else "?"
        raise ArtifactError(f"{source.path}: already quantized by {method}; start from the dense model")


def plan(walk: Walk, source: Checkpoint, recipe: Recipe) -> Coverage:
    """The coverage, after every check that needs no weights.

    Raises ArtifactError if tensors are missing or misshapen, RecipeError if a pass cannot handle a site's shape,
    PlanError if more is unreachable than the recipe's limit.
    """
    shapes = source.shapes()
    for name, parameter in walk.model.named_parameters():
        if shapes.get(name) != tuple(parameter.shape):
            have = f"has shape {shapes[name]}" if name in shapes else "is missing"
            raise ArtifactError(f"{source.path}: {name} {have}; the config means {tuple(parameter.shape)}")
    covered = coverage(walk.model, walk.path, [step.sites for step in recipe.passes])
    if covered.missed_share > recipe.limits.max_untouched:
        examples = [name for name, (_, reason) in covered.untouched.items() if reason == MISSED][:2]
        why = f"no pass can reach {covered.missed_share:.0%} of the block parameters, such as {', '.join(examples)}"
        if not examples:
            why = "the `sites` globs of this recipe select nothing"
        raise PlanError(f"{why}; limits.max_untouched allows {recipe.limits.max_untouched:.0%}")
    selected = PassManager(recipe.passes)
    for name, module in walk.model.named_modules():
        if f"{name}.weight" in covered.touched:
            for step in selected.steps_for(name):
                step.check(name, (module.weight.shape[0], module.weight.shape[1]))
    return covered


def tokens_for(walk: Walk, folder: Path, recipe: Recipe) -> Tokens:
    """The calibration windows and the probe; without data-hungry passes, only the probe."""
    limit = int(getattr(walk.model.config.get_text_config(), "max_position_embeddings", 2048))
    samples = recipe.calibration.samples if recipe.needs_data() else 0
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if recipe.needs_data():
            raise CalibrationError(f"{folder}: no tokenizer can be loaded, calibration needs one: {error}") from error
        probe = torch.randint(0, int(walk.model.config.vocab_size), (4, 64), generator=torch.manual_seed(0))
        return Tokens(ids_NT=probe[:0], probe_NT=probe, name="none (no tokenizer)", sha256="")
    if not recipe.needs_data():
        short = type(recipe.calibration)(data="text", length=min(256, limit))
        drawn = draw(short, tokenizer, limit, samples=0)
        return Tokens(ids_NT=drawn.ids_NT, probe_NT=drawn.probe_NT, name="none (data-free)", sha256="")
    return draw(recipe.calibration, tokenizer, limit, samples=samples)


@dataclass
class Job:
    """One run, after planning."""

    source: Checkpoint
    walk: Walk
    recipe: Recipe
    tokens: Tokens
    covered: Coverage
    emit: Callable[[Event], None]
    began: float

    def run(self, writer: ArtifactWriter) -> Report:
        """Walk, rewrite, write and verify; the artifact is complete but not yet in place."""
        walk, recipe = self.walk, self.recipe
        fallbacks = 0

        def emit(event: Event) -> None:
            nonlocal fallbacks
            fallbacks += isinstance(event, Fallback)
            self.emit(event)

        self.announce()
        writer.add({}, {n: self.source.tensor(n) for n in self.source.names() if not walk.in_block(n)})
        batches = [walk.enter(ids) for ids in batched(self.tokens.ids_NT)]
        probe = walk.enter(self.tokens.probe_NT)
        ledger: dict[str, Any] = {}
        manager = PassManager(recipe.passes, emit, recipe.ordering)
        since = time.monotonic()
        for block in manager.run(self.opened(batches, probe)):
            nbytes = writer.add(*self.divide(block))
            ledger |= {site.name: record(site) for site in block.sites.values() if site.weight is not site.original}
            self.finish_block(block, nbytes, time.monotonic() - since)
            since = time.monotonic()
        if fallbacks > recipe.limits.max_fallbacks:
            raise AcceptanceError(
                f"{fallbacks} fallbacks, limits.max_fallbacks allows {recipe.limits.max_fallbacks}; nothing was kept"
            )
        logits = walk.leave(probe)
        return self.conclude(writer, ledger, mean_kl(walk.dense_logits, logits), fallbacks, logits)

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
                tokens=self.tokens.ids_NT.numel(),
            )
        )

    def opened(self, batches: list[Travellers], probe: Travellers) -> Any:
        """The blocks of the walk, announced one by one."""
        for block in self.walk.visit(batches, probe):
            self.emit(BlockStarted(block=block.name, index=block.index, count=len(self.walk.blocks)))
            yield block

    def divide(self, block: Block) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a block stores: its rewritten sites, and every other tensor as the source has it."""
        sites = {s.name: s.weight for s in block.sites.values() if s.weight is not s.original}
        names = [n for n in self.source.names() if n.startswith(f"{block.name}.")]
        return sites, {n: self.source.tensor(n) for n in names if n.removesuffix(".weight") not in sites}

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

    def conclude(
        self, writer: ArtifactWriter, ledger: dict[str, Any], kl: float, fallbacks: int, logits: Tensor
    ) -> Report:
        """Write the descriptions, verify the whole folder, and report."""
        touched = sum(self.covered.touched.values())
        bits = 8 * sum(row["bytes"] for row in ledger.values()) / touched
        sizes = {"bytes": writer.size, "source_bytes": tensor_bytes(self.source), "bits_per_weight": bits}
        provenance = self.provenance(ledger, sizes, kl)
        config = {k: v for k, v in self.source.config.items() if k != "auto_map"}
        writer.describe(self.source.path, config, provenance, card(provenance))
        check_whole(writer.partial, self.source, self.walk, self.tokens.probe_NT, logits)
        report = Report(
            out=writer.out, source_bytes=sizes["source_bytes"], artifact_bytes=writer.size, bits_per_weight=bits, kl=kl,
            fallbacks=fallbacks, coverage=self.covered,
        )  # fmt: skip
        self.emit(
            RunFinished(
                out=str(writer.out),
                source_bytes=report.source_bytes,
                artifact_bytes=report.artifact_bytes,
                bits_per_weight=bits,
                kl=kl,
                fallbacks=fallbacks,
                seconds=time.monotonic() - self.began,
                peak_bytes=peak_bytes(),
            )
        )
        return report

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
            },
            "recipe": self.recipe.to_yaml(),
            "calibration": {
                "name": self.tokens.name, "sha256": self.tokens.sha256, "tokens": self.tokens.ids_NT.numel(),
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
    replay = Walk(artifact.config, artifact, artifact.dtype, walk.device)
    probe = replay.enter(probe_NT)
    for block in replay.visit([], probe):
        block.advance()
    again = replay.leave(probe)
    if not torch.allclose(again, logits, rtol=1e-3, atol=1e-3):
        worst = float((again - logits).abs().max())
        raise VerificationError(f"the reloaded model's logits differ from the compressed ones by {worst:.3g}")


def tensor_bytes(source: Checkpoint) -> int:
    """Bytes of a checkpoint's tensors, headers not counted."""
    return sum(source.tensor(name).nbytes for name in source.names())


def peak_bytes() -> int:
    """The largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


__all__ = ["CompressError", "Report", "compress"]
