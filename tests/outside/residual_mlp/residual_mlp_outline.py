"""What each layer computes, keeps and sends."""

from __future__ import annotations

from axonn.perf.layers.layer_cost import TRANSPOSED, CrossEntropyCost, EmbeddingCost, LayerCost, LinearCost
from axonn.perf.layers.local_layers import ActivationCost, ResidualCost
from axonn.perf.layers.model_outline import ModelOutline, OutlineLink
from tests.outside.residual_mlp.residual_mlp_config import ResidualMLPConfig


def residual_mlp_outline(c: ResidualMLPConfig) -> ModelOutline:
    """The chain of `ResidualMLP`."""
    tokens = c.seq_len
    perceptron: dict[str, LayerCost] = {
        "fc1": LinearCost(positions=tokens, inputs=c.hidden, outputs=c.inner),
        "silu": ActivationCost(kind="silu", positions=tokens, features=c.inner, axis="col"),
        "fc2": LinearCost(positions=tokens, inputs=c.inner, outputs=c.hidden, layout=TRANSPOSED),
        "residual": ResidualCost(positions=tokens, features=c.hidden),
    }
    embedding: dict[str, LayerCost] = {"tokens": EmbeddingCost(positions=tokens, entries=c.vocab, features=c.hidden)}
    head: dict[str, LayerCost] = {"output": LinearCost(positions=tokens, inputs=c.hidden, outputs=c.vocab, bias=False)}
    handed_on = tokens * c.hidden
    work = 4.0 * tokens * c.hidden * c.inner
    return ModelOutline(
        links=[
            OutlineLink(name="embedding", parts=embedding, handed_on=handed_on, cost=float(handed_on)),
            *(
                OutlineLink(name=f"mlp{i}", parts=perceptron, block=i, handed_on=handed_on, cost=work)
                for i in range(c.blocks)
            ),
            OutlineLink(name="head", parts=head, cost=2.0 * tokens * c.hidden * c.vocab),
        ],
        loss=CrossEntropyCost(positions=tokens, entries=c.vocab),
        name=c.name,
        flops=c.training_flops(recompute=False),
        flops_recomputing=c.training_flops(recompute=True),
    )
