"""The drawing of a model's graph: compared with kept files, valid whatever things are called, and nothing overlapping.

After a wanted change: `UPDATE_DRAWINGS=1 pytest tests/report`, then look at the pictures.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.cells import cell_len

from report import samples
from shardwright import report
from shardwright.report.units import order, path_ranges, run_title, unit_kinds
from shardwright.schemas.profile import ModelProfile

KEPT = Path(__file__).parent / "drawings"
SVG = "{http://www.w3.org/2000/svg}"
MODELS: dict[str, Callable[[], ModelProfile]] = {
    "graph": lambda: samples.PROFILE,
    "alternating": samples.alternating,
    "different": lambda: samples.different(14),
    "hostile": samples.hostile,
}
CHARACTER = 7.23
"""Pixels of a character of 12 pixels in DejaVu Sans Mono, the widest of the fonts that are asked for."""


@pytest.mark.parametrize("name", ["graph", "alternating", "different"])
def test_drawing_is_the_kept_one(name: str) -> None:
    text = report.profile_svg(MODELS[name](), 2, "fp32")
    kept = KEPT / f"{name}.svg"
    if os.environ.get("UPDATE_DRAWINGS"):
        kept.write_text(text, encoding="utf-8")
    assert text == kept.read_text(encoding="utf-8")


def test_page_is_the_kept_one() -> None:
    text = report.profile_html(samples.PROFILE, 2, "fp32")
    kept = KEPT / "graph.html"
    if os.environ.get("UPDATE_DRAWINGS"):
        kept.write_text(text, encoding="utf-8")
    assert text == kept.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", MODELS)
def test_no_text_overlaps_another_or_leaves_the_picture(name: str) -> None:
    root = ElementTree.fromstring(report.profile_svg(MODELS[name](), 2, "fp32").encode())
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    places = []
    for text in root.iter(f"{SVG}text"):
        x, y = float(text.attrib["x"]), float(text.attrib["y"])
        words = "".join(part for child in text for part in (child.tail or "",)) or text.text or ""
        assert x >= 0
        assert x + CHARACTER * cell_len(words) <= width
        assert 10 <= y <= height - 3
        places.append((x, y - 9, x + CHARACTER * cell_len(words), y + 3, words))
    assert len(places) > 10
    for (a, b, c, d, one), (e, f, g, h, other) in combinations(places, 2):
        assert c <= e or g <= a or d <= f or h <= b, (one, other)


def test_names_cannot_leave_their_place() -> None:
    """Whatever modules are called, XML parses, HTML holds no element of theirs, and every name is whole somewhere."""
    svg = report.profile_svg(samples.hostile(), 2, "fp32")
    root = ElementTree.fromstring(svg.encode())
    assert {element.tag.removeprefix(SVG) for element in root.iter()} == {
        "svg", "title", "style", "rect", "g", "text", "path",
    }  # fmt: skip
    said = "".join(root.itertext())
    cleaned = [re.sub("[\x00\x1b\ud800]", "\ufffd", name) for name in samples.HOSTILE]
    assert [name for name in cleaned if name not in said] == []
    tags: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append(tag)  # type: ignore[method-assign]
    page = report.profile_html(samples.hostile(), 2, "fp32")
    parser.feed(page)
    assert "script" not in tags
    assert page.encode()
    assert not re.search(r"(src|href)\s*=|url\(|@import", page)


def test_long_models_go_on_in_another_column() -> None:
    low, tall = (ElementTree.fromstring(report.profile_svg(samples.different(count), 1, "fp32")) for count in (20, 40))
    assert float(tall.attrib["height"]) < 1.3 * float(low.attrib["height"])
    assert float(tall.attrib["width"]) > float(low.attrib["width"])


def test_skips_and_shared_weights_are_told() -> None:
    said = "".join(ElementTree.fromstring(report.profile_svg(samples.PROFILE, 2, "fp32")).itertext())
    assert "blocks.0 to blocks.2: 1 tensor, 32 KiB" in said
    assert "embed.weight = head.weight" in said
    assert "cut: 2 tensors, 64 KiB" in said


def test_what_alternates_is_told_in_one_line() -> None:
    profile = samples.alternating(10)
    kinds = unit_kinds(profile)
    assert [(kind.name, kind.count) for kind in kinds] == [
        ("embedding", 1), ("block a", 21), ("block b", 10), ("head", 1),
    ]  # fmt: skip
    assert order(profile, kinds) == "10 x (2 a, 1 b), 1 a"
    assert order(samples.PROFILE, unit_kinds(samples.PROFILE)) == ""


@pytest.mark.parametrize(
    ("paths", "shown"),
    [
        ([], ""),
        (["layers.0"], "layers.0"),
        (["layers.0", "layers.1", "layers.2"], "layers.0-2"),
        (["layers.0", "layers.2", "layers.3"], "layers.0, 2-3"),
        (["encoder.9", "decoder.0", "decoder.1"], "encoder.9, decoder.0-1"),
        (["h.0.mlp", "h.1.mlp"], "h.0-1.mlp"),
        (["down1", "down2"], "down1, down2"),
        (["0", "1"], "0-1"),
    ],
)
def test_paths_as_ranges(paths: list[str], shown: str) -> None:
    assert path_ranges(paths) == shown


def test_a_sample_that_is_no_sequence_is_called_one() -> None:
    image = replace(samples.PROFILE, sequence_length=1)
    assert run_title(image, 1, "bf16") == f"{samples.PROFILE.name}: bf16, micro-batch of 1 sample"
    assert run_title(image, 4, "bf16").endswith("micro-batch of 4 samples")
    assert run_title(replace(samples.PROFILE, sequence_length=512), 4, "bf16").endswith("micro-batch 4 of 512 tokens")
