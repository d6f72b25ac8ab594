"""Tuning profiles: they are read as written, damaged or foreign ones are refused by name, and lowering follows them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import RecipeError
from compress.runtime.lower import lower, rule_of
from compress.runtime.maps import ByRows, FewRows, IntegerProduct, RoundedFirst, applied, path
from compress.weights import Grid, Quantized
from compress_kernels import cpu, tuning
from compress_kernels.bench import crossover
from compress_kernels.bench import tune as tuner
from compress_kernels.tuning import Key, Profile, TuningError

Close = Callable[[str, torch.Tensor, torch.Tensor, float], None]
VNNI = pytest.mark.skipif(not cpu.multiplies_integers(), reason="this CPU cannot sum products of bytes exactly")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path


def profile(form: str, paths: dict[int, str], size: tuple[int, int] = (1024, 1024)) -> Profile:
    """What a measurement of one format and size may have found."""
    entries: dict[Key, Any] = {
        Key(cpu.OP, form, *size, rows): {"path": chosen, "speedup": 1.5} for rows, chosen in paths.items()
    }
    return Profile(tuning.device_name("cpu"), torch.__version__, "2026-11-26", 1, entries)


def install(found: Profile) -> Path:
    tuning.write(found, tuning.place("cpu"))
    return tuning.place("cpu")


def weight(bits: int = 4, out: int = 1024) -> Quantized:
    grid = Grid(bits=bits, group=64 if bits == 4 else 0, symmetric=True)
    return grid.quantize(torch.randn(out, 1024, generator=torch.Generator().manual_seed(0)))


# -- files -------------------------------------------------------------------------------------------


def test_what_is_written_is_read_and_lies_in_the_users_cache(own_cache: Path) -> None:
    found = profile(cpu.INT4, {1: cpu.PACKED, 8: cpu.DECODED})
    where = install(found)
    assert where.parent == own_cache / "compress" / "tuning"
    assert where.name.endswith(f"-{torch.__version__}.json")
    assert tuning.read(where) == tuning.known("cpu") == found
    assert [p.name for p in where.parent.iterdir()] == [where.name]


def test_nothing_tuned_is_nothing_known() -> None:
    assert tuning.known("cpu") is None
    assert cpu.few_rows(cpu.INT4, 1024, 1024) == cpu.FEW_ROWS[cpu.INT4]


def test_a_new_profile_replaces_the_old_one_at_once() -> None:
    for rows in (1, 16):
        install(profile(cpu.INT4, {1: cpu.PACKED, rows: cpu.PACKED}))
        assert cpu.few_rows(cpu.INT4, 1024, 1024) == rows


def damaged() -> dict[str, Any]:
    good = {"op": "cpu", "format": "int4", "out": 8, "inputs": 8, "rows": 1, "choice": {"path": "packed"}}
    head = {"format": 1, "device": "d", "torch": "t", "measured": "m", "threads": 1}
    return {
        "an array": ([], "the file is not an object"),
        "another version": ({**head, "format": 2, "entries": []}, "format 2, this program reads 1"),
        "a missing name": ({**head}, "the file must have format, entries"),
        "a name too many": ({**head, "entries": [], "more": 1}, "must have"),
        "a wrong type": ({**head, "threads": "1", "entries": []}, "threads is '1', not int"),
        "true for a number": ({**head, "entries": [{**good, "rows": True}]}, "rows is True, not int"),
        "no rows": ({**head, "entries": [{**good, "rows": 0}]}, r"entries\[0\] has a size below 1"),
        "a nested choice": ({**head, "entries": [{**good, "choice": {"path": []}}]}, "more than text and numbers"),
        "one twice": ({**head, "entries": [good, good]}, r"entries\[1\] is a duplicate"),
    }


@pytest.mark.parametrize("kind", damaged())
def test_a_damaged_profile_is_one_line_that_names_it(kind: str) -> None:
    value, message = damaged()[kind]
    where = install(profile(cpu.INT4, {1: cpu.PACKED}))
    where.write_text(json.dumps(value))
    with pytest.raises(TuningError, match=message) as caught:
        tuning.known("cpu")
    assert str(where) in str(caught.value)
    assert "compress tune" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b"[" * 100_000], ids=["empty", "cut", "binary", "deep"])
def test_what_is_no_json_is_refused_where_a_weight_is_lowered(raw: bytes) -> None:
    install(profile(cpu.INT4, {1: cpu.PACKED})).write_bytes(raw)
    with pytest.raises(RecipeError, match="is not a tuning profile"):
        lower(weight(), torch.bfloat16)


@pytest.mark.parametrize("change", [{"device": "another"}, {"torch": "1.0"}])
def test_a_profile_of_another_machine_is_refused(change: dict[str, str]) -> None:
    where = install(profile(cpu.INT4, {1: cpu.PACKED}))
    where.write_text(json.dumps({**json.loads(where.read_text()), **change}))
    with pytest.raises(TuningError, match=f"was measured with {next(iter(change))}"):
        tuning.known("cpu")


def test_an_unknown_path_is_refused() -> None:
    install(profile(cpu.INT4, {1: "sideways"}))
    with pytest.raises(RecipeError, match="neither packed nor decoded"):
        lower(weight(), torch.bfloat16)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TuningError, match="cannot be written"):
        tuning.write(profile(cpu.INT4, {1: cpu.PACKED}), tmp_path / "file" / "p.json")


def test_nothing_is_measured_for_a_place_that_cannot_be_written(
    cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tuner, "measure", lambda: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    code, out, err = cli("tune", "--out", tmp_path / "file" / "p.json")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "file/p.json: cannot be written: " in err


# -- choices -----------------------------------------------------------------------------------------


def test_a_size_not_measured_takes_the_nearest_and_rows_the_next_above() -> None:
    small, large = ({Key("op", "f", n, n, rows): {"path": f"{n} {rows}"} for rows in (1, 8)} for n in (64, 1024))
    found = Profile("d", "t", "m", 1, {**small, **large})
    assert found.choice("op", "f", 100, 80, 1) == {"path": "64 1"}
    assert found.choice("op", "f", 700, 1024, 2) == {"path": "1024 8"}
    assert found.choice("op", "f", 700, 1024, 900) == {"path": "1024 8"}
    assert found.choice("op", "other", 64, 64, 1) is None


@pytest.mark.parametrize(
    ("paths", "few"),
    [({1: "packed", 4: "packed", 16: "decoded", 64: "packed"}, 4), ({1: "packed", 64: "packed"}, 64),
     ({1: "decoded", 4: "packed"}, 0)],
)  # fmt: skip
def test_packed_products_serve_as_many_rows_as_all_fewer_are_faster(paths: dict[int, str], few: int) -> None:
    install(profile(cpu.INT4, paths))
    assert cpu.few_rows(cpu.INT4, 1024, 1024) == few
    module = lower(weight(), torch.bfloat16)
    assert (module.few if isinstance(module, FewRows) else 0) == few
    assert rule_of(weight(), torch.bfloat16) == ("cpu_int4" if few else "decoded")


@VNNI
def test_integers_serve_the_rows_at_which_they_are_faster(assert_close: Close) -> None:
    install(profile(cpu.INT8_INT8, {1: cpu.PACKED, 8: cpu.DECODED, 64: cpu.PACKED}))
    module = lower(weight(8), torch.float32, "int8")
    assert isinstance(module, ByRows)
    assert [path(module, n) for n in (1, 2, 8, 9, 99)] == [
        "integers", "rounded, decoded", "rounded, decoded", "integers", "integers"
    ]  # fmt: skip
    x = torch.randn(8, 1024, generator=torch.Generator().manual_seed(0))
    assert_close("either way", applied(module.integers, x, None), applied(module.floats, x, None), 1e-6)
    assert torch.equal(module(x), module.floats(x))
    assert torch.equal(module(x[:1]), module.integers(x[:1]))


@pytest.mark.parametrize(("chosen", "kind"), [(cpu.PACKED, IntegerProduct), (cpu.DECODED, RoundedFirst)])
@VNNI
def test_one_answer_for_all_rows_needs_one_module(chosen: str, kind: type) -> None:
    install(profile(cpu.INT8_INT8, {1: chosen, 8: chosen}))
    assert type(lower(weight(8), torch.float32, "int8")) is kind


# -- measuring ---------------------------------------------------------------------------------------


def test_every_format_is_measured_at_every_size_and_count() -> None:
    timed = list(crossover.measure([(32, 64), (16, 128)], (1, 3), seconds=0, fewest=2))
    found = crossover.profile(timed)
    forms = {cpu.INT4, cpu.INT8, cpu.CSR} | ({cpu.INT8_INT8} if cpu.multiplies_integers() else set())
    assert found.entries.keys() == {
        Key(cpu.OP, form, *size, rows) for form in forms for size in ((32, 64), (16, 128)) for rows in (1, 3)
    }
    assert (found.device, found.torch) == (tuning.device_name("cpu"), torch.__version__)


@pytest.mark.parametrize(("packed", "chosen"), [(0.90, cpu.PACKED), (0.97, cpu.DECODED), (2.0, cpu.DECODED)])
def test_a_packed_product_must_win_by_a_margin(packed: float, chosen: str) -> None:
    timed = crossover.Timed(64, 64, 1, {cpu.INT4: [1.0] * 3}, {cpu.INT4: [packed] * 3})
    assert list(crossover.profile([timed]).entries.values()) == [{"path": chosen, "speedup": round(1 / packed, 3)}]


@pytest.mark.parametrize("device", ["meta", "nonsense"])
def test_a_device_without_a_measure_is_refused(device: str) -> None:
    with pytest.raises(TuningError, match=f"--device {device}: .*give one of"):
        tuner.tune(device)


def test_the_command_writes_where_loading_looks(
    cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small = lambda: crossover.measure([(32, 64)], (1, 2), seconds=0, fewest=2)  # noqa: E731
    monkeypatch.setattr(tuner, "measure", small)
    code, out, _ = cli("tune", "--json")
    assert (code, json.loads(out)["out"]) == (0, str(tuning.place("cpu")))
    assert tuning.known("cpu") is not None
    code, out, _ = cli("tune", "--out", tmp_path / "p.json")
    assert code == 0
    assert "int4" in out
    assert tuning.read(tmp_path / "p.json").threads == torch.get_num_threads()
    assert cli("tune", "--device", "meta")[0] == 2
