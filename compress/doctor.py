"""A description of this machine and installation, what is missing and would enable, and a bundle for a bug report.

A bundle is a zip of text files from a fixed list: no weights, no tokenizer, no calibration tokens, and no environment
variables. The home directory is replaced by `~` everywhere; names and text that are not valid Unicode are escaped.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from compress import __version__
from compress.errors import ArtifactError, RecipeError, visible, why
from compress.model.source import read_json
from compress.partial import put
from compress.planning import machine, resources
from compress_kernels import tuning

NEEDED = ("torch", "transformers", "accelerate", "safetensors", "numpy", "pydantic", "typer", "rich", "ruamel.yaml",
          "jinja2", "scipy")  # fmt: skip
OPTIONAL = {  # package -> (extra of compress-llm, what it enables)
    "lm-eval": ("eval", "compress eval, `accept` rules in recipes"),
    "datasets": ("eval", "compress eval, calibration from datasets folders and the hub"),
    "rouge-score": ("eval", "compress eval: summaries"),
    "langdetect": ("eval", "compress eval: instructions about languages"),
    "matplotlib": ("eval", "pictures of leaderboards and benchmarks"),
    "compressed-tensors": ("formats", "export --to compressed-tensors, and reading such models"),
    "bitsandbytes": ("formats", "the pass nf4, export --to bitsandbytes"),
    "gguf": ("formats", "export --to gguf"),
    "triton": ("kernels", "our kernels on a GPU"),
    "ray": ("ray", "compress sweep --engine ray"),
    "fastapi": ("serve", "compress serve"),
    "uvicorn": ("serve", "compress serve"),
    "prometheus-client": ("serve", "compress serve: its metrics"),
    "tokenizers": ("train", "training the built-in model anew"),
}
BUNDLED = ("compress.json", "config.json", "model.safetensors.index.json")  # files of an artifact
JOURNALS = ("identity.json", "records/*.json", "artifact/compress.json")  # of an unfinished run: hashes and errors
LARGEST = 64 << 20  # most bytes of a file in a bundle
CACHES = ("tuning", "machine")


def examine() -> dict[str, Any]:
    """Everything that `compress doctor` reports, as plain data; changes nothing."""
    return {
        "versions": {"compress": __version__, "python": platform.python_version(), **versions(NEEDED)},
        "system": {
            "platform": platform.platform(),
            "machine": platform.machine(),
            "cpu": tuning.device_name("cpu"),
            "cores": os.cpu_count(),
            "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "memory": {"free": resources.free_memory(), "this_process": resources.resident()},
        "disk": {"folder": str(Path.cwd()), "free": shutil.disk_usage(Path.cwd()).free},
        "gpus": gpus(),
        "cuda": {"torch": torch.version.cuda, "available": torch.cuda.is_available()},
        "optional": optional(),
        "profiles": profiles(),
        "caches": {name: folder_bytes(cache() / name) for name in CACHES},
    }


def versions(packages: tuple[str, ...]) -> dict[str, str | None]:
    """The installed version of each package, or None."""
    return {package: installed(package) for package in packages}


def installed(package: str) -> str | None:
    """The installed version of a package, or None; the package is not imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def optional() -> list[dict[str, Any]]:
    """The optional packages, each with its version or None, its extra, and what it enables."""
    return [
        {"package": name, "version": installed(name), "extra": extra, "enables": enables}
        for name, (extra, enables) in OPTIONAL.items()
    ]


def gpus() -> list[dict[str, Any]]:
    """The GPUs that torch can use, with their memory."""
    found = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(i)
        major, minor = torch.cuda.get_device_capability(i)
        found.append({"name": torch.cuda.get_device_name(i), "free": free, "total": total,
                      "capability": f"{major}.{minor}"})  # fmt: skip
    return found


def cache() -> Path:
    """The folder of Compress in the user's cache directory."""
    return tuning.place("cpu").parent.parent


def profiles() -> list[dict[str, Any]]:
    """The state of the tuning and machine profiles of this machine; a damaged one is reported with its remedy."""
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows = []
    for kind in kinds:
        tuned, measured = state_of(tuning.place(kind), tuning.known, kind), machine_state(kind)
        rows += [
            {"profile": "tuning", "device": kind, "state": tuned, "enables": "`compress tune` measures where packed "
             "products are faster"},
            {"profile": "machine", "device": kind, "state": measured, "enables": "`compress plan` measures it once, "
             "and then foresees times"},
        ]  # fmt: skip
    return rows


def machine_state(kind: str) -> str:
    """The state of the machine profile of a kind of device, as `state_of` gives it."""
    return state_of(machine.place(kind), machine.machine, kind)


def state_of(path: Path, read: Any, kind: str) -> str:
    """The path of a profile, `none` if there is none, or `damaged: ...` with the reason."""
    if not path.exists():
        return "none"
    try:
        read(kind)
    except (tuning.TuningError, RecipeError) as error:
        return f"damaged: {error}"
    return str(path)


def folder_bytes(folder: Path) -> int:
    """The bytes of all files in a folder; 0 if it does not exist."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0


def missing(found: dict[str, Any]) -> Iterator[str]:
    """One sentence for each thing that is missing or damaged."""
    for row in found["optional"]:
        if row["version"] is None:
            yield f"{row['package']} is missing: {row['enables']}; pip install {row['package']}"
    if not found["gpus"]:
        why = "there is no GPU here" if found["cuda"]["torch"] else "this torch is built without CUDA"
        yield f"no GPU: {why}; everything runs on the CPU"
    for row in found["profiles"]:
        if row["state"] == "none":
            yield f"no {row['profile']} profile of {row['device']}: {row['enables']}"
        elif row["state"].startswith("damaged"):
            yield f"{row['profile']} profile of {row['device']} is {row['state']}"


# -- bundles ---------------------------------------------------------------------------------------


def bundle(target: Path, folder: Path, log: Path | None = None, plan: dict[str, Any] | None = None) -> list[str]:
    """Pack what a bug report needs from an artifact, or from the partial folder of a run, into a zip.

    Returns the names of the files in it. Raises RecipeError if the zip already exists, would lie in the folder or
    cannot be written, ArtifactError if the folder holds nothing of a run, or something unreadable.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder; give an artifact, or the partial folder of a run")
    if folder.resolve() in target.resolve().parents:
        raise RecipeError(
            f"--bundle: {target} lies in the folder that it describes, which must stay unchanged; write it elsewhere"
        )
    wanted = sorted({file for pattern in (*BUNDLED, *JOURNALS) for file in folder.glob(pattern)})
    read = {visible(file.relative_to(folder).as_posix()): read_text(file) for file in wanted}
    texts = {name: text for name, text in read.items() if text is not None}
    if not {"compress.json", "identity.json"} & set(texts):
        raise ArtifactError(f"{folder}: neither an artifact nor the partial folder of a run; nothing to report")
    if "compress.json" in texts:
        texts["recipe.yaml"] = str(read_json(folder / "compress.json", "the provenance file").get("recipe", ""))
    if log is not None:
        events = read_text(log)
        if events is None:
            raise RecipeError(f"--log: {log} is not a regular file")
        texts["log.jsonl"] = events
    if plan is not None:
        texts["plan.json"] = json.dumps(plan, indent=1, default=str)
    texts["doctor.json"] = json.dumps(examine(), indent=1)
    texts["files.txt"] = "".join(
        f"{file.stat().st_size:>14,} {visible(str(file.relative_to(folder)))}\n"
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    )
    write_zip(target, {name: without_home(text) for name, text in sorted(texts.items())})
    return sorted(texts)


def read_text(file: Path) -> str | None:
    """The text of a regular file, None if it is none; raises ArtifactError if it is too large or not text."""
    if not file.is_file() or file.is_symlink():
        return None
    if file.stat().st_size > LARGEST:
        raise ArtifactError(f"{file}: {file.stat().st_size:,} bytes are more than a bundle accepts ({LARGEST:,})")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{file}: cannot be read: {why(error)}") from error


def without_home(text: str) -> str:
    """The text with the home directory replaced by `~`, also where JSON has escaped it."""
    homes = {str(Path.home()), str(Path.home().resolve())} - {"/", "."}
    for home in sorted(homes | {json.dumps(home)[1:-1] for home in homes}, key=len, reverse=True):
        text = re.sub(rf"{re.escape(home)}(?=[^\w.-]|$)", "~", text)
    return text


def write_zip(target: Path, texts: dict[str, str]) -> None:
    """Write a zip atomically; the same texts give the same bytes. Raises RecipeError if it exists or is unwritable."""
    if target.exists():
        raise RecipeError(f"--bundle: {target} exists; choose another name")

    def write(partial: Path) -> None:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, text in texts.items():
                content = text.encode(errors="backslashreplace")  # JSON escapes can yield a lone surrogate
                packed.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content, zipfile.ZIP_DEFLATED)

    try:
        put(target, write)
    except OSError as error:
        raise RecipeError(f"--bundle: {target} cannot be written: {error.strerror}") from error


__all__ = ["bundle", "examine", "missing"]
