from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from shardwright.backends.pytorch.runtime import session
from shardwright.backends.pytorch.runtime.losses import model_loss, next_token_loss
from shardwright.backends.pytorch.runtime.session import MetricsLog, Signals, Timer, only_device, seed_for


def test_seeds_are_the_same_everywhere_and_differ_by_every_part() -> None:
    assert seed_for(0, "step", 1, 2) == 184749658296298036
    seeds = {seed_for(*parts) for parts in ((0,), (1,), (0, "a"), (0, "b"), ("0",), (0, 1), (1, 0), (0, "step", 1))}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_metrics_keep_their_precision_and_replace_what_was_lost(tmp_path: Path) -> None:
    path = tmp_path / "out" / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in (1, 2, 3):
        log.write(step=step, loss=1 / 3, norm=float("nan"), peak=None)
    log.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    log = MetricsLog(path, 2)
    log.write(step=3, loss=2 / 3)
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0] == {"step": 1, "loss": 1 / 3, "norm": None, "peak": None}
    assert lines[2]["loss"] == 2 / 3


def test_signals_are_remembered() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    try:
        signals = Signals()
        assert not signals.stop
        assert not signals.save()
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.stop
        assert signals.save()
        assert not signals.save()
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGUSR1, before[1])


def test_a_timer_is_due_once_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(session.time, "monotonic", lambda: now[0])
    timer = Timer(5.0)
    found = []
    for now[0] in (101.0, 104.9, 105.0, 105.1, 109.0, 111.0):
        found.append(timer.due())
    assert found == [False, False, True, False, False, True]


def test_another_number_of_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert only_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(SystemExit, match="for 1 processes and 4 were started"):
        only_device("cpu")
    with pytest.raises(SystemExit, match="start 2 processes with torchrun"), session.process_group("cpu", 2):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_plan_for_gpus_says_so_without_one() -> None:
    with pytest.raises(SystemExit, match="for CUDA devices"):
        only_device("cuda")


def test_losses_are_sums_over_learnt_targets() -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.bfloat16)
    targets = torch.tensor([[1, -100, 4], [-100, -100, 0]])
    expected = -sum(
        torch.log_softmax(logits[row, column].float(), -1)[targets[row, column]]
        for row, column in ((0, 0), (0, 2), (1, 2))
    )
    assert next_token_loss(logits, targets).item() == pytest.approx(float(expected), rel=1e-6)

    class Output:
        loss = torch.tensor(2.5, dtype=torch.bfloat16)
        logits: torch.Tensor

    output = Output()
    output.logits = logits
    assert torch.equal(next_token_loss(output, targets), next_token_loss(logits, targets))
    assert model_loss(output, {"targets": targets}).item() == 7.5
    assert model_loss(torch.tensor(2.0), {"targets": targets}).item() == 6.0


@pytest.mark.parametrize("models_own", [False, True])
def test_a_micro_batch_without_learnt_targets_adds_nothing(models_own: bool) -> None:
    logits, targets = torch.randn(2, 3, 5, requires_grad=True), torch.full((2, 3), -100)
    mean = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert bool(mean.isnan())
    loss = model_loss(mean, {"targets": targets}) if models_own else next_token_loss(logits, targets)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize(
    "broken", [b"\n", b"garbage\n", b"\xff\xfe\n", b"\x00\x00\n", b"[]\n", b'{"step": null}\n', b'{"st']
)
def test_a_broken_log_keeps_nobody_from_resuming(tmp_path: Path, broken: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    good = b'{"step": 1}\n'
    path.write_bytes(good + broken + b'\n{"step": 2}\n{"step": 9}\n')
    MetricsLog(path, 2).close()
    assert path.read_bytes() == good + b'{"step": 2}\n'
