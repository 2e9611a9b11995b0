"""Profiles made by hand, so that the planner is tested on its own: Llama-like models from published formulas, and one
so small and round that its numbers can be worked out in the head.

Activations follow Korthikanti et al. (arXiv 2205.05198, section 4) with a fused attention kernel, SwiGLU and grouped
queries instead of GELU and dropout; FLOPs are 2mnk a matrix multiplication, causal attention counted as half.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from shardwright.schemas.cluster import ClusterSpec
from shardwright.schemas.job import JobSpec
from shardwright.schemas.profile import (
    Affine,
    BackwardMoment,
    ComputeDtypeName,
    Cut,
    ModelProfile,
    Operator,
    Parameter,
    Phase,
    Unit,
    UnitCost,
)

BYTES: dict[ComputeDtypeName, int] = {"fp32": 4, "bf16": 2}
NAMES: dict[ComputeDtypeName, str] = {"fp32": "float32", "bf16": "bfloat16"}
DTYPES: tuple[ComputeDtypeName, ...] = ("fp32", "bf16")


def llama(
    *,
    layers: int = 32,
    hidden: int = 4096,
    heads: int = 32,
    kv_heads: int = 8,
    ffn: int = 14336,
    vocabulary: int = 128256,
    sequence: int = 8192,
    tied: bool = False,
    init: str = "modules",
    dtypes: Sequence[ComputeDtypeName] = DTYPES,
) -> ModelProfile:
    """A Llama: Llama-3-8B by default."""
    kv = hidden // heads * kv_heads
    matrices = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    norms = ("input_layernorm", "post_attention_layernorm")
    paths = tuple(f"model.layers.{index}" for index in range(layers))
    parameters = [_parameter("model.embed_tokens.weight", (vocabulary, hidden), -1, ["lm_head.weight"] if tied else [])]
    for path in paths:
        parameters += [_parameter(f"{path}.{name}.weight", shape, 1) for name, shape in matrices.items()]
        parameters += [_parameter(f"{path}.{name}.weight", (hidden,), 1) for name in norms]
    parameters.append(_parameter("model.norm.weight", (hidden,), -1))
    if not tied:
        parameters.append(_parameter("lm_head.weight", (vocabulary, hidden), -1))

    def embedding(dtype: ComputeDtypeName) -> UnitCost:
        row = sequence * hidden * BYTES[dtype]
        operators = [
            _streaming("embedding", "forward", 2 * row, dtype),
            _streaming("embedding", "weight_gradient", row, dtype),
        ]
        return _cost(operators, saved=8 * sequence, inputs=8 * sequence, output=row, peak=row, backward=row)

    def block(dtype: ComputeDtypeName) -> UnitCost:
        row = sequence * hidden * BYTES[dtype]
        wide, narrow = sequence * ffn * BYTES[dtype], sequence * kv * BYTES[dtype]
        operators = []
        for phase, factor in (("forward", 1), ("input_gradient", 1), ("weight_gradient", 1)):
            for name, (out, inn) in matrices.items():
                operators.append(_matmul(name, phase, sequence, inn, out, dtype, factor))
        attention = 2 * sequence * sequence * hidden
        operators.append(_attention("forward", attention, 4 * row, dtype))
        operators.append(_attention("input_gradient", 5 * attention // 2, 8 * row, dtype))
        streamed = 30 * row + 6 * wide
        operators.append(_streaming("elementwise", "forward", streamed, dtype, count=30))
        operators.append(_streaming("elementwise", "input_gradient", 2 * streamed, dtype, count=60))
        saved = 4 * 2 * row + 2 * row + 2 * narrow + 4 * wide
        peak = saved + row + wide
        return _cost(operators, saved=saved, inputs=row, output=row, peak=peak, backward=2 * wide + 3 * row)

    def head(dtype: ComputeDtypeName) -> UnitCost:
        row, logits = sequence * hidden * BYTES[dtype], sequence * vocabulary
        operators = [
            _matmul("lm_head", "forward", sequence, hidden, vocabulary, dtype),
            _matmul("lm_head", "input_gradient", sequence, hidden, vocabulary, dtype),
            _matmul("lm_head", "weight_gradient", sequence, hidden, vocabulary, dtype),
            _streaming("cross_entropy", "forward", logits * 12, dtype, count=6),
            _streaming("cross_entropy", "input_gradient", logits * 12, dtype, count=6),
        ]
        saved = 4 * row + 4 * logits
        peak = saved + (4 + BYTES[dtype]) * logits
        cost = _cost(operators, saved=saved, inputs=saved, output=0, peak=peak, backward=4 * logits)
        # The loss is done with its logits when the gradients of the head's own parameters are made.
        return _with_loss(cost, 4 * logits, -2 * logits, vocabulary * hidden + hidden)

    units = (
        Unit(kind="embedding", paths=(), fingerprint="embedding", costs={d: embedding(d) for d in dtypes}),
        Unit(kind="block", paths=paths, fingerprint="block", costs={d: block(d) for d in dtypes}),
        Unit(kind="head", paths=(), fingerprint="head", costs={d: head(d) for d in dtypes}),
    )
    return _profile(f"llama {layers} x {hidden}", sequence, parameters, units, init)


def toy(*, blocks: int = 4, saved: int = 1000, trainable: bool = True) -> ModelProfile:
    """Round numbers: an embedding of 64 x 10 elements, `blocks` blocks of 10 x 10, a head of 64 x 10; a block saves
    `saved` bytes a sequence (100 when it is checkpointed) and does 1 MFLOP forward, 1 + 1 backward."""
    paths = tuple(f"blocks.{index}" for index in range(blocks))
    parameters = [_parameter("embedding.weight", (64, 10), -1)]
    parameters += [_parameter(f"{path}.weight", (10, 10), 1, trainable=trainable) for path in paths]
    parameters += [_parameter("head.weight", (64, 10), -1)]

    def cost(flops: int, saved: int, inputs: int, output: int) -> UnitCost:
        phases: tuple[Phase, ...] = ("forward", "input_gradient", "weight_gradient")
        operators = [_operator("mm", phase, "matmul", 1, flops, 0, "float32") for phase in phases]
        recompute = {"none": Affine(0, 50), "full": Affine(0, 50 + saved)}
        return UnitCost(
            operators=tuple(operators),
            saved={"none": Affine(0, saved), "full": Affine(0, inputs)},
            output=Affine(0, output),
            forward_peak=Affine(0, saved),
            backward_peak=recompute,
        )

    def costs(flops: int, saved: int, inputs: int, output: int) -> dict[ComputeDtypeName, UnitCost]:
        return dict.fromkeys(DTYPES, cost(flops, saved, inputs, output))

    head = dict.fromkeys(DTYPES, _with_loss(cost(2 * 10**6, 500, 500, 0), 50, -200, 640))
    units = [
        Unit(kind="embedding", paths=(), fingerprint="embedding", costs=costs(0, 10, 10, 100)),
        Unit(kind="block", paths=paths, fingerprint="block", costs=costs(10**6, saved, 100, 100)),
        Unit(kind="head", paths=(), fingerprint="head", costs=head),
    ]
    return _profile("toy", 16, parameters, [unit for unit in units if unit.kind != "block" or unit.paths], "modules")


def cuttable(profile: ModelProfile) -> ModelProfile:
    """The profile with a cut after the embedding and after every block."""
    cuts = tuple(Cut(after=name, tensors=1, bytes=100) for name in ("embedding", *profile.block_paths))
    return replace(profile, cuts=cuts)


def gpu_cluster(
    nodes: int = 1, *, per_node: int = 8, memory: str = "79GiB", device: str = "h100-sxm-80gb"
) -> ClusterSpec:
    """Nodes of eight H100 (or A100) with one fast adapter each."""
    a100 = "a100" in device
    return ClusterSpec.model_validate(
        {
            "name": f"{nodes} nodes",
            "device": {
                "name": device,
                "kind": "cuda",
                "memory": memory,
                "peak": {
                    "bf16": "312TFLOP/s" if a100 else "989TFLOP/s",
                    "fp32": "19.5TFLOP/s" if a100 else "67TFLOP/s",
                },
                "measured": {"bf16": "271.2TFLOP/s" if a100 else "794.5TFLOP/s"},
                "memory_bandwidth": "2039GB/s" if a100 else "3350GB/s",
            },
            "levels": [
                {"name": "node", "size": per_node, "bandwidth": "300GB/s" if a100 else "450GB/s", "latency": "3.4us"},
                {"name": "rail", "size": nodes, "bandwidth": "25GB/s" if a100 else "50GB/s", "latency": "14us"},
            ],
            "host_memory": "2TiB",
        }
    )


def cpu_cluster(processes: int, memory: str = "4GiB") -> ClusterSpec:
    """Processes on one host."""
    return ClusterSpec.model_validate(
        {
            "name": "cpu",
            "device": {
                "name": "cpu",
                "kind": "cpu",
                "memory": memory,
                "peak": {"fp32": "1GFLOP/s", "bf16": "0.5GFLOP/s"},
                "memory_bandwidth": "10GB/s",
            },
            "levels": [{"name": "node", "size": processes, "bandwidth": "1GB/s", "latency": "100us"}],
            "host_memory": "64GiB",
        }
    )


def job(cluster: ClusterSpec, *, batch: int | str = 64, sequence: int = 8192, **sections: object) -> JobSpec:
    """A job on that cluster; `sections` are top-level keys of a job file."""
    return JobSpec.model_validate(
        {
            "model": {"hf": "config.json"},
            "data": {"synthetic": {"vocabulary": 128256}},
            "train": {"sequence_length": sequence, "global_batch": batch, "steps": 100, **_train(sections)},
            "cluster": cluster,
            **{key: value for key, value in sections.items() if key != "train"},
        }
    )


def _train(sections: dict[str, object]) -> dict[str, object]:
    train = sections.get("train", {})
    assert isinstance(train, dict)
    return train


def _profile(
    name: str, sequence: int, parameters: Iterable[Parameter], units: Iterable[Unit], init: str
) -> ModelProfile:
    return ModelProfile(
        name=name,
        device_kind="cuda",
        sequence_length=sequence,
        parameters=tuple(parameters),
        buffer_bytes=0,
        units=tuple(units),
        cuts=(Cut(after="blocks.0", tensors=1, bytes=100),),
        attention={"fp32": "efficient", "bf16": "flash"},
        init=init,  # type: ignore[arg-type]
        input_bytes=Affine(0, 16 * sequence),
        local_sources=("model.py",),
        packages=(),
        warnings=(),
        digest="0" * 64,
    )


def _parameter(
    name: str, shape: tuple[int, ...], unit: int, also: Sequence[str] = (), *, trainable: bool = True
) -> Parameter:
    return Parameter(name=name, shape=shape, trainable=trainable, unit=unit, also=tuple(also))


def _cost(operators: Sequence[Operator], *, saved: int, inputs: int, output: int, peak: int, backward: int) -> UnitCost:
    return UnitCost(
        operators=tuple(operators),
        saved={"none": Affine(0, saved), "full": Affine(0, inputs)},
        output=Affine(0, output),
        forward_peak=Affine(0, peak),
        backward_peak={"none": Affine(0, backward), "full": Affine(0, backward + saved)},
    )


def _with_loss(cost: UnitCost, loss: int, head: int, numel: int) -> UnitCost:
    """The head's backward as two moments: bytes in the loss, and in the model with gradients of `numel` elements."""
    moments = (BackwardMoment(Affine(0, loss), 0, True), BackwardMoment(Affine(0, head), numel, False))
    return replace(cost, backward_moments={"none": moments, "full": moments})


def _matmul(name: str, phase: str, rows: int, inn: int, out: int, dtype: ComputeDtypeName, count: int = 1) -> Operator:
    moved = BYTES[dtype] * rows * (inn + out)
    flops = Affine(0, 2 * rows * inn * out)
    size = Affine(BYTES[dtype] * inn * out, moved)
    return _operator(name, phase, "matmul", count, flops, size, NAMES[dtype])


def _attention(phase: str, flops: int, size: int, dtype: ComputeDtypeName) -> Operator:
    return _operator("attention", phase, "attention", 1, flops, size, NAMES[dtype])


def _streaming(name: str, phase: str, size: int, dtype: ComputeDtypeName, count: int = 1) -> Operator:
    return _operator(name, phase, "elementwise", count, 0, size, NAMES[dtype])


def _operator(
    name: str, phase: str, kind: str, count: int, flops: int | Affine, size: int | Affine, dtype: str
) -> Operator:
    return Operator(
        name=name,
        module="",
        phase=phase,  # type: ignore[arg-type]
        kind=kind,  # type: ignore[arg-type]
        count=count,
        flops=flops if isinstance(flops, Affine) else Affine(0, flops),
        bytes=size if isinstance(size, Affine) else Affine(0, size),
        shapes=(),
        dtype=dtype,
    )
