"""A key-value cache for factored (low-rank) projections that stores each token's latents instead of its key and value.

With W_k = A_k B_k and W_v = A_v B_v, the latents B_k x and B_v x are all that later tokens need; if both projections
have the same B, one latent is enough. Keys and values are recomputed from the latents, layer by layer, at every
step, which saves memory between steps and costs time. Keys are rotated (RoPE) when they are recomputed, each by its
own position, so the cache also stores the positions, once for all layers.

The attentions that this works for are found by structure and verified on a few tokens before a cache is made: keys must
be `k_proj` of the hidden states, with or without a norm `k_norm`, then rotated (or not) by the model's only rotary
embedding through the family's own `apply_rotary_pos_emb`.
Shapes: B batch, H key-value heads, T tokens, D channels of a head, R rank.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from compress.errors import RecipeError, in_short, pass_on_memory
from compress.runtime.linear import CompressedLinear
from compress.runtime.lower import lower

Map = Callable[[Tensor], Tensor]
ROTATE = "apply_rotary_pos_emb"  # the name that families give it, in the Python module of their attention
STEADY = {"default", "linear", "llama3", "yarn"}  # types of rotary embedding that do not depend on the text's length
TRANSFORMS = ("hadamard", "diagonal", "permutation")  # kinds of factors that are not low-rank
PROBE = (6, 3)  # tokens of each of the two forward passes that verify an attention; one row begins with padding
ROUNDINGS = 8  # in the model's dtype: of the matrix, the latent and the result, on both sides
SAME = 1e-4  # relative difference allowed between float32 values computed in two ways


# -- what a model must be like ---------------------------------------------------------------------


def is_factored(spec: Mapping[str, Any]) -> bool:
    """Whether the specification of a site is a product of two matrices whose input is not rounded."""
    tree = spec["tree"]
    return tree["kind"] == "product" and tree["right"]["kind"] not in TRANSFORMS and "inputs" not in spec


def attentions(model: Any) -> dict[str, Any]:
    """The full-attention modules that have a `k_proj` and a `v_proj` of their own, by module name."""
    layers = DynamicCache(config=model.config).layers
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and all(isinstance(getattr(module, leaf, None), nn.Module) for leaf in ("k_proj", "v_proj"))
    }
    return {n: m for n, m in found.items() if m.layer_idx < len(layers) and type(layers[m.layer_idx]) is DynamicLayer}


def check(model: Any, factored: Collection[str]) -> None:
    """Raise RecipeError if the model could not use a latent cache once the modules named in `factored` are factored."""
    kind, known = type(model).__name__, attentions(model)
    if not known:
        raise RecipeError(f"kv: latent: {kind} has no full attention with a k_proj and a v_proj of its own")
    if not any({f"{name}.k_proj", f"{name}.v_proj"} <= set(factored) for name in known):
        raise RecipeError(
            f"kv: latent: no attention of {kind} has both k_proj and v_proj factored; use transmla or svd-llm"
        )
    rotary_of(model)
    if getattr(model.config.get_text_config(decoder=True), "clip_qkv", None) is not None:
        raise RecipeError(f"kv: latent: {kind} clips its keys (clip_qkv), which is not supported")


def rotary_of(model: Any) -> Any:
    """The rotary embedding of a model, or None; raises RecipeError unless it is one function of the position alone."""
    found = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "rotary_emb"]
    given = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = {kind for module in found for kind in rope_types(module).values()}
    if len(found) > 1 or not kinds <= STEADY or "mrope_section" in given:
        said = "positions of an image" if "mrope_section" in given else " and ".join(sorted(kinds))
        raise RecipeError(
            f"kv: latent: the rotary embedding of {type(model).__name__} depends on more than the position: {said}"
        )
    return found[0] if found else None


def rope_types(rotary: Any) -> dict[str, str]:
    """The types of a rotary embedding, keyed by layer type if each layer type has its own, else by the empty string."""
    given = getattr(rotary, "rope_type", "default")
    return dict(given) if isinstance(given, dict) else {"": given}


# -- from hidden states to latents, from latents to keys and values ------------------------------------


@dataclass(frozen=True, eq=False)
class Reading:
    """How one attention computes keys and values: with which rotary embedding, and from one latent or two."""

    rotary: Any  # the module of the rotary embedding, or None
    shared: bool

    def latents(self, attention: Any, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """The latents [B, 1, T, R] of keys and of values; the second has R = 0 if they share the first."""
        key_BTR = factors(attention.k_proj)[0](hidden_BTD)
        value_BTR = key_BTR[..., :0] if self.shared else factors(attention.v_proj)[0](hidden_BTD)
        return key_BTR.unsqueeze(1), value_BTR.unsqueeze(1)

    def keys_values(
        self, attention: Any, latents: tuple[Tensor, Tensor], heads: int, positions_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, D] computed from latents [B, 1, T, R] of tokens at these positions."""
        key_BTR, value_BTR = (latent.squeeze(1) for latent in latents)
        keys_BHTD = self.rotated(attention, normed(attention, made(attention.k_proj, key_BTR), heads), positions_BT)
        values_BTO = made(attention.v_proj, key_BTR if self.shared else value_BTR)
        return keys_BHTD, values_BTO.unflatten(-1, (heads, -1)).transpose(1, 2)

    def rotated(self, attention: Any, keys_BHTD: Tensor, positions_BT: Tensor) -> Tensor:
        """Keys rotated by the family's own function; channels beyond the embedding's width are not rotated."""
        if self.rotary is None:
            return keys_BHTD
        rotate = getattr(sys.modules[type(attention).__module__], ROTATE)
        layered = () if "" in rope_types(self.rotary) else (attention.layer_type,)
        cos, sin = self.rotary(keys_BHTD, positions_BT.to(keys_BHTD.device, torch.long), *layered)
        turned, rest = keys_BHTD[..., : cos.shape[-1]], keys_BHTD[..., cos.shape[-1] :]
        rotated: Tensor = rotate(turned[:, :0], turned, cos, sin)[1]
        return torch.cat((rotated, rest), -1)


def factors(projection: CompressedLinear) -> tuple[Map, Map]:
    """The two maps of a factored projection, input to latent and latent to output, as the module computes them."""
    if isinstance(projection.lowered, nn.Sequential):
        return projection.lowered[0], projection.lowered[1]
    weight: Any = projection.expression
    return weight.right.linear, weight.left.linear


def keep_factors(projection: CompressedLinear) -> None:
    """Make a prepared module compute with its factors even where the whole matrix would be cheaper."""
    if projection.lowered is not None and not isinstance(projection.lowered, nn.Sequential):
        weight: Any = projection.expression
        projection.lowered = nn.Sequential(*(lower(part, projection.dtype) for part in (weight.right, weight.left)))


def made(projection: CompressedLinear, latent_BTR: Tensor) -> Tensor:
    """The output of the projection for a latent, [B, T, out], with bias."""
    y_BTO = factors(projection)[1](latent_BTR)
    return y_BTO if projection.bias is None else y_BTO + projection.bias


def normed(attention: Any, keys_BTO: Tensor, heads: int) -> Tensor:
    """Keys [B, H, T, D] after the attention's `k_norm`, if it has one, applied per head or over all heads together."""
    norm: Any = getattr(attention, "k_norm", None)
    together = norm is not None and norm.weight.shape[-1] == keys_BTO.shape[-1]
    keys_BTHD = (norm(keys_BTO) if together else keys_BTO).unflatten(-1, (heads, -1))
    normed_BTHD: Tensor = keys_BTHD if norm is None or together else norm(keys_BTHD)
    return normed_BTHD.transpose(1, 2)


def share_latent(attention: Any) -> bool:
    """Whether keys and values are computed from one and the same latent."""
    key, value = (
        [p.get_buffer(name).data_ptr() for path, name in p.names.items() if path.startswith("right")]
        for p in (attention.k_proj, attention.v_proj)
    )
    return key == value


# -- the cache -------------------------------------------------------------------------------------------


class LatentLayer(DynamicLayer):  # type: ignore[misc]
    """One layer of the cache: `keys` [B, 1, T, R] holds the latents of keys, `values` those of values.

    `values` has R = 0 if keys and values share one latent.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shown: tuple[Any, Reading, Tensor, Tensor] | None = None

    def show(self, attention: Any, reading: Reading, hidden_BTD: Tensor, positions_BT: Tensor) -> None:
        """Record what the attention that is about to update this layer was given; positions are those of all tokens."""
        self.shown = attention, reading, hidden_BTD.detach(), positions_BT

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store the latents of new tokens and return all keys and values, those of the new tokens as given.

        Raises RecipeError if a model other than the one this cache was made for calls it.
        """
        if self.shown is None:
            raise RecipeError("kv: latent: this cache was made for another model; create one for this model")
        attention, reading, hidden_BTD, positions_BT = self.shown
        self.shown = None
        old = (self.keys, self.values) if self.get_seq_length() else None
        with torch.no_grad():
            super().update(*reading.latents(attention, hidden_BTD))
        if old is None:
            return key_states, value_states
        before_BT = positions_BT[:, : old[0].shape[2]]
        keys, values = reading.keys_values(attention, old, key_states.shape[1], before_BT)
        return torch.cat((keys, key_states), 2), torch.cat((values, value_states), 2)


class LatentCache(Cache):  # type: ignore[misc]
    """A cache whose layers numbered in `layers` store latents; the others are transformers' own for this config."""

    def __init__(self, config: Any, layers: Collection[int], kind: type[LatentLayer] = LatentLayer) -> None:
        plain = DynamicCache(config=config).layers
        super().__init__(layers=[kind() if i in layers else layer for i, layer in enumerate(plain)])
        self.first = min(layers)
        self.positions_BT: Tensor | None = None

    def show(self, attention: Any, reading: Reading, hidden_BTD: Tensor, positions_BT: Tensor) -> None:
        """Pass on to a layer what its attention was given; the first layer also stores the new tokens' positions."""
        if attention.layer_idx == self.first or self.positions_BT is None:
            self.positions_BT = joined(self.positions_BT, positions_BT.int())
        self.layers[attention.layer_idx].show(attention, reading, hidden_BTD, self.positions_BT)

    def nbytes(self) -> int:
        """Bytes held by the latent layers and the positions."""
        kept = [layer for layer in self.layers if isinstance(layer, LatentLayer) and layer.is_initialized]
        held = [t for layer in kept for t in (layer.keys, layer.values)]
        held += [] if self.positions_BT is None else [self.positions_BT]
        return sum(int(t.nbytes) for t in held)

    def select(self, rows: Map) -> None:
        """Apply `rows` to the batch dimension of the positions, unless one row of positions stands for all rows."""
        if self.positions_BT is not None and len(self.positions_BT) > 1:
            self.positions_BT = rows(self.positions_BT)

    def reset(self) -> None:
        """Remove all tokens."""
        super().reset()
        self.positions_BT = None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens from the end; `tokens_to_remove` is minus their number, as in transformers."""
        super().crop(tokens_to_remove)
        if self.positions_BT is not None and tokens_to_remove:
            self.positions_BT = self.positions_BT[:, :tokens_to_remove]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows of the batch as beam search asks."""
        super().reorder_cache(beam_idx)
        self.select(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        super().batch_repeat_interleave(repeats)
        self.select(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows of the batch."""
        super().batch_select_indices(indices)
        self.select(lambda t: t[indices])


def joined(before_BT: Tensor | None, new_BT: Tensor) -> Tensor:
    """Positions followed by new ones, [B, T]; if both have one row, so has the result, and it stands for all rows."""
    if before_BT is None:
        return new_BT
    rows = max(len(before_BT), len(new_BT))
    return torch.cat((before_BT.expand(rows, -1), new_BT.expand(rows, -1)), 1)


# -- making it -------------------------------------------------------------------------------------------


class Witness(LatentLayer):
    """A layer that also stores the keys and values it is given, and compares them with those its latents yield."""

    agreed: Reading | None = None  # the reading that reproduced them, once one has
    given: tuple[Tensor, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append the tokens and return all given keys and values.

        Raises RecipeError if no reading of the latents of all tokens reproduces them.
        """
        if self.shown is None:
            raise RecipeError(
                "kv: latent: this attention is not given hidden states and token positions; load with kv=None"
            )
        attention, reading, _hidden_BTD, positions_BT = self.shown
        super().update(key_states, value_states)
        now = (key_states, value_states)
        self.given = tuple(torch.cat(p, 2) for p in zip(self.given, now, strict=True)) if self.given else now
        ways = [self.agreed] if self.agreed else [reading, replace(reading, rotary=None)]

        def alike(way: Reading) -> bool:
            again = way.keys_values(attention, (self.keys, self.values), key_states.shape[1], positions_BT)
            return all(
                one.shape == other.shape and same(one, other) for one, other in zip(again, self.given, strict=True)
            )

        self.agreed = next(filter(alike, ways), None)
        if self.agreed is None:
            raise RecipeError(
                f"kv: latent: {type(attention).__name__} {attention.layer_idx} computes its keys or values in an "
                "unsupported way; load with kv=None"
            )
        return self.given[0], self.given[1]


def same(got: Tensor, want: Tensor) -> bool:
    """Whether two tensors are equal up to rounding in their dtype."""
    off = (got.float() - want.float()).norm() / want.float().norm().clamp(min=1e-30)
    return bool(off <= max(SAME, ROUNDINGS * torch.finfo(want.dtype).eps))


def prepared(model: Any) -> Callable[[], LatentCache]:
    """The function that creates latent caches for `model`; hooks on its attentions feed such a cache from now on.

    Layers whose projections are not factored, or whose latents are larger than key and value together, keep a plain
    cache. Raises RecipeError if no layer is left, or if one computes keys and values differently from what is assumed.
    """
    factored = {n for n, m in model.named_modules() if isinstance(m, CompressedLinear) and is_factored(m.spec)}
    check(model, factored)
    chosen = [
        attention
        for name, attention in attentions(model).items()
        if {f"{name}.k_proj", f"{name}.v_proj"} <= factored and rank_of(attention) <= width_of(attention)
    ]
    if not chosen:
        raise RecipeError(f"kv: latent: the latents of {type(model).__name__} are larger than its keys and values")
    for attention in chosen:
        for projection in (attention.k_proj, attention.v_proj):
            keep_factors(projection)
    for attention, reading in proved(model, chosen):
        attention.register_forward_pre_hook(partial(_show, reading), with_kwargs=True)
    return partial(LatentCache, model.config, tuple(attention.layer_idx for attention in chosen))


def proved(model: Any, chosen: list[Any]) -> list[tuple[Any, Reading]]:
    """Each attention with the reading that reproduces its keys and values; raises RecipeError if one has none."""
    rotary = rotary_of(model)
    cache = LatentCache(model.config, [attention.layer_idx for attention in chosen], Witness)
    with ExitStack() as hooks:
        for attention in chosen:
            found = rotary if hasattr(sys.modules[type(attention).__module__], ROTATE) else None
            show = partial(_show, Reading(found, share_latent(attention)))
            hooks.callback(attention.register_forward_pre_hook(show, with_kwargs=True).remove)
        try:
            feed(model, cache)
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:  # from family code called in this way
            pass_on_memory(error)
            raise RecipeError(
                f"kv: latent: {type(model).__name__} is not supported ({in_short(error)}); load with kv=None"
            ) from error
    return [(attention, cache.layers[attention.layer_idx].agreed) for attention in chosen]


@torch.no_grad()
def feed(model: Any, cache: Cache) -> None:
    """Run the model on a few tokens of two rows, one of which begins with padding, in one forward pass per PROBE."""
    words = model.config.get_text_config(decoder=True).vocab_size
    ids_BT = torch.arange(2 * sum(PROBE), device=model.device).view(2, -1) % words
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, :2] = 0
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    for start, stop in pairwise((0, *accumulate(PROBE))):
        model(
            input_ids=ids_BT[:, start:stop],
            attention_mask=mask_BT[:, :stop],
            position_ids=positions_BT[:, start:stop],
            past_key_values=cache,
            use_cache=True,
        )


def rank_of(attention: Any) -> int:
    """How many values the cache stores per token."""
    key, value = (int(p.spec["tree"]["right"]["shape"][0]) for p in (attention.k_proj, attention.v_proj))
    return key if share_latent(attention) else key + value


def width_of(attention: Any) -> int:
    """How many values the key and value of a token have together."""
    return int(attention.k_proj.out_features + attention.v_proj.out_features)


def _show(reading: Reading, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook that passes the hidden states and positions given to an attention on to its latent cache."""
    cache, positions = kwargs.get("past_key_values"), kwargs.get("position_ids")
    hidden = args[0] if args else kwargs.get("hidden_states")
    if isinstance(cache, LatentCache) and hidden is not None and positions is not None:
        cache.show(attention, reading, hidden, positions)
