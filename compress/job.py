"""The job of one run, after planning: reshape the model, walk it, rewrite its weights, write and verify the artifact.

Not here: what can be refused from headers, and where the artifact is put (`driver.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.artifact import content_hash
from compress.calibration import Tokens
from compress.card import card
from compress.deltas import Against
from compress.errors import CompressError, PlanError, RecipeError, UnsupportedWeight, in_short, out_of_memory
from compress.events import (
    BlockFinished,
    BlockStarted,
    Event,
    ModelReshaped,
    ResumeUnavailable,
    RunResumed,
    RunStarted,
)
from compress.frontmatter import carried
from compress.identity import Identity, identity, machine, versions
from compress.journal import Journal, Write
from compress.kv import written
from compress.model.anatomy import Coverage
from compress.model.architecture import without_code
from compress.model.block import Block
from compress.model.divergence import mean_kl
from compress.model.family import TESTED
from compress.model.memory import give_back, gpu_peak_bytes, peak_bytes
from compress.model.reshaped import walk_over
from compress.model.site import Site
from compress.model.source import Checkpoint, display_name, locate, stored_share
from compress.model.travellers import Travellers, batched, tokens_at_once
from compress.model.walk import Walk
from compress.model.whole import Whole
from compress.passes.base import needs_twins, windows_at_once
from compress.passes.budget import Budgets, allocations
from compress.passes.manager import PassManager
from compress.picture import picture
from compress.plan import check_tensors, check_values, plan
from compress.recipe import Calibration, Recipe
from compress.runtime.kv import check as check_cache
from compress.runtime.latent import is_factored
from compress.shards import Entry
from compress.texts import HUB
from compress.verification import check_whole
from compress.writer import PICTURE, ArtifactWriter, Packed, Part, Stored

BATCH, TWIN, PROBE, DENSE = "batch.", "twin.", "probe", "dense"  # names of the streams that pass through the model
LOGITS = "dense_logits"
PROVED = 16  # tokens on which the replay of an untested family is compared with the model itself


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of a run: sizes in bytes, `kl` in nats on the probe, counts of `fallbacks` and `starved` matrices.

    `kl` is the mean token KL(dense || compressed). `starved` counts matrices of experts that too few calibration tokens
    reached; `coverage` says which tensors the passes touched.
    """

    out: Path
    source_bytes: int
    artifact_bytes: int
    bits_per_weight: float
    kl: float
    fallbacks: int
    starved: int
    coverage: Coverage


def prove(walk: Walk, tokens: Tokens) -> None:
    """Check, for a family that no test covers, that running it block by block gives the model's own logits.

    Uses a few tokens of the probe. Raises UnsupportedWeight if the results differ, or if the family's code fails when
    it is called block by block.
    """
    try:
        walk.prove(tokens.probe_NT[:1, :PROVED])
    except CompressError:
        raise
    except (TypeError, ValueError, AttributeError, IndexError, KeyError, RuntimeError, NotImplementedError) as error:
        if out_of_memory(error):
            raise
        raise UnsupportedWeight(
            f"{type(walk.model).__name__} cannot be run block by block: {type(error).__name__}: {in_short(error)}"
        ) from error


@dataclass
class Job:
    """One run, after planning; `source` and `walk` are those of the dense model until `reshape` replaces them."""

    source: Checkpoint
    walk: Walk
    recipe: Recipe
    tokens: Tokens
    covered: Coverage
    emit: Callable[[Event], None]
    journal: Journal
    beside: Against | None = None  # the base, if only the difference from it is compressed

    def __post_init__(self) -> None:
        self.dense_bytes = self.source.nbytes()
        self.dense_logits: Tensor | None = None  # the dense model's on the probe, if the walk is over another model
        self.reshaped: list[dict[str, Any]] = []
        self.ledger: dict[str, Any] = {}
        self.stored = self.weights = 0  # bytes and parameters of all sites so far
        self.nbytes = 0  # bytes of what was packed last
        self.budgets: dict[Any, Any] = {}
        self.team = self.journal.team

    def identity(self, **options: Any) -> Identity:
        """Everything in which another run must be equal to this one in order to resume it."""
        if type(self.source) is Checkpoint:
            self.source.unsound()  # checks the values and computes the hashes in a single read
        base = {f"base.{key}": value for key, value in (self.beside.pin if self.beside else {}).items()}
        return identity(self.source, self.named_recipe(), self.tokens, self.walk.device, **options, **base)

    def check(self) -> None:
        """Check every value of the model, and, for an untested family, that it can be run block by block."""
        check_values(self.walk, self.source)
        if self.beside:
            check_values(self.walk, self.beside.base)
        if str(self.source.config.get("model_type")) not in TESTED:
            prove(self.walk, self.tokens)

    def run(self, writer: ArtifactWriter) -> Report:
        """Reshape, walk, rewrite, write and verify; the artifact is complete but not yet in place."""
        self.announce()
        self.reshape()
        self.settle()
        walk, journal = self.walk, self.journal
        journal.count = len(walk.blocks)
        journal.beside = self.beside_what()
        budgets = self.begin(writer)
        streams = self.enter()
        walk.drop_frame()
        if reason := next((opaque for stream in streams.values() if (opaque := stream.opaque)), ""):
            journal.unavailable = True
            self.emit(ResumeUnavailable(reason=f"{type(walk.model).__name__} passes a {reason} from block to block"))
        if journal.done:
            self.emit(RunResumed(done=journal.done, count=journal.count))
            walk.fit.most = journal.records[-1]["at_once"]
        journal.restore(streams)
        manager = PassManager(self.recipe.passes, self.emit, self.recipe.ordering, budgets, self.team)
        since = time.monotonic()
        for block in manager.run(self.opened(streams)):
            walk.fit.most = self.team.least(walk.fit.most)
            journal.record(partial(self.pack_block, writer, block), self.going(streams, block.last))
            self.finish_block(block, time.monotonic() - since)
            since = time.monotonic()
        journal.settle()
        probe = streams[PROBE]
        streams.clear()
        give_back()  # reading the artifact back does not need the windows' hidden states
        told = self.team.first(lambda: self.conclude(writer, probe))
        return Report(out=writer.out, coverage=self.covered, **told)

    def beside_what(self) -> torch.device | None:
        """The GPU that may continue computing while a block is recorded; None if recording must be waited for.

        None on a CPU, with several processes, for a source whose tensors are computed rather than read, and for a
        delta, which would have to hold the base's matrices of one more block.
        """
        device, plain = self.walk.device, type(self.source) is Checkpoint and self.beside is None
        return device if device.type == "cuda" and self.team.size == 1 and plain else None

    def begin(self, writer: ArtifactWriter) -> Budgets:
        """Write the tensors outside all blocks and find the budgets, or take both from an earlier run."""
        journal, team = self.journal, self.team
        made = content_hash(self.source) if self.recipe.reshapes else ""
        team.agree(lambda: {"hash of the reshaped model": made})
        journal.follow(lambda: self.take_up(writer, made))
        if journal.records:
            self.budgets = journal.records[0]["budgets"]
        else:
            kept = self.dense_logits if team.chief else None
            journal.record(partial(self.pack_frame, writer, made), {}, {} if kept is None else {LOGITS: kept})
        return {int(index): told for index, told in team.first(lambda: self.budgets).items()}

    def take_up(self, writer: ArtifactWriter, made: str) -> None:
        """Take over what an earlier run has written, unless its reshaped model was another one."""
        if self.journal.records and self.journal.records[0]["reshaped"] != made:
            self.journal.discard("the passes that change the model's shape gave a different model than before")
        for done in self.journal.records:
            writer.take(Part(**done["part"]))
            self.remember(done)

    def remember(self, facts: dict[str, Any]) -> None:
        """Add the facts about one block, or about the tensors outside all blocks, to those of the run."""
        self.ledger |= facts["rows"]
        self.stored += facts["stored"]
        self.weights += facts["weights"]

    def enter(self) -> dict[str, Travellers]:
        """The streams of tokens before the first block, by name: the batches, their twins, the probe, and its twin.

        Twins stay in the dense model; those of batches exist only if a pass compares with it. Of several processes,
        each has some of the batches.
        """
        walk, passes = self.walk, self.recipe.passes
        measured = any(step.requires for step in self.recipe.weight_passes)
        ids = batched(self.tokens.windows if measured else (), tokens_at_once(walk.device), windows_at_once(passes))
        own = [(i, ids_BT) for i, ids_BT in enumerate(ids) if self.team.owns(i)]
        streams = {f"{BATCH}{i}": walk.enter(ids_BT, stored=True) for i, ids_BT in own}
        if needs_twins(passes):
            streams |= {f"{TWIN}{i}": walk.enter(ids_BT, stored=True) for i, ids_BT in own}
        return streams | {name: walk.enter(self.tokens.probe_NT) for name in (PROBE, DENSE)}

    def going(self, streams: Mapping[str, Travellers], last: bool) -> dict[str, Travellers]:
        """The streams that this process records after a block: its batches, except after the last block.

        The first process also records the two of the probe.
        """
        everywhere = (PROBE, DENSE)
        names = [name for name in streams if (self.team.chief if name in everywhere else not last)]
        return {name: streams[name] for name in names}

    def site_bytes(self, site: Site, packed: Packed | None) -> int:
        """The bytes of a site as packed, or else as the source holds it, whose dtype may not be the config's."""
        if site.idle:
            return 0
        if packed is not None:
            return packed.nbytes(site.name, site.weight)
        held = stored_share(self.source.headers, site.place.tensor, site.shape[0] * site.shape[1])
        return site.weight.nbytes() if held is None else held

    def pack_block(self, writer: ArtifactWriter, block: Block) -> Write:
        """Pack a block, check the limits, and return the function that writes it."""
        expressed, plain = self.divide(block)
        packed = writer.pack(expressed, plain)
        sizes = {s.name: self.site_bytes(s, packed if s.name in expressed else None) for s in block.sites.values()}
        facts = {
            "rows": {name: record(block.sites[name], sizes[name]) for name in expressed},
            "stored": sum(sizes.values()),
            "weights": sum(site.shape[0] * site.shape[1] for site in block.sites.values()),
            "at_once": self.walk.fit.most,
        }
        self.remember(facts)
        self.check_limits(self.ledger)
        return self.ready(writer, packed, facts)

    def ready(self, writer: ArtifactWriter, packed: Packed, facts: dict[str, Any]) -> Write:
        """A function that writes what was packed and returns `facts` together with what was written."""
        self.nbytes = packed.size
        return lambda: {**facts, "part": asdict(writer.write(packed))}

    def replayed(self) -> Tensor:
        """The logits of the walk's model on the probe, computed, or read from the record of an earlier run."""
        if self.journal.records:
            return self.journal.tensors(self.journal.records[0]["state"][0]["file"], (LOGITS,))[LOGITS].to(
                self.walk.device
            )
        return self.walk.replay(self.walk.enter(self.tokens.probe_NT))

    def reshape(self) -> None:
        """Run the recipe's reshaping passes; their model replaces the dense one, whose logits on the probe are kept."""
        if self.recipe.reshapes:
            self.dense_logits = self.replayed()
        for step in self.recipe.reshapes:
            whole = Whole(self.walk, self.tokens.windows, self.tokens.probe_NT, self.recipe.passes)
            made = step.reshape(whole, self.source)
            walk = walk_over(made, self.walk)
            check_tensors(walk, made)
            sizes = [sum(prod(held.shape) for held in source.headers.values()) for source in (self.source, made)]
            blocks = (len(self.walk.blocks), len(walk.blocks))
            self.emit(ModelReshaped(step=step.name, change=made.change, parameters=(sizes[0], sizes[1]), blocks=blocks))
            self.reshaped.append({"step": step.name, "change": made.change, **made.facts})
            self.walk.drop_frame()  # free it here: the new model's tensors may keep a reference to this walk
            self.source, self.walk = made, walk
        self.covered = plan(self.walk, self.recipe)

    def settle(self) -> None:
        """For a delta that drops or rounds tensors, replace the fine-tuned model by the one that the delta keeps.

        The logits of the fine-tuned model on the probe are kept.
        """
        if self.beside is None or self.beside.lossless:
            return
        self.dense_logits = self.replayed()
        kept = self.beside.kept()
        walk = walk_over(kept, self.walk)
        walk.base = self.walk.base
        self.walk.drop_frame()
        self.source, self.walk = kept, walk

    def pack_frame(self, writer: ArtifactWriter, made: str) -> Write:
        """Find the budgets, pack the tensors outside all blocks, and return the function that writes them.

        For a delta, the facts include ledger rows of the tables (embeddings, output head) that it rewrites.
        """
        self.budgets = allocations(self.recipe.passes, Whole(self.walk, self.tokens.windows, self.tokens.probe_NT))
        frame = self.walk.anatomy.frame()
        coded = self.beside.coded_of(frame) if self.beside else {}
        sites = {name.removesuffix(".weight"): Stored(weight=weight, tensor=name) for name, weight in coded.items()}
        packed = writer.pack(sites, self.entries([name for name in frame if name not in coded]))
        rows = {name: self.beside.record(name, weight) for name, weight in coded.items()} if self.beside else {}
        facts: dict[str, Any] = {
            "rows": {name.removesuffix(".weight"): row for name, row in rows.items()},
            "stored": 0, "weights": 0, "reshaped": made, "budgets": self.budgets,
        }  # fmt: skip
        self.remember(facts)
        return self.ready(writer, packed, facts)

    def check_limits(self, ledger: dict[str, Any]) -> None:
        """Raise PlanError as soon as the run can no longer stay within the recipe's limits."""
        limits = self.recipe.limits
        fallbacks = sum(len(row["fallbacks"]) for row in ledger.values())
        if fallbacks > limits.max_fallbacks:
            raise PlanError(
                f"{fallbacks} fallbacks, limits.max_fallbacks allows {limits.max_fallbacks}; nothing was kept"
            )
        routed = sum(place.routed for place in self.walk.anatomy.places.values())
        starved = sum(bool(row["starved"]) for row in ledger.values())
        if routed and starved > limits.max_starved * routed:
            raise PlanError(
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
                processes=self.team.size,
            )
        )

    def opened(self, streams: dict[str, Travellers]) -> Iterator[Block]:
        """The unfinished blocks of the walk; BlockStarted is emitted for each."""
        batches, twins = ([s for name, s in streams.items() if name.startswith(kind)] for kind in (BATCH, TWIN))
        for block in self.walk.visit(batches, streams[PROBE], streams[DENSE], twins, self.journal.done, self.team):
            self.emit(BlockStarted(block=block.name, index=block.index, count=len(self.walk.blocks)))
            yield block

    def divide(self, block: Block) -> tuple[dict[str, Stored], list[Entry]]:
        """What a block stores: its rewritten sites, and every other tensor as the source has it.

        If any expert of a module was rewritten, all its experts are stored one by one, including those left as they
        were. For a delta, whose modules are never run, this holds only for experts stacked in one tensor of the file.
        """
        places = {site.name: site.place for site in block.sites.values()}
        rewritten = {s.name for s in block.sites.values() if s.weight is not s.original}
        opened = {places[name].module for name in rewritten if places[name].expert is not None}
        if self.beside:
            opened = {places[name].module for name in rewritten if places[name].stacked}
        sites = {
            site.name: Stored(
                weight=site.stored,
                tensor=site.place.tensor,
                transposed=site.transposed != site.place.turned,
                inputs=site.inputs,
                expert=site.place.expert if site.place.stacked else None,
                part=site.place.expert is not None,
            )
            for site in block.sites.values()
            if site.name in rewritten or (site.place.expert is not None and site.place.module in opened)
        }
        taken = {stored.tensor for stored in sites.values()}
        return sites, self.entries([n for n in self.walk.anatomy.tensors_of(block.index) if n not in taken])

    def entries(self, names: list[str]) -> list[Entry]:
        """Entries that copy the source's own tensors unchanged; for a delta, only those that its base does not give."""
        headers = self.source.headers
        if self.beside:
            names = self.beside.own(names)
        return [
            Entry(
                name=name,
                make=partial(self.source.tensor, name),
                **headers[name]._asdict(),
                nbytes=headers[name].nbytes,
            )
            for name in names
        ]

    def finish_block(self, block: Block, seconds: float) -> None:
        """Emit BlockFinished."""
        self.emit(
            BlockFinished(
                block=block.name,
                index=block.index,
                count=len(self.walk.blocks),
                error=block.drift,
                nbytes=self.nbytes,
                seconds=seconds,
                peak_bytes=peak_bytes(),
                gpu_peak_bytes=gpu_peak_bytes(self.walk.device),
            )
        )

    def conclude(self, writer: ArtifactWriter, probe: Travellers) -> dict[str, Any]:
        """Write config, card and provenance, verify the whole folder, and return the numbers of the report.

        Raises RecipeError if the result does not differ from the model, or a delta not from its base.
        """
        ledger, bits = self.ledger, 8 * self.stored / self.weights
        if self.beside and not writer.weight_map:
            raise RecipeError(f"{self.source.path} does not differ from {self.beside.base.path}; nothing to write")
        if not ledger and not self.reshaped and not self.beside:
            raise RecipeError("the passes left every weight as it was; there is nothing to write")
        logits = self.walk.leave(probe)
        self.walk.drop_frame()
        kl = mean_kl(self.walk.dense_logits if self.dense_logits is None else self.dense_logits, logits)
        sizes: dict[str, Any] = {
            "bytes": writer.size,
            "source_bytes": self.dense_bytes,
            "bits_per_weight": bits,
        }
        provenance = self.provenance(ledger, sizes, kl)
        config = {k: v for k, v in without_code(self.source.config).items() if k != "quantization_config"}
        kv = written(self.recipe.kv) if self.recipe.kv else None
        if kv == "latent":  # a budget, or a rank that saves nothing, may have left every site unfactored
            places = self.walk.anatomy.places
            done = {places[site].module for site, spec in writer.specs.items() if is_factored(spec)}
            check_cache(self.walk.model, "latent", done)
        pin, base = (self.beside.pin, self.beside.base.path) if self.beside else (None, None)
        drawn = "" if self.beside else picture(provenance)  # no picture for a delta, which should be small
        told = card(provenance, PICTURE if drawn else "", carried(self.source.path))
        writer.describe(self.source.path, config, provenance, told, kv, pin, base, drawn)
        check_whole(writer.partial, self.source, self.walk, probe.ids_BT, logits, base)
        return {
            "source_bytes": sizes["source_bytes"],
            "artifact_bytes": writer.size,
            "bits_per_weight": bits,
            "kl": kl,
            "fallbacks": sum(len(row["fallbacks"]) for row in ledger.values()),
            "starved": sum(bool(row["starved"]) for row in ledger.values()),
        }

    def named_recipe(self) -> Recipe:
        """The recipe with names in place of the paths of models and files."""
        delta = self.recipe.delta
        named = replace(delta, base=display_name(locate(delta.base))) if delta else None
        return replace(self.recipe, model=display_name(self.source.path), calibration=self.named(), delta=named)

    def named(self) -> Calibration:
        """The calibration with a file's name in place of its path."""
        data = self.recipe.calibration.data
        return replace(self.recipe.calibration, data=data if data.startswith(HUB) else Path(data).name)

    def provenance(self, ledger: dict[str, Any], sizes: dict[str, Any], kl: float) -> dict[str, Any]:
        """The content of compress.json without the file hashes, which the writer adds."""
        family = str(self.source.config.get("model_type"))
        told = machine(self.walk.device)
        return {
            "versions": versions(),
            "source": {
                "name": display_name(self.source.path),
                "family": family,
                "tested_family": family in TESTED,
                "sha256": self.source.digests(),
                "decoded_from": self.source.decoded_from,
            },
            "machine": {name: told[name] for name in ("threads", "cpu", "device")},
            "recipe": self.named_recipe().to_yaml(),
            "calibration": {
                "name": self.tokens.name, "sha256": self.tokens.sha256, "tokens": self.tokens.count,
                **({"windows_at_once": self.walk.fit.most} if self.walk.fit.halved else {}),
            },
            "sizes": sizes,
            "probe": {"tokens": self.tokens.probe_NT.numel(), "kl": kl},
            **({"reshaped": self.reshaped} if self.reshaped else {}),
            **({"base": self.beside.pin, "cast": self.beside.cast} if self.beside else {}),
            "sites": ledger,
            "untouched": self.covered.untouched,
            "tensors": self.source.shapes(),
        }  # fmt: skip


def record(site: Any, nbytes: int) -> dict[str, Any]:
    """The ledger row of a site in compress.json; `nbytes` is what the site takes in the files.

    Raises RecipeError if a pass of somebody else's has noted something under a name that rows have for themselves.
    """
    own = {
        "weight": site.weight.describe(),
        "bytes": nbytes,
        "dense_bytes": site.original.nbytes(),
        "weight_error": site.weight_error,
        "output_error": site.output_error,
        "tokens": site.stats.tokens,
        "fallbacks": [list(fallback) for fallback in site.fallbacks],
        "starved": site.starving,
        "inputs": site.inputs,
        "errors": [list(each) for each in site.errors],
    }
    if taken := sorted(own.keys() & site.ledger.keys()):
        raise RecipeError(
            f"{site.name}: a pass noted {taken[0]!r} in the ledger, which is a field of every row; rename it"
        )
    unsaid = {"inputs": not site.inputs, "errors": len(site.errors) < 2}
    return {**{key: value for key, value in own.items() if not unsaid.get(key)}, **site.ledger}
