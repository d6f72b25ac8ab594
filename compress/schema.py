"""The forms of what an artifact says of itself in config.json and compress.json, checked before they are believed.

Not here: what is done with them (`artifact.py`) and the tree of a weight, which `weights/pack.py` checks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from compress.errors import ArtifactError, visible


class Tree(TypedDict):
    """The root of a weight's tree; what else it must have, its kind decides."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    kind: str
    shape: tuple[int, int]


class SiteSpec(TypedDict):
    """What config.json holds of one site: tree, tensors in order, name for people, whether the source has [in, out].

    `tensor` of the source, if it is not `<site>.weight`; `expert` of it, if that tensor holds a stack of them;
    `inputs`, what the module rounds what it is given to; `shared`, by path, the keys of another site's tensors.
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
    """What config.json holds of the model that a delta belongs to: how it was called, and its fingerprint."""

    name: str
    sha256: str


class SiteRecord(TypedDict):
    """What compress.json holds of one site; passes may add more.

    `errors` are the weight errors after each pass, where there were several; `damping_failed`, what was tried before
    `damping`; `dead_inputs`, those that no calibration token has used.
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
    """The versions that made an artifact."""

    compress: str
    python: str
    torch: str
    transformers: str
    safetensors: str


class Source(TypedDict):
    """The dense model an artifact was made from; sha256 by shard, and the format it was decoded from, if any."""

    name: str
    family: str
    tested_family: bool
    sha256: dict[str, str]
    decoded_from: NotRequired[str]


class Calibrated(TypedDict):
    """What the statistics were taken over; `windows_at_once`, how few went together after memory ran out."""

    name: str
    sha256: str
    tokens: int
    windows_at_once: NotRequired[int]


class Sizes(TypedDict):
    """Bytes of all tensors, after and before; bits a weight of the blocks' linear maps."""

    bytes: int
    source_bytes: int
    bits_per_weight: float


class Probe(TypedDict):
    """Mean KL to the dense model in nats, on tokens no statistic saw."""

    tokens: int
    kl: float


class Reshaping(TypedDict):
    """What a pass changed that made another model, for people; and in detail, as each pass tells it."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    step: str
    change: str


class Provenance(TypedDict):
    """compress.json: how the artifact was made, and the sha256 of every other file.

    `sha256` is that of all the rest of it, as `artifact.seal` makes it.
    Of a delta also its base, and the dtype of the tensors that the base holds in another one.
    `base_files`, of a delta, are the companion files that it leaves to its base, which has them alike.
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
    """The value, if it has the declared form; raises ArtifactError naming the first field that has not.

    Names and words must be such as people can see; only of `recipe` may there be several lines.
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
        raise ArtifactError(f"{where}: {hidden!r} holds characters that do not show")
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
