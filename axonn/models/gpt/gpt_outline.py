"""Outline of a GPT for the performance model."""

from __future__ import annotations

from axonn.models.gpt.gpt_config import GPTConfig
from axonn.perf.layers.layer_cost import TRANSPOSED, CrossEntropyCost, EmbeddingCost, LayerCost, LinearCost, NormCost
from axonn.perf.layers.local_layers import ActivationCost, AttentionCoreCost, DropoutCost, ResidualCost
from axonn.perf.layers.model_outline import ModelOutline, OutlineLink


def gpt_outline(model: GPTConfig) -> ModelOutline:
    """Return the chain of `axonn.models.gpt.gpt_model.GPT` with what each layer computes, keeps and sends."""
    m, tokens = model, model.seq_len
    activation = tokens * m.hidden
    norm = NormCost(positions=tokens, features=m.hidden)
    embedding: dict[str, LayerCost] = {
        "tokens": EmbeddingCost(positions=tokens, entries=m.vocab, features=m.hidden),
        "positions": EmbeddingCost(positions=tokens, entries=m.seq_len, features=m.hidden, layout=(None, "row")),
    }
    residual = ResidualCost(positions=tokens, features=m.hidden, dropout=m.dropout > 0)
    if m.dropout:
        embedding["dropout"] = DropoutCost(positions=tokens, features=m.hidden)
    attention: dict[str, LayerCost] = {
        "norm": norm,
        "qkv": LinearCost(positions=tokens, inputs=m.hidden, outputs=3 * m.hidden),
        "core": AttentionCoreCost(
            positions=tokens,
            heads=m.heads,
            width=m.hidden // m.heads,
            causal=True,
            dropout=m.attention_dropout > 0,
        ),
        "projection": LinearCost(
            positions=tokens, inputs=m.hidden, outputs=m.hidden, layout=TRANSPOSED, fused_bias=True
        ),
        "residual": residual,
    }
    feed_forward: dict[str, LayerCost] = {
        "norm": norm,
        "fc1": LinearCost(positions=tokens, inputs=m.hidden, outputs=4 * m.hidden, fused_bias=True),
        "gelu": ActivationCost(kind="gelu", positions=tokens, features=4 * m.hidden, axis="col"),
        "fc2": LinearCost(positions=tokens, inputs=4 * m.hidden, outputs=m.hidden, layout=TRANSPOSED, fused_bias=True),
        "residual": residual,
    }
    head: dict[str, LayerCost] = {
        "norm": norm,
        "output": LinearCost(positions=tokens, inputs=m.hidden, outputs=m.vocab, bias=False),
    }
    links = [OutlineLink(name="embedding", parts=embedding, handed_on=activation, cost=m.cost("embedding"))]
    halves = ("attention", attention, m.cost("attention")), ("mlp", feed_forward, m.cost("mlp"))
    for i in range(m.layers):
        for name, parts, cost in halves:
            links.append(OutlineLink(name=f"{name}{i}", parts=parts, block=i, handed_on=activation, cost=cost))
    links.append(OutlineLink(name="head", parts=head, cost=m.cost("head")))
    ties = (("embedding.tokens.weight", "head.output.weight"),) if m.tied_head else ()
    return ModelOutline(
        links=links,
        loss=CrossEntropyCost(positions=tokens, entries=m.vocab),
        ties=ties,
        name=m.name,
        flops=m.training_flops(recompute=False),
        flops_recomputing=m.training_flops(recompute=True),
    )
