"""The inputs of a merge, the base and the models: opened, named, and checked to share one architecture before any work.

All models have the base's tensors. Only tables over the vocabulary may have more rows, for tokens that a fine-tune has
added. Those rows are taken from the model that has them; if several have them, and with identical tokenizer files,
their mean is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.artifact import Artifact, is_artifact
from compress.errors import ArtifactError, RecipeError, pass_on_memory
from compress.model.architecture import parsed
from compress.model.source import Checkpoint, Held, digest, display_name, locate
from compress.plan import FLOATS
from compress.sources import open_source
from compress.stats import finite

COMPUTED = {  # the config keys that change what a model computes from the same tensors
    "model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size",
    "intermediate_size", "hidden_act", "hidden_activation", "activation_function", "rms_norm_eps", "layer_norm_eps",
    "layer_norm_epsilon", "rope_theta", "partial_rotary_factor", "tie_word_embeddings", "layer_types",
    "num_experts_per_tok", "num_local_experts", "scale_attn_weights", "logit_scale", "final_logit_softcapping",
    "attn_logit_softcapping", "query_pre_attn_scalar", "n_head", "n_layer", "n_embd", "n_inner",
    "sliding_window", "use_sliding_window",
    "embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling", "norm_topk_prob",
    "routed_scaling_factor", "n_group", "topk_group",
}  # fmt: skip
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")


@dataclass(frozen=True, kw_only=True)
class Member:
    """A model to merge.

    `key` is derived from the hashes of its files. The order of summation and the random draws of a merge depend on it,
    not on the label.
    """

    label: str
    source: Checkpoint
    sha256: dict[str, str]
    key: str

    def tensor(self, name: str) -> Tensor:
        """One tensor; raises ArtifactError if it is not finite."""
        return checked(self.source, name)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The inputs of a merge.

    `members` are sorted by key, so that their order does not depend on the user's; `order` holds the labels in the
    user's order. `growers` are the members with a larger vocabulary than the base.
    """

    base: Checkpoint
    sha256: dict[str, str]
    members: tuple[Member, ...]
    order: tuple[str, ...]
    growers: tuple[Member, ...]

    @property
    def teller(self) -> Checkpoint:
        """The source of the result's config and tokenizer: the base, or a model with a larger vocabulary."""
        return self.growers[0].source if self.growers else self.base

    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self.base.headers)

    def merges(self, name: str) -> bool:
        """Whether a tensor is merged, which is if it is floating-point; the others are the same in every model."""
        return self.base.headers[name].dtype in FLOATS

    def header(self, name: str) -> Held:
        """The dtype and shape of the merged tensor: the base's dtype, and as many rows as the largest model has."""
        held = self.base.headers[name]
        return held._replace(shape=max([held.shape, *(m.source.headers[name].shape for m in self.growers)]))


def checked(source: Checkpoint, name: str) -> Tensor:
    """One tensor; raises ArtifactError if it holds NaN or infinite values."""
    found = source.tensor(name)
    if not finite(found):
        raise ArtifactError(f"{source.path}: {name} holds NaN or infinite values")
    return found


def open_inputs(base: Path, folders: Mapping[str, Path]) -> Inputs:
    """Open the base and the models by label; a delta of the base is read as the model it decodes to.

    Everything is compared before files are hashed. Raises ArtifactError for a folder that is neither a plain model of
    the base's architecture nor a delta of the base.
    """
    opened = open_source(base)
    sources = {label: open_model(path, base) for label, path in folders.items()}
    for label, source in sources.items():
        compare(opened, label, source)
    members = sorted(members_of(sources), key=lambda m: m.key)
    return Inputs(
        base=opened,
        sha256=opened.digests(),
        members=tuple(members),
        order=tuple(folders),
        growers=grown(opened, members),
    )


def open_model(path: Path, base: Path) -> Checkpoint:
    """A fine-tuned model, or the model that a delta of the base decodes to."""
    return Artifact(path, base) if is_artifact(path) and Artifact(path).is_delta else open_source(path)


def labelled(models: Mapping[str, str | Path] | Sequence[str | Path]) -> dict[str, Path]:
    """Label -> folder; a folder without a label goes by its own name.

    Raises RecipeError for labels that are not usable or used twice, ArtifactError for a path that is no model folder.
    """
    if isinstance(models, str) or not isinstance(models, (Mapping, Sequence)) or not models:
        raise RecipeError(
            f"models: {models!r} is not a list of folders, or a mapping of names to them, of at least one"
        )
    pairs = list(models.items()) if isinstance(models, Mapping) else [("", model) for model in models]
    found: dict[str, Path] = {}
    for label, model in pairs:
        path = locate(model)
        name = label or display_name(path)
        if not isinstance(name, str) or set(name) & set(":=,*\n"):
            raise RecipeError(f"models: {name!r} is not a usable name; it must not be empty or contain any of : = , *")
        if name in found:
            raise RecipeError(f"models: two are called {name!r}; name them, as in one=FOLDER two=FOLDER")
        found[name] = path
    return found


def members_of(sources: Mapping[str, Checkpoint]) -> Iterator[Member]:
    """The opened models with their hashes; identical models get different keys."""
    seen: dict[str, int] = {}
    for label, source in sources.items():
        digests = source.digests()
        whole = sha256("".join(digests.values()).encode()).hexdigest()
        seen[whole] = seen.get(whole, 0) + 1
        yield Member(label=label, source=source, sha256=digests, key=f"{whole}.{seen[whole]}")


def compare(base: Checkpoint, where: str, model: Checkpoint) -> None:
    """Raise ArtifactError for the first difference in architecture between the base and the model named `where`."""
    mine, theirs = model.headers, base.headers
    told = differences(base.config, model.config)
    for key, want, got in chain(told, differences(filled(base.config), filled(model.config))):
        raise ArtifactError(f"{where}: config.json says {key} {got!r}, the base's {want!r}; they cannot be merged")
    for name in sorted(mine.keys() ^ theirs.keys()):
        has, lacks = (where, "the base") if name in mine else ("the base", where)
        raise ArtifactError(f"{where}: {has} has {name}, {lacks} does not; they cannot be merged")
    entries = vocabulary(base.config)
    for name, held in sorted(theirs.items()):
        found = mine[name]
        grew = found.shape[:1] > held.shape[:1] == (entries,) and found.shape[1:] == held.shape[1:]
        if found.shape != held.shape and not grew:
            raise ArtifactError(f"{where}: {name} is {list(found.shape)}, the base's {list(held.shape)}")
        if (found.dtype in FLOATS) != (held.dtype in FLOATS):
            raise ArtifactError(f"{where}: {name} holds {found.dtype}, the base's {held.dtype}")
        if held.dtype not in FLOATS and not torch.equal(base.tensor(name), model.tensor(name)):
            raise ArtifactError(f"{where}: {name} holds {held.dtype} and differs from the base's; it cannot be merged")


def filled(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config under the names of this transformers, with defaults for what it leaves out; as it is if unknown."""
    try:
        found: dict[str, Any] = parsed(config).to_dict()
    except Exception as error:  # transformers raises many types for what it does not know
        pass_on_memory(error)
        return config
    return found


def differences(base: Any, other: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, the base's value, the other's value) for each config entry that differs and affects the computation."""
    for key in sorted(base.keys() & other.keys()):
        where, want, got = f"{path}{key}", base[key], other[key]
        if isinstance(want, dict) and isinstance(got, dict):
            yield from differences(want, got, f"{where}.")
        elif want != got and (key in COMPUTED or "rope_" in where):
            yield where, want, got


def vocabulary(config: Mapping[str, Any]) -> int | None:
    """The size of the vocabulary according to a config, at its top level or in its text config; None if absent."""
    told = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    return told if isinstance(told, int) else None


def grown(base: Checkpoint, members: Sequence[Member]) -> tuple[Member, ...]:
    """The models that have more rows than the base in some table.

    Raises ArtifactError if there are several and their shapes or tokenizers differ, since their new rows may then mean
    different tokens.
    """
    sizes = base.shapes()
    found = [m for m in members if m.source.shapes() != sizes]
    for other in found[1:]:
        first = found[0]
        same = other.source.shapes() == first.source.shapes()
        if not same or tokenizer(first) != tokenizer(other):
            raise ArtifactError(
                f"{first.label} and {other.label} both add to the base's vocabulary, with different tokenizers, "
                "so their new entries have different meanings; merge only one of them"
            )
    return tuple(found)


def tokenizer(member: Member) -> dict[str, str]:
    """The hashes of a model's tokenizer files; files that a delta shares with its base are read from the base."""
    source = member.source
    held = {name: source.companion(name) if isinstance(source, Artifact) else source.path / name for name in TOKENIZERS}
    return {name: digest(file) for name, file in held.items() if file is not None and file.is_file()}
