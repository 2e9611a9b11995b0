from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support.golden import LLAMA
from support.tiny import build
from torch import Tensor, nn

from shardwright.backends.pytorch.runtime.initialize import InitializationError, initialize, parameters_on_meta

CPU = torch.device("cpu")


def test_parameters_are_on_meta_and_buffers_are_real() -> None:
    with parameters_on_meta():
        model = build(tied=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.head.weight is model.embed.weight
    assert float(model.scale) == pytest.approx(32**-0.5)
    assert not nn.Linear(2, 2).weight.is_meta


def test_one_parameter_under_two_names_stays_one() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shared = nn.Parameter(torch.zeros(3), requires_grad=False)
            self.first = shared
            self.second = shared
            self.register_parameter("none", None)

    with parameters_on_meta():
        model = Twice()
    assert model.first is model.second
    assert not model.first.requires_grad
    assert model.none is None


def initialized(order: tuple[str, ...], seed: int = 0, **arguments: Any) -> dict[str, Tensor]:
    with parameters_on_meta():
        model = build(**arguments)
    for path in order:
        initialize(model, path, seed=seed, device=CPU)
    assert model.embed.weight is model.head.weight or not arguments.get("tied")
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


BLOCKS = ("blocks.0", "blocks.1", "blocks.2")


def test_weights_depend_on_the_seed_and_the_units_path_alone() -> None:
    torch.manual_seed(1)
    first = initialized((*BLOCKS, ""))
    torch.manual_seed(2)
    second = initialized((*reversed(BLOCKS), ""))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = initialized((*BLOCKS, ""), seed=1)
    assert not torch.equal(first["blocks.0.up.weight"], other["blocks.0.up.weight"])
    assert not torch.equal(first["blocks.0.up.weight"], first["blocks.1.up.weight"])


def test_weights_are_drawn_as_the_modules_draw_them() -> None:
    found, usual = initialized((*BLOCKS, ""), width=128), build(width=128).state_dict()
    assert found.keys() | {"scale"} == usual.keys()
    for name, parameter in found.items():
        assert float(parameter.std()) == pytest.approx(float(usual[name].std()), rel=0.2, abs=1e-6), name
        assert float(parameter.mean()) == pytest.approx(float(usual[name].mean()), abs=0.05), name


def test_tied_weights_are_initialised_once_and_stay_tied() -> None:
    assert "head.weight" not in initialized((*BLOCKS, ""), tied=True)


class Plain(nn.Module):
    """A parameter that nobody initialises after construction."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


class Greedy(nn.Module):
    """A parent that initialises what belongs to its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 2)])
        self.own = nn.Linear(2, 2)

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter)


@pytest.mark.parametrize("bias", [False, True])
def test_a_parameter_of_two_units_stays_one_or_is_refused(bias: bool) -> None:
    """A module that has more to initialise would draw the other unit's values anew."""
    with parameters_on_meta():
        model = nn.Sequential(nn.Linear(3, 3, bias=bias), nn.Linear(3, 3, bias=bias))
        model[1].weight = model[0].weight
    initialize(model, "0", seed=0, device=CPU)
    with pytest.raises(InitializationError, match="initialised already") if bias else nullcontext():
        initialize(model, "1", seed=0, device=CPU)
    assert model[1].weight is model[0].weight
    assert not model[0].weight.is_meta


def test_what_nothing_initialises_is_refused() -> None:
    with parameters_on_meta():
        model = nn.Sequential(Plain())
    with pytest.raises(InitializationError, match=r"nothing initialises 0\.weight"):
        initialize(model, "0", seed=0, device=CPU)


def test_touching_another_unit_is_refused() -> None:
    with parameters_on_meta():
        model = Greedy()
    initialize(model, "blocks.0", seed=0, device=CPU)
    with pytest.raises(InitializationError, match="initialised already"):
        initialize(model, "", seed=0, device=CPU)


def test_a_parent_may_initialise_its_children_within_a_unit() -> None:
    with parameters_on_meta():
        model = nn.Sequential(Greedy(), nn.MultiheadAttention(4, 2))
    initialize(model, "", seed=0, device=CPU)
    assert not any(bool(parameter.isnan().any()) for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_hugging_face_models_get_their_own_initial_weights(tmp_path: Path, tied: bool) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = LLAMA | {"num_hidden_layers": 2, "tie_word_embeddings": tied, "initializer_range": 0.05}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = AutoConfig.from_pretrained(tmp_path / "config.json")
    usual = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for path in ("model.layers.0", "model.layers.1", ""):
        initialize(model, path, seed=0, device=CPU)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    found = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert found.keys() == dict(usual.named_parameters()).keys()
    for name, parameter in found.items():
        assert parameter.dtype == torch.float32
        norm = "norm" in name
        assert float(parameter.mean()) == pytest.approx(1.0 if norm else 0.0, abs=0.01), name
        assert float(parameter.std()) == pytest.approx(0.0 if norm else 0.05, rel=0.1, abs=1e-6), name
    for (name, buffer), (_, usual_buffer) in zip(model.named_buffers(), usual.named_buffers(), strict=True):
        assert torch.equal(buffer, usual_buffer), name
    ids = torch.arange(10).reshape(1, 10)
    assert bool(model(input_ids=ids).logits.isfinite().all())
