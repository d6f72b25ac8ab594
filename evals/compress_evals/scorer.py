"""lm-eval's wrapper of a live model, changed so that logits are computed only where they are read.

lm-eval asks for the likelihood of a few tokens after a long prompt, but computes logits, and their float32 log-softmax,
for the whole prompt: 49,152 to 128,256 unused numbers per token. Here the output layer is applied only to the end of
each batch, and no key-value cache is kept. Prompts that do not fit the context lose their beginning, but not the BOS
token, without which many models fall apart. A newline ends an answer only behind something said: lm-eval would take the
answer of a model that begins with an empty line for silence. Not here: batching, prompts and the use of the
likelihoods, which remain lm-eval's.
"""

from __future__ import annotations

import copy
import inspect
from functools import cache
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import pad_and_concat
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from compress.runtime.kv import own_cache
from compress_evals.metrics.answers import first_line


class Scorer(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """A live model in the form that lm-eval evaluates, with a fixed batch size."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        """Wrap the model; nothing is computed yet."""
        bos = tokenizer.bos_token_id
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            add_bos_token=bos is not None,
            prefix_token_id=bos,
            softmax_dtype=torch.float32,  # log-softmax in bfloat16 creates ties that the logits do not have
        )
        self._options = options(model) if pads_with_zeros() else None
        self._longest: int | None = None  # tokens of the longest continuation that is being scored
        self._by_line = False  # whether answers that are being generated end with their first line

    def _loglikelihood_tokens(self, requests: Any, *positional: Any, **named: Any) -> Any:
        self._longest = max((len(continuation) for *_, continuation in requests), default=None)
        bos, most = self.tokenizer.bos_token_id, self.max_length + 1  # the last token is scored, not read
        fitting = [(text, fitted(ctx, most - len(then), bos), then) for text, ctx, then in requests]
        try:
            return super()._loglikelihood_tokens(fitting, *positional, **named)
        finally:
            self._longest = None

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """The generated texts; where only a newline is to end them, their first line that is not blank."""
        if not all(request.args[1].get("until") == ["\n"] for request in requests):
            return list(super().generate_until(requests, disable_tqdm))
        endless = [copy.copy(request) for request in requests]
        for request in endless:
            prompt, settings = request.arguments
            request.arguments = (prompt, {**settings, "until": []})
        self._by_line = True
        try:
            return [first_line(said) for said in super().generate_until(endless, disable_tqdm)]
        finally:
            self._by_line = False

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        if not self._by_line:
            whole: Tensor = super()._model_generate(context, max_length, stop, **options)
            return whole
        ends = StoppingCriteriaList([LineSaid(self.tokenizer, context.shape[1], self.eot_token_id)])
        options |= {"use_cache": True, "pad_token_id": self.tokenizer.pad_token_id}  # as lm-eval sets them
        ids: Tensor = self.model.generate(input_ids=context, max_length=max_length, stopping_criteria=ends, **options)
        return ids

    def tok_batch_encode(
        self, strings: list[str], *positional: Any, left_truncate_len: int | None = None, **named: Any
    ) -> tuple[Tensor, Tensor]:
        """Token ids and their mask, [rows, tokens], padded and cut to `left_truncate_len`; BOS tokens stay."""
        ids, mask = super().tok_batch_encode(strings, *positional, **named)
        cut, bos = ids.shape[1] - (left_truncate_len or ids.shape[1]), self.tokenizer.bos_token_id
        if cut <= 0:
            return ids, mask
        starts = mask.argmax(dim=1)  # padding is on the left
        first = ids.gather(1, starts[:, None])[:, 0]
        ids, mask = ids[:, cut:].clone(), mask[:, cut:]
        if bos is not None:
            ids[(starts < cut) & (first == bos), 0] = bos
        return ids, mask

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        if self._longest is None or self._options is None or attn_mask is not None or labels is not None:
            whole: Tensor = super()._model_call(inps, attn_mask, labels)
            return whole
        with torch.no_grad():
            logits: Tensor = self.model(inps, logits_to_keep=read(inps, self._longest), **self._options).logits
            return logits


class LineSaid(StoppingCriteria):  # type: ignore[misc]  # transformers has no types for it
    """Ends each row behind its first line that is not blank, or behind the end token."""

    def __init__(self, tokenizer: Any, prompt: int, end: int) -> None:
        """`prompt` is the length of the prompts in tokens, padding included."""
        self.tokenizer, self.prompt, self.end = tokenizer, prompt, end

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Which rows have ended."""
        new = input_ids[:, self.prompt :]
        said = ["\n" in text.lstrip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]
        return torch.tensor(said, device=new.device) | (new == self.end).any(dim=1)


def fitted(context: list[int], room: int, bos: int | None) -> list[int]:
    """The end of a context that does not fit into `room` tokens, after its BOS token if it has one."""
    if len(context) <= room or room < 1 or bos is None or context[0] != bos:
        return context
    return [bos, *context[len(context) - room + 1 :]]


def read(inps: Tensor, longest: int) -> int:
    """The number of positions at the end of a batch whose logits include all that are read.

    `inps` [rows, tokens] is padded with zeros on the right, and of each row only the last `longest` positions are read.
    lm-eval accounts for the positions that are missing at the front. A real token 0 at the end of a row is taken for
    padding, so that one position more than needed is computed.
    """
    tokens = inps.shape[1]
    last = ((inps != 0) * torch.arange(1, tokens + 1, device=inps.device)).amax(dim=1)
    return min(tokens, tokens - int(last.min()) + longest)


def options(model: Any) -> dict[str, Any] | None:
    """Further arguments for the model's forward pass; None if the model has no `logits_to_keep`."""
    known = inspect.signature(model.forward).parameters
    if "logits_to_keep" not in known:
        return None
    plain = "use_cache" in known and own_cache(model) is None  # a cache set by a recipe must stay in use
    return {"use_cache": False} if plain else {}


@cache
def pads_with_zeros() -> bool:
    """Whether lm-eval pads with zeros on the right, as `read` assumes."""
    return bool(pad_and_concat(3, [torch.tensor([7])], padding_side="right").tolist() == [[7, 0, 0]])
