"""The ledger as a picture and in words: what it shows of each site, with reproducible bytes and any names."""

from __future__ import annotations

import errno
import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import compress
from compress import RTN
from compress.artifact import Artifact, verify
from compress.errors import visible
from compress.ledger import notes
from compress.picture import HIGH, WIDE, labels, picture

SVG = "{http://www.w3.org/2000/svg}"
NAMES = ["<script>alert(1)</script>", "\"'><svg onload=alert(1)>", "]]>", "<!--", "&lt;b&gt;", "\x1b[31m", "a\nb",
         "\u202ea", "\0", "\ud800", "</title>", "x" * 500]  # fmt: skip


def row(weight_error: float = 0.2, output_error: float | None = 0.1, **others: Any) -> dict[str, Any]:
    return {"weight": "int4g64", "bytes": 40, "dense_bytes": 160, "weight_error": weight_error,
            "output_error": output_error, "tokens": 512, "fallbacks": [], "starved": [], **others}  # fmt: skip


def told(sites: dict[str, Any], name: str = "llama") -> dict[str, Any]:
    sizes = {"bytes": 1, "source_bytes": 2, "bits_per_weight": 4.5}
    return {"source": {"name": name}, "sites": sites, "sizes": sizes, "calibration": {"name": "mixed 128x256"}}


def drawn(sites: dict[str, Any], name: str = "llama") -> ElementTree.Element:
    return ElementTree.fromstring(picture(told(sites, name)))


def texts(svg: ElementTree.Element) -> list[str]:
    return [str(node.text) for node in svg.iter(f"{SVG}text")]


def dots(svg: ElementTree.Element) -> list[list[tuple[float, float]]]:
    """The points of each line, panel after panel, behind those of the legend."""
    paths = [node.attrib["d"] for node in svg.iter(f"{SVG}path") if node.get("class") == "d"]
    found = [[(float(x), float(y)) for x, y in re.findall(r"M([\d.]+) ([\d.]+)h0", path)] for path in paths]
    return found[len(found) // 3 :]


def bars(svg: ElementTree.Element, pale: bool) -> list[float]:
    """The heights of the bars, kind after kind."""
    paths = [n.attrib["d"] for n in svg.iter(f"{SVG}path") if n.get("fill") and (n.get("class") == "b") == pale]
    return [float(height) for path in paths for height in re.findall(r"v-([\d.]+)", path)]


def test_an_error_stands_at_its_height() -> None:
    svg = drawn({f"m.layers.{i}.a.q_proj": row(0.4, (0.0, 0.1, 0.4)[i]) for i in range(3)})
    output, weight = dots(svg)
    base = output[0][1]
    assert [base - y for _, y in output] == pytest.approx([0, HIGH / 4, HIGH], abs=0.11)
    assert len({y for _, y in weight}) == 1
    assert output[1][0] - output[0][0] == pytest.approx(output[2][0] - output[1][0], abs=0.11)
    assert [t for t in texts(svg) if t.startswith("0")][:5] == ["0", "0.1", "0.2", "0.3", "0.4"]


def test_bars_are_as_high_as_the_bytes_they_stand_for() -> None:
    svg = drawn({"l.0.q_proj": row(bytes=20), "l.0.k_proj": row(bytes=80), "l.1.q_proj": row(bytes=40)})
    scale = HIGH / 400  # of axes that end at the next line above 320 bytes
    assert bars(svg, pale=True) == pytest.approx([160 * scale, 160 * scale, 160 * scale], abs=0.11)
    assert bars(svg, pale=False) == pytest.approx([20 * scale, 40 * scale, 80 * scale], abs=0.11)
    assert "size of each block's sites, bytes: before (pale, left) and after" in texts(svg)


def test_experts_are_a_median_and_a_range() -> None:
    svg = drawn({f"l.0.experts.{e}.up_proj": row(output_error=0.1 * e) for e in range(1, 6)})
    [[_, y]], _ = dots(svg)
    low, high = re.fullmatch(r"M[\d.]+ ([\d.]+)V([\d.]+)", svg.find(f"{SVG}path[@class='r']").attrib["d"]).groups()  # type: ignore[union-attr]
    assert float(low) - y == pytest.approx(y - float(high), abs=0.11) and float(low) > float(high)


def test_fallbacks_and_starved_sites_are_marked_and_explained() -> None:
    plain = drawn({"l.0.q_proj": row()})
    marked = drawn({"l.0.q_proj": row(fallbacks=[["gptq", "x"]]), "l.0.k_proj": row(starved=["gptq: rtn"])})
    assert list(plain.iter(f"{SVG}circle")) == []
    assert [node.get("class") for node in marked.iter(f"{SVG}circle")] == ["f", "e", "f", "e", "f", "e"]
    assert {"fallback", "starved of tokens"} <= set(texts(marked))
    assert "1 fallbacks; 1 starved" in str(marked.find(f"{SVG}desc").text)  # type: ignore[union-attr]


def test_what_was_not_measured_is_not_drawn() -> None:
    assert "output error, relative" not in texts(drawn({"l.0.q_proj": row(output_error=None)}))
    assert picture(told({"lm_head": row()})) == ""
    for value in (float("nan"), float("inf"), -1.0, 10**400):  # in a file that anybody wrote
        svg = drawn({"l.0.q_proj": row(value, value, bytes=value), "l.1.q_proj": row()})
        assert [len(points) for points in dots(svg)] == [1, 1] and bars(svg, pale=True) == []


@pytest.mark.parametrize("least", [5e-324, 2e-323, 1e-310, 1e-301])
def test_an_error_too_small_for_an_axis_is_drawn_as_nothing(least: float) -> None:
    assert dots(drawn({"l.0.q_proj": row(least, least)})) == dots(drawn({"l.0.q_proj": row(0.0, 0.0)}))


def test_kinds_are_called_by_as_much_as_tells_them_apart() -> None:
    kinds = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "self_attn.q_proj"]
    assert list(labels(kinds).values()) == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj", "q"]


def test_names_of_ten_thousand_parts_take_no_memory() -> None:
    kinds = [f"{'a.' * 10_000}{end}" for end in ("b", "c")]
    tracemalloc.start()
    found = list(labels(kinds).values())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == ["b", "c"] and peak < 2**24


@pytest.mark.parametrize("name", NAMES)
def test_names_stay_text(name: str) -> None:
    svg = drawn({f"{name}.0.{name}": row(weight=name, fallbacks=[[name, name]])}, name)
    assert {node.tag.removeprefix(SVG) for node in svg.iter()} == {
        "svg",
        "title",
        "desc",
        "style",
        "text",
        "path",
        "circle",
    }
    assert str(svg.find(f"{SVG}title").text).startswith(visible(name)[:150])  # type: ignore[union-attr]
    assert all(not key.startswith("on") for node in svg.iter() for key in node.attrib)


def test_eighty_blocks_fit_and_the_same_ledger_gives_the_same_bytes() -> None:
    sites = {
        f"l.{i}.{name}_proj": row(0.1 + i / 100)
        for i in range(80)
        for name in ("q", "k", "v", "o", "gate", "up", "down")
    }
    svg = picture(told(sites))
    assert svg == picture(told(json.loads(json.dumps(sites)))) and len(svg) < 100_000
    assert all(0 <= x <= WIDE for line in dots(ElementTree.fromstring(svg)) for x, _ in line)
    assert len([t for t in texts(ElementTree.fromstring(svg)) if t == "75"]) == 3


def test_notes_say_what_did_not_go_as_asked() -> None:
    assert notes(row()) == []
    said = row(damping=0.1, damping_failed=[0.01], dead_inputs=3, errors=[["wanda", 0.3], ["gptq", 0.35]],
               fallbacks=[["gptq", "why"]], starved=["gptq: rtn"])  # fmt: skip
    assert notes(said) == ["damping 0.1", "damping 0.01 failed", "3 dead inputs",
                           "weight error wanda 0.3000 -> gptq 0.3500", "fallback of gptq: why",
                           "starved: gptq: rtn"]  # fmt: skip


def test_a_run_leaves_the_picture_beside_its_card_and_inspect_draws_it_again(
    llama_artifact: Path, tiny_llama: Path, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    provenance = Artifact(llama_artifact).provenance
    assert "ledger.svg" in provenance["files"] and verify(llama_artifact)
    assert "](ledger.svg)" in (llama_artifact / "README.md").read_text()
    assert {len(record["errors"]) for record in provenance["sites"].values()} == {2}
    assert cli("inspect", llama_artifact, "--picture", tmp_path / "a.svg")[0] == 0
    assert (tmp_path / "a.svg").read_bytes() == (llama_artifact / "ledger.svg").read_bytes()
    for folder, place, why in (
        (llama_artifact, tmp_path / "a.png", "must be named .svg"),
        (tiny_llama, tmp_path / "b.svg", "is not a compressed model"),
        (llama_artifact, tmp_path / "none" / "b.svg", "cannot be written"),
    ):  # fmt: skip
        code, _, err = cli("inspect", folder, "--picture", place)
        assert code == 2 and why in err and not place.exists()


def test_a_full_disk_leaves_the_picture_that_was_there(
    llama_artifact: Path, tmp_path: Path, cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, plain = tmp_path / "a.svg", Path.write_text
    target.write_text("<svg/>")

    def full(path: Path, text: str, **options: Any) -> int:
        plain(path, text[:9], **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    code, _, err = cli("inspect", llama_artifact, "--picture", target)
    assert (code, err) == (2, f"error: --picture: {target} cannot be written: No space left on device\n")
    assert target.read_text() == "<svg/>" and list(tmp_path.iterdir()) == [target]


def test_a_damaged_picture_is_found(llama_artifact: Path, tmp_path: Path, tiny_llama: Path) -> None:
    out = compress.run(tiny_llama, [RTN(group=8)], tmp_path / "out").out
    (out / "ledger.svg").write_text("<svg/>")
    with pytest.raises(compress.CompressError, match=r"ledger\.svg"):
        verify(out)
