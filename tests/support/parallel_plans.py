"""Plans with tensor, sequence, context and expert parallelism, made by hand out of other plans, and hand-made divisions
of the models that goldens train."""

from __future__ import annotations

from collections.abc import Sequence

from shardwright.schemas.plan import Division, ExpertModules, Plan

LLAMA_DIVISIONS = (
    Division(pattern="model.embed_tokens", style="vocabulary", dims={"weight": 0}),
    Division(pattern="model.layers.*.self_attn", style="region", sequence_dim=1),
    Division(pattern="model.layers.*.self_attn.q_proj", style="column", dims={"weight": 0}, units=6),
    Division(pattern="model.layers.*.self_attn.k_proj", style="column", dims={"weight": 0}, units=2),
    Division(pattern="model.layers.*.self_attn.v_proj", style="column", dims={"weight": 0}, units=2),
    Division(pattern="model.layers.*.self_attn.o_proj", style="row", sequence_dim=1, dims={"weight": 1}, units=6),
    Division(pattern="model.layers.*.mlp", style="region", sequence_dim=1),
    Division(pattern="model.layers.*.mlp.gate_proj", style="column", dims={"weight": 0}, units=50),
    Division(pattern="model.layers.*.mlp.up_proj", style="column", dims={"weight": 0}, units=50),
    Division(pattern="model.layers.*.mlp.down_proj", style="row", sequence_dim=1, dims={"weight": 1}, units=50),
    Division(pattern="model.layers.*.input_layernorm", style="shared"),
    Division(pattern="model.layers.*.post_attention_layernorm", style="shared"),
    Division(pattern="lm_head", style="column", enters=True, dims={"weight": 0}),
)
"""With the sequence divided, too."""

GPT2_DIVISIONS = (
    Division(pattern="transformer.wte", style="vocabulary", dims={"weight": 0}),
    Division(
        pattern="transformer.h.*.attn", style="region", attributes=("embed_dim", "num_heads", "split_size"), units=4
    ),
    Division(
        pattern="transformer.h.*.attn.c_attn",
        style="column",
        dims={"bias": 0, "weight": 1},
        units=4,
        parts={"bias": (64, 64, 64), "weight": (64, 64, 64)},
    ),
    Division(pattern="transformer.h.*.attn.c_proj", style="row", dims={"weight": 0}, units=4),
    Division(pattern="transformer.h.*.mlp.c_fc", style="column", enters=True, dims={"bias": 0, "weight": 1}, units=256),
    Division(pattern="transformer.h.*.mlp.c_proj", style="row", dims={"weight": 0}, units=256),
    Division(pattern="lm_head", style="column", enters=True, dims={"weight": 0}),
)
"""Fused projections, and attributes that count heads and features."""

MIXTRAL_EXPERTS = (
    ExpertModules(pattern="model.layers.*.mlp.experts", experts=4, chosen=2, attributes=("num_experts",)),
)


def parallel_plan(
    plan: Plan,
    *,
    tp: int = 1,
    sequence: bool = False,
    cp: int = 1,
    method: str = "ring",
    ep: int = 1,
    divisions: Sequence[Division] = (),
    head: str = "lm_head",
    expert_modules: Sequence[ExpertModules] = (),
) -> Plan:
    """The plan of one process of `tp`, for all of them; with `cp`, micro-batches have so many times as many samples."""
    fields = plan.model_dump(mode="json")
    job, decision = fields["job"], fields["decision"]
    level = job["cluster"]["levels"][0]
    level["size"] *= tp
    decision["mesh"]["world_size"] *= tp
    if tp > 1:
        decision["mesh"]["axes"].append({"name": "tp", "size": tp, "levels": [level["name"]]})
    decision["micro_batch"] *= cp
    decision["tensor_parallel"] = {"degree": tp, "sequence": sequence}
    decision["context_parallel"] = {"degree": cp, "method": method if cp > 1 else "none"}
    decision["expert_parallel"] = {"degree": ep}
    fields["model"] |= {
        "divisions": [division.model_dump(mode="json") for division in divisions],
        "head": head if cp > 1 else "",
        "expert_modules": [each.model_dump(mode="json") for each in expert_modules] if ep > 1 else [],
    }
    degrees = [f"{name} {size}" for name, size in (("tp", tp), ("cp", cp), ("ep", ep)) if size > 1]
    fields["name"] = ", ".join([fields["name"], *degrees])
    return Plan.model_validate(fields)
