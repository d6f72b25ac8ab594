"""A run that was stopped at any moment resumes after its last finished block, and writes the same bytes as otherwise.

Kills are SIGKILLs of processes (`forks.py`), at steps that change the disk or after some time; runs that only have to
stop between two blocks are interrupted in this process.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress import (
    GPTQ,
    LRQ,
    OWL,
    RTN,
    ArtifactError,
    Calibration,
    Delta,
    FineTune,
    QuaRot,
    Realign,
    Recipe,
    RecipeError,
    ShortGPT,
    SliceGPT,
    Wanda,
    WandaSP,
    journal,
)
from compress.events import (
    BlockFinished,
    BlockRecorded,
    BlockStarted,
    Event,
    ResumeUnavailable,
    RunInterrupted,
    RunRestarted,
    RunResumed,
)
from compress.job import Job
from compress.journal import Journal
from compress.model.travellers import Shared, Travellers
from compress.shards import WriteError

BLOCKS = 3
FEW = Calibration(samples=6, length=32)
PASSES = (Wanda(sparsity="2:4"), GPTQ(group=8, target="original"))
RECIPE = """\
calibration: {samples: 6, length: 32}
passes:
  - wanda: {sparsity: 2:4}
  - rtn: {group: 8}
"""  # the cheapest that has states, masks and codes
MOMENTS = random.Random(10)  # of kills, as shares of a run
Order = Callable[..., Any]
Tally = Callable[[str, str], AbstractContextManager[None]]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def deeper(tiny: Path, out: Path, blocks: int = BLOCKS) -> Path:
    """A model like the tiny one, of more blocks."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(tiny, num_hidden_layers=blocks)
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(out)
    for file in tiny.glob("tokenizer*"):
        shutil.copy(file, out / file.name)
    return out


@pytest.fixture(scope="module")
def model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deeper(tiny_llama, tmp_path_factory.mktemp("deeper") / "model")


class Recording:
    """A sink that keeps every event and interrupts the run behind a block."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop, self.events = stop, list[Event]()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, BlockFinished) and event.index == self.stop:
            raise KeyboardInterrupt

    def told(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def stopped(model: Path, recipe: Any, out: Path, behind: int = 0, **options: Any) -> Path:
    """The partial folder of a run that was interrupted behind a block."""
    with pytest.raises(KeyboardInterrupt):
        compress.run(model, recipe, out, emit=Recording(behind), **options)
    assert not out.exists()
    return out.with_name(f"{out.name}.partial")


def continued(model: Path, recipe: Any, out: Path, **options: Any) -> Recording:
    """What the same run tells when it goes on; it is then complete and nothing else is left."""
    heard = Recording()
    compress.run(model, recipe, out, emit=heard, **options)
    assert not out.with_name(f"{out.name}.partial").exists()
    return heard


# -- killed anywhere -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(
    model: Path, forks: Order, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Order, dict[str, str], int, float]:
    """How to order a run in a process, the hashes of an uninterrupted one, its steps, and its seconds."""
    place = tmp_path_factory.mktemp("killed")
    recipe = place / "recipe.yaml"
    recipe.write_text(RECIPE)

    def order(out: Path, **wanted: Any) -> dict[str, Any]:
        out.parent.mkdir(exist_ok=True)
        return dict(forks(model=model, recipe=recipe, out=out, **wanted))

    assert order(place / "whole" / "o")["code"] == 0
    began = time.monotonic()
    steps = int(order(place / "counted" / "o")["said"])
    return order, hashes(place / "whole" / "o"), steps, time.monotonic() - began


def many(quick: int, slow: int) -> list[Any]:
    """Shares of a run, at random from a fixed seed; those beyond `quick` are left out of `make check`."""
    shares = [round(MOMENTS.random(), 3) for _ in range(quick + slow)]
    return [*shares[:quick], *[pytest.param(share, marks=pytest.mark.slow) for share in shares[quick:]]]


def large(share: float) -> dict[str, int]:
    """For every other run: all its states count as large, which threads write; for every third: beside the next block.

    A run that goes on does neither.
    """
    number = int(share * 1_000)
    return ({"part": 1_000} if number % 2 else {}) | ({} if number % 3 else {"beside": 1})


def ended(killed: Any, out: Path) -> None:
    """Assert that the run, killed anywhere, ends with the same bytes; it may have been about to tidy up."""
    order, whole, _, _ = killed
    in_place = out.exists()
    assert not in_place or hashes(out) == whole
    assert order(out, options={"force": in_place})["code"] == 0
    assert hashes(out) == whole
    assert [path.name for path in out.parent.iterdir()] == ["o"]


@pytest.mark.slow
@pytest.mark.parametrize("share", many(5, 35))
def test_killed_at_any_step_it_ends_with_the_same_bytes(
    share: float, killed: Any, tmp_path: Path, tally: Tally
) -> None:
    with tally("fault", "SIGKILL right before a random step"):
        assert killed[0](tmp_path / "o", last=1 + int(share * killed[2]), **large(share))["code"] == -9
        ended(killed, tmp_path / "o")


@pytest.mark.parametrize("share", many(0, 10))
def test_killed_after_any_time_it_ends_with_the_same_bytes(
    share: float, killed: Any, tmp_path: Path, tally: Tally
) -> None:
    with tally("fault", "SIGKILL after a random time"):
        assert killed[0](tmp_path / "o", after=share * killed[3], **large(share))["code"] in (-9, 0)
        ended(killed, tmp_path / "o")


@pytest.mark.slow
@pytest.mark.parametrize("share", many(1, 7))
def test_killed_again_and_again_it_still_ends(share: float, killed: Any, tmp_path: Path, tally: Tally) -> None:
    order, _, steps, _ = killed
    with tally("fault", "SIGKILL three times over"):
        for part in (0.3, 0.6, 0.1 + 0.5 * share):
            assert order(tmp_path / "o", last=1 + int(part * steps))["code"] in (-9, 0)
            if (tmp_path / "o").exists():
                break
        ended(killed, tmp_path / "o")


@pytest.fixture(scope="module")
def replacing(killed: Any, llama_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """The steps of a run that replaces an older output."""
    out = Path(shutil.copytree(llama_artifact, tmp_path_factory.mktemp("replacing") / "o"))
    return int(killed[0](out, options={"force": True})["said"])


@pytest.mark.parametrize("left", [pytest.param(n, marks=[pytest.mark.slow] if n % 6 else []) for n in range(1, 31)])
def test_killed_while_it_replaces_an_output_it_leaves_the_old_or_the_new(
    left: int, killed: Any, replacing: int, llama_artifact: Path, tmp_path: Path, tally: Tally
) -> None:
    order, whole, _, _ = killed
    out = Path(shutil.copytree(llama_artifact, tmp_path / "o"))
    with tally("fault", "SIGKILL at one of the last steps of replacing an output"):
        assert order(out, last=replacing - left, options={"force": True})["code"] == -9
        old = out if out.exists() else out.with_name("o.partial") / "artifact-replaced"
        assert hashes(old) in (hashes(llama_artifact), whole)
        assert order(out, options={"force": True})["code"] == 0
        assert hashes(out) == whole
        assert [path.name for path in out.parent.iterdir()] == ["o"]


@pytest.mark.slow
@pytest.mark.parametrize("share", many(4, 26))
def test_on_a_full_disk_it_stops_in_one_line_and_goes_on_later(
    share: float, killed: Any, tmp_path: Path, tally: Tally
) -> None:
    order, whole, steps, _ = killed
    with tally("fault", "disk full from a random step on"):
        told = order(tmp_path / "o", full=1 + int(share * steps), **large(share))
        assert told["code"] in (0, 1)
        assert told["code"] == 0 or told["said"].startswith("ArtifactError: ")
        assert told["code"] == 0 or "No space left on device" in told["said"]
        assert (tmp_path / "o").exists() or order(tmp_path / "o")["code"] == 0
        assert hashes(tmp_path / "o") == whole


def test_a_killed_run_loses_at_most_one_block(killed: Any, model: Path, tmp_path: Path) -> None:
    order, whole, steps, _ = killed
    assert order(tmp_path / "o", last=steps - 20)["code"] == -9
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    heard = continued(model, tmp_path / "recipe.yaml", tmp_path / "o")
    assert heard.told(RunResumed) == [RunResumed(done=BLOCKS, count=BLOCKS)]
    assert heard.told(BlockStarted) == []
    assert hashes(tmp_path / "o") == whole


# -- every kind of recipe --------------------------------------------------------------------------

KINDS: dict[str, Any] = {
    "data-free": Recipe(passes=(RTN(group=8),)),
    "dense": Recipe(passes=PASSES, calibration=FEW, ordering="dense"),
    "block": Recipe(passes=PASSES, calibration=FEW, ordering="block"),
    "budget": Recipe(passes=(OWL(), Wanda(sparsity=0.5)), calibration=FEW),
    "twins": Recipe(passes=(Realign(), GPTQ(group=8)), calibration=FEW),
    "learned": Recipe(passes=(RTN(group=8), LRQ(rank=4, steps=4, held_out=1)), calibration=FEW),
    "tuned": Recipe(passes=(RTN(group=8), FineTune(steps=4, held_out=1)), calibration=FEW),
    "shortgpt": Recipe(passes=(ShortGPT(blocks=1), RTN(group=8)), calibration=FEW),
    "slicegpt": Recipe(passes=(SliceGPT(), RTN(group=8)), calibration=FEW),
    "reshaped": Recipe(passes=(WandaSP(heads=0.5, neurons=0.25),), calibration=FEW),
    "rotated": Recipe(passes=(QuaRot(), GPTQ(group=8)), calibration=FEW),
}


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """The hashes of an uninterrupted run of a kind of recipe, made once."""

    @cache
    def made(kind: str) -> dict[str, str]:
        return hashes(compress.run(model, KINDS[kind], tmp_path_factory.mktemp(kind) / "whole").out)

    return made


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_recipe_goes_on(kind: str, model: Path, tmp_path: Path, whole: Any) -> None:
    stopped(model, KINDS[kind], tmp_path / "o")
    heard = continued(model, KINDS[kind], tmp_path / "o")
    count = heard.told(RunResumed)[0].count
    assert heard.told(RunResumed) == [RunResumed(done=1, count=count)]
    assert [event.index for event in heard.told(BlockStarted)] == list(range(1, count))
    assert hashes(tmp_path / "o") == whole(kind)


@pytest.mark.slow
@pytest.mark.parametrize("embeddings", ["own", "int8"])
def test_a_delta_goes_on(embeddings: Any, model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tuned = Path(shutil.copytree(model, tmp_path / "tuned"))
    moved = {name: t + 0.01 * t.roll(1, 0) for name, t in load_file(tuned / "model.safetensors").items()}
    save_file(moved, tuned / "model.safetensors", metadata={"format": "pt"})
    recipe = Recipe(passes=(GPTQ(group=8),), calibration=FEW, delta=Delta(base=str(model), embeddings=embeddings))
    compress.run(tuned, recipe, tmp_path / "whole")
    stopped(tuned, recipe, tmp_path / "o")
    assert continued(tuned, recipe, tmp_path / "o").told(RunResumed) == [RunResumed(done=1, count=BLOCKS)]
    assert hashes(tmp_path / "o") == hashes(tmp_path / "whole")


def test_several_recipes_for_a_delta_leave_nothing_to_go_on_with(model: Path, tmp_path: Path) -> None:
    from compress.extraction import best_of

    tuned = deeper(model, tmp_path / "tuned")
    recipes = [Recipe(passes=(RTN(bits=n, group=8),), delta=Delta(base=str(model))) for n in (3, 4)]
    flipped = tuned / "model.safetensors"
    flipped.write_bytes(flipped.read_bytes()[:-4] + bytes(4))  # else there is no difference
    heard = Recording(0)
    with pytest.raises(KeyboardInterrupt):
        best_of(tuned, recipes, tmp_path / "o", emit=heard)
    assert heard.told(RunInterrupted) == []
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]


@pytest.mark.slow
@pytest.mark.parametrize("presses", [1, 2])
def test_control_c_once_or_twice_is_safe(
    presses: int, killed: Any, forks: Order, model: Path, tmp_path: Path, tally: Tally
) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    line = ["run", tmp_path / "recipe.yaml", "--model", model, "--out", tmp_path / "o"]
    behind_a_block = {"place": tmp_path, "pattern": "o.partial/records/00001.json"}
    with tally("fault", "Ctrl-C, once or twice"):
        for _ in range(5):  # on a busy machine a run may end before it is pressed
            shutil.rmtree(tmp_path / "o", ignore_errors=True)
            [told] = forks(lines=[line], signals=[signal.SIGINT] * presses, **behind_a_block)
            if told["code"]:
                break
        assert presses == 2 or (told["code"], told["out"]) == (130, "")
        assert presses == 2 or "run the same command to resume" in told["err"]
        [told] = forks(lines=[line])
        assert (told["code"], "resuming after block" in told["err"]) == (0, True)
        assert hashes(tmp_path / "o") == killed[1]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(True, True), (True, False), (False, True)])
def test_states_on_disk_and_in_memory_are_interchangeable(
    first: bool, then: bool, model: Path, tmp_path: Path, whole: Any
) -> None:
    stopped(model, KINDS["twins"], tmp_path / "o", behind=1, offload=first)
    assert continued(model, KINDS["twins"], tmp_path / "o", offload=then).told(RunResumed)
    assert hashes(tmp_path / "o") == whole("twins")


def test_offloaded_states_are_not_copied(model: Path, tmp_path: Path) -> None:
    partial = stopped(model, Recipe(passes=PASSES, calibration=FEW), tmp_path / "o", offload=True)
    record = json.loads((partial / "records" / "00001.json").read_text())["record"]
    offloaded = [state for state in record["state"] if "stream" in state]
    assert [state["stream"] for state in offloaded] == ["batch.0"]
    kept = sorted(path.name for path in partial.rglob("*") if path.name.startswith("batch-"))
    assert kept == [Path(state["file"]).name for state in offloaded]


@pytest.mark.slow
def test_large_states_are_parted_and_go_on(
    model: Path, tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "PART", 1_000)
    partial = stopped(model, KINDS["twins"], tmp_path / "o", behind=1)
    last = max((partial / "records").glob("*.json"))
    named = {state["file"] for state in json.loads(last.read_text())["record"]["state"]}
    assert len(named) > 2 and named == {f"records/{path.name}" for path in last.parent.glob("*.safetensors")}
    assert continued(model, KINDS["twins"], tmp_path / "o").told(RunResumed)
    assert hashes(tmp_path / "o") == whole("twins")


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are recorded while the next is computed, as where a GPU computes."""
    monkeypatch.setattr(Job, "beside_what", lambda self: torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["data-free", "budget", "twins", "tuned"])
def test_what_is_recorded_beside_the_next_block_is_the_same(
    kind: str, model: Path, tmp_path: Path, whole: Any, beside: None
) -> None:
    stopped(model, KINDS[kind], tmp_path / "o", behind=1)
    assert continued(model, KINDS[kind], tmp_path / "o").told(RunResumed) == [RunResumed(done=2, count=BLOCKS)]
    assert hashes(tmp_path / "o") == whole(kind)


def test_the_next_block_does_not_wait_for_a_record(
    model: Path, tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch, beside: None
) -> None:
    computing, written = threading.Event(), journal.write_tensors

    def late(path: Path, entries: Any) -> str:
        assert computing.wait(60) or path.name.startswith("00000")
        return written(path, entries)

    class Watching(Recording):
        def __call__(self, event: Event) -> None:
            super().__call__(event)
            if isinstance(event, BlockStarted):
                computing.clear() if event.index == 0 else computing.set()

    monkeypatch.setattr(journal, "write_tensors", late)
    heard = Watching()
    compress.run(model, KINDS["twins"], tmp_path / "o", emit=heard)
    told = [(type(event), getattr(event, "index", getattr(event, "done", 0))) for event in heard.events]
    assert told.index((BlockStarted, 1)) < told.index((BlockRecorded, 1)) < told.index((BlockStarted, 2))
    assert hashes(tmp_path / "o") == whole("twins")


@pytest.mark.slow
def test_an_error_of_a_record_beside_ends_the_run_which_goes_on(
    model: Path, tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch, beside: None
) -> None:
    written = journal.write_tensors

    def full(path: Path, entries: Any) -> str:
        if path.name.startswith("00002"):
            raise WriteError(str(path)) from OSError(28, "No space left on device")
        return written(path, entries)

    monkeypatch.setattr(journal, "write_tensors", full)
    with pytest.raises(ArtifactError, match="No space left on device"):
        compress.run(model, KINDS["twins"], tmp_path / "o")
    monkeypatch.setattr(journal, "write_tensors", written)
    assert continued(model, KINDS["twins"], tmp_path / "o").told(RunResumed) == [RunResumed(done=1, count=BLOCKS)]
    assert hashes(tmp_path / "o") == whole("twins")


@pytest.mark.slow
@pytest.mark.parametrize("aside", [False, True])
def test_files_of_large_states_are_taken_over(
    aside: bool, model: Path, tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So there are never more than those of two blocks, and none is removed and made again."""
    monkeypatch.setattr(journal, "PART", 1_000)
    if aside:
        monkeypatch.setattr(Job, "beside_what", lambda self: torch.device("cpu"))
    seen: list[dict[int, str]] = []

    def look(event: Event) -> None:
        if isinstance(event, BlockRecorded):
            found = (tmp_path / "o.partial" / "records").glob("*.safetensors")
            seen.append({path.stat().st_ino: path.name.partition(".")[0] for path in found})

    deep = deeper(model, tmp_path / "deep", blocks=5)
    compress.run(deep, KINDS["twins"], tmp_path / "o", emit=look)
    files, numbers = [len(found) for found in seen], [set(found.values()) for found in seen]
    assert numbers[3] == {"00002", "00003"} and files[3] == files[2] == 2 * files[1] > 2
    assert seen[2].keys() == seen[3].keys() == seen[4].keys()  # the very same files
    monkeypatch.undo()
    compress.run(deep, KINDS["twins"], tmp_path / "again")
    assert hashes(tmp_path / "o") == hashes(tmp_path / "again")


@pytest.mark.slow
def test_no_thread_writes_once_the_folder_is_let_go(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second Ctrl-C comes while the first waits for what threads are writing."""
    whole, written, blocks = journal.write_tensors, Job.pack_block, []

    class Impatient(ThreadPoolExecutor):
        pressed = False

        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            if wait and not self.pressed:
                self.pressed = True
                raise KeyboardInterrupt
            super().shutdown(wait, cancel_futures=cancel_futures)

    def slowly(path: Path, entries: Any) -> str:
        time.sleep(0.3)
        return whole(path, entries)

    def interrupted(self: Job, writer: Any, block: Any) -> Any:
        blocks.append(block.index)
        if len(blocks) == 2:
            monkeypatch.setattr(journal, "write_tensors", slowly)
            raise KeyboardInterrupt
        return written(self, writer, block)

    monkeypatch.setattr(journal, "PART", 1_000)
    monkeypatch.setattr(journal, "ThreadPoolExecutor", Impatient)
    monkeypatch.setattr(Job, "pack_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress.run(model, Recipe(passes=PASSES, calibration=FEW), tmp_path / "o")
    left = sorted((tmp_path / "o.partial").rglob("*"))
    time.sleep(0.5)
    assert sorted((tmp_path / "o.partial").rglob("*")) == left
    monkeypatch.undo()
    assert continued(model, Recipe(passes=PASSES, calibration=FEW), tmp_path / "o").told(RunResumed)


@pytest.mark.slow
def test_shards_of_any_size_go_on(model: Path, tmp_path: Path) -> None:
    recipe = Recipe(passes=PASSES, calibration=FEW)
    compress.run(model, recipe, tmp_path / "whole", shard_size=8_000)
    stopped(model, recipe, tmp_path / "o", behind=1, shard_size=8_000)
    continued(model, recipe, tmp_path / "o", shard_size=8_000)
    assert hashes(tmp_path / "o") == hashes(tmp_path / "whole")


def test_what_blocks_leave_for_later_blocks_is_put_back() -> None:
    ids, hidden, shared = torch.zeros(1, 2), torch.randn(1, 2, 3), Shared()
    left, fresh = dict[str, Any](), dict[str, Any]()
    travellers, again = (
        Travellers(ids, hidden, [shared.call(((), {"left": into})), shared.call(((), {"left": into}))])
        for into in (left, fresh)
    )
    left["full.attention"] = tuple(torch.full((2,), float(i)) for i in range(11))
    again.carry(travellers.carried())
    assert fresh.keys() == left.keys()
    assert all(torch.equal(a, b) for a, b in zip(fresh["full.attention"], left["full.attention"], strict=True))
    assert again.calls[0][1]["left"] is again.calls[1][1]["left"]
    assert not travellers.opaque


@pytest.mark.slow
def test_a_model_whose_blocks_share_keys_and_values_goes_on(gemma3n: Path, tmp_path: Path) -> None:
    recipe = Recipe(passes=(GPTQ(sites="*mlp*", group=8),), calibration=FEW)
    compress.run(gemma3n, recipe, tmp_path / "whole")
    stopped(gemma3n, recipe, tmp_path / "o", behind=1)
    assert continued(gemma3n, recipe, tmp_path / "o").told(RunResumed) == [RunResumed(done=2, count=3)]
    assert hashes(tmp_path / "o") == hashes(tmp_path / "whole")


@pytest.mark.slow
def test_what_cannot_be_stored_is_said_and_done_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, halfway: Any
) -> None:
    recipe = Recipe(passes=PASSES, calibration=FEW)
    monkeypatch.setattr(Travellers, "opaque", "Cache")
    stopped(model, recipe, tmp_path / "o", behind=1)
    heard = continued(model, recipe, tmp_path / "o")
    assert "passes a Cache from block to block" in heard.told(ResumeUnavailable)[0].reason
    assert [event.index for event in heard.told(BlockStarted)] == [0, 1, 2]
    assert hashes(tmp_path / "o") == halfway[1]


@pytest.mark.slow
def test_a_mixture_of_experts_goes_on(tmp_path: Path, tiny_llama: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "mixtral", vocab_size=211, hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, num_local_experts=4,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "m")
    for file in tiny_llama.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "m" / file.name)
    recipe = Recipe(passes=(Wanda(),), calibration=FEW, limits=compress.Limits(max_starved=1.0))
    compress.run(tmp_path / "m", recipe, tmp_path / "whole")
    stopped(tmp_path / "m", recipe, tmp_path / "o")
    assert continued(tmp_path / "m", recipe, tmp_path / "o").told(RunResumed) == [RunResumed(done=1, count=2)]
    assert hashes(tmp_path / "o") == hashes(tmp_path / "whole")


# -- the same run, or refused ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def halfway(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The partial folder of a run stopped behind its second block, to be copied; and the hashes of the whole."""
    place = tmp_path_factory.mktemp("halfway")
    recipe = Recipe(passes=PASSES, calibration=FEW)
    compress.run(model, recipe, place / "whole")
    return stopped(model, recipe, place / "o", behind=1), hashes(place / "whole")


@pytest.fixture
def own(halfway: tuple[Path, dict[str, str]], tmp_path: Path) -> Path:
    """A copy of it, beside the target that it belongs to."""
    return Path(shutil.copytree(halfway[0], tmp_path / "o.partial"))


CHANGED: dict[str, tuple[Any, str]] = {
    "an option": (
        (Wanda(sparsity="2:4"), GPTQ(group=4, target="original")),
        r"recipe\.passes\[1\]\.gptq\.group was 8, is 4;",
    ),
    "a pass": ((Wanda(sparsity="2:4"),), r"recipe\.passes\[1\]\.gptq\.\w+ was .*, is absent \(and \d+ more\)"),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGED)
def test_another_recipe_is_refused_by_name(what: str, own: Path, model: Path) -> None:
    passes, message = CHANGED[what]
    before = hashes(own / "artifact")
    with pytest.raises(RecipeError, match=rf"{own}: holds a different run: {message}") as told:
        compress.run(model, Recipe(passes=passes, calibration=FEW), own.with_name("o"))
    assert "--restart" in str(told.value)
    assert "\n" not in str(told.value)
    assert hashes(own / "artifact") == before


def test_other_tokens_are_refused_by_name(own: Path, model: Path) -> None:
    recipe = Recipe(passes=PASSES, calibration=Calibration(samples=6, length=32, seed=1))
    with pytest.raises(RecipeError, match=r"recipe\.calibration\.seed was 0, is 1 \(and \d more\)"):
        compress.run(model, recipe, own.with_name("o"))


def test_other_weights_are_refused_by_name(own: Path, model: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(model, tmp_path / "model"))
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (other / "model.safetensors").write_bytes(content)
    with pytest.raises(RecipeError, match=r"model\.model\.safetensors was [0-9a-f]{12}, is [0-9a-f]{12};"):
        compress.run(other, Recipe(passes=PASSES, calibration=FEW), own.with_name("o"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("code_hash", lambda: "f" * 64, r"code was [0-9a-f]{12}, is f{12};"),
        ("machine", lambda device: {"threads": 7, "cpu": "?", "device": "cpu"}, r"machine\.threads was 1, is 7 \(and"),
        ("versions", lambda: {"torch": "0.1"}, r"versions\.torch was .*, is 0\.1 \(and 4 more\)"),
    ],
)
def test_other_code_or_machines_are_refused_by_name(
    name: str, value: Any, message: str, own: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"compress.identity.{name}", value)
    with pytest.raises(RecipeError, match=message):
        compress.run(model, Recipe(passes=PASSES, calibration=FEW), own.with_name("o"))


def test_another_shard_size_is_refused_by_name(own: Path, model: Path) -> None:
    with pytest.raises(RecipeError, match=r"options\.shard_size was 5000000000, is 9000;"):
        compress.run(model, Recipe(passes=PASSES, calibration=FEW), own.with_name("o"), shard_size=9000)


def test_restart_throws_away_what_is_there(own: Path, model: Path, halfway: Any) -> None:
    heard = continued(model, Recipe(passes=PASSES, calibration=FEW), own.with_name("o"), restart=True)
    assert [event.index for event in heard.told(BlockStarted)] == [0, 1, 2]
    assert heard.told(RunResumed) == []
    assert hashes(own.with_name("o")) == halfway[1]


@pytest.mark.slow
def test_a_run_that_finished_no_block_does_not_stand_in_the_way(killed: Any, model: Path, tmp_path: Path) -> None:
    order, _, steps, _ = killed
    assert order(tmp_path / "o", last=int(0.3 * steps))["code"] == -9
    assert (tmp_path / "o.partial" / "identity.json").exists()
    assert not (tmp_path / "o.partial" / "records" / "00001.json").exists()
    assert len(continued(model, Recipe(passes=(RTN(group=8),)), tmp_path / "o").told(BlockStarted)) == BLOCKS


def test_places_and_times_do_not_matter(own: Path, model: Path, tmp_path: Path, halfway: Any) -> None:
    moved = Path(shutil.copytree(model, tmp_path / "elsewhere" / model.name))
    for path in (*moved.iterdir(), *own.rglob("*")):
        os.utime(path, (1, 1))  # 1970
    heard = continued(moved, Recipe(passes=PASSES, calibration=FEW), own.with_name("o"))
    assert heard.told(RunResumed) == [RunResumed(done=2, count=BLOCKS)]
    assert hashes(own.with_name("o")) == halfway[1]


def test_a_mistake_in_between_costs_nothing(own: Path, model: Path, halfway: Any) -> None:
    with pytest.raises(RecipeError, match="selects no site"):
        compress.run(model, [RTN(sites="*nothing*")], own.with_name("o"))
    assert continued(model, Recipe(passes=PASSES, calibration=FEW), own.with_name("o")).told(RunResumed)
    assert hashes(own.with_name("o")) == halfway[1]


# -- damage ----------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize("damage", [flip, *(pytest.param(one, marks=pytest.mark.slow) for one in (cut, Path.unlink))])
@pytest.mark.parametrize(
    "name",
    [
        "records/00001.json", "records/00002.json", "records/00002.safetensors", "artifact/part-00002.safetensors",
        "identity.json",
    ],
)  # fmt: skip
def test_what_is_damaged_is_never_used(
    name: str, damage: Callable[[Path], None], own: Path, model: Path, halfway: Any, tally: Tally
) -> None:
    damage(own / name)
    with tally("damage", "a record, state, shard or identity of a stopped run"):
        heard = continued(model, Recipe(passes=PASSES, calibration=FEW), own.with_name("o"))
        assert [event.index for event in heard.told(BlockStarted)] == [0, 1, 2]
        assert hashes(own.with_name("o")) == halfway[1]
    if (name, damage) == ("records/00002.json", Path.unlink):  # as if it had never been written
        assert heard.told(RunRestarted)[0].reason.endswith("00001.safetensors is missing or damaged")
    else:
        assert Path(name).name in heard.told(RunRestarted)[0].reason or damage is Path.unlink


@pytest.mark.parametrize("name", ["records/00001.json", "identity.json"])
def test_what_cannot_be_read_is_not_discarded(
    name: str, own: Path, model: Path, halfway: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file server that is away, for example, does not mean that the file is damaged."""
    read = Path.read_text

    def failing(path: Path, *given: Any, **options: Any) -> str:
        if path == own / name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path, *given, **options)

    recipe = Recipe(passes=PASSES, calibration=FEW)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", failing)
        with pytest.raises(ArtifactError, match=rf"{name}: cannot be read: Input/output error"):
            compress.run(model, recipe, own.with_name("o"))
    heard = continued(model, recipe, own.with_name("o"))
    assert not heard.told(RunRestarted) and len(heard.told(BlockStarted)) < BLOCKS
    assert hashes(own.with_name("o")) == halfway[1]


@pytest.mark.slow
def test_a_damaged_offloaded_state_is_never_used(model: Path, tmp_path: Path, halfway: Any, tally: Tally) -> None:
    recipe = Recipe(passes=PASSES, calibration=FEW)
    partial = stopped(model, recipe, tmp_path / "o", offload=True)
    flip(next(partial.rglob("batch-*")))
    with tally("damage", "an offloaded state of a stopped run"):
        heard = continued(model, recipe, tmp_path / "o", offload=True)
        assert "is missing or damaged" in heard.told(RunRestarted)[0].reason
        assert hashes(tmp_path / "o") == halfway[1]


@pytest.mark.slow
def test_another_shape_than_before_starts_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = KINDS["shortgpt"]
    stopped(model, recipe, tmp_path / "o")
    monkeypatch.setattr("compress.job.content_hash", lambda made: "another")
    heard = continued(model, recipe, tmp_path / "o")
    assert "gave a different model than before" in heard.told(RunRestarted)[0].reason
    assert len(heard.told(BlockStarted)) == BLOCKS - 1


# -- the folder ------------------------------------------------------------------------------------


def test_two_runs_into_one_folder_are_refused(model: Path, tmp_path: Path) -> None:
    with (
        Journal(tmp_path / "o", lambda event: None),
        pytest.raises(RecipeError, match=rf"process {os.getpid()} is writing {tmp_path / 'o'}; wait for it"),
    ):
        compress.run(model, [RTN(group=8)], tmp_path / "o")
    compress.run(model, [RTN(group=8)], tmp_path / "o")


def test_a_folder_of_somebody_else_is_left_alone(model: Path, tmp_path: Path) -> None:
    (tmp_path / "o.partial").mkdir()
    (tmp_path / "o.partial" / "download").write_text("precious")
    with pytest.raises(
        RecipeError, match=r"o\.partial is needed as the working folder for o, but is not empty; move it away"
    ):
        compress.run(model, [RTN(group=8)], tmp_path / "o")
    assert (tmp_path / "o.partial" / "download").read_text() == "precious"
    assert [path.name for path in tmp_path.rglob("*")] == ["o.partial", "download"]


def test_an_interrupt_says_how_far_it_came(model: Path, tmp_path: Path) -> None:
    heard = Recording(1)
    with pytest.raises(KeyboardInterrupt):
        compress.run(model, [RTN(group=8)], tmp_path / "o", emit=heard)
    assert heard.events[-1] == RunInterrupted(done=2, count=BLOCKS)


def test_a_disk_that_holds_half_of_it_already_is_large_enough(
    own: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    held = sum(path.stat().st_size for path in own.rglob("*") if path.is_file())
    free = size - held + 100
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": free}))
    continued(model, Recipe(passes=PASSES, calibration=FEW), own.with_name("o"))
    with pytest.raises(compress.PlanError, match="bytes are free"):
        compress.run(model, Recipe(passes=PASSES, calibration=FEW), own.with_name("p"))


@pytest.mark.slow
def test_an_error_of_the_disk_keeps_what_is_done(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, halfway: Any
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("compress.writer.copy_companions", full)
    recipe = Recipe(passes=PASSES, calibration=FEW)
    with pytest.raises(ArtifactError, match=r"cannot be written: .*No space left on device"):
        compress.run(model, recipe, tmp_path / "o")
    monkeypatch.undo()
    assert continued(model, recipe, tmp_path / "o").told(RunResumed) == [RunResumed(done=BLOCKS, count=BLOCKS)]
    assert hashes(tmp_path / "o") == halfway[1]


def test_what_a_record_costs_is_told(model: Path, tmp_path: Path) -> None:
    heard = Recording(BLOCKS - 1)
    with pytest.raises(KeyboardInterrupt):
        compress.run(model, Recipe(passes=PASSES, calibration=FEW), tmp_path / "o", emit=heard)
    records = tmp_path / "o.partial" / "records"
    told = heard.told(BlockRecorded)
    assert [event.done for event in told] == [0, 1, 2, 3]
    assert told[-1].nbytes == sum((records / f"00003.{ending}").stat().st_size for ending in ("json", "safetensors"))
