"""The models that every tool is given, with their calibration windows and the tokens on which results are evaluated.

Not here: how a tool is run (`job.py`). Windows are drawn as `compress run` draws them and handed unchanged to the other
tools; the hash in Compress's own artifact shows that it used the same. Shape suffixes: N windows, T tokens.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from compress import Calibration
from compress.calibration import draw
from compress.model.source import locate
from compress_evals.fidelity import evaluation_text, text_windows
from compress_evals.folders import tokenizer_of

VOCABULARY, SAMPLES, LENGTH = 1024, 64, 512  # of the random model
SPARE = 4 * 256  # tokens that the calibration of Compress sets aside for its probe
JUDGED = 8  # windows on which the random model is evaluated
SUBJECTS = ("m512", "m512-bf16", "builtin")
TASKS = ("wanda", "sparsegpt", "gptq", "rtn")
PASSES = {  # the options that come nearest to the defaults of the other tools
    "wanda": "wanda: {sparsity: 2:4}",
    "sparsegpt": "sparsegpt: {sparsity: 2:4}",
    "gptq": "gptq: {bits: 4, group: 128, symmetric: true, order: activation}",
    "rtn": "rtn: {bits: 4, group: 128, symmetric: true}",
}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model folder, its calibration, the file of its windows with their hash, and its evaluation tokens."""

    name: str
    model: Path
    calibration: Calibration
    ids: Path
    sha256: str
    judged_NT: Tensor
    knows: bool  # whether it was trained, so that it can answer questions

    def recipe(self, task: str) -> str:
        """The recipe that Compress runs for a task."""
        told = self.calibration
        drawn = f"{{data: {told.data}, samples: {told.samples}, length: {told.length}, seed: {told.seed}}}"
        return f"calibration: {drawn}\npasses:\n  - {PASSES[task]}\n"


def prepared(name: str, folder: Path) -> Subject:
    """The subject of that name; its files are written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    return trained_model(folder) if name == "builtin" else random_model(name, folder)


def drawn(calibration: Calibration, tokenizer: Any, longest: int, ids: Path) -> str:
    """Write the windows that a calibration draws, and return their hash."""
    tokens = draw(calibration, tokenizer, longest)
    save_file({"windows": tokens.windows[0]}, ids)
    return tokens.sha256


def random_model(name: str, folder: Path) -> Subject:
    """A Llama of 26.7 million random parameters, in float32 or bf16 as its name says, calibrated on random tokens.

    It shows whether two tools compute the same result, not whether a method is good.
    """
    model, text = folder / name, folder / f"{name}.txt"
    if not model.is_dir():
        make_random(model, torch.bfloat16 if name.endswith("bf16") else torch.float32)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (SAMPLES * LENGTH + SPARE,), generator=generator)
    text.write_text(" ".join(f"t{i}" for i in ids.tolist()), encoding="utf-8")
    calibration = Calibration(data=str(text), samples=SAMPLES, length=LENGTH)
    windows = folder / f"{name}.safetensors"
    return Subject(
        name=name, model=model, calibration=calibration, ids=windows,
        sha256=drawn(calibration, tokenizer_of(model), LENGTH, windows),
        judged_NT=torch.randint(VOCABULARY, (JUDGED, LENGTH), generator=generator), knows=False,
    )  # fmt: skip


def make_random(model: Path, dtype: torch.dtype) -> None:
    """Write the random model, with a tokenizer that has one word per token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        max_position_embeddings=2048, bos_token_id=None, eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = LlamaForCausalLM(config).to(dtype)
    part = model.with_name(f"{model.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    made.save_pretrained(part)
    word_tokenizer(VOCABULARY).save_pretrained(part)
    part.rename(model)


def word_tokenizer(vocabulary: int) -> Any:
    """A tokenizer that reads `t7` as token 7 and adds no special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0")  # gptqmodel asks for a padding token


def trained_model(folder: Path) -> Subject:
    """The built-in model with its usual calibration, evaluated on the text that no calibration set contains."""
    model, windows = locate("builtin"), folder / "builtin.safetensors"
    calibration = Calibration(data="mixed", samples=128, length=256)
    tokenizer = tokenizer_of(model)
    whole = [w.ids for w in text_windows(tokenizer, evaluation_text(), 256) if len(w.ids) == 256]
    return Subject(
        name="builtin", model=model, calibration=calibration, ids=windows,
        sha256=drawn(calibration, tokenizer, 512, windows), judged_NT=torch.tensor(whole), knows=True,
    )  # fmt: skip
