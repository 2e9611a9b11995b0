"""Checkpoints of one process: what is written, what is refused, and what is left when a save is killed."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.launch import read_checkpoint
from support.tiny import Tiny, build
from torch import nn

from shardwright.backends.pytorch.runtime import checkpoint as module
from shardwright.backends.pytorch.runtime.checkpoint import CheckpointError, Checkpoints, TrainState
from shardwright.backends.pytorch.runtime.index import check_cover, key_of, parse_key
from shardwright.backends.pytorch.runtime.pieces import Box, whole
from shardwright.backends.pytorch.runtime.tensorfile import FormatError, write_tensors


def trained(steps: int = 2, **arguments: Any) -> tuple[Tiny, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = build(width=8, layers=2, **arguments)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.arange(24).reshape(2, 12)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def save(folder: Path, *steps: int, keep: int = 2) -> tuple[Tiny, torch.optim.Optimizer]:
    model, optimizer = trained()
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(TrainState(step=step, tokens=10 * step, seed=7), model, optimizer)
    return model, optimizer


def load(folder: Path, **arguments: Any) -> tuple[Tiny, torch.optim.Optimizer, TrainState | None]:
    model, optimizer = trained(0, **arguments)
    return model, optimizer, Checkpoints(folder, 2).load(model, optimizer, seed=7)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_restores_everything(tmp_path: Path) -> None:
    model, optimizer = save(tmp_path, 3)
    with torch.no_grad():
        model.scale.fill_(4.0)
    save_again = Checkpoints(tmp_path, 2)
    save_again.save(TrainState(4, 40, 7), model, optimizer)
    found, states, state = load(tmp_path)
    assert state == TrainState(4, 40, 7)
    assert float(found.scale) == 4.0
    for (name, expected), (_, parameter) in zip(model.named_parameters(), found.named_parameters(), strict=True):
        assert torch.equal(parameter, expected), name
        saved, restored = optimizer.state[expected], states.state[parameter]
        assert saved.keys() == restored.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(saved[key], restored[key]) for key in saved)


def test_the_format_is_plain_and_plan_independent(tmp_path: Path) -> None:
    model, _ = save(tmp_path, 3)
    assert names(tmp_path / "step_00000003") == ["index.json", "rank_00000.safetensors"]
    assert (tmp_path / "LATEST").read_text() == "step_00000003\n"
    index = json.loads((tmp_path / "step_00000003" / "index.json").read_text())
    assert index["train"] == {"step": 3, "tokens": 30, "seed": 7}
    assert index["optimizer"] == "AdamW"
    expected = {f"model.{name}" for name, _ in model.named_parameters()} | {"buffer.scale"}
    expected |= {
        f"optimizer.{state}.{name}"
        for state in ("step", "exp_avg", "exp_avg_sq")
        for name, _ in model.named_parameters()
    }
    assert index["tensors"].keys() == expected
    assert torch.equal(read_checkpoint(tmp_path)["model.head.weight"], model.head.weight)


def test_tied_parameters_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    model, optimizer = trained(tied=True)
    Checkpoints(tmp_path, 2).save(TrainState(1, 1, 7), model, optimizer)
    assert "model.head.weight" not in read_checkpoint(tmp_path)
    found, _, _ = load(tmp_path, tied=True)
    assert found.head.weight is found.embed.weight
    assert torch.equal(found.head.weight, model.head.weight)


def test_older_checkpoints_are_removed_and_later_ones_stay(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 30, 4, keep=2)
    # LATEST was moved back from 30 to 4, as somebody may do by hand to start again from there.
    assert names(tmp_path) == ["LATEST", "step_00000002", "step_00000004", "step_00000030"]
    (tmp_path / "step_00000009.tmp").mkdir()
    save(tmp_path, 5, keep=1)
    assert names(tmp_path) == ["LATEST", "step_00000005", "step_00000030"]


def test_the_same_step_is_saved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = save(tmp_path, 5)
    _, _, state = load(tmp_path)
    checkpoints = Checkpoints(tmp_path, 2)
    assert checkpoints.load(model, optimizer, seed=7) == state
    monkeypatch.setattr(module, "write_tensors", lambda *_: pytest.fail("written again"))
    checkpoints.save(TrainState(5, 50, 7), model, optimizer)


def test_the_newest_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    model, optimizer = save(tmp_path, 5)
    with pytest.raises(CheckpointError, match="not to be overwritten"):
        Checkpoints(tmp_path, 2).save(TrainState(5, 1, 7), model, optimizer)
    assert load(tmp_path)[2] == TrainState(5, 50, 7)


def test_nothing_to_load_is_no_error(tmp_path: Path) -> None:
    assert load(tmp_path / "nowhere")[2] is None


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = save(tmp_path, 1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="No space left"):
            Checkpoints(tmp_path, 2).save(TrainState(2, 2, 7), model, optimizer)
    assert load(tmp_path)[2] == TrainState(1, 10, 7)
    Checkpoints(tmp_path, 2).save(TrainState(2, 2, 7), model, optimizer)
    assert load(tmp_path)[2] == TrainState(2, 2, 7)


def in_child(body: Callable[[], None]) -> int:
    """Run in a forked process, which ends without clean-up; returns the signal that killed it, or 0."""
    child = os.fork()
    if child == 0:
        try:
            body()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_killed_before_every_change_of_the_disk_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """SIGKILL at the n-th call that changes the disk, for every n until the save gets through."""
    model, optimizer = save(tmp_path / "base", 1, 2, keep=2)
    killed = 0
    while True:
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "base", folder)

        def body(folder: Path = folder, limit: int = killed) -> None:
            left = limit

            def counted(function: Callable[..., Any]) -> Callable[..., Any]:
                def call(*arguments: Any, **keywords: Any) -> Any:
                    nonlocal left
                    left -= 1
                    if left < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*arguments, **keywords)

                return call

            for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "open"):
                setattr(os, name, counted(getattr(os, name)))
            Checkpoints(folder, 2).save(TrainState(3, 30, 7), model, optimizer)

        code = in_child(body)
        _, _, state = load(folder)
        assert state in (TrainState(2, 20, 7), TrainState(3, 30, 7))
        # The next run goes on from there, over whatever was left.
        again = TrainState(state.step + 1, 1, 7)
        Checkpoints(folder, 2).save(again, model, optimizer)
        assert load(folder)[2] == again
        assert not list(folder.glob("*.tmp"))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        killed += 1
    assert killed > 12


def test_killed_at_random_moments_saves_leave_a_whole_checkpoint(tmp_path: Path) -> None:
    model, optimizer = save(tmp_path, 1)
    chance, interrupted = random.Random(0), 0
    for _ in range(25):
        child = os.fork()
        if child == 0:
            checkpoints = Checkpoints(tmp_path, 2)
            state = checkpoints.load(model, optimizer, seed=7)
            assert state is not None
            for step in range(state.step + 1, 10**6):
                checkpoints.save(TrainState(step, 10 * step, 7), model, optimizer)
            os._exit(0)
        time.sleep(chance.uniform(0.001, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        interrupted += any(tmp_path.glob("*.tmp"))
        state = load(tmp_path)[2]
        assert state is not None
        assert state.tokens == 10 * state.step
    assert interrupted > 0


# --- strangers' checkpoints ------------------------------------------------------------------------------------------


class Payload:
    """Unpickling it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_planted_pickles_run_no_code(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    poison = pickle.dumps(Payload(mark))
    pickle.loads(poison)
    assert mark.exists()
    mark.unlink()
    places = ("index.json", "rank_00000.safetensors", ".metadata", "__0_0.distcp", "rank_00001.safetensors", "model.pt")
    for place in places:
        folder = tmp_path / place
        save(folder, 1)
        (folder / "step_00000001" / place).write_bytes(poison)
        if place in places[:2]:
            with pytest.raises(CheckpointError):
                load(folder)
        else:
            assert load(folder)[2] is not None
    (tmp_path / "latest").mkdir()
    (tmp_path / "latest" / "LATEST").write_bytes(poison)
    with pytest.raises(CheckpointError):
        load(tmp_path / "latest")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["", "..", "../elsewhere", "/tmp", "step_1", "step_00000001/../..", "step_00000001x"])
def test_latest_can_only_name_a_checkpoint(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    (tmp_path / "LATEST").write_text(name)
    with pytest.raises(CheckpointError, match="not the name of a checkpoint"):
        load(tmp_path)


def test_latest_is_a_regular_file(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "LATEST").unlink()
    os.mkfifo(tmp_path / "LATEST")
    with pytest.raises(CheckpointError, match="not a regular file"):
        load(tmp_path)


HEAD = "model.head.weight"


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    def edited(text: str) -> str:
        fields = json.loads(text)
        change(fields)
        return json.dumps(fields)

    return edited


def piece(**changes: Any) -> Callable[[str], str]:
    return edit(lambda fields: fields["tensors"][HEAD]["pieces"][0].update(changes))


FORGERIES: dict[str, tuple[Callable[[str], str], str]] = {
    "no JSON": (lambda text: text[:-1], "not valid JSON"),
    "a number that is none": (lambda text: text.replace('"step":1', '"step":NaN'), "not a number"),
    "one key twice": (lambda text: text.replace('"version":1', '"version":1,"version":1'), "comes twice"),
    "a list": (lambda text: "[]", "expected exactly"),
    "another version": (edit(lambda f: f.update(version=2)), "not a checkpoint of version 1"),
    "another format": (edit(lambda f: f.update(format="other")), "not a checkpoint of version 1"),
    "a key too many": (edit(lambda f: f.update(code="import os")), "expected exactly"),
    "a step that is no number": (edit(lambda f: f["train"].update(step="1")), "whole numbers"),
    "a step that is a boolean": (edit(lambda f: f["train"].update(step=True)), "whole numbers"),
    "a negative step": (edit(lambda f: f["train"].update(tokens=-1)), "whole numbers"),
    "another step than its name": (edit(lambda f: f["train"].update(step=2)), "holds step 2"),
    "another seed": (edit(lambda f: f["train"].update(seed=8)), "seed 8"),
    "another optimizer": (edit(lambda f: f.update(optimizer="SGD")), "states of SGD"),
    "an optimizer that is no text": (edit(lambda f: f.update(optimizer=[])), "wrong type"),
    "tensors that are no object": (edit(lambda f: f.update(tensors=[])), "wrong type"),
    "a tensor missing": (edit(lambda f: f["tensors"].pop(HEAD)), f"for example in {HEAD}"),
    "a tensor too many": (edit(lambda f: f["tensors"].update({"model.more": f["tensors"][HEAD]})), "model.more"),
    "a name of no kind": (edit(lambda f: f["tensors"].update(other=f["tensors"][HEAD])), "not the name of"),
    "a state of no parameter": (
        edit(lambda f: f["tensors"].update({"optimizer.exp_avg.nobody": f["tensors"][HEAD]})),
        "no such parameter",
    ),
    "a state without a parameter": (
        edit(lambda f: f["tensors"].update({"optimizer.exp_avg": f["tensors"][HEAD]})),
        "not the name of",
    ),
    "a file elsewhere": (piece(file="../../secret.safetensors"), "not a file of a checkpoint"),
    "an absolute file": (piece(file="/etc/passwd"), "not a file of a checkpoint"),
    "a file with a line end": (piece(file="rank_00000.safetensors\n"), "not a file of a checkpoint"),
    "a file that is not there": (piece(file="rank_00009.safetensors"), "cannot be opened"),
    "a piece outside": (piece(stop=[258, 8]), "outside the tensor"),
    "a piece turned round": (piece(start=[257, 0], stop=[0, 8]), "outside the tensor"),
    "a piece with a negative start": (piece(start=[-1, 0]), "not a shape"),
    "a piece of other dims": (piece(start=[0], stop=[257]), "outside the tensor"),
    "a piece of unequal dims": (piece(start=[0]), "differ in length"),
    "a gap": (piece(stop=[256, 8]), "do not cover"),
    "no pieces": (edit(lambda f: f["tensors"][HEAD].update(pieces=[])), "do not cover"),
    "one piece twice": (
        edit(lambda f: f["tensors"][HEAD]["pieces"].append(f["tensors"][HEAD]["pieces"][0])),
        "overlap",
    ),
    "pieces that are no list": (edit(lambda f: f["tensors"][HEAD].update(pieces={})), "not a list"),
    "a huge shape": (edit(lambda f: f["tensors"][HEAD].update(shape=[2**40, 2**40])), "too large"),
    "a negative shape": (edit(lambda f: f["tensors"][HEAD].update(shape=[-257, 8])), "not a shape"),
    "another shape": (
        edit(
            lambda f: f["tensors"][HEAD].update(
                shape=[8, 257], pieces=[f["tensors"][HEAD]["pieces"][0] | {"stop": [8, 257]}]
            )
        ),
        "needed as",
    ),
    "another dtype": (edit(lambda f: f["tensors"][HEAD].update(dtype="F64")), "saved as torch.float64"),
    "an unknown dtype": (edit(lambda f: f["tensors"][HEAD].update(dtype="OBJECT")), "unknown dtype"),
    "a piece that the file does not hold": (
        edit(
            lambda f: f["tensors"][HEAD].update(
                pieces=[
                    f["tensors"][HEAD]["pieces"][0] | {"stop": [100, 8]},
                    f["tensors"][HEAD]["pieces"][0] | {"start": [100, 0]},
                ]
            )
        ),
        "as the index says",
    ),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_indices_are_refused(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    path = tmp_path / "step_00000001" / "index.json"
    change, message = FORGERIES[name]
    before = path.read_text()
    path.write_text(change(before))
    assert path.read_text() != before
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_a_file_with_other_contents_than_the_index_says_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = tmp_path / "step_00000001" / "rank_00000.safetensors"
    path.unlink()
    write_tensors(path, {"model.head.weight[0:257,0:8]": torch.zeros(8, 257)})
    with pytest.raises(CheckpointError, match="as the index says"):
        load(tmp_path)


def test_another_model_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="no such parameter"):
        load(tmp_path, tied=True)
    model = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="no such parameter"):
        Checkpoints(tmp_path, 2).load(model, torch.optim.AdamW(model.parameters()), seed=7)


# --- names and boxes of pieces ---------------------------------------------------------------------------------------

spans = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)).map(sorted), max_size=4)


@given(st.text(min_size=1), spans)
def test_keys_of_pieces_are_read_back(name: str, spans: list[list[int]]) -> None:
    box = Box(tuple(span[0] for span in spans), tuple(span[1] for span in spans))
    assert parse_key(key_of(name, box)) == (name, box)


@pytest.mark.parametrize("key", ["", "name", "name[0:1", "[0:1]", "name[a:b]", "name[0]", "name[0:1,]", "name[-1:2]"])
def test_other_keys_are_refused(key: str) -> None:
    with pytest.raises(FormatError):
        parse_key(key)


@given(st.lists(st.integers(1, 6), max_size=3), st.data())
def test_cover_is_checked_against_every_element(shape: list[int], data: st.DataObject) -> None:
    """Cut a tensor into boxes; whole it passes, with a box left out, doubled or moved it does not."""
    boxes = [whole(shape)]
    for _ in range(data.draw(st.integers(0, 5))):
        box = boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
        wide = [dim for dim, size in enumerate(box.shape) if size > 1]
        if not wide:
            boxes.append(box)
            break
        dim = data.draw(st.sampled_from(wide))
        cut = data.draw(st.integers(box.start[dim] + 1, box.stop[dim] - 1))
        middle = lambda values, dim=dim, cut=cut: tuple(cut if i == dim else v for i, v in enumerate(values))  # noqa: E731
        boxes += [Box(box.start, middle(box.stop)), Box(middle(box.start), box.stop)]
    check_cover("it", tuple(shape), boxes)
    number = data.draw(st.integers(0, len(boxes) - 1))
    with pytest.raises(FormatError):
        check_cover("it", tuple(shape), boxes[:number] + boxes[number + 1 :])
    with pytest.raises(FormatError):
        check_cover("it", tuple(shape), [*boxes, boxes[number]])


def test_without_latest_the_last_one_in_place_counts(tmp_path: Path) -> None:
    save(tmp_path, 3, 5)
    (tmp_path / "LATEST").unlink()
    (tmp_path / "step_00000007.tmp").mkdir()
    assert Checkpoints(tmp_path, 2).latest() == "step_00000005"
