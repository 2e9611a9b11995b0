from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rehearse.samples import cluster, decision, plan_for
from shardwright.rehearse.shrink import exactly, pinned, reference, shrink
from shardwright.rehearse.shrink_model import shrink_model
from shardwright.schemas.diagnostics import InputError
from shardwright.schemas.job import ModelSpec, OptimizerSpec
from shardwright.schemas.plan import Communication

EXAMPLES = Path(__file__).parents[2] / "examples"
ONE_NODE = cluster(("node", 8))
SGD = OptimizerSpec(name="sgd")


def hugging_face(config: str | dict[str, Any], vocabulary: int | None = 256, **rehearse: Any) -> dict[str, Any]:
    small, _ = shrink_model(ModelSpec(hf=config, rehearse=rehearse), EXAMPLES, vocabulary)
    assert isinstance(small.hf, dict)
    assert small.rehearse == {}
    return small.hf


def test_llama_keeps_grouped_queries_and_proportions() -> None:
    small = hugging_face("configs/llama3-70b.json")
    assert small["num_hidden_layers"] == 3
    assert (small["num_attention_heads"], small["num_key_value_heads"]) == (4, 2)
    assert (small["hidden_size"], small["intermediate_size"]) == (64, 224)  # 28672 / 8192 = 3.5
    assert small["vocab_size"] == 256
    assert small["rope_theta"] == 500000.0


def test_gpt2_keeps_its_heads_apart_and_loses_default_dropout() -> None:
    small = hugging_face({"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12})
    assert (small["n_layer"], small["n_embd"], small["n_head"]) == (3, 64, 4)
    assert small["attn_pdrop"] == small["embd_pdrop"] == small["resid_pdrop"] == 0.0
    assert max(small[name] for name in ("bos_token_id", "eos_token_id")) == 255


def test_a_rehearsal_starts_from_random_weights() -> None:
    small, changes = shrink_model(ModelSpec(hf="configs/llama3-70b.json", weights="load"), EXAMPLES, 256)
    assert small.weights == "random"
    assert [(each.before, each.after) for each in changes if each.key == "model.weights"] == [("load", "random")]


def test_a_list_with_one_entry_per_layer_is_cut() -> None:
    kinds = ["sliding_attention", "full_attention"] * 4
    config = {"model_type": "qwen3", "num_hidden_layers": 8, "layer_types": kinds, "head_dim": 128}
    small = hugging_face(config)
    assert small["layer_types"] == kinds[:3]
    assert small["head_dim"] == 16


def test_a_small_model_is_left_alone() -> None:
    config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    assert hugging_face(config, vocabulary=None) == config


def test_the_rehearse_key_has_the_last_word() -> None:
    assert hugging_face("configs/llama3-8b.json", num_hidden_layers=5)["num_hidden_layers"] == 5


def test_a_factory_loses_depth_and_dropout_only() -> None:
    spec = ModelSpec(factory="model:build", args={"layers": 12, "width": 512, "dropout": 0.1, "causal": True})
    small, changes = shrink_model(spec, EXAMPLES, 256)
    assert small.args == {"layers": 3, "width": 512, "dropout": 0.0, "causal": True}
    assert [change.key for change in changes] == ["model.args.layers", "model.args.dropout"]


def test_an_unreadable_configuration_is_named() -> None:
    with pytest.raises(InputError, match=r"model\.hf.*nowhere\.json"):
        hugging_face("nowhere.json")


def test_everything_shrunk_is_reported(tmp_path: Path) -> None:
    on = cluster(("node", 8), ("rail", 8))
    chosen = decision(("dp_replicate", 8), ("dp_shard", 8), micro_batch=4, accumulation=8)
    small = shrink(plan_for(chosen, on), tmp_path, processes=8, steps=4)
    assert {change.key: (change.before, change.after) for change in small.changes} == {
        "decision.mesh.dp_replicate": ("8", "2"),
        "decision.mesh.dp_shard": ("8", "2"),
        "decision.micro_batch": ("4", "2"),
        "decision.accumulation": ("8", "3"),
        "train.sequence_length": ("1024", "64"),
        "train.steps": ("100", "4"),
        "train.schedule.warmup": ("20 steps", "1 steps"),
        "cluster.device": ("gpu", "cpu-process"),
        "model.args.layers": ("12", "3"),
        "data.synthetic.vocabulary": ("1000", "256"),
    }
    assert small.job.train.global_batch_sequences == 4 * 2 * 3
    assert small.job.cluster.world_size == 4
    assert small.job.model.init == "modules"  # as the plan says, however small the model has become


@pytest.mark.parametrize(
    ("blocks", "of", "small_blocks", "expected"),
    [(0, 12, 3, "none"), (12, 12, 3, "full"), (1, 12, 3, 1), (6, 12, 3, 2), (11, 12, 3, 2), (6, 12, 1, "full")],
)
def test_some_checkpointed_blocks_stay_some(
    tmp_path: Path, blocks: int, of: int, small_blocks: int, expected: int | str
) -> None:
    chosen = decision(("dp_shard", 8), blocks=blocks, of=of)
    small = shrink(plan_for(chosen, ONE_NODE), tmp_path, processes=8, steps=4)
    assert pinned(small, chosen, SGD, "fp32", small_blocks).strategy.checkpointing == (expected,)


@pytest.mark.parametrize(("gradients", "expected"), [(1, (1,)), (8, (4,))])
def test_gradients_stay_whole_or_sharded(tmp_path: Path, gradients: int, expected: tuple[int, ...]) -> None:
    chosen = decision(("dp_shard", 8), gradients=gradients, accumulation=4, reshard=False)
    small = shrink(plan_for(chosen, ONE_NODE), tmp_path, processes=8, steps=4)
    strategy = pinned(small, chosen, SGD, "bf16_mixed", 3).strategy
    assert strategy.states.gradients == expected
    assert strategy.states.parameters == strategy.states.optimizer_states == (4,)
    assert strategy.reshard_after_forward == (False,)
    assert (strategy.engine, strategy.precision) == (("fsdp2",), ("bf16_mixed",))


def test_amsp_keeps_its_chain_and_its_bits(tmp_path: Path) -> None:
    on = cluster(("pair", 2), ("node", 4), ("rail", 16))
    axes = (("dp_4", 2), ("dp_3", 8), ("dp_2", 4), ("dp_1", 2))
    degrees = {"parameters": 8, "gradients": 1, "optimizer": 64, "secondary": 2}
    sent = {"int8_gathers": ("dp_2",), "int4_reductions": ("dp_2", "dp_3", "dp_4")}
    chosen = decision(*axes, engine="amsp", accumulation=4, communication=sent, **degrees)
    small = shrink(plan_for(chosen, on, quality="lossy"), tmp_path, processes=8, steps=4)
    assert {change.key: change.after for change in small.changes if change.key.startswith("decision.")} == {
        "decision.mesh.axes": "2 x 2 x 2",
        "decision.states.parameters.degree": "4",
        "decision.states.optimizer_states.degree": "8",
        "decision.accumulation": "3",
    }
    job = pinned(small, chosen, SGD, "fp32", 3)
    states = job.strategy.states
    assert (states.parameters, states.gradients, states.optimizer_states) == ((4,), (1,), (8,))
    assert states.secondary == (2,)
    assert job.strategy.reshard_after_forward == (True,)
    planned = decision(("dp_2", 4), ("dp_1", 2), engine="amsp", of=3, accumulation=3, parameters=4, optimizer=8)
    as_it_is = exactly(small, chosen, planned, fewer_bits=True)
    assert [(axis.name, axis.size) for axis in as_it_is.mesh.axes] == [("dp_3", 2), ("dp_2", 2), ("dp_1", 2)]
    assert as_it_is.communication.int8_gathers == ("dp_2",)
    assert as_it_is.communication.int4_reductions == ("dp_2", "dp_3")
    exact = exactly(small, chosen, planned, fewer_bits=False)
    assert (exact.mesh, exact.communication) == (as_it_is.mesh, Communication())


def test_a_second_copy_goes_where_there_is_no_room_for_it(tmp_path: Path) -> None:
    chosen = decision(("dp_shard", 8), secondary=4)
    for processes, expected in ((8, (2,)), (2, ("none",))):
        small = shrink(plan_for(chosen, ONE_NODE), tmp_path, processes=processes, steps=4)
        assert pinned(small, chosen, SGD, "fp32", 3).strategy.states.secondary == expected


def test_the_reference_is_one_process_on_the_same_batch(tmp_path: Path) -> None:
    chosen = decision(("dp_shard", 8), blocks=6, accumulation=4)
    small = shrink(plan_for(chosen, ONE_NODE), tmp_path, processes=8, steps=4)
    alone = reference(small, SGD, "fp32", 12)
    assert alone.cluster.world_size == 1
    assert alone.train == pinned(small, chosen, SGD, "fp32", 3).train
    assert alone.strategy.engine == ("single",)
    assert alone.strategy.checkpointing == ("none",)


def test_files_are_used_where_they_exist(tmp_path: Path) -> None:
    chosen = decision(("dp_shard", 8))
    data = {"bytes": ["corpus/*.txt"], "validation": "held-out.txt"}
    absent = shrink(plan_for(chosen, ONE_NODE, data=data), tmp_path, processes=8, steps=4)
    assert absent.job.data.synthetic is not None
    assert absent.job.data.synthetic.vocabulary == 256
    assert [change.because for change in absent.changes if change.key == "data.bytes"] == ["the files are not there"]
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("text")
    present = shrink(plan_for(chosen, ONE_NODE, data=data), tmp_path, processes=8, steps=4)
    assert present.job.data.bytes == ("corpus/*.txt",)
    assert present.job.data.validation is None


def test_token_files_keep_the_models_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "train.u32").write_bytes(bytes(4000))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 5000}))
    job = {"model": {"hf": "config.json"}, "data": {"tokens": "train.u32"}}
    small = shrink(plan_for(decision(("dp_shard", 8)), ONE_NODE, **job), tmp_path, processes=8, steps=4)
    assert isinstance(small.job.model.hf, dict)
    assert small.job.model.hf["vocab_size"] == 5000


def test_a_dataset_of_the_users_keeps_its_length(tmp_path: Path) -> None:
    job = {"data": {"dataset": "mine:load"}}
    small = shrink(plan_for(decision(("dp_shard", 8)), ONE_NODE, **job), tmp_path, processes=8, steps=4)
    assert small.job.train.sequence_length == 1024
