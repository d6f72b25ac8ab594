"""Shared fixtures: tiny random models of some families, sites with measured inputs, and one numeric comparison.

Not here: reference results (`naive.py`) and the properties of every node and pass (`conformance.py`). Models are built,
never downloaded; their sizes are deliberately unusual (width 48, inner 72, vocabulary 211, grouped heads).
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers and children share the cores; read when torch is imported
os.environ["XDG_CACHE_HOME"] = os.path.join(tempfile.gettempdir(), "no-cache")  # without the profiles that a user tuned

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which bitsandbytes and others do

from hypothesis import settings
from torch import Tensor, nn

from compress import GPTQ, Calibration, Recipe, Wanda, calibration, run
from compress.model.anatomy import Place
from compress.model.block import Block
from compress.model.site import Site
from compress.model.source import Checkpoint, dtype_of
from compress.model.travellers import Travellers
from compress.model.walk import Walk
from compress.passes import PASSES
from compress.stats import AbsMean, Collector, ColumnNorm, Cross, Gram, Moments, Statistics
from compress.weights import External

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # if started in the background; child processes inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


FAMILIES = ("llama", "llama_tied", "mistral", "qwen2", "qwen3", "gemma")
SIZES: dict[str, Any] = {
    "vocab_size": 211, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
    "initializer_range": 0.15,
}  # fmt: skip
PECULIAR: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "short": {"model_type": "llama", "num_hidden_layers": 1, "tie_word_embeddings": False},
    "llama_tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"sliding_window": 16, "tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": False},
    "gpt2": {"tie_word_embeddings": True},  # its matrices lie in the file as [in, out]
    "gemma": {"head_dim": 12, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "hybrid": {  # full attention in the first block, a sliding window in the second: two masks in one model
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
        "tie_word_embeddings": False,
    },
}

settings.register_profile("compress", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("compress")


def relative_rms(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| in float64; the absolute error if `want` is zero."""
    got, want = got.detach().double(), want.detach().double()
    norm = float(want.norm())
    return float((got - want).norm()) / (norm if norm else 1.0)


@pytest.fixture(scope="session")
def assert_close() -> Callable[[str, Tensor, Tensor, float], None]:
    """The only numeric comparison of the tests: the relative RMS error of `got` is at most `ratio`."""

    def check(name: str, got: Tensor, want: Tensor, ratio: float) -> None:
        assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        error = relative_rms(got, want)
        assert error <= ratio, f"{name}: relative RMS error {error:.3g} > {ratio:.3g}"

    return check


def load_beside(name: str) -> ModuleType:
    """The helper module `tests/<name>.py`; tests is not a package, so it is loaded by path."""
    qualified = f"compress_tests_{name}"
    if qualified not in sys.modules:
        spec = importlib.util.spec_from_file_location(qualified, Path(__file__).parent / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[qualified] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[qualified])
    return sys.modules[qualified]


@pytest.fixture(scope="session")
def naive() -> ModuleType:
    """The module of slow reference implementations and of the fixtures in the specifications."""
    return load_beside("naive")


# -- models ----------------------------------------------------------------------------------------


def build_tokenizer() -> Any:
    """A small BPE tokenizer of at most 200 entries, so that every id exists in the tiny models."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from compress.calibration import builtin_text

    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=200, limit_alphabet=110, special_tokens=special, show_progress=False)
    bpe.train_from_iterator(builtin_text()[:200], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def build_model(kind: str, seed: int = 0) -> nn.Module:
    """A random float32 model; norms and biases are also random, so that a forgotten one is noticed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**{"model_type": kind, **SIZES, **PECULIAR[kind]})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


@pytest.fixture(scope="session", autouse=True)
def encoded_once() -> Iterator[None]:
    """Cache the encoding of the same texts by the same tokenizer, which took a seventh of each run of a tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "encode", load_beside("encoded").once(calibration.encode))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_power_cut() -> Iterator[None]:
    """Replace fsync, which a run calls 30 times: killed processes lose no written data while the system stays up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="module")
def frozen() -> Iterator[None]:
    """For tests in which memory runs out often: garbage collections skip what is alive before, which takes .3 s."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


ModelMaker = Callable[..., Path]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelMaker:
    """`model_folder(family, dtype="float32", sharded=False)`: a shared folder with a tokenizer; do not modify it."""
    made: dict[tuple[str, str, bool], Path] = {}
    tokenizer = build_tokenizer()

    def make(kind: str = "llama", dtype: str = "float32", sharded: bool = False) -> Path:
        key = (kind, dtype, sharded)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{kind}-{dtype}-{'sharded' if sharded else 'single'}")
            model = build_model(kind).to(getattr(torch, dtype))
            model.save_pretrained(folder, max_shard_size="40KB" if sharded else "1GB")
            tokenizer.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_llama(model_folder: ModelMaker) -> Path:
    """A float32 Llama of two blocks in one file, with untied embeddings."""
    return model_folder("llama")


@pytest.fixture(scope="session")
def gemma3n(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 Gemma 3n of three blocks, the second of which leaves its keys and values for the third."""
    from transformers import AutoConfig

    from compress.model.architecture import auto_class

    config = AutoConfig.for_model(
        "gemma3n_text", **{**SIZES, "num_hidden_layers": 3, "intermediate_size": [72] * 3}, head_dim=12,
        vocab_size_per_layer_input=211, hidden_size_per_layer_input=16, sliding_window=8, num_kv_shared_layers=1,
        layer_types=["sliding_attention", "full_attention", "full_attention"], laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 3,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("gemma3n")
    torch.manual_seed(0)
    auto_class(config).from_config(config, dtype=torch.float32).save_pretrained(folder)
    for file in tiny_llama.glob("tokenizer*"):
        shutil.copy(file, folder / file.name)
    return folder


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each of six plain decoders in turn; `model/test_families.py` has all tested families."""
    return str(request.param)


@pytest.fixture
def ids() -> Tensor:
    """Three windows of 21 tokens: more than one row, and longer than the sliding window."""
    return torch.randint(4, 200, (3, 21), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def hugging_face() -> Callable[[Path], Any]:
    """`hugging_face(folder)`: the model as stock transformers loads it, in the dtype of its config."""

    def load(folder: Path) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype="auto").eval()

    return load


@pytest.fixture
def walk_of() -> Callable[[Path], Walk]:
    """`walk_of(folder)`: a walk over the checkpoint on the CPU."""

    def open_walk(folder: Path) -> Walk:
        source = Checkpoint(folder)
        return Walk(source.config, source, dtype_of(source.config), torch.device("cpu"))

    return open_walk


@pytest.fixture(scope="session")
def recipe_24_int4() -> Recipe:
    """Prune 2:4, then quantize the kept weights, compensating for those removed; calibrated on six short windows."""
    return Recipe(
        passes=(Wanda(sparsity="2:4"), GPTQ(group=8, target="original")),
        calibration=Calibration(samples=6, length=32),
    )


@pytest.fixture(scope="session")
def llama_artifact(tiny_llama: Path, recipe_24_int4: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama compressed by `recipe_24_int4`; do not modify it."""
    return run(tiny_llama, recipe_24_int4, tmp_path_factory.mktemp("llama") / "out").out


@pytest.fixture
def own_artifact(llama_artifact: Path, tmp_path: Path) -> Path:
    """A copy of `llama_artifact` that a test may damage."""
    return Path(shutil.copytree(llama_artifact, tmp_path / "artifact"))


# -- the command line ---------------------------------------------------------------------------------


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`cli("run", ...)` runs the command line in this process and returns (exit code, stdout, stderr)."""

    from compress.cli import main

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["compress", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


# -- faults ----------------------------------------------------------------------------------------

ATTEMPTS: Counter[tuple[str, str, str]] = Counter()  # (kind, what, tried or held), of all workers
Tally = Callable[[str, str], AbstractContextManager[None]]


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """`with tally(kind, what):` counts one attempt, and counts it as held if nothing is raised inside."""
    counts: Counter[tuple[str, str, str]] = Counter()

    @contextmanager
    def attempt(kind: str, what: str) -> Iterator[None]:
        counts[kind, what, "tried"] += 1
        yield
        counts[kind, what, "held"] += 1

    yield attempt
    request.node.user_properties.append(("attempts", [[*key, number] for key, number in counts.items()]))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use `tally`, so that `-m fault` runs only these and prints the whole table."""
    for item in items:
        if "tally" in getattr(item, "fixturenames", ()):
            item.add_marker("fault")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up the counts of a test, from whichever worker process it ran in."""
    if report.when == "teardown":
        for name, value in report.user_properties:
            if name == "attempts":
                ATTEMPTS.update({(kind, what, state): number for kind, what, state, number in value})  # type: ignore[misc]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table of README, SECURITY.md and docs/reliability.md: how much was tried, and how often it held."""
    rows = sorted({(kind, what) for kind, what, _ in ATTEMPTS})
    if rows:
        terminalreporter.write_line("\n| kind | what | tried | held |\n|---|---|---|---|")
    for kind in sorted({kind for kind, _ in rows}):
        mine = [row for row in rows if row[0] == kind]
        told = [[what, *(ATTEMPTS[kind, what, state] for state in ("tried", "held"))] for _, what in mine]
        told.append(["**all**", *(sum(row[column] for row in told) for column in (1, 2))])
        for what, tried, held in told:
            terminalreporter.write_line(f"| {kind} | {what} | {tried:,} | {held:,} |")


OVERRIDE = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, which let root ignore file modes
VERSION_3 = 0x20080522  # of the capability structure, linux/capability.h


@contextmanager
def obeying_modes() -> Iterator[None]:
    """Within this context, this thread may write only where file modes allow it, even if root runs the tests."""
    libc, head, before = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(VERSION_3, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(head, before) == 0
    less = (ctypes.c_uint32 * 6)(*before)
    less[0] &= ~OVERRIDE  # only the effective set; the permitted set stays, so that this can be undone
    assert libc.capset(head, less) == 0
    try:
        yield
    finally:
        assert libc.capset(head, before) == 0


@contextmanager
def unwritable(folder: Path) -> Iterator[None]:
    """Within this context, neither the folder nor any file in it may be written."""
    paths = [folder, *folder.rglob("*")]
    modes = {path: path.stat().st_mode for path in paths}
    for path in reversed(paths):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        with obeying_modes():
            with pytest.raises(PermissionError):  # proves that the protection works
                (folder / "x").touch()
            yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


@pytest.fixture
def read_only() -> Callable[[Path], AbstractContextManager[None]]:
    """`with read_only(folder):` nothing in the folder may be written, not even by root."""
    return unwritable


@pytest.fixture(scope="session")
def forks(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """`forks(**order)`: the answer of `forks.py`, a process that imports everything once and forks for each order."""
    first = tmp_path_factory.mktemp("first")
    measured = "calibration: {samples: 2, length: 32}\npasses: [{wanda: {sparsity: 2:4}}, {rtn: {group: 8}}]\n"
    (first / "recipe.yaml").write_text(measured)
    command = [sys.executable, str(Path(__file__).with_name("forks.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def order(**wanted: Any) -> Any:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps(wanted, default=str) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        order(here=True, model=tiny_llama, recipe=first / "recipe.yaml", out=first / "o")
        yield order
        process.kill()  # its children have ended; a clean exit would take seconds


# -- sites -----------------------------------------------------------------------------------------


@pytest.fixture
def site_of() -> Callable[..., Site]:
    """`site_of(w, x=None, gram=None, dense=None)`: a site with the statistics of the inputs x, or with a given Gram.

    `dense` are the inputs of the same tokens in the dense model.
    """

    def make(
        w_OI: Tensor, x_TI: Tensor | None = None, gram_II: Tensor | None = None, dense_TI: Tensor | None = None
    ) -> Site:
        linear = nn.Linear(w_OI.shape[1], w_OI.shape[0], bias=False, dtype=w_OI.dtype)
        linear.weight.data = w_OI.clone()
        linear.requires_grad_(False)
        site = Site("blocks.0.proj", linear)
        if x_TI is not None:
            collector = Collector((AbsMean, ColumnNorm, Cross, Gram, Moments), w_OI.shape[1], w_OI.device)
            collector.update(x_TI, dense_TI)
            site.stats = collector.finish(site.name)
        if gram_II is not None:
            site.stats = Statistics({Gram: gram_II}, tokens=1)
        return site

    return make


@pytest.fixture
def block_of() -> Callable[..., Block]:
    """`block_of(module, x, dense=None, batch=4)`: a block with a site for each linear layer of a module.

    x [windows, T, in] are the hidden states after the compressed blocks, `dense` those of the dense model. With a
    `base`, by site, only the differences from it are rewritten.
    """

    def make(
        module: nn.Module,
        x_NTD: Tensor,
        dense_NTD: Tensor | None = None,
        batch: int = 4,
        base: dict[str, External] | None = None,
    ) -> Block:
        module.requires_grad_(False)
        linear = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
        places = [
            Place(site=f"blocks.0.{n}", tensor=f"blocks.0.{n}.weight", module=f"blocks.0.{n}", shape=part.weight.shape)
            for n, part in linear.items()
        ]

        def travelling(hidden_NTD: Tensor) -> list[Travellers]:
            return [Travellers(part[..., 0], part, [((), {})]) for part in hidden_NTD.split(batch)]

        probe, dense = (travelling(x_NTD[:1])[0] for _ in range(2))
        twins = travelling(x_NTD if dense_NTD is None else dense_NTD)
        with torch.no_grad():
            return Block("blocks.0", 0, module, places, travelling(x_NTD), probe, dense, twins=twins, base=base)

    return make


@pytest.fixture
def registry() -> Iterator[dict[str, Any]]:
    """The registered passes; registrations by a test are undone afterwards."""
    before = dict(PASSES)
    yield PASSES
    PASSES.clear()
    PASSES.update(before)
