"""`shardwright schedule`: every family made, timetables checked, what is wrong said with the way out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from cli.conftest import Run
from shardwright.planner.schedules.table import SCHEDULES
from shardwright.planner.schedules.text import to_text
from shardwright.planner.schedules.timetable import Action

KEYS = ["family", "bubble_rate", "makespan", "steady_state_bubble", "peak_memory", "lower_bound", "gap", "timetable"]
SMALL = ("schedule", "--stages", "4", "--micro-batches", "8")
RIGHT = "F0 F1 I0 W0 I1 W1\nF0 I0 F1 I1 W0 W1\n"
PROFILE = "18.522,18.086,9.337,0.601"
"""Times of F, I, W and sending of a 1.5B model in ms (arXiv 2401.10241)."""


def fields(run: Run, *arguments: str) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("family", SCHEDULES)
def test_each_family_is_drawn_checked_and_told(run: Run, folder: Path, family: str) -> None:
    """What `--json` says is simulated again by `--check`, and is the same."""
    result = run(*SMALL, "--family", family)
    assert result.exit_code == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert sum(line[:4].strip().isdecimal() for line in result.stdout.splitlines()) == 4
    told = fields(run, *SMALL, "--family", family)
    assert list(told) == KEYS
    assert told["family"] == family
    (folder / "told.json").write_text(json.dumps(told))
    assert fields(run, "schedule", "--check", "told.json") == told


def test_the_text_form_is_checked_like_the_json(run: Run, folder: Path) -> None:
    told = fields(run, *SMALL, "--family", "zb-v")
    orders = tuple(
        tuple(Action(each["kind"], each["chunk"], each["micro_batch"]) for each in lane) for lane in told["timetable"]
    )
    (folder / "v.txt").write_text("# a V\n\n" + to_text(orders))
    assert fields(run, "schedule", "--check", "v.txt", "--family", "zb-v") == told
    # Without a family the placement is the one on which it runs.
    assert fields(run, "schedule", "--check", "v.txt") == {**told, "family": "given"}


def test_published_rates(run: Run) -> None:
    setting = ("schedule", "--stages", "8", "--micro-batches", "24", "--times", PROFILE)
    for family, rate in {"1f1b": 0.2431, "zb-h1": 0.1585, "zb-h2": 0.1083}.items():
        assert fields(run, *setting, "--family", family)["bubble_rate"] == pytest.approx(rate, abs=5e-5)
    searched = fields(run, *setting, "--memory-limit", "8")
    assert searched["family"] == "zb-auto"
    assert searched["bubble_rate"] <= 0.1585 + 5e-5
    assert max(searched["peak_memory"]) <= 8


def test_chunks_share_the_times_of_a_device(run: Run) -> None:
    told = fields(run, *SMALL, "--chunks", "2", "--memory-limit", "4")
    assert {each["chunk"] for lane in told["timetable"] for each in lane} == {0, 1}
    assert {each["end"] - each["start"] for lane in told["timetable"] for each in lane} == {0.5}


@pytest.mark.parametrize("name", ["times.yaml", "times.json"])
def test_times_of_each_device_or_stage_from_a_file(run: Run, folder: Path, name: str) -> None:
    values: dict[str, Any] = {"F": [1, 2, 3, 4], "I": 2, "W": 1, "comm": [0.5, 0.25, 0.125]}
    (folder / name).write_text(json.dumps(values | {"activations": [4, 3, 2, 1], "held_by_weight": 0.5}))
    told = fields(run, *SMALL, "--family", "1f1b", "--times", name)
    first = [lane[0] for lane in told["timetable"]]
    assert [(each["start"], each["end"]) for each in first] == [(0, 1), (1.5, 3.5), (3.75, 6.75), (6.875, 10.875)]
    assert told["peak_memory"] == [16, 9, 4, 1]
    values["F"] = [1, 2, 3, 4, 5, 6, 7, 8]  # one a stage of two chunks, on a V
    (folder / name).write_text(json.dumps(values))
    lanes = fields(run, *SMALL, "--family", "zb-v", "--times", name)["timetable"]
    lengths = {(each["chunk"], round(each["end"] - each["start"], 9)) for each in lanes[0] if each["kind"] == "F"}
    assert lengths == {(0, 1), (1, 8)}


def test_drawing_and_trace_are_written_anew(run: Run, folder: Path) -> None:
    for _ in range(2):
        result = run(*SMALL, "--svg", "s.svg", "--trace", "t.json")
        assert result.exit_code == 0, result.stderr
        assert "wrote s.svg" in result.stderr
    assert len(ElementTree.parse(folder / "s.svg").getroot()) > 100
    assert len(json.loads((folder / "t.json").read_text())["traceEvents"]) > 100


@pytest.mark.parametrize(("option", "name"), [("--svg", "mine.svg"), ("--trace", "mine.json"), ("--svg", "mine.png")])
def test_a_file_of_the_users_is_left_alone(run: Run, folder: Path, option: str, name: str) -> None:
    (folder / name).write_text("mine")
    result = run(*SMALL, option, name)
    assert result.exit_code == 2
    assert (folder / name).read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "place", "says", "marked"),
    [
        ("F0 W0 I0\n", ":1:4:", "W0 runs before its I", ">W0<"),
        ("F0 F1 I0 W0 I1 W1\n\nF0 I0 F1 I1 W0\n", ":3:15:", "W1 is missing", ">end<"),
        ("F0 I0 F1 W0 I1 W1\nF1 F0 I0 W0 I1 W1\n", ":1:4:", "deadlock", ">I0<"),
    ],
)
def test_a_timetable_that_does_not_run_is_shown_up_to_there(
    run: Run, folder: Path, text: str, place: str, says: str, marked: str
) -> None:
    (folder / "wrong.txt").write_text(text)
    result = run("schedule", "--check", "wrong.txt")
    assert result.exit_code == 2
    assert "Where the timetable stops" in result.stdout
    assert marked in result.stdout
    assert f"wrong.txt{place} error:" in result.stderr
    assert says in result.stderr
    machine = run("schedule", "--check", "wrong.txt", "--json")
    assert machine.exit_code == 2
    assert says in json.loads(machine.stdout)["diagnostics"][0]["message"]


def test_a_wrong_action_is_found_in_the_json(run: Run, folder: Path) -> None:
    told = fields(run, *SMALL, "--family", "1f1b")
    told["timetable"][2][3]["kind"] = "W"
    (folder / "told.json").write_text(json.dumps(told, indent=1))
    result = run("schedule", "--check", "told.json")
    assert result.exit_code == 2
    assert "rank 2, action 3" in result.stderr
    assert '"kind"' in (folder / "told.json").read_text().splitlines()[int(result.stderr.split(":")[1])]


def test_a_timetable_beyond_the_memory_is_shown_and_refused(run: Run, folder: Path) -> None:
    (folder / "right.txt").write_text(RIGHT)
    assert run("schedule", "--check", "right.txt", "--memory-limit", "2").exit_code == 0
    result = run("schedule", "--check", "right.txt", "--memory-limit", "2,1.5")
    assert result.exit_code == 1
    assert "This timetable does not fit" in result.stdout
    assert "0.5 more than the limit of 1.5" in " ".join(result.stdout.split())


def test_no_schedule_fits(run: Run) -> None:
    result = run(*SMALL, "--family", "1f1b", "--memory-limit", "2.5")
    assert result.exit_code == 1
    text = " ".join(result.stdout.split())
    assert "1.5 more than the limit of 2.5" in text
    assert "--memory-limit 4 is the least" in text
    assert "zb-auto fits into this one" in text
    machine = run(*SMALL, "--family", "1f1b", "--memory-limit", "2.5", "--json")
    assert json.loads(machine.stdout)["infeasible"]["excess"] == 1.5


@pytest.mark.parametrize("family", ["zb-auto", "zb-1p", "zb-v"])
def test_the_least_memory_of_a_search_is_found(run: Run, family: str) -> None:
    """It fits there, and not a chunk's activations below."""
    result = run(*SMALL, "--family", family, "--memory-limit", "0.25", "--json")
    assert result.exit_code == 1
    least = max(json.loads(result.stdout)["infeasible"]["needed"])
    assert run(*SMALL, "--family", family, "--memory-limit", str(least)).exit_code == 0
    below = least - 1 / SCHEDULES[family].chunks
    assert below <= 0 or run(*SMALL, "--family", family, "--memory-limit", str(below)).exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "says", "way_out"),
    [
        (("--family", "zb-atuo"), "no family 'zb-atuo'", "did you mean zb-auto?"),
        (("--family", "zb-v", "--chunks", "3"), "does not run with 3", "the nearest that it takes is 2"),
        (("--times", "1,2,3"), "four numbers F,I,W,comm, found 3", "18.5,18.1,9.3,0.6"),
        (("--times", "1,2,three,0"), "W: expected a number, found 'three'", "18.5"),
        (("--times", "1,0,1,0"), "I: expected a time above 0", "18.5"),
        (("--times", "nothing.yaml"), "no such file", ""),
        (("--memory-limit", "many"), "expected a number above 0, found 'many'", "one micro-batch"),
        (("--memory-limit", "1,2"), "2 numbers for 4 devices", "one a device"),
        (("--family", "interleaved-1f1b", "--micro-batches", "7"), "a multiple", "another family"),
    ],
)
def test_wrong_options(run: Run, arguments: tuple[str, ...], says: str, way_out: str) -> None:
    result = run(*SMALL, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert says in result.stderr
    assert way_out in result.stderr


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("F: 1\nI: 1\n", "W: is missing"),
        ("F: 1\nI: 1\nW: 1\nCOMM: 1\n", "did you mean `comm`?"),
        ("F: [1, 2, 3, -4]\nI: 1\nW: 1\n", "F.3: expected a time above 0"),
        ("F: [1, 2]\nI: 1\nW: 1\n", "F: a list of 2"),
        ("F: 1\nI: 1\nW: 1\ncomm: [1, 2]\n", "comm: a list of 2"),
        ("[1, 1, 1, 0]\n", "expected a mapping"),
    ],
)
def test_wrong_files_of_times(run: Run, folder: Path, text: str, says: str) -> None:
    (folder / "times.yaml").write_text(text)
    result = run(*SMALL, "--times", "times.yaml")
    assert result.exit_code == 2
    assert says in result.stderr


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("t.txt", "F0 I0 X0\n", "t.txt:1:7: error: 'X0' is no action"),
        ("t.txt", "# nothing\n", "holds no actions"),
        ("t.txt", "F0 I0 W0 F99999999\n", "micro-batch 99999999"),
        ("t.json", "{}", "timetable: is missing"),
        ("t.json", '{"timetable": [[{"kind": "F"}]]}', "timetable.0.0: expected a mapping"),
    ],
)
def test_files_that_are_no_timetables(run: Run, folder: Path, name: str, text: str, says: str) -> None:
    (folder / name).write_text(text)
    result = run("schedule", "--check", name)
    assert result.exit_code == 2
    assert says in result.stderr


def test_sizes_must_be_given_or_agree_with_the_file(run: Run, folder: Path) -> None:
    assert "--micro-batches: is missing" in run("schedule", "--stages", "4").stderr
    (folder / "right.txt").write_text(RIGHT)
    result = run("schedule", "--check", "right.txt", "--stages", "4")
    assert result.exit_code == 2
    assert "the timetable has 2" in result.stderr


def test_the_document_is_true(run: Run, folder: Path) -> None:
    """Its examples are what is printed, and its table has every family with its paper."""
    text = (Path(__file__).parents[2] / "docs" / "schedules.md").read_text()
    (folder / "wrong.txt").write_text("F0 F1 I0 W0 I1 W1\nF0 I0 F1 W1 W0 I1\n")
    for example in re.findall(r"```console\n\$ shardwright (.*?)\n(.*?)```", text, re.DOTALL):
        result = run(*example[0].split())
        assert example[1] == result.stdout + result.stderr
    rows = {line.split("`")[1]: line for line in text.splitlines() if re.match(r"\| `[a-z0-9-]+` \|", line)}
    assert [name for name in rows if name in SCHEDULES] == list(SCHEDULES)
    for family in SCHEDULES.values():
        assert all(number in rows[family.name] for number in re.findall(r"\d{4}\.\d{5}", family.source))
        assert f"| {family.chunks_in_words} |" in rows[family.name]
