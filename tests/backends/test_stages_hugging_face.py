"""Stages of Hugging Face models, in one process, against the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.stages_models import Batch, Case
from support.stages_run import cut, in_stages, whole
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": 64, "num_hidden_layers": 3}
DECODER = SMALL | {"intermediate_size": 32, "num_key_value_heads": 1, "use_cache": False}
LAYERS = [f"model.layers.{at}" for at in range(3)]
MODELS: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", DECODER, LAYERS),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", DECODER | {"num_local_experts": 4}, LAYERS),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_layer": 3, "n_embd": 16, "n_head": 2, "vocab_size": 64, "n_positions": 16, "use_cache": False},
        [f"transformer.h.{at}" for at in range(3)],
    ),
    "bert": (
        "BertConfig",
        "BertForMaskedLM",
        SMALL | {"intermediate_size": 32},
        [f"bert.encoder.layer.{at}" for at in range(3)],
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 64, "use_cache": False}
        | {"decoder_start_token_id": 0},
        [f"{side}.block.{at}" for side in ("encoder", "decoder") for at in range(2)],
    ),
}


def batch_of(number: int) -> Batch:
    """Tokens of which some are padding."""
    ids = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(number))
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, 5 + number :] = 0
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": mask}


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


@pytest.mark.parametrize("name", MODELS)
def test_stages_are_the_whole_model(name: str) -> None:
    config, model, options, blocks = MODELS[name]
    torch.manual_seed(1)
    built = getattr(transformers, model)(getattr(transformers, config)(**options))
    case = Case(built.train(), blocks, loss_of, batch_of)
    for cuts in ([1, 2], [0, len(blocks)]):
        loss, gradients = whole(case)
        found, own = in_stages(case, cuts)
        assert found == loss
        torch.testing.assert_close(own, gradients, atol=1e-7, rtol=1e-4)
        case.model.zero_grad()


def test_the_position_bias_of_t5_goes_with_the_activations() -> None:
    """Only the first block of the encoder, and of the decoder, has the weights that it is made of."""
    _, model, options, blocks = MODELS["t5"]
    built = getattr(transformers, model)(transformers.T5Config(**options))
    stages = cut(Case(built, blocks, loss_of, batch_of), [1, 3])
    assert sorted(wire.shape for wire in stages.wires[0, 1]) == [(1, 2, 8, 8), (2, 8, 16)]
    assert set(stages.wires) == {(0, 1), (1, 2)}
