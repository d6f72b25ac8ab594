"""Untrusted checkpoints: every false header, index, link or config gives one line, costs little, and runs no code."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import compress
from compress import Magnitude
from compress.model.source import Checkpoint
from compress.survey import survey

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NAME = "model.layers.0.mlp.up_proj.weight"
Refuse = Callable[..., str]


def attempts(folder: Path) -> list[Callable[[], object]]:
    """Every way to open a model folder."""
    out = folder.parent / "out"
    return [
        lambda: compress.run(folder, [Magnitude()], out),
        lambda: compress.load(folder),
        lambda: survey(folder),
    ]


def refused(folder: Path, refuse: Refuse) -> str:
    """The message of a run; every other way of opening the folder is refused too."""
    said = [refuse(way, "bad input", "hostile checkpoints") for way in attempts(folder)]  # all of them
    return next(iter(said))


# -- headers ---------------------------------------------------------------------------------------


def parts(folder: Path) -> tuple[dict[str, Any], bytes]:
    content = (folder / SINGLE).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(folder: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


LIES: dict[str, dict[str, Any]] = {
    "a narrower dtype": {"dtype": "F16"},
    "an unknown dtype": {"dtype": "F7"},
    "a dtype torch has not": {"dtype": "F6_E2M3", "shape": [72 * 48 * 32 // 6]},
    "a dtype of half bytes": {"dtype": "F4", "shape": [72, 48 * 8]},
    "complex numbers": {"dtype": "C64", "shape": [72, 24]},
    "another shape": {"shape": [48, 72]},
    "a shape of terabytes": {"shape": [1 << 40, 1 << 20]},
    "a shape that overflows": {"shape": [1 << 32, 1 << 32]},
    "a shape that overflows to its size": {"shape": [72, 48, (1 << 63) + 1]},
    "negative sides": {"shape": [-72, -48]},
    "a fraction of a side": {"shape": [72.0, 48]},
    "no values": {"shape": [0, 48]},
    "a side of no values": {"shape": [0, 1 << 60]},
    "offsets behind the end": {"data_offsets": [0, 1 << 50]},
    "offsets of another tensor": {"data_offsets": [0, 72 * 48 * 4]},
    "negative offsets": {"data_offsets": [-4, 72 * 48 * 4 - 4]},
    "offsets that are no pair": {"data_offsets": [0]},
    "no offsets": {"data_offsets": None},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies(lie: str, single: Path, refuse: Refuse) -> None:
    header, data = parts(single)
    header[NAME] |= LIES[lie]
    write(single, json.dumps(header).encode(), data)
    refused(single, refuse)


@pytest.mark.parametrize("length", [0, 1, 5, 1 << 20, 99_000_000, 1 << 40, 1 << 62, (1 << 64) - 1])
def test_a_length_that_lies(length: int, single: Path, refuse: Refuse) -> None:
    header, data = parts(single)
    write(single, json.dumps(header).encode(), data, length)
    assert "not a readable safetensors file" in refused(single, refuse)


def test_a_length_in_the_other_byte_order(single: Path, refuse: Refuse) -> None:
    content = (single / SINGLE).read_bytes()
    (single / SINGLE).write_bytes(content[:8][::-1] + content[8:])
    assert "not a readable safetensors file" in refused(single, refuse)


MORE = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'

HEADERS: dict[str, Callable[[bytes], bytes]] = {
    "not UTF-8": lambda text: b'{"\xff\xfe":0,' + text[1:],
    "a list": lambda _: b"[]",
    "nothing": lambda _: b"",
    "very deep": lambda _: b'{"a":' + b"[" * 100_000,
    "a tensor twice": lambda text: b'{"%s":' % NAME.encode() + MORE + text[1:],
    "metadata twice": lambda text: b'{"__metadata__":{"a":"b"},' + text[1:],
    "a key of a tensor twice": lambda text: text.replace(b'"dtype":', b'"dtype":"F64","dtype":', 1),
    "a name with controls": lambda text: b'{"\\u001b[31mx\\n":' + MORE + text[1:],
    "a name turned round": lambda text: b'{"a\\u202eb":' + MORE + text[1:],
    "half a pair in a name": lambda text: b'{"\\ud800":' + MORE + text[1:],
    "NaN": lambda text: b'{"x":NaN,' + text[1:],
    "metadata that is no text": lambda text: b'{"__metadata__":{"format":{"x":1}},' + text.partition(b"},")[2],
}  # fmt: skip


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_that_is_none(header: str, single: Path, refuse: Refuse) -> None:
    told, data = parts(single)
    write(single, HEADERS[header](json.dumps(told, separators=(",", ":")).encode()), data)
    refused(single, refuse)


@pytest.mark.parametrize("more", [b"x", b"\0" * 4096])
def test_bytes_that_no_tensor_owns(more: bytes, single: Path, refuse: Refuse) -> None:
    with (single / SINGLE).open("ab") as file:
        file.write(more)
    assert "not a readable safetensors file" in refused(single, refuse)


# -- the index and links ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "../../../../etc/passwd", "/etc/passwd", "./model-00001-of-00007.safetensors", "sub/x", "..",
     ".", "", "a\0b", "a\nb", "x" * 300, "~/x", "\\\\host\\x", "file:///etc/passwd", None, 3, [], {}],
)  # fmt: skip
def test_an_index_that_leaves_its_folder(shard: object, sharded: Path, refuse: Refuse, edit_json: Any) -> None:
    (sharded.parent / "x.safetensors").write_bytes(b"secret")
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": shard}))
    assert "is not a file of this folder" in refused(sharded, refuse)


@pytest.mark.parametrize("name", ["\x1b]0;x\x07", "a\u202eb", "a\nerror: all is well"])
def test_an_index_with_names_that_do_not_show(name: str, sharded: Path, refuse: Refuse, edit_json: Any) -> None:
    def change(index: dict[str, Any]) -> None:
        index["weight_map"][name] = index["weight_map"]["lm_head.weight"]

    edit_json(sharded / INDEX, change)
    assert "contains unprintable characters" in refused(sharded, refuse)


@pytest.mark.parametrize("file", [SINGLE, "tokenizer.json", "generation_config.json", "notes.txt", "config.json"])
def test_a_link_out_of_the_folder(file: str, single: Path, refuse: Refuse) -> None:
    outside = single.parent / "outside"
    shutil.copyfile(single / file if (single / file).exists() else single / "config.json", outside)
    (single / file).unlink(missing_ok=True)
    (single / file).symlink_to(outside)
    assert f"{single / file}: links out of the folder" in refused(single, refuse)


def test_links_as_the_hub_keeps_its_snapshots(single: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--someone--small"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    shutil.copytree(single, cache / "blobs")
    for file in (cache / "blobs").iterdir():
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
    assert Checkpoint(snapshot).names() == Checkpoint(single).names()


def test_a_link_in_a_circle(sharded: Path, refuse: Refuse) -> None:
    shard = sharded / "model-00003-of-00007.safetensors"
    shard.unlink()
    shard.symlink_to(shard)
    assert "is not a file of this folder" in refused(sharded, refuse)


@pytest.mark.parametrize("file", ["config.json", SINGLE])
def test_a_pipe_is_not_waited_for(file: str, single: Path, refuse: Refuse) -> None:
    (single / file).unlink()
    os.mkfifo(single / file)
    refused(single, refuse)


# -- JSON ------------------------------------------------------------------------------------------

TEXTS: dict[str, bytes] = {
    "a list": b"[]", "null": b"null", "a number": b"1e999", "nothing": b"", "not UTF-8": b"\xff\xfe{}", "a NUL": b"\0",
    "deep lists": b'{"a":' + b"[" * 100_000, "deep objects": b'{"a":' * 100_000,
    "lists as deep as can be read": b'{"a":' + b"[" * 900 + b"]" * 900 + b"}", "a pickle": pickle.dumps({"a": 1}),
    "a number of 5000 digits": b'{"a":' + b"9" * 5000 + b"}",
}  # fmt: skip


@pytest.mark.parametrize("file", ["config.json", INDEX])
@pytest.mark.parametrize("text", TEXTS)
def test_json_that_is_none(text: str, file: str, sharded: Path, refuse: Refuse) -> None:
    (sharded / file).write_bytes(TEXTS[text])
    assert file in refused(sharded, refuse)


@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_a_key_that_stands_twice(file: str, sharded: Path, refuse: Refuse) -> None:
    text = (sharded / file).read_text().rstrip()
    key = "model_type" if file == "config.json" else "weight_map"
    (sharded / file).write_text(f'{{"{key}": {{}},{text[1:]}')
    assert f"the key '{key}' stands twice" in refused(sharded, refuse)


def test_json_larger_than_any_is(single: Path, refuse: Refuse) -> None:
    with (single / "config.json").open("r+b") as file:
        file.truncate(1 << 40)  # of holes: no disk is used
    assert "is larger than" in refused(single, refuse)


# -- configs ---------------------------------------------------------------------------------------

HUGE: dict[str, Any] = {
    "num_hidden_layers": 10**9, "head_dim": 10**11, "hidden_size": 10**12, "vocab_size": 10**15,
    "intermediate_size": 2**62, "max_position_embeddings": 10**12, "num_attention_heads": 2**40,
    "text_config": {"num_hidden_layers": 10**6}, "num_key_value_heads": -(10**12), "layers": [2, 10**7],
}  # fmt: skip


@pytest.mark.parametrize("key", HUGE)
def test_a_config_of_another_size_than_its_tensors(key: str, single: Path, refuse: Refuse, edit_json: Any) -> None:
    edit_json(single / "config.json", lambda config: config.update({key: HUGE[key]}))
    assert "tensors allow" in refused(single, refuse)


WRONG: dict[str, Any] = {
    "model_type": [["llama"], {}, 7, "\ud800", "../x", "no_such"],
    "architectures": [7, {"a": 1}],
    "num_hidden_layers": ["2", 2.5, None, True, [2]],
    "hidden_size": [-48, 0, "x"],
    "num_attention_heads": [0, -1],
    "hidden_act": ["__import__('os')", [], 5],
    "rope_parameters": [{"rope_type": "evil"}, 7],
    "pad_token_id": [10**9],
    "quantization_config": [[1], 7, "x", {"quant_method": ["compress"]}],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in WRONG.items() for v in values])
def test_a_config_with_a_wrong_value(key: str, value: object, single: Path, refuse: Refuse, edit_json: Any) -> None:
    edit_json(single / "config.json", lambda config: config.update({key: value}))
    refused(single, refuse)


@pytest.mark.parametrize("dtype", ["__loader__", "float17", ["float32"], "hub", "nn"])
def test_a_dtype_that_is_none(dtype: object, single: Path, refuse: Refuse, edit_json: Any) -> None:
    edit_json(single / "config.json", lambda config: config.update(dtype=dtype))
    assert "unknown dtype" in refused(single, refuse)


def module(folder: Path, canary: Path) -> None:
    """Files of Python that a loader of remote code would run."""
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "evil.py", "__init__.py"):
        (folder / name).write_text(f"open({str(canary)!r}, 'w').close()\nEvil = EvilConfig = object\n")


def auto_map(config: dict[str, Any]) -> None:
    config["auto_map"] = {"AutoConfig": "configuration_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.Evil",
                          "AutoTokenizer": ["tokenization_evil.Evil", None]}  # fmt: skip


def test_code_beside_a_known_model_is_not_run(single: Path, canary: Path, edit_json: Any, bounded: Any) -> None:
    module(single, canary)
    edit_json(single / "config.json", auto_map)
    edit_json(single / "tokenizer_config.json", auto_map)
    with bounded():
        out = compress.run(single, [compress.Wanda()], single.parent / "out", calibration=FEW).out
        compress.load(single), compress.load(out)
    assert not list(out.glob("*.py")) and "auto_map" not in (out / "config.json").read_text()


FEW = compress.Calibration(samples=4, length=32)


def test_code_of_an_unknown_model_is_not_run(single: Path, canary: Path, refuse: Refuse, edit_json: Any) -> None:
    module(single, canary)
    edit_json(single / "config.json", lambda config: (auto_map(config), config.update(model_type="evil")))
    refused(single, refuse)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_of_a_repository_are_not_fetched(key: str, single: Path, refuse: Refuse, edit_json: Any) -> None:
    edit_json(single / "config.json", lambda config: config.update({key: "someone/evil-kernels"}))
    assert "names an attention or experts implementation" in refuse(
        lambda: compress.load(single), "bad input", "hostile checkpoints"
    )


@pytest.mark.parametrize(
    "change", [lambda tensors: tensors.pop(NAME), lambda t: t.update({NAME: t[NAME].T.contiguous()})]
)
def test_a_tensor_is_never_made_up(change: Any, single: Path, refuse: Refuse) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(single / SINGLE)
    change(tensors)
    save_file(tensors, single / SINGLE, metadata={"format": "pt"})
    assert NAME in refused(single, refuse)


# -- the command line ------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "inspect", "merge", "extract"])
@pytest.mark.parametrize("break_it", ["header", "index", "config", "link"])
def test_the_command_line_says_it_in_one_line(command: str, break_it: str, sharded: Path, cli: Any) -> None:
    match break_it:
        case "header":
            (sharded / "model-00002-of-00007.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
        case "index":
            (sharded / INDEX).write_text('{"weight_map": {"a": "../../x"}}')
        case "config":
            (sharded / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1000000000}')
        case _:
            (sharded / "tokenizer.json").unlink()
            (sharded / "tokenizer.json").symlink_to("/etc/passwd")
    out = sharded.parent / "out"
    words = {
        "run": ["run", "rtn-int4", "--model", sharded, "--out", out], "inspect": ["inspect", sharded],
        "merge": ["merge", "builtin", sharded, "--out", out],
        "extract": ["delta", "extract", sharded, "--base", sharded, "--out", out],
    }  # fmt: skip
    code, printed, said = cli(*words[command])
    assert code == 2 and not printed
    assert [line for line in said.splitlines() if line.startswith("error: ")] == said.splitlines()[-1:]
    assert "Traceback" not in said and not out.exists()
