"""A LoRA adapter as PEFT saves it: `adapter_config.json` beside `adapter_model.safetensors`, read and checked.

An adapter means W + scale * B A at each module that it names. Reading is exact: the factors keep their dtype, and
the scale is multiplied into B, with rounding only where it must be (see `scaled`). Adapters that two factors do not
describe completely are refused: DoRA, other variants, and initialisations that also change the base's weights (PiSSA,
OLoRA, CorDA, LoftQ, LoRA-GA).
Not here: which tensors of a base the modules are, and what is written (`compress/adapters/__init__.py`).
Shape suffixes: O out, I in, R rank.
Source: Hu et al., "LoRA", ICLR 2022, section 4.1; Kalajdzievski, "A rank stabilization scaling factor", 2023 (rsLoRA).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from compress.errors import ArtifactError
from compress.model.source import ADAPTER, Held, Shard, check_links, read_json, visible_names
from compress.stats import finite

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every tensor in the file; what follows is a path in the model
PAIR = re.compile(r"(.+)\.lora_([AB])\.weight")
NESTED = re.compile(r"\)[*+{]")  # a repeated group, inside which anything may repeat
REPEATED = re.compile(r"[*+{]")
LONGEST, MOST_REPEATED = 255, 2  # characters of a pattern, repetitions in it: enough for names and their numbers
FLOATS = ("F16", "BF16", "F32")
INITIALISED = (True, False, "gaussian", "eva", "orthogonal", "mica")  # these leave the base's weights unchanged
VARIANTS = (  # options with which an adapter is no longer W + scale * B A
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication", "alora_invocation_tokens", "arrow_config",
    "kasa_config", "velora_config", "monteclora_config", "trainable_token_indices", "target_parameters",
)  # fmt: skip
REMEDY = "merge it with PEFT (merge_and_unload) and use `compress delta extract` on the result"


class Config(TypedDict):
    """The fields of adapter_config.json that are read; others concern training, or are refused by `check_variant`."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    peft_type: Literal["LORA"]
    r: Annotated[int, Field(ge=1)]
    lora_alpha: Annotated[float, Field(allow_inf_nan=False)]
    use_rslora: NotRequired[bool]
    rank_pattern: NotRequired[dict[str, Annotated[int, Field(ge=1)]] | None]
    alpha_pattern: NotRequired[dict[str, Annotated[float, Field(allow_inf_nan=False)]] | None]
    init_lora_weights: NotRequired[bool | str | None]
    base_model_name_or_path: NotRequired[str | None]


READER = TypeAdapter(Config)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter as PEFT saves it."""
    try:
        return (folder / ADAPTER).is_file()
    except (OSError, ValueError):  # a name too long, a NUL
        return False


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Names in the file of a module's two factors, their rank, and the scale: alpha / r, for rsLoRA alpha / sqrt(r)."""

    a: str
    b: str
    rank: int
    scale: float


class Adapter:
    """An adapter folder: `pairs` by the path of their module, and `whole` tensors (biases, modules that were saved)."""

    def __init__(self, folder: Path) -> None:
        """Raises ArtifactError if it is not a LoRA adapter in safetensors, or is more than W + scale * B A."""
        self.folder = folder
        self.config = self._config()
        check_links(folder)
        if not (folder / WEIGHTS).is_file():
            pickled = " (a pickled adapter_model.bin is not read)" if (folder / "adapter_model.bin").exists() else ""
            raise ArtifactError(f"{folder}: missing {WEIGHTS}{pickled}")
        self.shard = Shard(folder / WEIGHTS)
        self.pairs: dict[str, Pair] = {}
        self.whole: dict[str, str] = {}
        self._sort()

    def _config(self) -> dict[str, Any]:
        """adapter_config.json, checked."""
        where = self.folder / ADAPTER
        raw = read_json(where, "the adapter's configuration")
        kind = raw.get("peft_type")
        if kind != "LORA":
            raise ArtifactError(f"{where}: peft_type is {kind!r}; only LORA can be read: {REMEDY}")
        try:
            config: dict[str, Any] = READER.validate_python(raw, strict=True)  # type: ignore[assignment]
        except ValidationError as error:
            first = error.errors()[0]
            raise ArtifactError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        check_variant(config, where)
        return config

    def _sort(self) -> None:
        """Sort the tensors into factors and whole tensors.

        Raises ArtifactError for a factor without its partner, or a name that does not belong to a linear layer.
        """
        found: dict[str, dict[str, str]] = {}
        for key in visible_names(dict.fromkeys(sorted(self.shard.held), self.shard.path), self.shard.path):
            path = key.removeprefix(PREFIX).replace(".base_layer.", ".")
            if not key.startswith(PREFIX) or (".lora_" in path and not PAIR.fullmatch(path)):
                raise ArtifactError(f"{self.shard.path}: {key!r} is not a matrix of a linear layer; {REMEDY}")
            pair = PAIR.fullmatch(path)
            held, name = (found.setdefault(pair[1], {}), pair[2]) if pair else (self.whole, path)
            if name in held:
                raise ArtifactError(f"{self.shard.path}: {key!r} and {held[name]!r} are the same tensor")
            held[name] = key
        for module, held in found.items():
            if len(held) < 2:
                raise ArtifactError(f"{self.shard.path}: {module} has only lora_{next(iter(held))}")
            self.pairs[module] = self._pair(module, held["A"], held["B"])
        if not self.pairs and not self.whole:
            raise ArtifactError(f"{self.shard.path}: contains no tensor")

    def _pair(self, module: str, a: str, b: str) -> Pair:
        """The factors of a module with their scale; raises ArtifactError unless shapes, dtypes and the rank agree."""
        (kind_a, shape_a), (kind_b, shape_b) = self.shard.held[a], self.shard.held[b]
        rank = int(matching(self.config.get("rank_pattern"), module, self.config["r"]))
        fits = len(shape_a) == len(shape_b) == 2 and shape_a[0] == shape_b[1] == rank
        if not fits or kind_a not in FLOATS or kind_b not in FLOATS:
            raise ArtifactError(
                f"{self.shard.path}: {module}: lora_A is {kind_a} of {list(shape_a)} and lora_B {kind_b} of "
                f"{list(shape_b)}; floats of [{rank}, in] and [out, {rank}] are needed"
            )
        alpha = float(matching(self.config.get("alpha_pattern"), module, self.config["lora_alpha"]))
        return Pair(a=a, b=b, rank=rank, scale=alpha / (sqrt(rank) if self.config.get("use_rslora") else rank))

    def shape(self, module: str) -> tuple[int, int]:
        """[out, in] of the matrix that a module's factors are added to."""
        pair = self.pairs[module]
        return self.shard.held[pair.b].shape[0], self.shard.held[pair.a].shape[1]

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """scale * B [out, r] and A [r, in]; raises ArtifactError if one is not finite."""
        pair = self.pairs[module]
        a_RI, b_OR = self.tensor(pair.a), self.tensor(pair.b)
        left_OR = scaled(b_OR, pair.scale)
        if not finite(left_OR):
            raise ArtifactError(f"{self.shard.path}: {module}: scaled by {pair.scale:g}, lora_B is not finite")
        return left_OR, a_RI

    def held(self, path: str) -> Held:
        """Dtype and shape of a tensor that is stored whole."""
        return self.shard.held[self.whole[path]]

    def tensor(self, key: str) -> Tensor:
        """One tensor of the file; raises ArtifactError if it holds NaN or infinite values."""
        found = self.shard.tensor(key)
        if not finite(found):
            raise ArtifactError(f"{self.shard.path}: {key} holds NaN or infinite values")
        return found

    @cached_property
    def parameters(self) -> int:
        """Entries of all factors."""
        return sum(pair.rank * sum(self.shape(module)) for module, pair in self.pairs.items())


def check_variant(config: Mapping[str, Any], where: Path) -> None:
    """Raise ArtifactError if an adapter is more than W + scale * B A, or changed its base when it was made."""
    for name in VARIANTS:
        if config.get(name):
            raise ArtifactError(f"{where}: {name} is set, which two factors cannot represent; {REMEDY}")
    start = config.get("init_lora_weights", True)
    if start is not None and start not in INITIALISED:
        raise ArtifactError(f"{where}: init_lora_weights {start!r} changes the base's weights too; {REMEDY}")


def matching(pattern: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """The value of the first expression in a rank or alpha pattern that matches the end of a module's path.

    Raises ArtifactError for an expression that is malformed, too long, or repeats so much that matching might not end.
    """
    for key, value in (pattern or {}).items():
        if len(key) > LONGEST or NESTED.search(key) or len(REPEATED.findall(key)) > MOST_REPEATED:
            raise ArtifactError(f"{ADAPTER}: the pattern {key[:60]!r} is too long or repeats too much to be matched")
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error as error:
            raise ArtifactError(f"{ADAPTER}: {key!r} is not a regular expression: {error}") from error
    return otherwise


def scaled(b_OR: Tensor, scale: float) -> Tensor:
    """scale * B, in B's dtype where that is exact, as for powers of two, else rounded once to float32."""
    exact = b_OR.double() * scale
    for dtype in (b_OR.dtype, torch.float32):
        if bool((exact.to(dtype).double() == exact).all()):
            return exact.to(dtype)
    return exact.float()
