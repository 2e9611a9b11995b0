"""What units cost processes that share every layer, against formulas that others have published."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from passes.divided import COLUMN, LLAMA, LLAMA_NORMS, ROW, Parts, Table, with_sequence
from passes.jobs import LLAMA as LLAMA_CONFIG
from passes.jobs import USER, make_job
from passes.models import HEADER
from passes.test_formulas import GPT, statistics
from shardwright.passes import profile_model as profile_of_job
from shardwright.passes.serialise import digest, digest_of, profile_from_json, profile_to_json
from shardwright.schemas.profile import UnitCost

S, H, A, V = 24, 64, 8, 256
LAYER: Table = {
    "embed": [{"style": "vocabulary"}],
    "head": [{**COLUMN, "enters": True}],
    "blocks.*.qkv": [{**COLUMN, "enters": True}],
    "blocks.*.up": [{**COLUMN, "enters": True}],
    "blocks.*.out": [ROW],
    "blocks.*.down": [ROW],
    "blocks.*": [{"style": "shared", "attributes": ("heads",)}],
}
"""Of the layer of Korthikanti et al.; each block holds a count of heads, and no parameter of its own."""
DEGREES = (2, 4, 8)
FOLDERS = TemporaryDirectory()
"""Of the models that several tests measure."""
degrees = pytest.mark.parametrize("t", DEGREES)
sequences = pytest.mark.parametrize("sequence", [False, True])


def in_parallel(table: Table) -> Table:
    """The table where the sequence is divided, too."""
    return {
        **{
            path: [
                {**style, "sequence_dim": 1} if path.startswith("blocks") and style["style"] != "shared" else style
                for style in styles
            ]
            for path, styles in table.items()
        },
        "blocks.*.norm[12]": [{"style": "shared"}],
    }


@cache
def gpt(sequence: bool) -> Parts:
    folder = Path(FOLDERS.name)
    (folder / "user.py").write_text(HEADER + GPT)
    job = make_job({"factory": "user:build", "args": {"width": H, "heads": A, "drop": 0.1}}, length=S)
    return Parts(job, folder, in_parallel(LAYER) if sequence else LAYER, sequence=sequence)


@cache
def measured(sequence: bool, unit: int) -> dict[int, UnitCost]:
    found = gpt(sequence).measured(*DEGREES)
    assert not found.warnings
    assert found.parallelism.degrees == DEGREES
    return {degree: costs["bf16"] for degree, costs in found.units[unit].divided.items()}


@degrees
def test_saved_bytes_of_a_gpt_layer(t: int) -> None:
    """sbh (10 + 24 / t) + 5 a s^2 b / t (arXiv 2205.05198, equation 2), which leaves out the norms' statistics."""
    saved = measured(False, 1)[t].saved
    assert saved["none"].at(1) == 10 * S * H + (24 * S * H + 5 * A * S * S) // t + statistics(S)
    assert saved["full"].at(1) == 2 * S * H


@degrees
def test_saved_bytes_with_the_sequence_divided(t: int) -> None:
    """sbh 34 / t + 5 a s^2 b / t (equation 4), where what enters is gathered again in backward; here the two gathered
    inputs (2 sbh each) are kept as they are."""
    saved = measured(True, 1)[t].saved
    paper = (34 * S * H + 5 * A * S * S + statistics(S)) // t
    assert saved["none"].at(1) == paper + 2 * 2 * S * H * (t - 1) // t
    assert saved["full"].at(1) == 2 * S * H // t


@sequences
@degrees
def test_all_products_are_divided(t: int, sequence: bool) -> None:
    units = gpt(sequence).work.units
    for at in (1, 2):
        whole, part = units[at].costs["bf16"], measured(sequence, at)[t]
        for phase in ("forward", "input_gradient", "weight_gradient"):
            assert part.flops(phase, 1) * t == whole.flops(phase, 1) > 0


def told(cost: UnitCost) -> list[tuple[str, str, int, int, bool]]:
    return sorted((one.phase, one.kind, one.bytes.at(1), one.count, one.again) for one in cost.exchanges)


HIDDEN = 2 * S * H


@degrees
def test_exchanges(t: int) -> None:
    """Two all-reduces of hidden states in each direction (arXiv 1909.08053, figure 4); dropout after the second sum
    keeps a mask, so that both are made again when the block is recomputed."""
    assert told(measured(False, 1)[t]) == [
        ("backward", "all_reduce", HIDDEN, 2, False),
        ("forward", "all_reduce", HIDDEN, 2, True),
    ]
    tokens = 4 * S
    assert told(measured(False, 2)[t]) == [
        ("backward", "all_reduce", HIDDEN, 1, False),
        ("forward", "all_reduce", tokens, 3, False),
    ]
    assert told(measured(False, 0)[t]) == [("forward", "all_reduce", HIDDEN, 1, False)]


@degrees
def test_exchanges_with_the_sequence_divided(t: int) -> None:
    """An all-gather and a reduce-scatter for each all-reduce, and the gradients of what each process has used on its
    own part of the sequence: weight and bias of two norms, and the biases of two rows."""
    assert told(measured(True, 1)[t]) == [
        ("backward", "all_gather", HIDDEN, 2, False),
        ("backward", "all_reduce", 2 * H, 6, False),
        ("backward", "reduce_scatter", HIDDEN, 2, False),
        ("forward", "all_gather", HIDDEN, 2, True),
        ("forward", "reduce_scatter", HIDDEN, 2, True),
    ]
    assert ("backward", "all_gather", HIDDEN, 1, False) in told(measured(True, 0)[t])
    assert ("forward", "all_gather", HIDDEN, 1, False) in told(measured(True, 2)[t])


@degrees
def test_the_first_block_keeps_whole_hidden_states_once_it_is_recomputed(t: int) -> None:
    alone, divided = measured(False, 0)[t].saved, measured(True, 0)[t].saved
    assert divided["none"] == alone["none"]
    assert divided["full"].at(1) - alone["full"].at(1) == HIDDEN - HIDDEN // t


@sequences
def test_what_is_exchanged_moves_nothing_in_memory_and_is_never_kept(sequence: bool) -> None:
    names = {"all_reduce_", "all_gather", "reduce_scatter"}
    found = [op for op in measured(sequence, 1)[2].operators if op.name in names]
    assert found
    assert not any(op.flops.at(1) or op.bytes.at(1) or op.results.at(1) for op in found)


NO_CROSS_ENTROPY = """
def tied(**args):
    model = build(**args)
    model.head.weight = model.embed.weight
    return model

def loss(output, batch):
    return output.logsumexp(-1).sum()
"""


def llama(**changes: Any) -> Parts:
    return Parts(make_job({"hf": {**LLAMA_CONFIG, **changes}}), USER, LLAMA)


def test_heads_that_processes_share_add_up_their_gradients() -> None:
    """Two key-value heads for four processes: each has one, (8, 64) of (16, 64) in 16 bit, of keys and of values."""
    found = llama().measured(2, 4)
    weights = [one for one in told(found.units[1].divided[4]["bf16"]) if one[2] == 2 * 8 * 64]
    assert weights == [("backward", "all_reduce", 2 * 8 * 64, 2, False)]
    assert not any(one[2] == 2 * 8 * 64 for one in told(found.units[1].divided[2]["bf16"]))
    whole = found.units[1].costs["bf16"]
    assert found.units[1].divided[4]["bf16"].flops("forward", 1) * 4 > whole.flops("forward", 1)
    assert found.units[1].divided[2]["bf16"].flops("forward", 1) * 2 == whole.flops("forward", 1)


def test_the_models_own_loss_takes_divided_logits() -> None:
    inputs = {"input_ids": "input_ids", "labels": "targets", "shift_labels": "targets"}
    job = make_job({"hf": LLAMA_CONFIG, "loss": "model", "inputs": inputs})
    found = Parts(job, USER, LLAMA).measured(2)
    assert not found.warnings
    assert ("forward", "all_reduce", 4 * 32, 3, False) in told(found.units[2].divided[2]["bf16"])


def test_the_model_is_put_back() -> None:
    parts = Parts(make_job({"hf": LLAMA_CONFIG}), USER, with_sequence(LLAMA, LLAMA_NORMS), sequence=True)
    model = parts.work.built.module
    before = [dict(vars(module)) | dict(module._parameters) for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert parts.tried(2).reason == ""
    after = [dict(vars(module)) | dict(module._parameters) for module in model.modules()]
    assert all(one.keys() == other.keys() for one, other in zip(before, after, strict=True))
    assert all(one[key] is other[key] for one, other in zip(before, after, strict=True) for key in one)
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def test_a_trial_tells_what_ran() -> None:
    parts = gpt(False)
    whole, part = parts.tried(1), parts.tried(4)
    heads = [next(ran.shapes[0] for ran in run.operators if ran.operator.endswith("softmax")) for run in (whole, part)]
    assert heads == [(2, A, S, S), (2, A // 4, S, S)]


def test_a_degree_at_which_the_model_does_not_run_is_left_out() -> None:
    """Of eight query heads each of sixteen processes would have a half."""
    found = llama().measured(2, 16)
    assert found.parallelism.degrees == (2,)
    assert found.parallelism.refused == ""
    (warning,) = found.warnings
    assert "tensor parallelism over 16 processes is left out" in warning
    assert "8 heads or features of model.layers.0.self_attn.o_proj.weight" in warning
    assert all(set(unit.divided) == {2} for unit in found.units)


def test_a_model_that_runs_at_no_degree_is_refused() -> None:
    found = llama().measured(16)
    assert found.parallelism.degrees == ()
    assert found.parallelism.refused
    assert not any(unit.divided for unit in found.units)


def test_an_attribute_that_does_not_divide_is_named() -> None:
    table = {**LAYER, "blocks.*": [{"style": "shared", "attributes": ("drop",)}]}
    parts = gpt(False)
    other = Parts(parts.work.job, parts.folder, table)
    assert "drop of module blocks.0 is 0.1" in other.tried(2).reason


def test_a_loss_that_is_no_cross_entropy_needs_whole_logits(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(HEADER + GPT + NO_CROSS_ENTROPY)
    job = make_job({"factory": "user:tied", "args": {"width": H, "heads": A}, "loss": "user:loss"}, length=S)
    parts = Parts(job, tmp_path, LAYER)
    assert parts.work.parameters[0].tensor_parallel == "vocabulary"
    assert "cross_entropy takes the logits of module head" in parts.tried(2).reason


def test_a_digest_is_the_same_of_what_was_written_down() -> None:
    """Degrees are numbers, 2 before 16; in JSON they are texts."""
    profile = profile_of_job(make_job({"factory": "gpt:build"}), USER, ("bf16",))
    costs = profile.units[1].divided[2]
    unit = replace(profile.units[1], divided={2: costs, 16: costs})
    profile = replace(profile, units=(profile.units[0], unit, *profile.units[2:]))
    assert digest_of(profile_to_json(profile)) == digest(profile)
    assert profile_from_json(profile_to_json(profile)) == profile
