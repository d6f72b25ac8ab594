"""Times compressed layers and models against dense ones, in alternation, so that other load affects both sides alike.

Loading models and printing results are done elsewhere. A layer is timed on several of its sites in rotation, so that a
weight does not stay in a CPU or GPU cache that it would leave in the whole model. The dense side is the `nn.Linear`
that a dense model would run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.artifact import Artifact, keys, plain_shapes, tensor_of
from compress.errors import ArtifactError, RecipeError
from compress.model.anatomy import Anatomy
from compress.model.architecture import check_sizes, skeleton
from compress.runtime.experts import CompressedExperts
from compress.runtime.explain import explain
from compress.runtime.generation import Decoder
from compress.runtime.linear import CompressedLinear
from compress.runtime.lower import rule_of
from compress.runtime.maps import FewRows, IntegerProduct, Matrix, Packed, path
from compress.weights import unpack
from compress_kernels.bench.clock import FEWEST, race
from compress_kernels.bench.gpu import spans
from compress_kernels.cpu import nbytes
from compress_kernels.tuning import device_name

CPU = torch.device("cpu")
REPLAYS = 10  # of one side's CUDA graph before the other side's graph runs
ROTATED = 1 << 28  # bytes of dense matrices to rotate through: more than the last-level cache of a server
PREPARED, LOW_MEMORY = "prepared", "low memory"
EXPERTS = "experts"  # stands in for the name of a lowering rule: none applies, because expert stacks are decoded
REASONS = {  # path -> why it may be slower than dense
    "decoded": "the matrix is decoded once and multiplied as dense, and its module adds a few microseconds; "
    "it saves disk, not time",
    "packed": "the packed product is not faster than the dense one at this size here; it saves disk, not time",
    "integers": "rounding the inputs (and transforming them first, if the weight has a transform) costs more than the "
    "integer product saves at this size; in a model, projections that share an input round it once",
    "rounded, decoded": "inputs are rounded at each call and multiplied, as floats, by a matrix decoded once; it "
    "saves disk, not time",
    "decoded at each call": "the matrix is decoded at each call; it saves memory, not time",
}
SEVERAL = "its parts are multiplied one by one, which together costs more than one dense product"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A median with its spread: the interquartile range of many values, or the full range of few."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Sites that compute in the same way: one shape [out, in], one kind of weight; bytes are totals over the sites."""

    sites: tuple[str, ...]
    names: tuple[str, ...]
    weight: str
    shape: tuple[int, int]
    rule: str
    dense_bytes: int
    stored_bytes: int


@dataclass(frozen=True, kw_only=True)
class LayerTiming:
    """The timing of one layer for x with `rows` rows: seconds per call, as median and quartiles.

    `speedup` is dense / compressed time, computed for each pair of measurements. `held_bytes` is what one site's module
    keeps in memory, `path` how it computes for this many rows, and `why` the reason in one sentence.
    """

    layer: Layer
    rows: int
    mode: str
    path: str
    why: str
    held_bytes: int
    rounds: int
    dense: Spread
    compressed: Spread
    speedup: Spread

    @property
    def slower(self) -> bool:
        """Whether dense was faster in at least three quarters of the pairs."""
        return self.speedup.high < 1


@dataclass(frozen=True, kw_only=True)
class GenerationTiming:
    """The timing of greedy generation by one model: medians and ranges over the runs.

    `speedup` is relative to the first model, run by run. `tokens_per_second` includes the time of the prompt, which is
    `prefill` (seconds, with the first new token); `decode` is tokens per second after the first. `held_bytes` counts
    all weights, `cache_bytes` the key-value cache. `captured` says whether steps replay a CUDA graph.
    """

    name: str
    tokens_per_second: Spread
    speedup: Spread
    prefill: Spread
    decode: Spread
    held_bytes: int
    cache_bytes: int
    captured: bool


def measure_layers(
    folder: Path,
    rows: Sequence[int] = (1, 8, 64),
    *,
    low_memory: bool = False,
    seconds: float = 0.5,
    device: str = "cpu",
) -> list[LayerTiming]:
    """Time every kind of layer of an artifact, for each number of rows of x in `rows`, on one device.

    On a CPU each measurement takes about `seconds`; on a GPU the calls are replayed as one CUDA graph. With
    `low_memory`, modules that keep only the stored bits are timed too. Raises ArtifactError if the folder is not an
    artifact, or is a delta.
    """
    artifact, there = whole(folder), torch.device(device)
    modes = (PREPARED, LOW_MEMORY) if low_memory else (PREPARED,)
    return [t for layer in layers(artifact, there) for t in measure_layer(artifact, layer, rows, modes, seconds, there)]


def whole(folder: Path) -> Artifact:
    """The artifact in a folder; raises ArtifactError for a delta, whose sites are not matrices on their own."""
    artifact = Artifact(folder)
    if artifact.is_delta:
        raise ArtifactError(f"{folder}: is a delta of {artifact.pin_name}; `compress delta apply` makes a model of it")
    return artifact


def conditions(folder: Path, device: str = "cpu") -> dict[str, str]:
    """The conditions that timings depend on besides the artifact: device, threads, dtype, torch version, date."""
    return {
        "device": "cpu" if device == "cpu" else device_name(device),
        "threads": str(torch.get_num_threads()),
        "dtype": str(Artifact(folder).dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }


def layers(artifact: Artifact, device: torch.device = CPU) -> list[Layer]:
    """The sites of an artifact, grouped into layers of sites that compute in the same way."""
    alike: dict[Any, list[str]] = {}
    stacked = in_stacks(artifact)
    for site, spec in artifact.specs.items():
        alike.setdefault((structure(spec["tree"]), spec.get("inputs"), site in stacked), []).append(site)
    return [described(artifact, sites, sites[0] in stacked, device) for sites in alike.values()]


def in_stacks(artifact: Artifact) -> set[str]:
    """The sites whose matrices the model keeps in stacked expert tensors, however the file stores them."""
    if not artifact.specs:
        return set()
    check_sizes(artifact.config, artifact.shapes())
    model = skeleton(artifact.config, artifact.dtype)
    places = Anatomy(model, plain_shapes(artifact.specs)).places
    missing = artifact.specs.keys() - places.keys()
    if missing:
        raise ArtifactError(f"quantization_config: the model has no site {min(missing)!r}")
    return {site for site in artifact.specs if places[site].expert is not None}


def structure(tree: Any) -> Any:
    """The specification in hashable form, without what distinguishes masks of one pattern, which compute alike."""
    match tree:
        case dict():
            rule = str(tree.get("pattern", "")).partition("@")[0]
            parts = {key: value for key, value in tree.items() if key not in ("kept", "mask", "pattern")}
            return rule, tuple((key, structure(value)) for key, value in parts.items())
        case list():
            return tuple(map(structure, tree))
        case _:
            return tree


def described(artifact: Artifact, sites: list[str], stacked: bool, device: torch.device) -> Layer:
    """The layer that stands for sites that compute in the same way."""
    first = artifact.specs[sites[0]]
    there = unpack(first["tree"], stored(artifact, sites[0], device))
    out, inputs = (int(n) for n in first["tree"]["shape"])
    held = {key for site in sites for key in keys(site, artifact.specs[site]).values()}
    return Layer(
        sites=tuple(sites),
        names=tuple(dict.fromkeys(site.rpartition(".")[2] for site in sites)),
        weight=first["name"] + (f", inputs {first['inputs']}" if "inputs" in first else ""),
        shape=(out, inputs),
        rule=EXPERTS if stacked else rule_of(there, artifact.dtype, first.get("inputs", "")),
        dense_bytes=len(sites) * out * inputs * artifact.dtype.itemsize,
        stored_bytes=sum(artifact.stored_headers[key].nbytes for key in held),
    )


def measure_layer(
    artifact: Artifact, layer: Layer, rows: Sequence[int], modes: Sequence[str], seconds: float, device: torch.device
) -> Iterator[LayerTiming]:
    """The timings of one layer; each mode is raced against dense alone, because modes disturb each other's caches."""
    each = layer.dense_bytes // len(layer.sites)
    chosen = layer.sites[: max(1, ROTATED // each)]
    dense = [dense_module(artifact, site).to(device) for site in chosen]
    stacked = layer.rule == EXPERTS
    modules = {mode: [site_module(artifact, site, mode, device, stacked) for site in chosen] for mode in modes}
    for count in rows:
        x = torch.randn(count, layer.shape[1], generator=torch.Generator().manual_seed(0)).to(device, artifact.dtype)
        for mode, maps in modules.items():
            with torch.inference_mode():
                base, times = timed(dense, maps, x, seconds)
            yield LayerTiming(
                layer=layer,
                rows=count,
                mode=mode,
                path=path_of(maps[0], count),
                why=explain(maps[0], count) if isinstance(maps[0], CompressedLinear) else REASONS["decoded"],
                held_bytes=held_bytes(maps[0], device),
                rounds=len(times),
                dense=quartiles(base),
                compressed=quartiles(times),
                speedup=quartiles([d / t for d, t in zip(base, times, strict=True)]),
            )


def timed(dense: Sequence[nn.Module], maps: Sequence[nn.Module], x: Tensor, seconds: float) -> list[list[float]]:
    """Seconds per call of the dense and of the compressed modules, in pairs.

    On a GPU both sides are CUDA graphs, replayed alternately, REPLAYS times each.
    """
    if x.device.type == "cuda":
        sides = [[partial(each, x) for each in some] for some in (dense, maps)]
        rounds = [[spans(calls, x.device, REPLAYS) for calls in sides] for _ in range(FEWEST)]
        return [[second for side in rounds for second in side[i]] for i in range(2)]
    return race((rotating(dense, x), rotating(maps, x)), warm=len(maps) + 1, seconds=seconds)


def stored(artifact: Artifact, site: str, device: torch.device) -> dict[str, Tensor]:
    """The stored tensors of a site on a device, keyed by their path in the specification tree."""
    return {path: artifact.stored_tensor(key).to(device) for path, key in keys(site, artifact.specs[site]).items()}


def dense_module(artifact: Artifact, site: str) -> nn.Linear:
    """The site as a dense model would hold it."""
    matrix, bias = artifact.expression(site).dense().to(artifact.dtype), bias_of(artifact, site)
    module = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None, device="meta")
    module.weight, module.bias = nn.Parameter(matrix.contiguous(), requires_grad=False), bias  # type: ignore[assignment]
    return module


def site_module(
    artifact: Artifact, site: str, mode: str, device: torch.device = CPU, stacked: bool = False
) -> nn.Module:
    """The site as `compress.load` builds it; for an expert stack in prepared mode, its decoded matrix alone."""
    if stacked and mode == PREPARED:
        return Matrix(artifact.expression(site).dense().to(device, artifact.dtype))
    module = CompressedLinear(artifact.specs[site], bias_of(artifact, site, device), artifact.dtype)
    module.fill(stored(artifact, site, device))
    module.prepare(artifact.dtype, lean=mode == LOW_MEMORY)
    return module


def bias_of(artifact: Artifact, site: str, device: torch.device = CPU) -> nn.Parameter | None:
    """The bias that belongs to a site's weight, or None."""
    name = tensor_of(site, artifact.specs[site]).removesuffix("weight") + "bias"
    if name not in artifact:
        return None
    return nn.Parameter(artifact.tensor(name).to(device, artifact.dtype), requires_grad=False)


def path_of(module: nn.Module, rows: int) -> str:
    """How a site's module computes for x with this many rows."""
    lowered = module.lowered if isinstance(module, CompressedLinear) else module
    return "decoded at each call" if lowered is None else path(lowered, rows)


def rotating(maps: Sequence[nn.Module], x: Tensor) -> Callable[[], object]:
    """A function that applies the next module of the rotation at each call."""
    turn = cycle(maps)
    return lambda: next(turn)(x)


def quartiles(values: Sequence[float]) -> Spread:
    """The median and the quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median=median, low=low, high=high)


def extent(values: Sequence[float]) -> Spread:
    """The median and the full range."""
    return Spread(median=statistics.median(values), low=min(values), high=max(values))


def held_bytes(model: nn.Module, device: torch.device | None = None) -> int:
    """Bytes that a loaded model or layer holds: parameters, buffers and packed copies; shared tensors count once.

    With `device`, counts only parameters, buffers and decoded stacks on that device, because stored tensors may be
    parked in host memory; packed copies always count.
    """
    tensors, packed = [*model.parameters(), *model.buffers()], 0
    for part in model.modules():
        if isinstance(part, (FewRows, IntegerProduct)):
            packed += nbytes(part.packed)
        if isinstance(part, Packed):
            packed += nbytes(part.form)
        if isinstance(part, CompressedExperts):
            tensors += part.decoded.values()
    there = [tensor for tensor in tensors if device in (None, tensor.device)]
    return packed + sum({tensor.data_ptr(): tensor.nbytes for tensor in there}.values())


def layer_sentences(timings: Sequence[LayerTiming]) -> list[str]:
    """One sentence for each layer that is slower than dense, and for each reason."""
    found: dict[tuple[str, str], list[LayerTiming]] = {}
    for timing in filter(lambda timing: timing.slower, timings):
        size = " x ".join(map(str, timing.layer.shape))
        who = f"{', '.join(timing.layer.names)} ({timing.layer.weight}, {size})"
        found.setdefault((who, reason(timing)), []).append(timing)
    return [
        f"{who}: slower than dense at {', '.join(f'{t.rows} ({1 / t.speedup.median:.2f}x)' for t in slow)} "
        f"row{'s' if [t.rows for t in slow] != [1] else ''}: {why}"
        for (who, why), slow in found.items()
    ]


def reason(timing: LayerTiming) -> str:
    """Why this path may cost more than a plain matrix product."""
    return REASONS.get(timing.path, SEVERAL)


def measure_generation(
    models: Mapping[str, Any], *, prompt: int = 64, new: int = 128, runs: int = 5
) -> list[GenerationTiming]:
    """Time greedy generation of `new` tokens after `prompt` random ones, batch size 1, alternating between the models.

    Each model runs `runs` times; the first run warms up and is not counted. Raises RecipeError if a model cannot
    generate this much.
    """
    for name, model in models.items():
        check_generates(name, model, prompt + new)
    decoders, ids_BT = [Decoder(model, prompt + new) for model in models.values()], {}
    for decoder in decoders:
        words = decoder.model.config.get_text_config(decoder=True).vocab_size
        ids_BT[decoder] = torch.randint(words, (1, prompt), generator=torch.Generator().manual_seed(0)).to(
            decoder.device
        )
        decoder.capture(ids_BT[decoder])
    split: dict[Decoder, list[tuple[float, float]]] = {decoder: [] for decoder in decoders}
    race(
        [lambda d=d: split[d].append(d.timed(ids_BT[d], new)) for d in decoders],  # type: ignore[misc]
        fewest=runs,
        most=runs,
    )
    times = [[read + steps for read, steps in split[decoder][1:]] for decoder in decoders]  # the first warmed up
    return [
        GenerationTiming(
            name=name,
            tokens_per_second=extent([new / t for t in taken]),
            speedup=extent([d / t for d, t in zip(times[0], taken, strict=True)]),
            prefill=extent([read for read, _ in split[decoder][1:]]),
            decode=extent([(new - 1) / steps for _, steps in split[decoder][1:]]),
            held_bytes=held_bytes(model, decoder.device),
            cache_bytes=decoder.cache_bytes(),
            captured=decoder.graph is not None,
        )
        for (name, model), decoder, taken in zip(models.items(), decoders, times, strict=True)
    ]


def generation_sentences(timings: Sequence[GenerationTiming]) -> list[str]:
    """Sentences on where a model does worse than the first: slower in every pair of runs, or larger in memory."""
    dense, *others = timings
    lines = []
    for found in others:
        if found.speedup.high < 1:
            lines.append(f"{found.name}: slower than dense in every pair of runs, {1 / found.speedup.median:.2f}x")
        if found.held_bytes > dense.held_bytes:
            lines.append(
                f"{found.name}: holds {found.held_bytes / dense.held_bytes:.2f}x the memory of dense: decoded or "
                "packed matrices are kept beside the stored bits; low memory keeps only the stored bits"
            )
    return lines


def check_generates(name: str, model: Any, tokens: int) -> None:
    """Raise RecipeError if a model cannot generate, or has a context shorter than `tokens`."""
    if not model.can_generate():
        raise RecipeError(f"--generate: {name} is a {type(model).__name__}, which cannot generate text")
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        raise RecipeError(f"--generate: {tokens} tokens of prompt and answer; {name} allows at most {longest}")


__all__ = [
    "FEWEST", "GenerationTiming", "Layer", "LayerTiming", "Spread", "conditions", "generation_sentences",
    "layer_sentences", "measure_generation", "measure_layers", "race",
    ]  # fmt: skip
