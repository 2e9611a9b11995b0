"""Plain PyTorch models of all kinds: profiled with and without sharing, and measured whole, to the byte and FLOP."""

from __future__ import annotations

from functools import cache

import pytest

from passes import tiny
from passes.jobs import USER, make_job
from passes.reference import measure_whole
from passes.totals import flops, peaks, saved
from passes.zoo_jobs import MODELS, ZOO, job_of
from shardwright.passes import profile_model
from shardwright.passes.draws import LARGEST, drawing
from shardwright.schemas.profile import ComputeDtypeName, ModelProfile


@cache
def profile_of(name: str, kind: str, dtype: ComputeDtypeName, share: bool = True) -> ModelProfile:
    return profile_model(job_of(name, kind=kind, share=share), ZOO, (dtype,))


def numbered(path: str, count: int) -> list[str]:
    return [f"{path}.{index}" for index in range(count)]


BLOCKS = {
    "transformer": [*numbered("transformer.encoder.layers", 3), *numbered("transformer.decoder.layers", 3)],
    "u-net": [
        *("down.0.0", "down.0.1", "down.1.0", "down.1.1", "down.2.0", "down.2.1", "middle1", "middle2"),
        *("up.0.0", "up.0.1", "up.1.0", "up.1.1", "up.2.0", "up.2.1"),
    ],
    "lstm": [],
    "gru": [],
    "rnn": [],
    "stacked-lstm": numbered("layers", 3),
    "dit": numbered("blocks", 3),
    "resnet": [*numbered("stages.0", 2), *numbered("stages.1", 3)],
    "nested": numbered("layers", 4),
    "two-stacks": [*numbered("encoder.layers", 3), *numbered("decoder.layers", 3)],
    "shared": numbered("own", 2),
    "python-depth": numbered("layers", 4),
    "sample-depth": numbered("layers", 4),
}
"""In order of execution."""
EXACT_PEAKS = ("transformer", "lstm", "gru", "rnn", "stacked-lstm", "dit", "sample-depth")
"""Models without work between their blocks. Where there is some, its temporaries are taken to come on top of all that
is saved; and fake tensors add up two gradients in a third tensor, PyTorch in the first."""


@pytest.mark.parametrize("name", MODELS)
def test_blocks(name: str) -> None:
    assert list(profile_of(name, "cuda", "bf16").block_paths) == BLOCKS[name]


@pytest.mark.parametrize("name", MODELS)
def test_every_block_measured_by_itself_gives_the_same(name: str) -> None:
    shared, unshared = profile_of(name, "cuda", "bf16"), profile_of(name, "cuda", "bf16", share=False)
    assert shared.units == unshared.units


HUGGING_FACE = {
    "llama": {"hf": tiny.LLAMA_31},
    "gemma3": {"hf": tiny.GEMMA3},
    "deepseek": {"hf": tiny.DEEPSEEK_V3},
    "mixtral": {"hf": tiny.MIXTRAL},
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_every_block_of_a_hugging_face_model_measured_by_itself_gives_the_same(name: str) -> None:
    model = HUGGING_FACE[name]
    shared, unshared = (
        profile_model(make_job({**model, "profile": {"share": share}}, length=24), USER, ("bf16",))
        for share in (True, False)
    )
    assert shared.units == unshared.units
    assert len(shared.block_paths) > len([unit for unit in shared.units if unit.kind == "block"])


CASES: list[tuple[str, str, ComputeDtypeName]] = [
    *((name, "cuda", "bf16") for name in MODELS),
    *((name, "cpu", "fp32") for name in ("lstm", "stacked-lstm", "resnet")),
]


@pytest.mark.parametrize(("name", "kind", "dtype"), CASES)
def test_the_sum_over_the_units_is_the_whole_model(name: str, kind: str, dtype: ComputeDtypeName) -> None:
    profile = profile_of(name, kind, dtype)
    paths = profile.block_paths
    with drawing(LARGEST, ()):
        whole = measure_whole(job_of(name, kind=kind), ZOO, paths, 0, dtype, 2)
        recomputed = measure_whole(job_of(name, kind=kind), ZOO, paths, len(paths), dtype, 2)
    assert flops(profile, dtype, 2, "forward") == whole.forward_flops - whole.forward_masked
    assert flops(profile, dtype, 2, "input_gradient", "weight_gradient") == (
        whole.backward_flops - whole.backward_masked
    )
    assert saved(profile, dtype, "none", 2) == whole.saved
    assert saved(profile, dtype, "full", 2) == recomputed.saved
    peak = peaks(profile, dtype, 2)
    found = (peak["none"], peak["full"])
    measured = (whole.backward_peak, recomputed.backward_peak)
    assert found == measured if name in EXACT_PEAKS else found == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("name", ["transformer", "two-stacks"])
def test_encoder_and_decoder_are_told_apart(name: str) -> None:
    units = [unit for unit in profile_of(name, "cuda", "bf16").units if unit.kind == "block"]
    stacks = [{path.split(".layers")[0] for path in unit.paths} for unit in units]
    assert all(len(of_unit) == 1 for of_unit in stacks)
    encoder, decoder = units[0], units[-1]
    assert encoder.fingerprint != decoder.fingerprint
    assert decoder.costs["bf16"].flops("forward", 1) > encoder.costs["bf16"].flops("forward", 1) * 0.5


def test_stages_of_a_resnet_are_told_apart() -> None:
    units = [unit for unit in profile_of("resnet", "cuda", "bf16").units if unit.kind == "block"]
    strided = next(unit for unit in units if unit.paths[0] == "stages.1.0")
    assert strided.count == 1
    plain = [unit for unit in units if set(unit.paths) & {"stages.1.1", "stages.1.2"}]
    assert {unit.costs["bf16"].flops("forward", 1) for unit in plain} != {strided.costs["bf16"].flops("forward", 1)}


def test_skip_connections_are_alive_while_the_blocks_between_run_backward() -> None:
    units = [unit for unit in profile_of("u-net", "cuda", "bf16").units if unit.kind == "block"]
    crossing = {path: unit.costs["bf16"].crossing.slope for unit in units for path in unit.paths}
    assert crossing["down.0.0"] < crossing["down.0.1"] < crossing["middle1"]


def test_layers_that_are_called_again_are_passed_over_with_a_warning() -> None:
    (warning,) = [line for line in profile_of("shared", "cuda", "bf16").warnings if "groups" in line]
    assert "groups.0 and 1 more" in warning
    assert "more than once" in warning


def test_a_recurrent_layer_costs_what_it_does_on_paper() -> None:
    """Hochreiter and Schmidhuber's cell as PyTorch has it: four gates, each of the input and the hidden state; so
    2 * 4 h (i + h) FLOPs a step and layer, as much again for either gradient."""
    length, width, vocabulary = 20, 16, 96
    one_layer = length * 2 * 4 * width * (width + width)
    (head,) = profile_of("lstm", "cuda", "bf16").units
    assert head.costs["bf16"].flops("forward", 1) == 2 * one_layer + 2 * length * width * vocabulary
    block = profile_of("stacked-lstm", "cuda", "bf16").units[1].costs["bf16"]
    assert [block.flops(phase, 1) for phase in ("forward", "input_gradient", "weight_gradient")] == 3 * [one_layer]
    activation = 2 * length * width
    kept = 3 * activation + 5 * activation  # of norm and LSTM the inputs, the output; four gates and the cell's state
    assert block.saved["none"].at(1) == kept + 2 * 4 * length + 2 * 2 * width  # fp32 statistics, initial states
    (warning,) = [line for line in profile_of("stacked-lstm", "cuda", "bf16").warnings if "recurrent" in line]
    assert "module layers.0.lstm" in warning


def test_what_is_skipped_at_random_counts_as_run() -> None:
    profile = profile_of("python-depth", "cuda", "bf16")
    (warning,) = [line for line in profile.warnings if "random" in line]
    assert "(depth.py:" in warning
    assert "close to 1" in warning
    whole = profile_of("sample-depth", "cuda", "bf16")
    assert flops(profile, "bf16", 2, "forward") == flops(whole, "bf16", 2, "forward")
