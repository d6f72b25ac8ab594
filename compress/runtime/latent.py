"""A key-value cache that keeps, of each token, only what factored projections make its key and its value of.

Where W_k = A_k B_k and W_v = A_v B_v, the latents B_k x and B_v x are all that later tokens need: one latent where both
are of the same B. Keys and values are made of them anew, layer by layer, whenever they are attended to: memory is saved
between steps, at the price of time. Keys are rotated when they are read, each by its own position, so positions are
kept too, once for all layers.

Which attention this can stand in for is found by structure and proved on a few tokens before a cache is made: its keys
must be `k_proj` of the hidden states, with or without a norm `k_norm`, then rotated (or not) by the model's one
rotary embedding through the family's own `apply_rotary_pos_emb`.
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

from compress.errors import RecipeError, in_short
from compress.runtime.linear import CompressedLinear
from compress.runtime.lower import lower

Map = Callable[[Tensor], Tensor]
ROTATE = "apply_rotary_pos_emb"  # what families call it, in the module of their attention
STEADY = {"default", "linear", "llama3", "yarn"}  # rotary embeddings that do not change when a text grows
TRANSFORMS = ("hadamard", "diagonal", "permutation")  # factors that are no low rank
PROBE = (6, 3)  # tokens that enter at a time when an attention is proved; one row begins with padding
ROUNDINGS = 8  # of the model's dtype: the matrix, the latent and what is made of it, of both sides
SAME = 1e-4  # relative, of float32 numbers computed twice


# -- what a model must be like ---------------------------------------------------------------------


def is_factored(spec: Mapping[str, Any]) -> bool:
    """Whether the specification of a site is a product of two matrices whose input is not rounded."""
    tree = spec["tree"]
    return tree["kind"] == "product" and tree["right"]["kind"] not in TRANSFORMS and "inputs" not in spec


def attentions(model: Any) -> dict[str, Any]:
    """The attentions over all tokens that have a key and a value projection of their own, by the module's name."""
    layers = DynamicCache(config=model.config).layers
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and all(isinstance(getattr(module, leaf, None), nn.Module) for leaf in ("k_proj", "v_proj"))
    }
    return {n: m for n, m in found.items() if m.layer_idx < len(layers) and type(layers[m.layer_idx]) is DynamicLayer}


def check(model: Any, factored: Collection[str]) -> None:
    """Raise RecipeError if no cache could keep latents once the modules of these names are factored."""
    kind, known = type(model).__name__, attentions(model)
    if not known:
        raise RecipeError(f"kv: latent: no attention of {kind} over all tokens has a k_proj and a v_proj of its own")
    if not any({f"{name}.k_proj", f"{name}.v_proj"} <= set(factored) for name in known):
        raise RecipeError(
            f"kv: latent: no attention of {kind} has both k_proj and v_proj factored; transmla does it, or svd-llm"
        )
    rotary_of(model)
    if getattr(model.config.get_text_config(decoder=True), "clip_qkv", None) is not None:
        raise RecipeError(f"kv: latent: {kind} clips its keys, which no probe of a few tokens may show")


def rotary_of(model: Any) -> Any:
    """The rotary embedding of a model, or None; raises RecipeError if it is not one function of the position alone."""
    found = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "rotary_emb"]
    given = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = {kind for module in found for kind in rope_types(module).values()}
    if len(found) > 1 or not kinds <= STEADY or "mrope_section" in given:
        said = "positions of an image" if "mrope_section" in given else " and ".join(sorted(kinds))
        raise RecipeError(
            f"kv: latent: the rotary embedding of {type(model).__name__} depends on more than a position: {said}"
        )
    return found[0] if found else None


def rope_types(rotary: Any) -> dict[str, str]:
    """The type of a rotary embedding, by the type of layer where each has its own, else under no name."""
    given = getattr(rotary, "rope_type", "default")
    return dict(given) if isinstance(given, dict) else {"": given}


# -- from hidden states to latents, from latents to keys and values ------------------------------------


@dataclass(frozen=True, eq=False)
class Reading:
    """How one attention makes keys and values: rotated by what, if by anything, and of one latent or of two."""

    rotary: Any  # a module, or None
    shared: bool

    def latents(self, attention: Any, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """The latents [B, 1, T, R] of keys and of values; the second is empty where they share the first."""
        key_BTR = factors(attention.k_proj)[0](hidden_BTD)
        value_BTR = key_BTR[..., :0] if self.shared else factors(attention.v_proj)[0](hidden_BTD)
        return key_BTR.unsqueeze(1), value_BTR.unsqueeze(1)

    def keys_values(
        self, attention: Any, latents: tuple[Tensor, Tensor], heads: int, positions_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, D] of latents [B, 1, T, R] of tokens at these positions."""
        key_BTR, value_BTR = (latent.squeeze(1) for latent in latents)
        keys_BHTD = self.rotated(attention, normed(attention, made(attention.k_proj, key_BTR), heads), positions_BT)
        values_BTO = made(attention.v_proj, key_BTR if self.shared else value_BTR)
        return keys_BHTD, values_BTO.unflatten(-1, (heads, -1)).transpose(1, 2)

    def rotated(self, attention: Any, keys_BHTD: Tensor, positions_BT: Tensor) -> Tensor:
        """Keys rotated by the family's own function; channels beyond the embedding's width stay as they are."""
        if self.rotary is None:
            return keys_BHTD
        rotate = getattr(sys.modules[type(attention).__module__], ROTATE)
        layered = () if "" in rope_types(self.rotary) else (attention.layer_type,)
        cos, sin = self.rotary(keys_BHTD, positions_BT.to(keys_BHTD.device, torch.long), *layered)
        turned, rest = keys_BHTD[..., : cos.shape[-1]], keys_BHTD[..., cos.shape[-1] :]
        rotated: Tensor = rotate(turned[:, :0], turned, cos, sin)[1]
        return torch.cat((rotated, rest), -1)


def factors(projection: CompressedLinear) -> tuple[Map, Map]:
    """The maps to and from the latent, as the module computes them."""
    if isinstance(projection.lowered, nn.Sequential):
        return projection.lowered[0], projection.lowered[1]
    weight: Any = projection.expression
    return weight.right.linear, weight.left.linear


def keep_factors(projection: CompressedLinear) -> None:
    """Let a prepared module compute by its factors, also where its whole matrix would be cheaper."""
    if projection.lowered is not None and not isinstance(projection.lowered, nn.Sequential):
        weight: Any = projection.expression
        projection.lowered = nn.Sequential(*(lower(part, projection.dtype) for part in (weight.right, weight.left)))


def made(projection: CompressedLinear, latent_BTR: Tensor) -> Tensor:
    """What the projection gives, [B, T, out]."""
    y_BTO = factors(projection)[1](latent_BTR)
    return y_BTO if projection.bias is None else y_BTO + projection.bias


def normed(attention: Any, keys_BTO: Tensor, heads: int) -> Tensor:
    """Keys [B, H, T, D], each head or all of them together through the attention's norm, if it has one."""
    norm: Any = getattr(attention, "k_norm", None)
    together = norm is not None and norm.weight.shape[-1] == keys_BTO.shape[-1]
    keys_BTHD = (norm(keys_BTO) if together else keys_BTO).unflatten(-1, (heads, -1))
    normed_BTHD: Tensor = keys_BTHD if norm is None or together else norm(keys_BTHD)
    return normed_BTHD.transpose(1, 2)


def share_latent(attention: Any) -> bool:
    """Whether keys and values are made of one and the same latent."""
    key, value = (
        [p.get_buffer(name).data_ptr() for path, name in p.names.items() if path.startswith("right")]
        for p in (attention.k_proj, attention.v_proj)
    )
    return key == value


# -- the cache -------------------------------------------------------------------------------------------


class LatentLayer(DynamicLayer):  # type: ignore[misc]
    """One layer: `keys` [B, 1, T, R] are the latents of keys, `values` those of values, or empty if they share them."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: tuple[Any, Reading, Tensor, Tensor] | None = None

    def show(self, attention: Any, reading: Reading, hidden_BTD: Tensor, positions_BT: Tensor) -> None:
        """What the attention that will update this layer is about to compute with; positions are of all tokens."""
        self.shown = attention, reading, hidden_BTD.detach(), positions_BT

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keep the latents of new tokens; the keys and values of all, the new ones as they came.

        Raises RecipeError if a model calls that this cache was not made for.
        """
        if self.shown is None:
            raise RecipeError("kv: latent: this cache was made for another model; take a new one from its own")
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
    """A cache whose layers of these numbers keep latents; the others are transformers' own for this config."""

    def __init__(self, config: Any, layers: Collection[int], kind: type[LatentLayer] = LatentLayer) -> None:
        plain = DynamicCache(config=config).layers
        super().__init__(layers=[kind() if i in layers else layer for i, layer in enumerate(plain)])
        self.first = min(layers)
        self.positions_BT: Tensor | None = None

    def show(self, attention: Any, reading: Reading, hidden_BTD: Tensor, positions_BT: Tensor) -> None:
        """Keep the positions of new tokens, when the first layer meets them, and show a layer what is coming."""
        if attention.layer_idx == self.first or self.positions_BT is None:
            self.positions_BT = joined(self.positions_BT, positions_BT.int())
        self.layers[attention.layer_idx].show(attention, reading, hidden_BTD, self.positions_BT)

    def nbytes(self) -> int:
        """Bytes that the layers with latents hold, and the positions."""
        kept = [layer for layer in self.layers if isinstance(layer, LatentLayer) and layer.is_initialized]
        held = [t for layer in kept for t in (layer.keys, layer.values)]
        held += [] if self.positions_BT is None else [self.positions_BT]
        return sum(int(t.nbytes) for t in held)

    def select(self, rows: Map) -> None:
        """Keep the positions of other rows of the batch; one row of them stands for all."""
        if self.positions_BT is not None and len(self.positions_BT) > 1:
            self.positions_BT = rows(self.positions_BT)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.positions_BT = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -`tokens_to_remove` tokens."""
        super().crop(tokens_to_remove)
        if self.positions_BT is not None and tokens_to_remove:
            self.positions_BT = self.positions_BT[:, :tokens_to_remove]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        super().reorder_cache(beam_idx)
        self.select(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)
        self.select(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        self.select(lambda t: t[indices])


def joined(before_BT: Tensor | None, new_BT: Tensor) -> Tensor:
    """Positions with new ones behind; one row stands for all where both have one."""
    if before_BT is None:
        return new_BT
    rows = max(len(before_BT), len(new_BT))
    return torch.cat((before_BT.expand(rows, -1), new_BT.expand(rows, -1)), 1)


# -- making it -------------------------------------------------------------------------------------------


class Witness(LatentLayer):
    """A layer that also keeps the keys and values it is given, to compare with them what its latents make."""

    agreed: Reading | None = None  # the reading that made the same, once one did
    given: tuple[Tensor, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """As the layer does; raises RecipeError if no reading of all its latents gives the keys and values of all."""
        if self.shown is None:
            raise RecipeError(
                "kv: latent: this attention is not given hidden states and positions of tokens; load with kv=None"
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
                f"kv: latent: {type(attention).__name__} {attention.layer_idx} makes its keys or values in a way that "
                "is not known here; load with kv=None"
            )
        return self.given[0], self.given[1]


def same(got: Tensor, want: Tensor) -> bool:
    """Whether two tensors are equal but for the rounding of their dtype."""
    off = (got.float() - want.float()).norm() / want.float().norm().clamp(min=1e-30)
    return bool(off <= max(SAME, ROUNDINGS * torch.finfo(want.dtype).eps))


def prepared(model: Any) -> Callable[[], LatentCache]:
    """What makes a latent cache for `model`, whose attentions from now on show such a cache what they compute with.

    Layers whose projections are not factored, or have latents larger than key and value, stay plain. Raises RecipeError
    if no layer is left, or if one computes otherwise than assumed.
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
    """The attentions with the reading of each that agrees with it; raises RecipeError for the first without one."""
    rotary = rotary_of(model)
    cache = LatentCache(model.config, [attention.layer_idx for attention in chosen], Witness)
    with ExitStack() as hooks:
        for attention in chosen:
            found = rotary if hasattr(sys.modules[type(attention).__module__], ROTATE) else None
            show = partial(_show, Reading(found, share_latent(attention)))
            hooks.callback(attention.register_forward_pre_hook(show, with_kwargs=True).remove)
        try:
            feed(model, cache)
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:  # of the family's code, called as by us
            raise RecipeError(
                f"kv: latent: {type(model).__name__} is not known here ({in_short(error)}); load with kv=None"
            ) from error
    return [(attention, cache.layers[attention.layer_idx].agreed) for attention in chosen]


@torch.no_grad()
def feed(model: Any, cache: Cache) -> None:
    """Let the model see a few tokens of two rows, one of which begins with padding, in steps."""
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
    """Numbers that are kept of a token."""
    key, value = (int(p.spec["tree"]["right"]["shape"][0]) for p in (attention.k_proj, attention.v_proj))
    return key if share_latent(attention) else key + value


def width_of(attention: Any) -> int:
    """Numbers of a token's key and value."""
    return int(attention.k_proj.out_features + attention.v_proj.out_features)


def _show(reading: Reading, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook: show a latent cache the hidden states and positions that an attention is given."""
    cache, positions = kwargs.get("past_key_values"), kwargs.get("position_ids")
    hidden = args[0] if args else kwargs.get("hidden_states")
    if isinstance(cache, LatentCache) and hidden is not None and positions is not None:
        cache.show(attention, reading, hidden, positions)
