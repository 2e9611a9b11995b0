"""The graph of a model, where it could be divided, and what goes from where to where."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import networkx as nx
import pytest

from passes.exports import graph_of, job
from passes.jobs import GPT2, LLAMA, make_job
from passes.models import HEADER, NOT_EXPORTED, profile_of
from shardwright.passes import model_graph, profile_model
from shardwright.passes.cuts import live_sets
from shardwright.passes.graph import make_graph
from shardwright.schemas.profile import Cut, Edge, ModelProfile

BLOCKS = ["embedding", "blocks.0", "blocks.1", "blocks.2"]
STREAM = 24 * 16 * 4


def test_a_chain_is_cut_at_one_tensor(tmp_path: Path) -> None:
    profile = profile_of(tmp_path)
    assert profile.cuts == tuple(Cut(after=path, tensors=1, bytes=STREAM) for path in BLOCKS)
    assert profile.warnings == ()


def test_masks_and_tables_are_not_carried(tmp_path: Path) -> None:
    for config in (LLAMA, {**GPT2, "n_layer": 5}):
        cuts = profile_model(make_job({"hf": config}), tmp_path, ("bf16",)).cuts
        assert {(cut.tensors, cut.bytes) for cut in cuts} == {(1, 32 * 64 * 4)}
        assert len(cuts) == 1 + (5 if config is not LLAMA else 3)


def test_everything_that_is_used_later_is_alive(tmp_path: Path) -> None:
    source = """
    class Pair(Block):
        def forward(self, x, skip):
            return super().forward(x), skip + x[..., :8]
    class build(Model):
        block = Pair
        def forward(self, tokens):
            x = first = self.embed(tokens)
            skip = x[..., :8] * 2
            for block in self.blocks:
                x, skip = block(x, skip)
            return self.head(x + F.pad(skip, (0, 8)) + first)
    """
    cuts = profile_of(tmp_path, source).cuts
    assert [(cut.tensors, cut.bytes) for cut in cuts] == [(2, STREAM * 3 // 2), *[(3, STREAM * 5 // 2)] * 3]


def test_different_blocks_have_their_own_cuts(tmp_path: Path) -> None:
    source = """
    class Half(Block):
        def __init__(self):
            super().__init__()
            self.smaller = nn.Linear(16, 8)
            self.larger = nn.Linear(8, 16)
        def forward(self, x):
            return self.smaller(super().forward(x if x.shape[-1] == 16 else self.larger(x)))
    class build(Model):
        block = Half
        def __init__(self):
            super().__init__(layers=5)
            self.head = nn.Linear(8, 256)
    """
    profile = profile_of(tmp_path, source)
    assert [cut.bytes for cut in profile.cuts] == [STREAM, *[STREAM // 2] * 5]


def test_what_export_cannot_trace_is_cut_all_the_same(tmp_path: Path) -> None:
    profile = profile_of(tmp_path, NOT_EXPORTED)
    assert profile.cuts == tuple(Cut(after=path, tensors=1, bytes=STREAM) for path in BLOCKS)
    assert len(profile.edges) == len(BLOCKS)
    (warning,) = profile.warnings
    assert "(user.py:" in warning
    assert "not me" in warning


def _edges(profile: ModelProfile) -> list[tuple[str, str, str, int, int]]:
    return [(edge.source, edge.target, edge.kind, edge.tensors, edge.bytes) for edge in profile.edges]


def test_a_chain_has_an_edge_to_every_next_unit(tmp_path: Path) -> None:
    names = [*BLOCKS, "head"]
    expected = [(a, b, "chain", 1, STREAM) for a, b in pairwise(names)]
    assert _edges(profile_of(tmp_path)) == expected


def test_what_passes_by_units_is_a_skip(tmp_path: Path) -> None:
    source = """
    class Late(Block):
        def forward(self, x, first=None):
            return super().forward(x) if first is None else super().forward(x + first)
    class build(Model):
        block = Late
        def forward(self, tokens):
            x = first = self.embed(tokens)
            a = self.blocks[0](x)
            b = self.blocks[1](a)
            c = self.blocks[2](b, first[..., :1])
            return self.head(c * a[:, :1])
    """
    assert _edges(profile_of(tmp_path, source)) == [
        ("embedding", "blocks.0", "chain", 1, STREAM),
        ("embedding", "blocks.2", "skip", 1, 24 * 4),
        ("blocks.0", "blocks.1", "chain", 1, STREAM),
        ("blocks.0", "head", "skip", 1, 16 * 4),
        ("blocks.1", "blocks.2", "chain", 1, STREAM),
        ("blocks.2", "head", "chain", 1, STREAM),
    ]


def test_what_a_block_writes_in_place_comes_from_it(tmp_path: Path) -> None:
    source = """
    class InPlace(Block):
        def forward(self, x):
            x += super().forward(x)
            return x
    class build(Model):
        block = InPlace
        def forward(self, tokens):
            x = self.embed(tokens) * 2
            for block in self.blocks:
                block(x)
            return self.head(x)
    """
    names = [*BLOCKS, "head"]
    expected = [(a, b, "chain", 1, STREAM) for a, b in pairwise(names)]
    assert _edges(profile_of(tmp_path, source)) == expected


def test_an_encoder_is_known_to_all_of_the_decoder() -> None:
    flow = graph_of("t5").flow
    hidden, bias = 32 * 64 * 4, 4 * 32 * 32 * 4
    assert [(cut.after, cut.tensors, cut.bytes) for cut in flow.cuts] == [
        ("embedding", 1, hidden),
        ("encoder.block.0", 2, hidden + bias),
        ("encoder.block.1", 2, hidden + bias),
        ("encoder.block.2", 1, hidden),
        ("decoder.block.0", 3, 2 * hidden + bias),
        ("decoder.block.1", 1, hidden),
    ]
    assert [edge for edge in flow.edges if edge.kind == "skip"] == [
        Edge(source="encoder.block.0", target="encoder.block.2", kind="skip", tensors=1, bytes=bias)
    ]


def test_skips_of_a_u_net_pair_its_levels() -> None:
    flow = graph_of("u-net").flow
    skips = [(edge.source, edge.target) for edge in flow.edges if edge.kind == "skip" and edge.source != "embedding"]
    assert skips == [
        ("down.0.0", "up.2.1"),
        ("down.0.1", "up.2.0"),
        ("down.1.0", "up.1.1"),
        ("down.1.1", "up.1.0"),
        ("down.2.0", "up.0.1"),
        ("down.2.1", "up.0.0"),
    ]
    every = {edge.target for edge in flow.edges if edge.source == "embedding"}
    assert every == {*flow.like}, "the time step goes to every block"


@pytest.mark.parametrize("model", ["gpt2", "deepseek-v3", "transformer", "u-net", "nested"])
def test_the_exported_graph_has_the_same_live_sets(model: str) -> None:
    """Two sources: storages in a run with stand-ins for repeated blocks, and nodes in the graph of the whole model."""
    whole = graph_of(model, whole=True)
    graph = make_graph(whole.exported)
    last = {unit: name for name, unit in graph.nodes(data="unit") if unit}
    alive = live_sets(graph)
    found = [Cut(after=cut.after, tensors=n, bytes=b) for cut in whole.flow.cuts for n, b in [alive[last[cut.after]]]]
    assert found == list(whole.flow.cuts)


def test_the_graph_has_one_block_of_each_kind() -> None:
    assert list(graph_of("deepseek-v3").exported.blocks.values()) == ["model.layers.0", "model.layers.1"]
    assert len(graph_of("u-net").exported.blocks) == len(graph_of("u-net").flow.like), "forward counts them"


@pytest.mark.parametrize(
    ("model", "tied"),
    [
        ("gpt2", {"transformer.wte.weight": 2}),
        ("bert", {"bert.embeddings.word_embeddings.weight": 2, "cls.predictions.bias": 1}),
        ("t5", {"shared.weight": 3}),
    ],
)
def test_a_tied_parameter_is_one_node(model: str, tied: dict[str, int]) -> None:
    exported = graph_of(model).exported
    graph = make_graph(exported)
    names = {node.name: name for node, name in exported.parameters.items()}
    nodes = [name for name, kind in graph.nodes(data="kind") if kind == "parameter"]
    assert len(nodes) == len({names[node] for node in nodes}) == len({*names.values()})
    users = {names[node]: len(graph[node]) for node in nodes}
    assert {name: users[name] for name in tied} == tied


def test_too_many_unlike_blocks_are_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardwright.passes.graph.MOST_BLOCKS", 2)
    assert profile_of(tmp_path).warnings == ()
    profile = profile_of(tmp_path, profile={"share": False})
    assert any("3 blocks of which none stands for another" in warning for warning in profile.warnings)
    assert {parameter.tensor_parallel for parameter in profile.parameters} == {"unknown"}


def test_nodes_say_what_they_are() -> None:
    spec, folder = job("llama")
    graph = model_graph(spec, folder)
    assert nx.is_directed_acyclic_graph(graph)
    ups = [node for node in graph.nodes.values() if node["module"] == "model.layers.0.mlp.up_proj"]
    assert ups == [
        {
            "kind": "operator",
            "operator": "aten.linear",
            "module": "model.layers.0.mlp.up_proj",
            "unit": "model.layers.0",
            "bytes": 32 * 160 * 4,
            "storage": ups[0]["storage"],
            "parameters": ("model.layers.0.mlp.up_proj.weight",),
        }
    ]
    assert {unit for _, unit in graph.nodes(data="unit")} == {"", "embedding", "model.layers.0", "head"}
    assert graph.nodes["input_ids"]["kind"] == "input"


def test_what_is_written_in_place_is_read_later(tmp_path: Path) -> None:
    source = """
class build(Model):
    def forward(self, tokens):
        x = self.embed(tokens)
        y = torch.zeros_like(x)
        y[..., :8] = x[..., 8:]
        return self.head(y)
    """
    (tmp_path / "user.py").write_text(HEADER + source)
    graph = model_graph(make_job({"factory": "user:build"}), tmp_path)
    (head,) = [name for name, node in graph.nodes.items() if "head.weight" in node["parameters"]]
    (looked_up,) = [name for name, node in graph.nodes.items() if node["operator"] == "aten.embedding"]
    assert nx.has_path(graph, looked_up, head)


def test_a_model_without_blocks_is_cut_where_little_is_alive(tmp_path: Path) -> None:
    source = """
    class build(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.first, self.second = nn.Embedding(256, 16), nn.LSTM(16, 16), nn.LSTM(16, 24)
            self.widen, self.narrow = nn.Linear(24, 64), nn.Linear(64, 8)
            self.head = nn.Linear(8, 256)
        def forward(self, tokens):
            x = self.second(self.first(self.embed(tokens))[0])[0]
            return self.head(self.narrow(self.widen(x).relu()))
    """
    profile = profile_of(tmp_path, source)
    assert [unit.kind for unit in profile.units] == ["head"]
    assert profile.edges == ()
    assert [(cut.after, cut.tensors, cut.bytes) for cut in profile.cuts] == [
        ("embed", 1, STREAM),
        ("first", 1, STREAM),
        ("narrow", 1, STREAM // 2),
    ]
