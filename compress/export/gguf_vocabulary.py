"""Writes the tokenizer of a model into a GGUF file, if llama.cpp supports the tokenizer's pre-tokenization.

llama.cpp identifies pre-tokenizers by name and does not read their rules. A byte-level BPE tokenizer is written if its
rules are among those listed below; otherwise it is left out, and the note on the export says so.
"""

from __future__ import annotations

from typing import Any

from compress.artifact import Artifact
from compress.model.source import read_json

BYTES = {"type": "ByteLevel", "add_prefix_space": False}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CUTS: dict[str, list[dict[str, Any]]] = {  # llama.cpp's name -> the pre-tokenizers of tokenizer.json that it stands for
    "gpt-2": [{**BYTES, "use_regex": True}],
    "starcoder": [{"type": "Digits", "individual_digits": True}, {**BYTES, "use_regex": True}],
    "llama-bpe": [
        {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False},
        {**BYTES, "use_regex": False},
    ],
}
NORMAL, CONTROL, USER, UNUSED = 1, 3, 4, 5  # token types of GGUF


def add_vocabulary(writer: Any, artifact: Artifact, size: int) -> str:
    """Add the tokens, merges and special tokens if llama.cpp has a name for the pre-tokenizer; returns a note.

    Tokens with ids from `size` on, such as a padding token that was added later, have no row in the model and are left
    out.
    """
    from gguf import SpecialVocab

    path = artifact.path / "tokenizer.json"
    told = read_json(path, "the tokenizer") if path.is_file() else {}
    cut = name_of_cut(told)
    if cut is None:
        return "llama.cpp has no name for its tokenizer, which is stored beside the file and not in it"
    found = {i: (token, NORMAL) for token, i in told["model"]["vocab"].items()}
    for added in told.get("added_tokens", []):
        found[added["id"]] = added["content"], CONTROL if added["special"] else USER
    tokens, types = zip(*(found.get(i, (f"[PAD{i}]", UNUSED)) for i in range(size)), strict=True)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    SpecialVocab(artifact.path, load_merges=True, n_vocab=size).add_to_gguf(writer, quiet=True)
    left_out = f", without the tokens from {size} on, which have no row in the model" if max(found) >= size else ""
    return f"its tokenizer is llama.cpp's {cut}{left_out}"


def name_of_cut(told: dict[str, Any]) -> str | None:
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json, or None if it has none."""
    model, before = told.get("model", {}), told.get("pre_tokenizer") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback") or told.get("normalizer"):
        return None
    steps = before.get("pretokenizers", [before])
    steps = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    return next((name for name, wanted in CUTS.items() if steps == wanted), None)
