"""A key-value cache that stores older tokens in 8, 4 or 2 bits, and what attaches it, or a latent one, to a model.

Codes are packed in memory, not only rounded. No kernel is fused: each step decodes the whole cache to the model's
dtype, layer by layer, so the cache saves memory between steps, not time.
Shapes: B batch, H key-value heads (of the model; the attention itself repeats them for grouped queries), T tokens,
D channels of a head, G values of a group, N groups or tokens, C channels or groups of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from compress.errors import RecipeError
from compress.kv import KV, Kept, read_kept
from compress.runtime import latent
from compress.weights.bits import pack_bits, unpack_bits

Rows = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Packed:
    """Quantized values [B, H, N, C, G]: packed codes [B, H, N, C, G * bits / 8], float16 scale and low [B, H, N, C].

    `low` is the minimum of each group.
    """

    codes: Tensor
    scale: Tensor
    low: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The stored tensors."""
        return self.codes, self.scale, self.low

    def mapped(self, rows: Rows) -> Packed:
        """The values after `rows` has been applied to the batch dimension of every tensor."""
        return Packed(*map(rows, self.tensors()))

    def joined(self, later: Packed) -> Packed:
        """These groups followed by later ones."""
        return Packed(*(torch.cat(pair, 2) for pair in zip(self.tensors(), later.tensors(), strict=True)))


def encode(x_BHNCG: Tensor, bits: int) -> Packed:
    """Quantize each group between its minimum and maximum, both included; a constant group has scale 0.

    Codes are computed from the scale and minimum as stored in float16. A group beyond float16's range decodes to NaN.
    Source: Liu et al., KIVI, ICML 2024, section 3 (asymmetric, no integer zero point).
    """
    x = x_BHNCG.float()
    low, high = x.aminmax(dim=-1)
    stored = low.half()
    scale = ((high - stored.float()).clamp(min=0) / (2**bits - 1)).half()
    steps = torch.where(scale > 0, scale, 1).float().unsqueeze(-1)
    codes = ((x - stored.float().unsqueeze(-1)) / steps).round().clamp(0, 2**bits - 1).to(torch.uint8)
    return Packed(pack_bits(codes, bits).view(*x.shape[:-1], x.shape[-1] * bits // 8), scale, stored)


def decode(packed: Packed, bits: int, dtype: torch.dtype) -> Tensor:
    """The values [B, H, N, C, G] that `encode` quantized, in `dtype`."""
    codes = unpack_bits(packed.codes.reshape(-1), bits, packed.codes.numel() * 8 // bits)
    x = codes.view(*packed.scale.shape, -1) * packed.scale.float().unsqueeze(-1)
    return (x + packed.low.float().unsqueeze(-1)).to(dtype)


class Side:
    """The keys or values of one layer: the first tokens unquantized, then quantized tokens, then an unquantized tail.

    Appending many tokens at once leaves the same state as appending them one by one.
    Source: KIVI, algorithm 1: keys are quantized `residual` tokens at a time, values as soon as more than `residual`
    of them are unquantized.
    """

    def __init__(self, kv: KV, keys: bool, like_BHTD: Tensor) -> None:
        self.kv, self.keys = kv, keys
        self.channel = keys and kv.keys == "channel"
        self.sink = self.tail = like_BHTD[:, :, :0].detach().clone()
        self.packed: Packed | None = None

    def update(self, new_BHTD: Tensor) -> Tensor:
        """Append new tokens and return all tokens; the new ones are unrounded in this step, also to each other."""
        middle = () if self.packed is None else (self.unlay(decode(self.packed, self.kv.bits, self.tail.dtype)),)
        seen_BHTD = torch.cat((self.sink, *middle, self.tail, new_BHTD), 2)
        self.append(new_BHTD)
        return seen_BHTD

    def append(self, new_BHTD: Tensor) -> None:
        """Append new tokens and quantize those that are due.

        The tail is copied, because a slice would keep the whole prompt in memory. Gradients stop here, since quantized
        tokens have none.
        """
        new_BHTD = new_BHTD.detach()
        first = min(self.kv.sink - self.sink.shape[2], new_BHTD.shape[2])
        if first:
            self.sink = torch.cat((self.sink, new_BHTD[:, :, :first]), 2)
        self.tail = torch.cat((self.tail, new_BHTD[:, :, first:]), 2)
        due = self.due(self.tail.shape[2])
        if due:
            later = encode(self.lay(self.tail[:, :, :due]), self.kv.bits)
            self.packed = later if self.packed is None else self.packed.joined(later)
            self.tail = self.tail[:, :, due:].clone()

    def due(self, plain: int) -> int:
        """How many of the unquantized tokens in the tail are to be quantized now."""
        return plain - plain % self.kv.residual if self.keys else max(0, plain - self.kv.residual)

    def lay(self, x_BHTD: Tensor) -> Tensor:
        """Split tokens into groups: of consecutive tokens of a channel, or of channels of a token."""
        if self.channel:
            return torch.unflatten(x_BHTD, 2, (-1, self.kv.group)).transpose(3, 4)
        return torch.unflatten(x_BHTD, 3, (-1, self.kv.group))

    def unlay(self, x_BHNCG: Tensor) -> Tensor:
        """Join groups to tokens; the inverse of `lay`."""
        return x_BHNCG.transpose(3, 4).flatten(2, 3) if self.channel else x_BHNCG.flatten(3, 4)

    def select(self, rows: Rows) -> None:
        """Apply `rows` to the batch dimension of everything stored."""
        self.sink, self.tail = rows(self.sink), rows(self.tail)
        self.packed = None if self.packed is None else self.packed.mapped(rows)

    def nbytes(self) -> int:
        """Bytes of memory held, counted by storage."""
        held = (self.sink, self.tail, *(() if self.packed is None else self.packed.tensors()))
        return sum(tensor.untyped_storage().nbytes() for tensor in held)


class QuantizedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of the cache.

    It cannot be cropped, because tokens that have been quantized cannot be restored; assisted generation is therefore
    refused.
    """

    supports_early_init = False

    def __init__(self, kv: KV) -> None:
        super().__init__()
        self.kv, self.length = kv, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Initialize for the first tokens; raises RecipeError if the head size does not divide into groups."""
        self.kv.check_head(value_states.shape[-1])
        if self.kv.keys == "token":
            self.kv.check_head(key_states.shape[-1])
        self.sides = (Side(self.kv, True, key_states), Side(self.kv, False, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append new tokens and return all keys and values that they may attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.length += key_states.shape[2]
        keys, values = self.sides
        return keys.update(key_states), values.update(value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what `query_length` new tokens may attend to."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """The number of tokens in the cache."""
        return self.length

    def get_max_length(self) -> int:
        """-1, which means no limit."""
        return -1

    def nbytes(self) -> int:
        """Bytes of memory held; 0 before the first token."""
        return sum(side.nbytes() for side in self.sides) if self.is_initialized else 0

    def reset(self) -> None:
        """Remove all tokens."""
        self.is_initialized, self.length = False, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Raise RecipeError unless `tokens_to_remove` is 0."""
        if tokens_to_remove:
            raise RecipeError(
                "kv: a quantized cache cannot remove tokens, which assisted generation needs; load with kv=None"
            )

    def select(self, rows: Rows) -> None:
        """Apply `rows` to the batch dimension of keys and values."""
        if self.is_initialized:
            for side in self.sides:
                side.select(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows of the batch as beam search asks."""
        self.select(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        self.select(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows of the batch."""
        self.select(lambda t: t[indices])


class QuantizedCache(Cache):  # type: ignore[misc]
    """A quantized cache for a model with this config; `options` are those of `compress.KV`.

    Use as `model.generate(ids, past_key_values=QuantizedCache(model.config, bits=4))`. Full-attention layers are
    quantized; others (sliding window, linear attention) keep transformers' own cache. Padding tokens are quantized
    together with the tokens beside them. Raises RecipeError for invalid options and for a model without a
    full-attention layer.
    """

    def __init__(self, config: Any, **options: Any) -> None:
        kv = KV.of(options)
        layers = DynamicCache(config=config).layers
        if not any(type(layer) is DynamicLayer for layer in layers):
            raise RecipeError(f"kv: {config.model_type} has no layer of full attention whose cache could be quantized")
        super().__init__(layers=[QuantizedLayer(kv) if type(layer) is DynamicLayer else layer for layer in layers])

    def nbytes(self) -> int:
        """Bytes that the quantized layers hold."""
        return sum(layer.nbytes() for layer in self.layers if isinstance(layer, QuantizedLayer))


def check(model: Any, kept: Kept, factored: Collection[str] = ()) -> None:
    """Raise RecipeError if the model cannot use such a cache; `factored` names the modules that will be low-rank."""
    check_decoder(model)
    if kept == "latent":
        latent.check(model, factored)
        return
    QuantizedCache(model.config, **asdict(kept))
    config = model.config.get_text_config(decoder=True)
    size = getattr(config, "v_head_dim", None) or getattr(config, "head_dim", None)
    kept.check_head(size or config.hidden_size // config.num_attention_heads)


def check_decoder(model: Any) -> None:
    """Raise RecipeError if the model is not a decoder that generates from a key-value cache."""
    cached = "past_key_values" in signature(model.forward).parameters
    if not (cached and model.can_generate()) or model.config.is_encoder_decoder:
        raise RecipeError(f"kv: {type(model).__name__} is not a decoder that generates from a key-value cache")


def attach(model: Any, kept: Kept | Mapping[str, Any]) -> None:
    """Make `model` create such a cache wherever it would create a default one: in `generate` and in its forward pass.

    A cache that the caller passes or names is left alone. Raises RecipeError if the model cannot use such a cache.
    """
    new = maker(model, read_kept(kept))
    model._own_cache = new
    model.register_forward_pre_hook(partial(_enter, new), with_kwargs=True)
    model.generate = partial(_generate, model.generate, new)


def own_cache(model: Any) -> Callable[[], Cache] | None:
    """The function that creates the kind of cache attached to a model; None if none is attached."""
    return getattr(model, "_own_cache", None)


def maker(model: Any, kept: Kept) -> Callable[[], Cache]:
    """The function that creates such a cache for the model; raises RecipeError if the model cannot use one."""
    if kept == "latent":
        check_decoder(model)
        return latent.prepared(model)
    check(model, kept)
    return partial(QuantizedCache, model.config, **asdict(kept))


def _enter(
    new: Callable[[], Cache], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A forward pre-hook that adds a new cache to the arguments if the forward pass would create its own."""
    bound = signature(model.forward).bind_partial(*args, **kwargs)
    given = bound.arguments
    asked = given.get("use_cache")
    if asked is None:
        asked = getattr(model.config.get_text_config(decoder=True), "use_cache", False)
    if asked and given.get("past_key_values") is None:
        given["past_key_values"] = new()
        return bound.args, bound.kwargs
    return None


def _generate(generate: Any, new: Callable[[], Cache], *args: Any, **kwargs: Any) -> Any:
    """Call `generate` with a new cache, unless the caller passes one, names an implementation or wants none.

    Each setting is that of the call, or else of the config passed, or else of the model's own config. There, "hybrid"
    means what a model does by itself, as in transformers.
    """
    passed = signature(generate).bind_partial(*args, **kwargs).arguments.get("generation_config")
    usual = generate.__self__.generation_config

    def setting(name: str) -> Any:
        values = (kwargs.get(name), getattr(passed, name, None), getattr(usual, name, None))
        return next((value for value in values if value is not None), None)

    named = setting("cache_implementation")
    inherited = named == usual.cache_implementation == "hybrid"
    if setting("use_cache") is not False and (not named or inherited) and kwargs.get("past_key_values") is None:
        kwargs["past_key_values"] = new()
    return generate(*args, **kwargs)
