"""The identity of a run: two runs with the same identity write the same bytes, so one may resume the other.

It is made of contents, never of paths or times: hashes of model, tokens and code, every option, and the parts of the
machine and its software that results depend on.
"""

from __future__ import annotations

import inspect
import json
import platform
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from compress import __version__
from compress.calibration import Tokens
from compress.frontmatter import carried
from compress.model.source import INDEX, Checkpoint, digest
from compress.passes.base import Pass
from compress.recipe import DEEPEST, Recipe
from compress.writer import is_companion

Identity = dict[str, Any]  # dotted name -> plain value
SHOWN = 60  # characters of a value in a message
PACKAGES = ("compress", "compress_kernels")


def identity(source: Checkpoint, recipe: Recipe, tokens: Tokens, device: torch.device, **options: Any) -> Identity:
    """The identity of a run, in the order in which differences are reported; `recipe` must not contain paths.

    Costs one read of the model for its hashes, which the artifact needs anyway.
    """
    return {
        **flat("recipe", json.loads(json.dumps(recipe.to_dict(), default=str))),
        **{f"options.{name}": value for name, value in options.items()},
        **{f"model.{name}": sha for name, sha in model_files(source).items()},
        **{f"model.card.{key}": value for key, value in carried(source.path).items()},
        "calibration.name": tokens.name,
        "calibration.tokens": token_hash(tokens),
        **{f"machine.{name}": value for name, value in machine(device).items()},
        **{f"versions.{name}": value for name, value in (versions() | others()).items()},
        "code": code_hash(),
        **{f"code.{name}": sha for name, sha in foreign_code(recipe.passes)},
    }


def machine(device: torch.device) -> dict[str, Any]:
    """The facts about the machine on which the last bits of a sum depend."""
    found = {"threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability(), "device": device.type}
    return found | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


def versions() -> dict[str, str]:
    """The versions of this program, of Python, and of the packages that compute in every run."""
    packages = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    return {"compress": __version__, "python": platform.python_version(), **packages}


def others() -> dict[str, str]:
    """The versions of the installed packages that compute in some runs."""
    found = {}
    for name in ("numpy", "scipy", "bitsandbytes", "compressed-tensors"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def model_files(source: Checkpoint) -> dict[str, str]:
    """The sha256 of every file of a model that its artifact depends on: weights, configuration, companion files."""
    others = [f for f in source.path.iterdir() if f.is_file() and (is_companion(f.name) or f.name == "config.json")]
    return {**source.digests(), **{f.name: digest(f) for f in sorted(others) if f.name != INDEX}}


def token_hash(tokens: Tokens) -> str:
    """One sha256 of the windows and the probe."""
    sha = sha256()
    for ids_NT in (*tokens.windows, tokens.probe_NT):
        sha.update(f"{list(ids_NT.shape)}".encode())
        sha.update(ids_NT.numpy().tobytes())
    return sha.hexdigest()


@cache
def code_hash(packages: tuple[str, ...] = PACKAGES) -> str:
    """One sha256 of the Python sources of these packages, as they were when this process first asked."""
    sha = sha256()
    for package in packages:
        spec = find_spec(package)
        for root in sorted(spec.submodule_search_locations or ()) if spec else ():
            for path in sorted(Path(root).rglob("*.py")):
                sha.update(f"{package}/{path.relative_to(root)} ".encode())
                sha.update(path.read_bytes())
    return sha.hexdigest()


def foreign_code(passes: Iterable[Pass]) -> Iterable[tuple[str, str]]:
    """Name and sha256 of the file of each pass that is not part of this program."""
    for kind in dict.fromkeys(map(type, passes)):
        if kind.__module__.partition(".")[0] in PACKAGES:
            continue
        try:
            told = digest(Path(inspect.getfile(kind)))
        except (OSError, TypeError):  # a class defined at an interactive prompt has no file
            told = "of no file"
        yield f"{kind.__module__}.{kind.__qualname__}", told


def flat(name: str, value: Any) -> Identity:
    """The leaves of plain data by their dotted paths; an empty mapping or list counts as a leaf."""
    if isinstance(value, Mapping) and value:
        return {k: v for key, part in value.items() for k, v in flat(f"{name}.{key}", part).items()}
    if isinstance(value, list) and value:
        return {k: v for i, part in enumerate(value) for k, v in flat(f"{name}[{i}]", part).items()}
    return {name: value}


def recipe_in(known: Identity) -> Any:
    """The recipe of a run as plain data, recovered from its identity (the inverse of `flat`).

    Paths of models and files are reduced to names. Raises ValueError for an identity that `identity` cannot have made.
    """
    whole: dict[str | int, Any] = {}
    for name, value in known.items():
        if name.startswith("recipe."):
            path = [int(i) if i else key for key, i in re.findall(r"([^.\[\]]+)|\[(\d+)\]", name)]
            here = whole
            for part in path[:-1]:
                here = here.setdefault(part, {})
                if not isinstance(here, dict) or len(path) > DEEPEST:
                    raise ValueError(f"{shown(name)} is not a value of a recipe")
            here[path[-1]] = value
    return listed(whole.get("recipe"))


def listed(value: Any) -> Any:
    """Plain data in which mappings with the keys 0, 1, ... are turned back into lists."""
    if not isinstance(value, dict):
        return value
    parts = {key: listed(part) for key, part in value.items()}
    return list(parts.values()) if parts and list(parts) == list(range(len(parts))) else parts


def difference(known: Identity, wanted: Identity) -> str:
    """A sentence on the first difference of two runs, `known` first, and how many more there are; empty if equal."""
    keys = [key for key in {**wanted, **known} if key not in wanted or key not in known or known[key] != wanted[key]]
    if not keys:
        return ""
    more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
    return f"{keys[0]} was {shown(known.get(keys[0]))}, is {shown(wanted.get(keys[0]))}{more}"


def shown(value: Any) -> str:
    """A value as it appears in a message, shortened."""
    text = "absent" if value is None else str(value)
    hashed = len(text) == 64 and all(letter in "0123456789abcdef" for letter in text)
    return text[:12] if hashed else text[:SHOWN]
