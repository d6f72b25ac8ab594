"""The schemas of an artifact's metadata in config.json and compress.json, checked before any of it is used.

Not here: what is done with the metadata (`artifact.py`) and the tree of a weight, which `weights/pack.py` checks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from compress.errors import ArtifactError, visible


class Tree(TypedDict):
    """The root of a weight's tree; its `kind` decides which other fields it must have."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    kind: str
    shape: tuple[int, int]


class SiteSpec(TypedDict):
    """The entry of one site in config.json.

    `tree` is its expression, `tensors` its stored tensors in order, `name` a readable form, and `transposed` says that
    the source stores [in, out]. `tensor` is the source tensor, if it is not `<site>.weight`, and `expert` the index in
    it, if it holds a stack of experts. `inputs` is the format that the module rounds its input to. `shared` maps paths
    to the keys of another site's tensors.
    """

    tree: Tree
    tensors: list[tuple[str, str, list[int]]]
    name: str
    transposed: bool
    tensor: NotRequired[str]
    expert: NotRequired[int]
    inputs: NotRequired[Literal["int8", "fp8"]]
    shared: NotRequired[dict[str, str]]


class Pin(TypedDict):
    """The entry in config.json for the base that a delta belongs to: its name and its fingerprint."""

    name: str
    sha256: str


class SiteRecord(TypedDict):
    """The ledger row of one site in compress.json; passes may add more fields.

    `errors` are the weight errors after each pass, if there were several; `damping_failed` are the values tried before
    `damping`; `dead_inputs` is the number of inputs that no calibration token used.
    """

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    weight: str
    bytes: int
    weight_error: float
    output_error: float | None
    tokens: int
    fallbacks: list[tuple[str, str]]
    starved: NotRequired[list[str]]
    dense_bytes: NotRequired[int]
    errors: NotRequired[list[tuple[str, float]]]
    damping: NotRequired[float]
    damping_failed: NotRequired[list[float]]
    dead_inputs: NotRequired[int]


class Versions(TypedDict):
    """The versions of the software that made an artifact."""

    compress: str
    python: str
    torch: str
    transformers: str
    safetensors: str


class Source(TypedDict):
    """The dense model an artifact was made from: sha256 by shard, and the format it was decoded from, if any."""

    name: str
    family: str
    tested_family: bool
    sha256: dict[str, str]
    decoded_from: NotRequired[str]


class Calibrated(TypedDict):
    """The calibration; `windows_at_once`, given if memory ran out, is the largest number that then ran at once."""

    name: str
    sha256: str
    tokens: int
    windows_at_once: NotRequired[int]


class Sizes(TypedDict):
    """The bytes of all tensors after and before, and the bits a weight of the blocks' linear maps."""

    bytes: int
    source_bytes: int
    bits_per_weight: float


class Probe(TypedDict):
    """Mean KL divergence to the dense model in nats, on tokens that no statistic saw."""

    tokens: int
    kl: float


class Reshaping(TypedDict):
    """A change of the model's shape by the pass `step`: a readable `change`, and details that each pass defines."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    step: str
    change: str


class Attached(TypedDict):
    """The LoRA adapter that a delta was made from, or that became part of an artifact: name, sha256 of its tensors."""

    name: str
    sha256: str


class Provenance(TypedDict):
    """The content of compress.json: how the artifact was made, and the sha256 of every other file.

    `sha256` is the hash of all other fields, computed by `artifact.seal`.
    For a delta, `base` names its base, `cast` gives the dtype of tensors that the base holds in another one, and
    `base_files` are the companion files that it shares with its base, which holds the same bytes.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    versions: Versions
    source: Source
    machine: dict[str, Any]
    recipe: str
    calibration: Calibrated
    sizes: Sizes
    probe: Probe
    reshaped: NotRequired[list[Reshaping]]
    base: NotRequired[Pin]
    adapter: NotRequired[Attached]
    cast: NotRequired[dict[str, Literal["F64", "F32", "F16", "BF16"]]]
    base_files: NotRequired[dict[str, str]]
    sites: dict[str, SiteRecord]
    untouched: dict[str, tuple[int, str]]
    tensors: dict[str, list[int]]
    files: dict[str, str]
    sha256: NotRequired[str]


SPECS = TypeAdapter(dict[str, SiteSpec])
PINS = TypeAdapter(Pin)
PROVENANCES = TypeAdapter(Provenance)


def checked(kind: TypeAdapter[Any], value: Any, where: str) -> dict[str, Any]:
    """The value, if it matches the schema; raises ArtifactError that names the first field that does not.

    All strings must be printable; only `recipe` may have several lines.
    """
    try:
        found: dict[str, Any] = kind.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(f"{where}: {place + ': ' if place else ''}{first['msg']}") from error
    lines = str(found["recipe"]).replace("\n", " ") if "recipe" in found else ""
    hidden = next((text for text in texts({**found, "recipe": lines}) if visible(text) != text), None)
    if hidden is not None:
        raise ArtifactError(f"{where}: {hidden!r} contains unprintable characters")
    return found


def texts(value: Any) -> Iterator[str]:
    """Every key and every string below a value."""
    level = [value]
    while level:
        node = level.pop()
        if isinstance(node, str):
            yield node
        elif isinstance(node, Mapping):
            level += [*node.keys(), *node.values()]
        elif isinstance(node, (list, tuple)):
            level += node
