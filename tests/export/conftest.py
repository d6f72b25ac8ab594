"""Fixtures: a small Llama whose shapes suit every format, its artifacts by passes, and a pass that makes any leaf."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import compress
from compress import Calibration, Codebook, Dense, Grid, Limits, Pass, Recipe, Scaled, Weight, WeightPass
from compress.model.site import Site
from compress.passes import PASSES
from compress.weights import BOOKS

SIZES: dict[str, Any] = {
    "vocab_size": 224, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
    "initializer_range": 0.15, "tie_word_embeddings": False,
}  # fmt: skip
Exporter = Callable[..., Path]


@dataclass(frozen=True, kw_only=True)
class Leaves(WeightPass, name="test-leaves"):
    """A pass for leaves that no built-in pass makes, or not from weights this small; `kind` names the leaf."""

    kind: str

    def rewrite(self, site: Site) -> Weight:
        return ENCODERS[self.kind](site.expect(Dense, by=self.name).dense().float())


del PASSES["test-leaves"]  # only for these tests: recipes get its objects, never its name


def nearest(x: Tensor, book: Tensor) -> Tensor:
    """The code of the entry of `book` [entries, 1] that is nearest to each element of x."""
    return (x[..., None] - book[:, 0]).abs().argmin(-1).to(torch.uint8)


def nf4(w_OI: Tensor, block: int) -> Weight:
    absmax = w_OI.unflatten(1, (-1, block)).abs().amax(-1)
    codes = nearest(w_OI.unflatten(1, (-1, block)) / absmax[..., None], BOOKS["nf4"]).flatten(1)
    return Codebook(codes, BOOKS["nf4"], Dense(absmax), "nf4")


def small_floats(w_OI: Tensor, rows: int, columns: int) -> Weight:
    scale = w_OI.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).abs().amax((1, 3)) / 448
    wide = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return Scaled((w_OI / wide).to(torch.float8_e4m3fn), scale, rows, columns)


ENCODERS: dict[str, Callable[[Tensor], Weight]] = {
    "nf4-row": lambda w: nf4(w, w.shape[1]),
    "nf4-16": lambda w: nf4(w, 16),
    "int4-zeros": lambda w: Grid(bits=4).quantize(torch.cat((-w[:, :1].abs(), w[:, 1:]), 1)),  # no zero is 0
    "int4-positive": lambda w: Grid(bits=4).quantize(w.abs()),  # all are
    "fp8-block": lambda w: small_floats(w, 32, 64),
    "fp8-group": lambda w: small_floats(w, 1, 32),
    "lowrank": lambda w: Dense(w[:, :8].contiguous()) @ Dense(w[:8].contiguous()),
}


def build(folder: Path, tokenizer_of: Path, kind: str = "llama", dtype: str = "float32", **changes: Any) -> Path:
    """A random model with the tokenizer of another folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **changes}), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    for file in tokenizer_of.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Callable[..., Path]:
    """`small(kind="llama", dtype="float32", **config)`: a folder, made once."""
    made: dict[str, Path] = {}

    def make(kind: str = "llama", dtype: str = "float32", **changes: Any) -> Path:
        key = repr((kind, dtype, changes))
        if key not in made:
            made[key] = build(tmp_path_factory.mktemp(kind), tiny_llama, kind, dtype, **changes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def artifact_of(small: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`artifact_of([passes], model=None)`: the compressed small Llama, made once for each list of passes."""
    made: dict[str, Path] = {}

    def make(passes: Sequence[Pass], model: Path | None = None) -> Path:
        key = repr((passes, model))
        if key not in made:
            recipe = Recipe(
                passes=tuple(passes), calibration=Calibration(samples=2, length=16), limits=Limits(max_untouched=1.0)
            )
            made[key] = compress.run(model or small(), recipe, tmp_path_factory.mktemp("artifact") / "out").out
        return made[key]

    return make


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision-language model, whose file names its matrices otherwise than the model does."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sides = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    text = LlamaConfig(**sides, num_hidden_layers=2, num_key_value_heads=2, vocab_size=224, max_position_embeddings=64)
    eye = CLIPVisionConfig(**sides, num_hidden_layers=3, image_size=16, patch_size=8, projection_dim=64)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=eye, image_token_id=223))
    folder = tmp_path_factory.mktemp("llava")
    model.float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bare_bloom(small: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as Bloom's on the hub: its names lack the model's prefix."""
    folder = shutil.copytree(small("bloom", n_layer=2, n_head=4), tmp_path_factory.mktemp("bare") / "bloom")
    held = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in held.items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def stock() -> Callable[..., Any]:
    """`stock(folder, dtype)`: the model loaded by stock transformers; no key is missing, unexpected or mismatched."""

    def load(folder: Path, dtype: Any = "auto", auto: str = "AutoModelForCausalLM", **options: Any) -> Any:
        import transformers

        model, told = getattr(transformers, auto).from_pretrained(
            folder, local_files_only=True, dtype=dtype, output_loading_info=True, **options
        )
        assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
        return model.eval()

    return load


@pytest.fixture
def logits(ids: Tensor) -> Callable[[Any], Tensor]:
    """`logits(model)`: its logits in float32."""

    def of(model: Any) -> Tensor:
        with torch.inference_mode():
            return torch.as_tensor(model(ids).logits).float()

    return of


@pytest.fixture
def leaves() -> type[Leaves]:
    """The pass class `Leaves`."""
    return Leaves
