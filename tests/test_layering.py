"""Which module may import which, checked on the sources; and a few rules for every file."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
ROOTS = {"compress": ROOT / "compress", "compress_kernels": ROOT / "kernels" / "compress_kernels",
         "compress_evals": ROOT / "evals" / "compress_evals"}  # fmt: skip


def module_name(path: Path) -> str:
    """The dotted name under which a file of ours is imported."""
    package = next(name for name, folder in ROOTS.items() if path.is_relative_to(folder))
    parts = path.relative_to(ROOTS[package]).with_suffix("").parts
    return ".".join((package, *(part for part in parts if part != "__init__")))


FILES = {module_name(path): path for folder in ROOTS.values() for path in sorted(folder.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def every(cases: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """One test of all these cases, which names those that fail: thousands of tests of a millisecond cost minutes."""

    def of_all(test: Callable[..., None]) -> Callable[[], None]:
        def run() -> None:
            failed: list[str] = []
            for case in cases:
                try:
                    test(*case) if isinstance(case, tuple) else test(case)
                except AssertionError as error:
                    failed.append(f"{case}: {error}")
            assert not failed, "\n".join(failed)

        run.__name__ = test.__name__
        return run

    return of_all


def imports(name: str) -> set[str]:
    """Every module that a file imports anywhere, also lazily; `from a import b` counts as a.b if that is a module."""
    found: set[str] = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {f if f in FILES else str(node.module) for f in full}
    return found


def under(name: str, allowed: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in allowed)


def top(name: str) -> str:
    return name.split(".")[0]


# house.md, "Layering": the packages of ours, and of others, that each room may import
# `SOLVER` is torch only: where there is no GPU it says so, and the rooms run their own loops
SOLVER = "compress_kernels.solver"
OWN: dict[str, tuple[str, ...]] = {
    "compress.errors": (),
    "compress.weights": ("compress.weights", "compress.errors", SOLVER),
    "compress.stats": ("compress.team", "compress.errors", SOLVER),
    "compress.team": ("compress.errors",),
    "compress.options": ("compress.errors",),
    "compress.events": ("compress.errors",),
    "compress.kv": ("compress.options", "compress.errors"),
    "compress.ledger": (),
    "compress.picture": ("compress.errors",),
    "compress.model": ("compress.model", "compress.stats", "compress.team", "compress.weights", "compress.errors"),
    "compress.passes": ("compress.passes", "compress.model", "compress.stats", "compress.team", "compress.weights",
                        "compress.errors", "compress.events", "compress.options", SOLVER),
    "compress.shards": ("compress.model.source", "compress.errors"),
    "compress.artifact": ("compress.weights", "compress.model.source", "compress.schema", "compress.shards",
                          "compress.errors"),
    "compress.partial": ("compress.errors",),
    "compress.writer": ("compress.artifact", "compress.partial", "compress.weights", "compress.model.source",
                        "compress.shards", "compress.errors"),
    "compress.frontmatter": (),
    "compress.identity": ("compress.calibration", "compress.frontmatter", "compress.model.source",
                          "compress.passes.base", "compress.recipe", "compress.writer"),
    "compress.journal": ("compress.events", "compress.identity", "compress.model.memory",
                         "compress.model.source", "compress.model.travellers", "compress.partial", "compress.shards",
                         "compress.team", "compress.writer", "compress.errors"),
    "compress.adapters": ("compress.adapters", "compress.artifact", "compress.card", "compress.frontmatter",
                          "compress.identity", "compress.model", "compress.picture", "compress.plan",
                          "compress.runtime.kv", "compress.runtime.latent", "compress.runtime.linear",
                          "compress.runtime.tenants", "compress.shards",
                          "compress.sources", "compress.stats", "compress.verification", "compress.weights",
                          "compress.writer", "compress.errors"),
    "compress.export": ("compress.export", "compress.adapters.lora", "compress.artifact", "compress.card",
                        "compress.frontmatter", "compress.partial", "compress.weights", "compress.model.anatomy",
                        "compress.model.architecture", "compress.model.source", "compress.plan",
                        "compress.shards", "compress.writer", "compress.errors"),
    "compress.merging": ("compress.merging", "compress.artifact", "compress.calibration", "compress.frontmatter",
                         "compress.model", "compress.options", "compress.plan",
                         "compress.recipe", "compress.shards", "compress.sources", "compress.stats",
                         "compress.weights.pattern", "compress.writer", "compress.errors"),
    "compress.runtime": ("compress.runtime", "compress.artifact", "compress.weights", "compress.errors",
                         "compress.kv", "compress.model.anatomy", "compress.model.architecture", "compress_kernels"),
    "compress.runtime.tenants": ("compress.runtime.tenants", "compress.runtime.linear", "compress.weights",
                                 "compress.errors",
                                 "compress_kernels.planes", "compress_kernels.segments", "compress_kernels.formats",
                                 "compress_kernels.given", "compress_kernels.dispatch"),
    "compress.tenants": ("compress", "compress.adapters", "compress.artifact", "compress.model.source",
                         "compress.runtime.tenants", "compress.errors"),
    "compress.serving": ("compress.serving", "compress.adapters.lora", "compress.runtime.tenants",
                         "compress.artifact", "compress.model.source",
                         "compress.writer", "compress.errors"),
    "compress.builtin": ("compress.builtin", "compress.errors"),
    "compress.calibration": ("compress.builtin", "compress.recipe", "compress.texts", "compress.errors"),
    "compress.texts": ("compress.errors",),
    "compress.sources": ("compress.artifact", "compress.foreign", "compress.model.source", "compress.errors"),
    "compress.deltas": ("compress.artifact", "compress.model", "compress.recipe", "compress.sources",
                        "compress.weights", "compress.errors"),
    "compress.planning": ("compress.planning", "compress.calibration", "compress.deltas", "compress.frontmatter",
                          "compress.model", "compress.partial", "compress.passes", "compress.plan", "compress.recipe",
                          "compress.sources", "compress.stats", "compress.weights", "compress.writer",
                          "compress.errors", "compress_kernels.tuning"),
    "compress.differences": ("compress.artifact", "compress.model", "compress.recipe", "compress.sources",
                             "compress.weights", "compress.writer", "compress.errors"),
    "compress.codecs": ("compress.passes", "compress.recipe", "compress.errors"),
    "compress_kernels": ("compress_kernels",),
    "compress_evals": ("compress_evals", "compress", "compress.builtin", "compress.errors"),
}  # fmt: skip
OTHERS: dict[str, tuple[str, ...]] = {
    "compress.errors": (),
    "compress.events": (),
    "compress.weights": ("torch", "numpy"),
    "compress.stats": ("torch",),
    "compress.team": ("torch",),
    "compress.options": ("pydantic",),
    "compress.kv": ("pydantic",),
    "compress.model": ("torch", "numpy", "transformers", "accelerate", "safetensors"),
    "compress.passes": ("torch", "pydantic", "scipy", "bitsandbytes"),
    "compress.artifact": ("torch", "safetensors"),
    "compress.partial": (),
    "compress.writer": ("torch", "safetensors"),
    "compress.frontmatter": ("ruamel",),
    "compress.identity": ("torch",),
    "compress.journal": ("torch", "safetensors"),
    "compress.adapters": ("torch", "peft", "pydantic", "typing_extensions"),
    "compress.export": ("torch", "numpy", "compressed_tensors", "bitsandbytes", "gguf"),
    "compress.merging": ("torch", "pydantic"),
    "compress.runtime": ("torch", "transformers"),
    "compress.runtime.tenants": ("torch",),
    "compress.tenants": (),
    "compress.serving": (
        "torch",
        "transformers",
        "fastapi",
        "starlette",
        "uvicorn",
        "prometheus_client",
        "pydantic",
        "pydantic_core",
    ),
    "compress_kernels": ("torch", "triton"),
}
# a bench runs what it is compared with
PEERS = {"compress_kernels.bench.subjects": ("bitsandbytes", "gemlite"), "compress_kernels.bench.plot": ("matplotlib",)}
# what writes down which version of us made a folder
VERSIONED = ("compress.identity", "compress.merging.describe")


GPU = "compress_kernels.gpu"  # the only folder that imports triton at the top of its files; itself imported lazily


def rooms(table: dict[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    return [(room, name) for room in table for name in FILES if under(name, (room,))]


# evaluating folders means reading what they say of themselves; these rooms read, they do not compress; what is found is
# put in place as an artifact is
READERS = ("compress.artifact", "compress.model.source", "compress.partial", "compress.plan", "compress.recipe",
           "compress.survey")  # fmt: skip
# what judges other tools reads their formats and draws their windows
# what times generation needs its clock; a bench that times the inner loops of passes enters them, one of caches makes
# them itself, one of deltas asks which passes the command line would choose, a leaderboard which kind of compression a
# pass is; a sweep file is as strict as a recipe
BENCHES = {
    "compress_evals.folders": ("compress.runtime.bench",),
    "compress_evals.deltas": ("compress.codecs",),
    "compress_evals.recovery": ("compress.adapters", "compress.calibration"),
    "compress_evals.rounding": ("compress.model.travellers",),
    "compress_evals.scorer": ("compress.runtime.kv",),
    "compress_evals.speed": ("compress.passes", "compress.stats", "compress.weights"),
    "compress_evals.kv": ("compress.runtime.kv", "compress.runtime.latent"),
    "compress_evals.latent": ("compress.runtime.kv",),
    "compress_evals.leaderboard.methods": ("compress.passes",),
    "compress_evals.matrices": ("compress.stats",),
    "compress_evals.peers.score": ("compress.sources", "compress.export.words"),
    "compress_evals.peers.subjects": ("compress.calibration",),
    "compress_evals.sweep.grid": ("compress.options",),
    "compress_evals.subject": ("compress.identity",),
    "compress_evals.sweep.records": ("compress.identity", "compress.options"),
    "compress_evals.tenants": ("compress.adapters", "compress.codecs", "compress.export", "compress.tenants"),
}


@every(rooms(OWN))
def test_a_room_imports_only_the_rooms_below(room: str, name: str) -> None:
    ours = {module for module in imports(name) if top(module) in ROOTS}
    public = "compress" in OWN[room] or name in VERSIONED
    forbidden = {m for m in ours if not under(m, OWN[room]) and not (m == "compress" and public)}
    if room == "compress_evals":  # the public package itself, not what lies under it
        forbidden |= {
            m
            for m in ours
            if m.startswith("compress.") and not under(m, OWN[room][2:] + READERS + BENCHES.get(name, ()))
        }
    assert forbidden == set()


@every(rooms(OTHERS))
def test_a_room_needs_only_its_packages(room: str, name: str) -> None:
    foreign = {top(m) for m in imports(name)} - set(ROOTS) - set(sys.stdlib_module_names)
    assert foreign <= {*OTHERS[room], *PEERS.get(name, ())}


@pytest.mark.slow
@every([name for name in FILES if name not in ("compress.cli", "compress.__main__")])
def test_nobody_imports_the_command_line(name: str) -> None:
    assert not {module for module in imports(name) if under(module, ("compress.cli", "compress.__main__"))}


@every([name for name in FILES if not name.startswith("compress_kernels")])
def test_triton_is_imported_only_by_kernels(name: str) -> None:
    assert "triton" not in {top(module) for module in imports(name)}


@every([n for n in FILES if top(n) == "compress_kernels" and not under(n, (GPU,))])
def test_kernels_import_triton_lazily(name: str) -> None:
    nodes = [node for node in TREES[name].body if isinstance(node, (ast.Import, ast.ImportFrom))]
    at_top = {alias.name for node in nodes for alias in node.names}
    at_top |= {
        f"{node.module}.{alias.name}" for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert not {module for module in at_top if top(module) == "triton" or under(module, (GPU,))}


@every([name for name in FILES if top(name) != "compress_kernels"])
def test_only_ops_reach_the_kernels_that_need_triton(name: str) -> None:
    assert not {module for module in imports(name) if under(module, (GPU,))}


@every([name for name in FILES if name.startswith("compress.passes")])
def test_a_pass_touches_no_files_or_progress_bars(name: str) -> None:
    assert not {top(m) for m in imports(name)} & {"pathlib", "os", "shutil", "tqdm", "rich", "json", "io"}


# -- every file ------------------------------------------------------------------------------------

# commands: their table or log line is their result
PRINTING = {
    "compress.cli",
    "compress.__main__",
    "compress.builtin.train",
    "compress_kernels.bench.__main__",
    "compress_evals.llm_kick",
    "compress_evals.foresight",
    "compress_evals.streaming",
}


def calls(name: str) -> set[str]:
    """The names of everything called, as written: `print`, `torch.load`."""
    return {ast.unparse(node.func) for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)}


@every([name for name in FILES if name not in PRINTING])
def test_only_commands_print(name: str) -> None:
    assert "print" not in calls(name)


@pytest.mark.slow
@every(FILES)
def test_nothing_is_unpickled_or_executed(name: str) -> None:
    assert not {top(module) for module in imports(name)} & {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    assert not calls(name) & {"torch.load", "torch.save", "eval", "exec", "compile", "os.system"}


@pytest.mark.slow
@every(FILES)
def test_remote_code_is_never_trusted(name: str) -> None:
    keywords = [k for node in ast.walk(TREES[name]) if isinstance(node, ast.Call) for k in node.keywords]
    assert not [k for k in keywords if k.arg == "trust_remote_code" and ast.unparse(k.value) != "False"]


@pytest.mark.slow
@every(FILES)
def test_exceptions_are_not_swallowed(name: str) -> None:
    handlers = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.ExceptHandler)]
    assert not [h.lineno for h in handlers if h.type is None]
    assert not [node.lineno for node in ast.walk(TREES[name]) if isinstance(node, ast.Assert)]


@every(FILES)
def test_every_module_opens_with_what_it_is(name: str) -> None:
    text = FILES[name].read_text(encoding="utf-8")
    assert not text.strip() or ast.get_docstring(TREES[name])


@pytest.mark.parametrize("folder", ["kernels", "evals", "recipes", "tests"])
def test_folders_around_packages_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_tests_are_no_package() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


@pytest.mark.parametrize("folder", ROOTS.values(), ids=ROOTS)
def test_every_package_is_typed(folder: Path) -> None:
    assert (folder / "py.typed").is_file()
