"""The package cannot execute what it reads: the sources have no such call, and a planted pickle is never opened."""

from __future__ import annotations

import ast
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import compress
from compress import Calibration, CompressError, Wanda
from compress.artifact import verify

ROOT = Path(__file__).parents[2]
SOURCES = [path for room in ("compress", "kernels", "evals") for path in sorted((ROOT / room).rglob("*.py"))]
MODULES = ("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pty", "commands")
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "torch.hub.load", "torch.jit.load",
         "torch.package.PackageImporter", "os.system", "os.popen", "runpy.run_path", "runpy.run_module",
         "torch.utils.cpp_extension.load_inline", "torch.utils.cpp_extension.load"}  # fmt: skip
OBJECTS = {f"{name}_object" for name in ("all_gather", "gather")} | {
    f"{name}_object_list" for name in ("broadcast", "scatter", "send", "recv")
}  # of torch.distributed: each pickles what it sends
ONLY_FALSE = {"trust_remote_code", "allow_pickle", "shell"}


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def complaints(path: Path) -> list[str]:
    """The lines of a file that could run what they are given."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        found += [f"{path.name}:{node.lineno}: {name}" for name in names if name.split(".")[0] in MODULES]
    for call in calls(tree):
        called = ast.unparse(call.func)
        loads_yaml = called == "yaml.load" and "YAML(typ='safe'" not in ast.unparse(tree)
        if called in CALLS or called.rpartition(".")[2] in OBJECTS or loads_yaml:
            found.append(f"{path.name}:{call.lineno}: {called}")
        for keyword in call.keywords:
            true = not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
            if (keyword.arg in ONLY_FALSE and true) or (keyword.arg == "weights_only"):
                found.append(f"{path.name}:{call.lineno}: {ast.unparse(keyword)}")
    return found


@pytest.mark.slow
def test_no_source_can_run_what_it_reads() -> None:
    assert len(SOURCES) > 250
    assert [line for path in SOURCES for line in complaints(path)] == []


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from joblib import load", "torch.load(p)", "eval(x)", "f(shell=True)", "f(trust_remote_code=x)",
     "np.load(p, allow_pickle=True)", "yaml.load(t)", "os.system('x')"],
)  # fmt: skip
def test_the_search_finds(line: str, tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(line)
    assert complaints(tmp_path / "x.py")


class Sing:
    """A pickle that makes a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


PLACES = ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.safetensors", "model.pt", "adapter_model.bin",
    "optimizer.pt",
          "training_args.bin", "scheduler.pt", "rng_state.pth", "tokenizer.json", "tokenizer.model",
          "tokenizer_config.json",
          "special_tokens_map.json", "generation_config.json", "config.json", "compress.json", "vocab.json",
          "state.json",
          "model.safetensors.index.json", "added_tokens.json", "chat_template.jinja",
          "processor_config.json"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_pickle_in_any_place_is_never_opened(
    place: str, tiny_llama: Path, llama_artifact: Path, tmp_path: Path, canary: Path
) -> None:
    few = Calibration(samples=4, length=32)
    for number, source in enumerate((tiny_llama, llama_artifact)):
        folder = Path(shutil.copytree(source, tmp_path / str(number)))
        (folder / place).write_bytes(pickle.dumps(Sing(canary)))
        ways = [
            lambda: compress.load(folder),  # noqa: B023
            lambda: verify(folder),  # noqa: B023
            lambda: compress.run(folder, [Wanda()], tmp_path / f"out{number}", calibration=few),  # noqa: B023
        ]
        for way in ways:
            try:
                way()
            except CompressError as error:
                assert str(error).isprintable()
            assert not canary.exists()


@pytest.mark.parametrize("name", ["c.pkl", "c.pt", "c.npy", "c.jsonl", "c.txt", "c.arrow"])
def test_a_pickle_as_calibration_text_is_never_opened(
    name: str, tiny_llama: Path, tmp_path: Path, canary: Path
) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Sing(canary)) * 3)
    with pytest.raises(CompressError):
        compress.run(
            tiny_llama,
            [Wanda()],
            tmp_path / "out",
            calibration=Calibration(data=str(tmp_path / name), samples=4, length=32),
        )
    assert not canary.exists()


@pytest.mark.slow
def test_a_datasets_folder_of_pickles_is_never_opened(tiny_llama: Path, tmp_path: Path, canary: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in (
        "dataset_info.json",
        "state.json",
        "data-00000-of-00001.arrow",
        "dataset_dict.json",
        "data.pkl",
        "x.parquet",
    ):
        (folder / name).write_bytes(pickle.dumps(Sing(canary)))
    (folder / "data.py").write_text(f"open({str(canary)!r}, 'w').close()")
    with pytest.raises(CompressError):
        compress.run(
            tiny_llama, [Wanda()], tmp_path / "out", calibration=Calibration(data=str(folder), samples=4, length=32)
        )
