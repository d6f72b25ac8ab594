"""Compress: turn a Hugging Face language model into a smaller one and prove what was lost.

Importing the package is cheap: torch is imported with the first name that needs it, and transformers, triton,
bitsandbytes and lm-eval when they are first used. The one side effect is that the quantization method `compress` will
be registered with transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

__version__ = "0.1.0"

from compress.errors import (
    AcceptanceError,
    ArtifactError,
    CalibrationError,
    CompressError,
    PlanError,
    RecipeError,
    UnsupportedWeight,
    VerificationError,
)  # fmt: skip
from compress.events import Event
from compress.runtime.hf import register_when_needed

if TYPE_CHECKING:
    from compress.extraction import Extracted
    from compress.job import Report
    from compress.kv import KV
    from compress.merging import Merged
    from compress.model.site import Site
    from compress.passes import (
        ALPS,
        ASVD,
        AWQ,
        DARE,
        FLAP,
        FP8,
        GPTQ,
        HQQ,
        LRQ,
        MXFP4,
        NF4,
        NVFP4,
        OATS,
        OWL,
        RIA,
        RPCA,
        RTN,
        SVD,
        SVDLLM,
        VQ,
        Auto,
        BitDelta,
        BlockPass,
        BlockQuantizer,
        Budget,
        Codec,
        Corrector,
        DeltaCoMe,
        DSnoT,
        Factorizer,
        FineTune,
        FlexRound,
        Global,
        GridQuantizer,
        Int8,
        LoRA,
        Magnitude,
        Pass,
        PassManager,
        Pruner,
        Quantizer,
        QuaRot,
        Ranks,
        Realign,
        ReALLM,
        Reconstruct,
        Refiner,
        Repair,
        Rotate,
        Sensitivity,
        ShortGPT,
        SitePass,
        SliceGPT,
        SLiM,
        SmoothQuant,
        SparseGPT,
        Swaps,
        TransMLA,
        Wanda,
        WandaSP,
        WeightPass,
        WeLore,
    )
    from compress.planning import Plan
    from compress.recipe import Accept, Calibration, Delta, Limits, Recipe
    from compress.runtime.tenants import Tenants
    from compress.weights import (
        NM,
        Codebook,
        Dense,
        Diagonal,
        External,
        Grid,
        Hadamard,
        Masked,
        Nested,
        Permutation,
        Product,
        Quantized,
        Scaled,
        Signs,
        Sum,
        Weight,
        pattern,
    )  # fmt: skip

register_when_needed()
# modules that define the names of `__all__` which are imported above for type checkers only; the cheapest come first
HOMES = ("compress.kv", "compress.recipe", "compress.weights", "compress.passes", "compress.model.site")


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` that needs torch, or a submodule of the package, on first access."""
    if name in __all__:
        for home in map(import_module, HOMES):
            if hasattr(home, name):
                return globals().setdefault(name, getattr(home, name))
    elif not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def run(
    model: str | Path | None,
    recipe: Recipe | str | Path | Sequence[Pass],
    out: str | Path,
    *,
    calibration: Calibration | None = None,
    emit: Callable[[Event], None] | None = None,
    device: str = "cpu",
    force: bool = False,
    **options: Any,
) -> Report:
    """Compress `model` by `recipe` into the folder `out`, verify what was written, and return a report of the run.

    `model` is a model folder, `builtin`, or None for the model that the recipe names. `recipe` is a Recipe, a recipe
    file, the name of a packaged recipe, or a list of passes. `calibration` replaces the recipe's, `emit` is called
    with every event, `device` is `cpu`, `cuda` or `cuda:N`, and `force` allows an earlier artifact in `out` to be
    replaced. `options` are the others of `compress.driver.compress`: `shard_size` (bytes), `offload`, `dequantize` and
    `restart`.

    The same call after an interruption resumes after the last finished block. Processes started by torchrun share the
    work, and each returns the report.

    Raises subclasses of CompressError for everything that a user can cause, and leaves `out` as it was before. The
    exception is the recipe's `accept` rule, which is checked once the artifact is in place: if it is broken,
    AcceptanceError is raised and the artifact stays in `out` for inspection.

    Example:
        compress.run("builtin", [Wanda(sparsity="2:4"), GPTQ(bits=4, target="original")], "half")
    """
    from dataclasses import replace

    from compress import driver
    from compress import recipe as recipes
    from compress.recipe import Recipe
    from compress.team import joined

    if isinstance(recipe, (str, Path)):
        recipe = recipes.load(recipe)
    elif not isinstance(recipe, Recipe):
        if not isinstance(recipe, (list, tuple)):
            raise RecipeError(f"recipe: {recipe!r} is not a Recipe, a recipe file or a list of passes")
        recipe = Recipe(passes=tuple(recipe))
    if calibration is not None:
        recipe = replace(recipe, calibration=calibration)
    source = recipes.model_of(recipe, model)
    if recipe.accept:
        require_evals()
    with joined(device) as team:
        report = driver.compress(
            source, recipe, out, emit=emit or (lambda event: None), device=device, force=force, **options
        )
        if recipe.accept:
            rule, base = recipe.accept, recipe.delta.base if recipe.delta else None
            team.first(lambda: accept(report.out, source, rule, team.placed(device), base))
    return report


def plan_run(model: str | Path | None, recipe: Recipe | str | Path, **options: Any) -> Plan:
    """Predict what `run` would write and need (bytes, memory, disk, time) from headers alone.

    Takes the arguments of `compress.planning.plan_run`, which says what they mean. `Plan.check` raises PlanError if
    something will not fit; this function raises CompressError subclasses for what `run` would refuse at its start.
    """
    from compress.planning import plan_run as say

    return say(model, recipe, **options)


def load(
    path: str | Path,
    *,
    base: str | Path | None = None,
    low_memory: bool = False,
    kv: KV | Mapping[str, Any] | Literal["recipe", "latent"] | None = "recipe",
    **options: Any,
) -> Any:
    """Load the model in the folder `path` and return it as a transformers model in eval mode, ready to run.

    By default each weight is decoded once, for speed: memory is that of the dense model plus the stored bits. With
    `low_memory`, only the stored bits are kept and each weight is decoded whenever it is used.

    `kv` chooses the key-value cache: "recipe" (the default) takes what the recipe says, a KV or a mapping such as
    {"bits": 4} gives the options of a quantized cache, "latent" caches the latent vectors of factored key and value
    projections, and None keeps transformers' plain cache.

    A delta is loaded as the plain fine-tuned model and needs its `base`, unless that is the built-in model. `options`
    are passed to `from_pretrained` of the Auto class that builds the architecture.

    Raises ArtifactError if the folder cannot be loaded, holds pickled weights or lacks its base, and RecipeError if
    `kv` does not fit the model or `low_memory` is asked for a delta.

    Example:
        model = compress.load("half", kv={"bits": 4})
        model.generate(**tokenizer("Hello", return_tensors="pt"))
    """
    from transformers import AutoConfig

    from compress.artifact import Artifact, base_of, is_artifact
    from compress.errors import first_line, out_of_memory
    from compress.kv import read_kept, written
    from compress.model.architecture import auto_class, check_sizes, without_code
    from compress.model.source import BUILTIN, Checkpoint, locate, read_json
    from compress.runtime.delta import fine_tuned
    from compress.runtime.hf import register
    from compress.runtime.kv import attach

    cache = kv if kv is None or kv == "recipe" else read_kept(kv)
    register()
    folder = locate(path)
    below = base_of(folder, None if base is None else locate(base), BUILTIN)
    if base is not None and below is None:
        raise ArtifactError(f"{folder}: is a whole model, not a delta; it has no base")
    raw = {k: v for k, v in read_json(folder / "config.json", "config.json").items() if k != "auto_map"}
    if raw != without_code(raw):
        raise ArtifactError(f"{folder}: its config.json names an attention or experts implementation; remove it")
    options = {"trust_remote_code": False, "use_safetensors": True, **options}
    try:
        read = Artifact(folder, below) if is_artifact(folder) else None  # reports errors before transformers does
        packed = read is not None and read.packed and not read.is_delta
        check_sizes(raw, (read or Checkpoint(folder)).shapes())
        for site in read.specs if read is not None else ():
            read.check(site)  # type: ignore[union-attr]
        if read is not None and read.is_delta:
            if low_memory:
                raise RecipeError("low_memory: a delta is loaded as a plain model; `load_tenants` keeps it packed")
            model = fine_tuned(read, options)
        else:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            if packed:
                config.quantization_config["low_memory"] = low_memory
                if cache != "recipe":
                    config.quantization_config["kv"] = written(cache) if cache else None
            options |= {"config": config, "local_files_only": True, "output_loading_info": True}
            model, found = auto_class(config).from_pretrained(folder, **options)
            for what in ("missing", "mismatched"):  # transformers initializes these at random and only warns
                if keys := sorted(map(str, found[f"{what}_keys"])):
                    raise ArtifactError(f"{folder}: {len(keys)} tensors are {what}, first {keys[0]}")
    except CompressError as error:
        if isinstance(error, ArtifactError) and str(folder) not in str(error):
            raise ArtifactError(f"{folder}: {error}") from error
        raise
    except Exception as error:  # transformers and safetensors raise many types for a damaged folder
        if out_of_memory(error):
            raise
        raise ArtifactError(f"{folder}: cannot be loaded: {first_line(error)}") from error
    if not packed and cache and cache != "recipe":
        attach(model, cache)
    return model.eval()


def extract(finetuned: str | Path, base: str | Path, out: str | Path, **options: Any) -> Extracted:
    """Store the difference between a fine-tuned model and its base in the folder `out`, and return what was written.

    Takes the arguments of `compress.extraction.extract`, which says what they mean. Raises CompressError subclasses;
    `out` is then as it was before.

    Example:
        compress.extract("finetuned", "base", "delta", bits=1.0)
    """
    from compress.extraction import extract as run

    return run(finetuned, base, out, **options)


def merge(
    base: str | Path, models: Mapping[str, str | Path] | Sequence[str | Path], out: str | Path, **options: Any
) -> Merged:
    """Merge fine-tunes of `base`, given as whole models or as deltas, into the folder `out`; return what was written.

    Takes the arguments of `compress.merging.merge`, which says what they mean. Raises CompressError subclasses; `out`
    is then not created.

    Example:
        compress.merge("base", {"math": "math-delta", "code": "code-model"}, "merged", method="ties")
    """
    from compress.merging import merge as run

    return run(base, models, out, **options)


def load_tenants(
    base: str | Path, deltas: Mapping[str, str | Path], budget: int | None = None, **options: Any
) -> Tenants:
    """Load a base model once, with its fine-tunes by name, so that one batch may mix requests for all of them.

    Fine-tunes are deltas or LoRA adapters. Takes the arguments of `compress.tenants.load_tenants`, which says what they
    mean. Raises ArtifactError for a fine-tune that does not belong to the base, PlanError for one that alone exceeds
    `budget` (bytes).

    Example:
        tenants = compress.load_tenants("base", {"math": "math-delta", "code": "code-delta"}, budget=2 * 10**9)
    """
    from compress.tenants import load_tenants as load_them

    return load_them(base, deltas, budget, **options)


def explain(layer: Any, rows: int, **options: Any) -> str:
    """Say in a sentence which code path a layer of a loaded model takes for `rows` rows of input, and why.

    Takes the arguments of `compress.runtime.explain.explain`, which says what they mean. Raises RecipeError for fewer
    than one row, or for a module that is not compressed.
    """
    from compress.runtime.explain import explain as say

    return say(layer, rows, **options)


def require_evals() -> None:
    """Raise RecipeError if the extra `eval` is not installed."""
    missing = [name for name in ("lm_eval", "datasets") if find_spec(name) is None]
    if missing:
        raise RecipeError(f"evaluation needs {', '.join(missing)}: pip install {' '.join(missing)}")


def evaluate(paths: str | Path | list[str | Path], base: str | Path | None = None, **options: Any) -> Any:
    """Measure what compressed models still know, and compare them with the dense model.

    Returns a list of `compress_evals.Results`: first that of the dense `base`, then one for each folder in `paths`.
    The result of a folder has `.vs`, a Comparison with intervals and verdicts. `base` defaults to `builtin` if the
    (first) artifact was made from that. `options` are those of `compress_evals.evaluate_folders`, such as `suite`,
    `limit` and `out`.

    Raises RecipeError if the extra `eval` is not installed or a base is missing, ArtifactError for folders that cannot
    be read or compared.

    Example:
        dense, half = compress.evaluate("half")
    """
    require_evals()
    from compress_evals import evaluate_folders

    return evaluate_folders(paths if isinstance(paths, list) else [paths], base, **options)


def accept(
    path: str | Path, base: str | Path, rule: Accept, device: str = "cpu", delta_base: str | Path | None = None
) -> None:
    """Evaluate the artifact in `path` against the dense model `base`, and raise AcceptanceError if `rule` is broken.

    The rule is broken if, at its confidence, a task may have lost more accuracy than `rule.max_drop`. For a delta,
    `delta_base` is the base that it is added to. Needs the extra `eval`. The artifact is kept in any case.
    """
    from compress_evals import accept as broken

    below: dict[str, Any] = {} if delta_base is None else {"delta_base": delta_base}
    if rule.suite != "facts":
        below |= {"suite": rule.suite, "data_dir": None if rule.data_dir is None else Path(rule.data_dir)}
    versus = evaluate(path, base, device=device, **below)[1].vs
    failures = broken(versus, rule.max_drop, rule.confidence)
    if failures:
        raise AcceptanceError(f"{path} is kept but not accepted: {'; '.join(failures)}")


__all__ = [
    "ALPS",
    "ASVD",
    "AWQ",
    "DARE",
    "FLAP",
    "FP8",
    "GPTQ",
    "HQQ",
    "KV",
    "LRQ",
    "MXFP4",
    "NF4",
    "NM",
    "NVFP4",
    "OATS",
    "OWL",
    "RIA",
    "RPCA",
    "RTN",
    "SVD",
    "SVDLLM",
    "VQ",
    "Accept",
    "AcceptanceError",
    "ArtifactError",
    "Auto",
    "BitDelta",
    "BlockPass",
    "BlockQuantizer",
    "Budget",
    "Calibration",
    "CalibrationError",
    "Codebook",
    "Codec",
    "CompressError",
    "Corrector",
    "DSnoT",
    "Delta",
    "DeltaCoMe",
    "Dense",
    "Diagonal",
    "Event",
    "External",
    "Factorizer",
    "FineTune",
    "FlexRound",
    "Global",
    "Grid",
    "GridQuantizer",
    "Hadamard",
    "Int8",
    "Limits",
    "LoRA",
    "Magnitude",
    "Masked",
    "Nested",
    "Pass",
    "PassManager",
    "Permutation",
    "PlanError",
    "Product",
    "Pruner",
    "QuaRot",
    "Quantized",
    "Quantizer",
    "Ranks",
    "ReALLM",
    "Realign",
    "Recipe",
    "RecipeError",
    "Reconstruct",
    "Refiner",
    "Repair",
    "Rotate",
    "SLiM",
    "Scaled",
    "Sensitivity",
    "ShortGPT",
    "Signs",
    "Site",
    "SitePass",
    "SliceGPT",
    "SmoothQuant",
    "SparseGPT",
    "Sum",
    "Swaps",
    "TransMLA",
    "UnsupportedWeight",
    "VerificationError",
    "Wanda",
    "WandaSP",
    "WeLore",
    "Weight",
    "WeightPass",
    "__version__",
    "accept",
    "evaluate",
    "explain",
    "extract",
    "load",
    "load_tenants",
    "merge",
    "pattern",
    "plan_run",
    "run",
]  # fmt: skip
