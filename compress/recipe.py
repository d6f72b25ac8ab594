"""A recipe: what to do to a model, as data; it converts between YAML and dataclasses, strictly in both directions.

YAML is read by version 1.2 rules (`2:4` and `off` are strings, `1e-2` is a number). Anchors, aliases and tags are
refused, and size and depth are limited. An error names its path: `passes[1].gptq.bits`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent, CollectionStartEvent, DocumentStartEvent, ScalarEvent

from compress.errors import RecipeError, nearest, why
from compress.kv import Kept, read_kept, written
from compress.options import build, check_options, validators
from compress.passes import PASSES, Pass, Reshape, SitePass, governed, load_plugins, windows_at_once

LARGEST = 64 * 1024
DEEPEST = 8
MOST = 64  # passes; a recipe that needs more should define a pass of its own
RECIPES = Path(__file__).parent / "_recipes"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Which tokens the statistics are measured on. This matters more than the method, so every result names it."""

    data: Annotated[
        str,
        Field(
            description="text, mixed (half of it questions and contexts), a .txt or .jsonl file, a datasets folder, "
            "or hub:NAME or hub:NAME:CONFIGURATION"
        ),
    ] = "mixed"
    samples: Annotated[int, Field(ge=1, le=65536, description="number of windows")] = 128
    length: Annotated[
        int | None, Field(ge=8, le=1 << 20, description="tokens per window; default: what the model takes, up to 2048")
    ] = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63, description="seed that selects the windows")] = 0
    layout: Annotated[
        Literal["packed", "documents"],
        Field(
            description="packed: windows from documents joined end to end; documents: one document each, never padded"
        ),
    ] = "packed"
    chat: Annotated[bool, Field(description="put each document through the tokenizer's chat template")] = False
    field: Annotated[
        str | None,
        Field(
            description="key or column that holds the documents, for JSON lines and datasets; default: text, with "
            "chat: messages"
        ),
    ] = None
    split: Annotated[str, Field(description="split of a dataset")] = "train"

    def __post_init__(self) -> None:
        check_options(self, "calibration")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits beyond which a run counts as failed."""

    max_untouched: Annotated[
        float, Field(ge=0, le=1, description="share of the blocks' matrix parameters that no pass could reach")
    ] = 0.02
    max_starved: Annotated[
        float, Field(ge=0, le=1, description="share of the experts' matrices that too few calibration tokens reach")
    ] = 0.5
    max_fallbacks: Annotated[
        int, Field(ge=0, description="number of sites where a pass fell back to something weaker")
    ] = 0

    def __post_init__(self) -> None:
        check_options(self, "limits")


@dataclass(frozen=True, kw_only=True)
class Accept:
    """How much accuracy may be lost: the lower confidence bound of each task's change must not be below -max_drop."""

    suite: Annotated[
        Literal["facts", "kick", "kick_mini"],
        Field(description="tasks: facts is built in, kick and kick_mini use real data"),
    ] = "facts"
    data_dir: Annotated[str | None, Field(description="for kick and kick_mini: the folder with the data")] = None
    max_drop: Annotated[
        float, Field(gt=0, le=1, description="largest accepted drop in accuracy, absolute (0.05 is 5 points)")
    ] = 0.05
    confidence: Annotated[float, Field(gt=0.5, lt=1, description="confidence level of the bound")] = 0.95

    def __post_init__(self) -> None:
        check_options(self, "accept")


@dataclass(frozen=True, kw_only=True)
class Delta:
    """The base that the model was fine-tuned from: only the difference from it is then compressed and stored.

    The `base` itself is not stored. By default a tensor that no pass rewrites is stored whole if it differs from the
    base's; the other options change that.
    """

    base: Annotated[str, Field(min_length=1, description="model folder, or `builtin`")]
    embeddings: Annotated[
        Literal["own", "int8", "base"],
        Field(
            description="own: as fine-tuned; int8: the difference in 8 bits, with one scale per row; base: the base's"
        ),
    ] = "own"
    head: Annotated[
        Literal["own", "int8", "base"],
        Field(description="the same for an output head that is not tied to the embedding"),
    ] = "own"
    others: Annotated[
        Literal["own", "base"],
        Field(description="own or base, for norms, biases and everything else that no pass rewrites"),
    ] = "own"
    vocabulary: Annotated[
        Literal["keep", "refuse"],
        Field(description="whether to keep or refuse a vocabulary of another size than that of the base"),
    ] = "keep"

    def __post_init__(self) -> None:
        check_options(self, "delta")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The passes in the order they run, with calibration, limits and what else belongs to the result.

    Raises RecipeError, on construction, for values or combinations that no run could carry out.
    """

    passes: tuple[Pass, ...]
    model: str | None = None
    calibration: Calibration = field(default_factory=Calibration)
    ordering: Annotated[
        Literal["site", "block", "dense"],
        Field(
            description="when statistics are measured: for each distinct input, for each block as papers do, or in "
            "the dense model throughout"
        ),
    ] = "site"
    limits: Limits = field(default_factory=Limits)
    accept: Accept | None = None
    kv: Kept | None = None
    delta: Delta | None = None

    def __post_init__(self) -> None:
        if not self.passes:
            raise RecipeError("passes: a recipe needs at least one pass")
        for step in self.passes:
            if not isinstance(step, Pass):
                raise RecipeError(f"passes: {step!r} is not a pass; give instances such as RTN(bits=4)")
        if self.ordering not in ("site", "block", "dense"):
            raise RecipeError(f"ordering: {self.ordering!r} is not allowed; it must be site, block or dense")
        if self.kv and not self.weight_passes:
            raise RecipeError(
                "kv: needs a pass that rewrites weights, or else the folder names no method; pass kv to compress.load "
                "instead"
            )
        if self.kv == "latent" and not any(step.gives == "factored" for step in self.weight_passes):
            raise RecipeError("kv: latent: needs a pass that factors keys and values, such as transmla or svd-llm")
        self._check_order()
        self._check_delta()
        governed(self.passes)
        windows_at_once(self.passes)

    def _check_order(self) -> None:
        """Raise RecipeError if a pass that changes the model's shape comes after one that does not."""
        first = next((i for i, step in enumerate(self.passes) if not isinstance(step, Reshape)), len(self.passes))
        for i, step in enumerate(self.passes[:first]):
            if isinstance(step, Reshape):
                try:
                    step.check(self.passes[i + 1 :])
                except RecipeError as error:
                    raise RecipeError(f"passes[{i}].{error}") from error
        for i, step in enumerate(self.passes[first:], first):
            if isinstance(step, Reshape):
                raise RecipeError(
                    f"passes[{i}].{step.name}: it changes the shape of the model and must come before "
                    f"passes[{first}].{self.passes[first].name}"
                )

    def _check_delta(self) -> None:
        """Raise RecipeError for a pass or an option that cannot be applied to the difference from a base."""
        for i, step in enumerate(self.passes if self.delta else ()):
            if isinstance(step, Reshape) or (isinstance(step, SitePass) and not step.on_differences):
                raise RecipeError(f"passes[{i}].{step.name}: cannot be applied to the difference from a base")
            if getattr(step, "inputs", "full") != "full":
                raise RecipeError(f"passes[{i}].{step.name}.inputs: the base reads the same input; it must be full")
        if self.delta and self.kv:
            raise RecipeError("kv: a delta has no key-value cache of its own; leave kv out")

    @property
    def reshapes(self) -> tuple[Reshape, ...]:
        """The passes that change the model's shape; they come first."""
        return tuple(step for step in self.passes if isinstance(step, Reshape))

    @property
    def weight_passes(self) -> tuple[SitePass, ...]:
        """The passes that rewrite weights, in order."""
        return tuple(step for step in self.passes if isinstance(step, SitePass))

    def needs_data(self) -> bool:
        """Whether any pass measures the model on calibration tokens."""
        return any(step.requires or isinstance(step, Reshape) for step in self.passes)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data with every option written out."""
        data: dict[str, Any] = {"model": self.model} if self.model else {}
        data |= {"calibration": asdict(self.calibration)} if self.needs_data() else {}
        data |= {"ordering": self.ordering, "passes": [{step.name: step.options()} for step in self.passes]}
        data["limits"] = asdict(self.limits)
        data |= {"kv": written(self.kv)} if self.kv else {}
        data |= {"delta": asdict(self.delta)} if self.delta else {}
        return data | ({"accept": asdict(self.accept)} if self.accept else {})

    def to_yaml(self) -> str:
        """The recipe as YAML that `load` reads back to an equal recipe."""
        yaml: Any = YAML(typ="safe", pure=True)
        yaml.default_flow_style = None  # innermost collections inline, all others in block style
        yaml.sort_base_mapping_type_on_output = False
        text = io.StringIO()
        yaml.dump(self.to_dict(), text)
        return text.getvalue()


KNOWN = tuple(f.name for f in fields(Recipe))
KEYS: tuple[tuple[str, Any], ...] = (
    ("calibration", Calibration),
    ("limits", Limits),
    ("accept", Accept),
    ("delta", Delta),
)


def parse(text: str, where: str = "recipe") -> Any:
    """Plain data from strict YAML 1.2; raises RecipeError that names the line."""
    if len(text) > LARGEST:
        raise RecipeError(f"{where}: larger than {LARGEST} bytes")
    yaml = YAML(typ="safe", pure=True)
    yaml.version = (1, 2)
    try:
        depth = 0
        for event in yaml.parse(io.StringIO(text)):
            started = isinstance(event, CollectionStartEvent)
            depth += started - (type(event).__name__ in ("MappingEndEvent", "SequenceEndEvent"))
            tagged = isinstance(event, (ScalarEvent, CollectionStartEvent)) and event.tag is not None
            if isinstance(event, DocumentStartEvent) and event.version not in (None, (1, 2)):
                raise RecipeError(f"{where}: only YAML 1.2 is supported, the file asks for {event.version}")
            if isinstance(event, AliasEvent) or getattr(event, "anchor", None) or tagged:
                raise RecipeError(
                    f"{where}: anchors, aliases and tags are not allowed (line {event.start_mark.line + 1})"
                )
            if depth > DEEPEST:
                raise RecipeError(f"{where}: nested deeper than {DEEPEST} (line {event.start_mark.line + 1})")
            if isinstance(event, ScalarEvent) and not event.value.isprintable():
                raise RecipeError(
                    f"{where}: {event.value!r} contains unprintable characters (line {event.start_mark.line + 1})"
                )
        return yaml.load(io.StringIO(text))
    except ValueError as error:  # for a scalar that looks like a number or a date but is none
        raise RecipeError(f"{where}: not valid YAML: {error}") from error
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        problem = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise RecipeError(f"{where}: not valid YAML: {problem}{line}") from error


def check_keys(data: Any, where: str) -> None:
    """Raise RecipeError, naming `where`, unless `data` is a mapping whose keys a recipe has."""
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where}: expected a mapping with `passes`")
    for key in data:
        if key not in KNOWN:
            raise RecipeError(f"{where}: unknown key {key!r}{nearest(str(key), KNOWN)}")


def from_dict(data: Any) -> Recipe:
    """A recipe from plain data; raises RecipeError that names the path of what is wrong."""
    check_keys(data, "recipe")
    steps = data.get("passes")
    if not isinstance(steps, Sequence) or isinstance(steps, str) or not steps:
        raise RecipeError("passes: expected a list with at least one pass")
    if len(steps) > MOST:
        raise RecipeError(f"passes: {len(steps)} are too many; at most {MOST} are allowed")
    model = data.get("model")
    if model is not None and not isinstance(model, str):
        raise RecipeError(f"model: expected a folder or `builtin`, got {model!r}")
    parts: dict[str, Any] = {key: build(kind, data[key], key) for key, kind in KEYS if data.get(key) is not None}
    if data.get("kv") is not None:
        parts["kv"] = read_kept(data["kv"])
    if "ordering" in data:
        parts["ordering"] = data["ordering"]
    return Recipe(passes=tuple(read_pass(step, f"passes[{i}]") for i, step in enumerate(steps)), model=model, **parts)


def read_pass(step: Any, where: str) -> Pass:
    """One pass from `name: {options}` or a bare name."""
    if isinstance(step, str):
        step = {step: {}}
    if not isinstance(step, Mapping) or len(step) != 1:
        raise RecipeError(f"{where}: expected one `name: {{options}}`, got {step!r}")
    ((name, options),) = step.items()
    load_plugins()
    if name not in PASSES:
        raise RecipeError(f"{where}: unknown pass {name!r}{nearest(str(name), PASSES)}")
    try:
        return build(PASSES[name], {} if options is None else options, f"{where}.{name}")
    except RecipeError as error:
        text = str(error)
        raise RecipeError(text if text.startswith(where) else f"{where}.{text}") from error


def load(recipe: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """A recipe from a file, or the packaged one of this name, with `path=value` changes applied.

    Paths are dotted. A pass is addressed by its index, `passes.0.sparsity=0.6`, or as error messages write it,
    `passes[0].wanda.sparsity=0.6`. Raises RecipeError if the file is missing or unreadable, or its content is invalid.
    """
    path = find(recipe)
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        text = content.decode("utf-8") if len(content) <= LARGEST else " " * len(content)  # `parse` refuses it
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {why(error)}") from error
    data = parse(text, str(path))
    check_keys(data, str(path))
    for change in changes:
        apply_change(data, change)
    return from_dict(data)


def model_of(recipe: Recipe, given: str | Path | None) -> str | Path:
    """The model that was given, else the one the recipe names; raises RecipeError if there is neither."""
    found = given if given is not None else recipe.model
    if found is None:
        raise RecipeError(
            "model: the recipe names no model and none was given; give a folder, or `builtin` (option: --model FOLDER)"
        )
    return found


def find(recipe: str | Path) -> Path:
    """The file that `recipe` names: a path, or the name of a packaged recipe; raises RecipeError if there is none."""
    path = Path(recipe)
    try:
        if path.is_file():
            return path
    except (OSError, ValueError) as error:  # a name too long, a NUL
        raise RecipeError(f"no recipe file at {str(recipe)[:60]!r}: {why(error)}") from error
    known = packaged()
    if path.parent == Path() and path.name.removesuffix(".yaml") in known:
        return known[path.name.removesuffix(".yaml")]
    if str(recipe) and path.is_dir():
        model = f"; to name a model, use --model {recipe}" if (path / "config.json").is_file() else ""
        raise RecipeError(f"no recipe file at {str(recipe)!r}, which is a folder{model}")
    hint = nearest(path.stem, known, "; `compress recipes` lists the packaged recipes")
    raise RecipeError(f"no recipe file at {str(recipe)!r}{hint}")


def packaged() -> dict[str, Path]:
    """The packaged recipes, name -> file: inside an installed wheel, or beside the package in a checkout."""
    folder = RECIPES if RECIPES.is_dir() else Path(__file__).parent.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def apply_change(data: Any, change: str) -> None:
    """Apply one `path=value` change to parsed recipe data, in place; raises RecipeError if the path leads nowhere."""
    path, equals, value = change.partition("=")
    if not equals:
        raise RecipeError(f"--set {change!r}: expected path=value, such as passes.0.sparsity=0.6")
    read = value if value.startswith(("*", "&", "!")) else parse(value, f"--set {path}")  # e.g. a glob, not YAML
    put(data, path, read, f"--set {path}")


def put(data: Any, path: str, value: Any, where: str) -> None:
    """Set one dotted path of parsed recipe data, in place; raises RecipeError, naming `where`, if it leads nowhere."""
    if not isinstance(data, dict):
        raise RecipeError("recipe: expected a mapping with `passes`")
    keys = re.sub(r"\[(\d+)\]", r".\1", path).split(".")  # errors say `passes[0]`
    if keys[0] not in KNOWN:
        raise RecipeError(f"{where}: unknown key {keys[0]!r}{option(data, keys[0])}")
    here: Any = data
    name = ""  # of the pass whose options are here
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(here, list):
            if not (key.isascii() and key.isdigit()) or int(key) >= len(here):
                there = "is 1" if len(here) == 1 else f"are {len(here)}"
                raise RecipeError(f"{where}: no item {key!r}; there {there}, numbered from 0")
            if last:
                raise RecipeError(f"{where}: name one of its options, such as {path}.sparsity")
            name, here = open_step(here, int(key))
        elif key == name and not last:  # as errors say it: `passes[0].gptq.bits`
            name = ""
        elif last:
            here[key] = value
        else:
            if here.get(key) is None:  # a key with no value counts as a key left out
                here[key] = {}
            here = here[key]
        if not isinstance(here, (dict, list)):
            raise RecipeError(f"{where}: {key!r} has no options")


def option(data: Any, name: str) -> str:
    """`; did you mean ...?` with the first pass or section that has an option of this name, else the nearest key."""
    load_plugins()
    steps = data["passes"] if isinstance(data.get("passes"), list) else []
    names = [str(next(iter(step), "")) if isinstance(step, dict) else str(step) for step in steps]
    parts = [(f"passes.{i}", PASSES[known]) for i, known in enumerate(names) if known in PASSES]
    found = [f"{part}.{name}" for part, kind in (*parts, *KEYS) if name in validators(kind)]
    return f"; did you mean {found[0]!r}?" if found else nearest(name, KNOWN)


def open_step(steps: list[Any], index: int) -> tuple[str, Any]:
    """The name of a step and its options, which become a mapping in place; ("", None) if `steps[index]` is no step."""
    step = steps[index]
    if isinstance(step, str):
        step = steps[index] = {step: {}}
    if not isinstance(step, dict) or len(step) != 1:
        return "", None
    ((name, options),) = step.items()
    if options is None:
        options = step[name] = {}
    return str(name), options
