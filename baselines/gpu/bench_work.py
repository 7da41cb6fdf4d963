"""Measured work: models, batches and how often, in full or in miniature."""

from __future__ import annotations

from typing import Any, Literal

from axonn.config.train_config import OptimizerConfig, StrictModel, TrainConfig, validate
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.models.unet.unet_config import UNetConfig

Device = Literal["cpu", "cuda"]
SEQ_LEN, VOCAB = 1024, 50304
OPTIMIZER = {"lr": 1e-3, "eps": 1e-3, "weight_decay": 0.1}
"""AdamW's `eps` is large, so that losses show gradients of another scale; with a small one Adam would hide them."""


class BenchModel(StrictModel):
    """One GPT to train."""

    model: GPTConfig
    batch_size: int
    microbatch_size: int

    def config(self, *, steps: int, precision: str = "bfloat16", **changes: Any) -> TrainConfig:
        """Return its training configuration; `changes` are keys of the configuration."""
        optimizer = {**OPTIMIZER, **changes.pop("optimizer", {})}
        content = {
            "model": self.model.model_dump(),
            "batch_size": self.batch_size,
            "microbatch_size": self.microbatch_size,
            "precision": precision,
            "optimizer": optimizer,
            "steps": steps,
        }
        return validate({**content, **changes}, TrainConfig, where=self.model.name)


def _gpt(
    name: str, layers: int, hidden: int, heads: int, *, batch: int, micro: int, seq: int, vocab: int
) -> BenchModel:
    model = GPTConfig(name=name, layers=layers, hidden=hidden, heads=heads, seq_len=seq, vocab=vocab)
    return BenchModel(model=model, batch_size=batch, microbatch_size=micro)


def _full(name: str, layers: int, hidden: int, heads: int, micro: int) -> BenchModel:
    return _gpt(name, layers, hidden, heads, batch=32, micro=micro, seq=SEQ_LEN, vocab=VOCAB)


def _mini(name: str, layers: int, hidden: int, *, seq: int = 32) -> BenchModel:
    return _gpt(name, layers, hidden, 4, batch=8, micro=2, seq=seq, vocab=512)


FULL_UNET = UNetConfig(
    name="unet-350m",
    image_size=64,
    channels=3,
    width=256,
    multipliers=(1, 2, 3, 4),
    blocks=3,
    attention_levels=(2, 3),
    head_channels=64,
    groups=32,
)
"""A U-Net in the proportions of Dhariwal & Nichol's network for 64 x 64 pixels (arXiv 2105.05233)."""
MINI_UNET = UNetConfig(
    name="unet-mini",
    image_size=8,
    channels=1,
    width=16,
    multipliers=(1, 2),
    blocks=1,
    attention_levels=(1,),
    head_channels=16,
    groups=8,
)


class BenchPlan(StrictModel):
    """All models, batches and repetitions of a benchmark."""

    device: Device
    quick: bool
    gpts: tuple[BenchModel, ...]
    offload: BenchModel
    """Model whose memory is measured, and whose copies are."""
    bsize: int
    """Elements of a bucket of the offloaded optimizer."""
    small: BenchModel
    """Model that runs on grids of several ranks."""
    cut: BenchModel
    """Model that runs on two ranks that share its layers, for the collectives."""
    unet: UNetConfig
    unet_batch: int
    unet_microbatch: int
    largest_hidden: int
    largest_limit: int
    """Layers above which no larger model is tried."""
    product_size: int
    rounds: int
    batches: int
    """Batches that a contender trains in one turn."""
    warmup: int
    grid_batches: int

    @property
    def kind(self) -> str:
        """Scale of the measurement, in a word."""
        return "miniature" if self.quick else "whole"


def plan_of(device: Device, *, quick: bool) -> BenchPlan:
    """Return the models of the papers on a GPU; in miniature, for trying the benchmark itself anywhere."""
    if quick:
        return BenchPlan(
            device=device,
            quick=True,
            gpts=(_mini("gpt-mini-2x64", 2, 64), _mini("gpt-mini-4x128", 4, 128)),
            offload=_mini("gpt-mini-4x128", 4, 128),
            bsize=_mini("x", 4, 128).model.parameters // 64,
            small=_mini("gpt-mini-4x64", 4, 64),
            cut=_mini("gpt-mini-4x128", 4, 128, seq=64),
            unet=MINI_UNET,
            unet_batch=4,
            unet_microbatch=2,
            largest_hidden=64,
            largest_limit=4,
            product_size=512,
            rounds=2,
            batches=1,
            warmup=1,
            grid_batches=3,
        )
    return BenchPlan(
        device=device,
        quick=False,
        gpts=(
            _full("gpt-125m", 12, 768, 12, 8),
            _full("gpt-350m", 24, 1024, 16, 8),
            _full("gpt-1.3b", 24, 2048, 16, 4),
        ),
        offload=_full("gpt-1.3b", 24, 2048, 16, 4),
        bsize=OptimizerConfig().bsize,
        small=_gpt("gpt-8x512", 8, 512, 8, batch=16, micro=2, seq=256, vocab=8192),
        cut=_gpt("gpt-4x2048", 4, 2048, 16, batch=16, micro=4, seq=SEQ_LEN, vocab=8192),
        unet=FULL_UNET,
        unet_batch=64,
        unet_microbatch=32,
        largest_hidden=4096,
        largest_limit=200,
        product_size=8192,
        rounds=8,
        batches=2,
        warmup=2,
        grid_batches=6,
    )
