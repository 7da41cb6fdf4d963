"""The outline of a GPT for the performance model."""

from __future__ import annotations

from axonn.models.gpt.gpt_config import GPTConfig
from axonn.perf.layers.layer_cost import TRANSPOSED, CrossEntropy, Embedding, Linear, Norm, Part
from axonn.perf.layers.local_layers import Activation, AttentionCore, Dropout, Residual
from axonn.perf.layers.model_outline import Link, Outline


def gpt_outline(model: GPTConfig) -> Outline:
    """Return the chain of `axonn.models.gpt.gpt_model.GPT` with what each layer computes, keeps and sends."""
    m, places = model, model.seq_len
    activation = places * m.hidden
    norm = Norm(positions=places, features=m.hidden)
    embedding: dict[str, Part] = {
        "tokens": Embedding(positions=places, entries=m.vocab, features=m.hidden),
        "positions": Embedding(positions=places, entries=m.seq_len, features=m.hidden, layout=(None, "row")),
    }
    residual = Residual(positions=places, features=m.hidden, dropout=m.dropout > 0)
    if m.dropout:
        embedding["dropout"] = Dropout(positions=places, features=m.hidden)
    attention: dict[str, Part] = {
        "norm": norm,
        "qkv": Linear(positions=places, inputs=m.hidden, outputs=3 * m.hidden),
        "core": AttentionCore(
            positions=places,
            heads=m.heads,
            width=m.hidden // m.heads,
            causal=True,
            dropout=m.attention_dropout > 0,
        ),
        "projection": Linear(positions=places, inputs=m.hidden, outputs=m.hidden, layout=TRANSPOSED, fused_bias=True),
        "residual": residual,
    }
    feed_forward: dict[str, Part] = {
        "norm": norm,
        "fc1": Linear(positions=places, inputs=m.hidden, outputs=4 * m.hidden, fused_bias=True),
        "gelu": Activation(kind="gelu", positions=places, features=4 * m.hidden, axis="col"),
        "fc2": Linear(positions=places, inputs=4 * m.hidden, outputs=m.hidden, layout=TRANSPOSED, fused_bias=True),
        "residual": residual,
    }
    head: dict[str, Part] = {
        "norm": norm,
        "output": Linear(positions=places, inputs=m.hidden, outputs=m.vocab, bias=False),
    }
    links = [Link(name="embedding", parts=embedding, handed_on=activation, cost=m.cost("embedding"))]
    halves = ("attention", attention, m.cost("attention")), ("mlp", feed_forward, m.cost("mlp"))
    for i in range(m.layers):
        for name, parts, cost in halves:
            links.append(Link(name=f"{name}{i}", parts=parts, block=i, handed_on=activation, cost=cost))
    links.append(Link(name="head", parts=head, cost=m.cost("head")))
    ties = (("embedding.tokens.weight", "head.output.weight"),) if m.tied_head else ()
    return Outline(
        links=links,
        loss=CrossEntropy(positions=places, entries=m.vocab),
        ties=ties,
        name=m.name,
        flops=m.training_flops(recompute=False),
        flops_recomputing=m.training_flops(recompute=True),
    )
