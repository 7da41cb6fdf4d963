"""The U-Net: what is counted is what is built, and what is computed is the same on every grid."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from axonn.config.train_config import load_yaml
from axonn.data.images import ImageData
from axonn.distributed.transport import InProcessCollectives, InProcessWorld
from axonn.engine import Engine
from axonn.errors import GridError
from axonn.grid import ProcessGrid
from axonn.inter_layer.stage import virtual_spans
from axonn.models.unet import unet_model
from axonn.models.unet.unet_config import UNetConfig, unet_links
from axonn.models.unet.unet_model import UNet, sinusoids
from axonn.schedules import ChunkLayout
from axonn.tensor import TensorContext
from experiments.definition import HERE
from tests.helpers.comparing import check_every_rank
from tests.helpers.training import SEED, UNET, Case, batch_of, serial_model, serial_reference, train_in_process

MODELS = sorted((HERE / "models").glob("unet-*.yaml"))
VARIANTS = {
    "as in the other tests": {},
    "one level": {"multipliers": (2,), "attention_levels": ()},
    "three levels, attention at all": {"multipliers": (1, 2, 2), "attention_levels": (0, 1, 2)},
    "narrower below, grey": {"multipliers": (3, 1), "blocks": 2, "channels": 1, "image_size": 4},
    "wider above, attention in the middle alone": {"multipliers": (2, 1, 1), "attention_levels": ()},
}


def config_of(**changes: Any) -> UNetConfig:
    return UNetConfig(**(UNET.model_dump() | changes))


def built(config: UNetConfig, device: str = "meta") -> dict[str, nn.Module]:
    with torch.device(device):
        return {layer.name: layer.build(TensorContext.serial()) for layer in UNet(config).layers}


def run(modules: dict[str, nn.Module], *inputs: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """What each link hands on."""
    outputs = []
    for module in modules.values():
        out = module(*inputs)
        inputs = out if isinstance(out, tuple) else (out,)
        outputs.append(inputs)
    return outputs


def count(modules: dict[str, nn.Module]) -> int:
    return sum(p.numel() for module in modules.values() for p in module.parameters())


# --- counts and shapes


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_parameters_and_flops_are_those_of_the_built_module(changes: dict[str, Any]) -> None:
    config = config_of(**changes)
    modules = built(config)
    assert count(modules) == config.parameters
    shape = (3, config.channels, config.image_size, config.image_size)
    inputs = torch.empty(shape, device="meta"), torch.zeros(3, dtype=torch.int64, device="meta")
    # Torch counts the products of attention only where they are products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        outputs = run(modules, *inputs)
    assert counter.get_total_flops() == 3 * config.forward_flops
    assert sum(layer.cost for layer in UNet(config).layers) == config.forward_flops
    assert outputs[-1][0].shape == shape


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_the_models_of_the_suite_have_the_parameters_in_their_name(path: Any) -> None:
    config = load_yaml(path, UNetConfig)
    assert config.name == path.stem
    assert count(built(config)) == config.parameters
    size, _, by_rule = config.name.removeprefix("unet-").partition("-")
    named = float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]
    # A rule that leaves only the width to choose, in steps of 64, meets the number less well.
    assert config.parameters == pytest.approx(named, rel=0.05 if by_rule else 0.02)
    # The grids that the largest ones need.
    # (The heads of those by rule are what their width makes them, and cannot always be cut over 4.)
    large = ProcessGrid(row=4, col=2 if by_rule else 4)
    UNet(config).check(large if named > 1e9 else ProcessGrid(row=2, col=2))


def test_the_models_of_the_suite_go_from_a_million_to_28_billion_parameters() -> None:
    assert {path.stem for path in MODELS} >= {"unet-1m", "unet-3.5b", "unet-7.5b", "unet-14b", "unet-28b"}
    assert all(yaml.safe_load(path.read_text())["kind"] == "unet" for path in MODELS)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize(("row", "col"), [(1, 1), (2, 1), (1, 2)])
def test_every_link_hands_on_what_the_next_stage_expects(changes: dict[str, Any], row: int, col: int) -> None:
    model = UNet(config_of(**changes))
    c = model.config
    grid = ProcessGrid(row=row, col=col)
    world = InProcessWorld(grid.size)

    def handed_on(rank: int) -> list[tuple[torch.Tensor, ...]]:
        context = TensorContext(grid, rank, InProcessCollectives(world, grid, rank))
        modules = {layer.name: layer.build(context) for layer in model.layers}
        with torch.no_grad():
            for parameter in (p for m in modules.values() for p in m.parameters()):
                parameter.zero_()
            outputs = run(modules, torch.zeros(3, c.channels, c.image_size, c.image_size), torch.arange(3))
        for number, output in enumerate(outputs):
            specs = model.activation(number, 3, torch.float32, context)
            assert [(tuple(t.shape), t.dtype) for t in output] == [tuple(spec) for spec in specs], number
        return outputs

    assert len(world.run(handed_on)) == grid.size


def test_skip_connections_join_what_is_as_large() -> None:
    links = unet_links(config_of(multipliers=(1, 2, 2), blocks=2))
    joined = [link for link in links if link.joins]
    assert len(joined) == 3 * 3
    assert sum(link.keeps for link in links) == len(joined)
    assert links[-1].skips == ()
    for before, link in pairwise(links):
        if link.joins:
            assert before.skips[-1].size == before.output.size == link.output.size


def test_a_checkpointed_block_is_a_residual_block_and_what_follows_it() -> None:
    links = unet_links(UNET)
    assert (links[0].block, links[-1].block) == (None, None)
    for before, link in pairwise(links[:-1]):
        expected = (0 if before.block is None else before.block + 1) if link.kind == "residual" else before.block
        assert link.block == expected


# --- the function


def test_the_time_embedding_tells_time_steps_apart() -> None:
    waves = sinusoids(torch.tensor([0, 1, 999]), 8)
    assert waves[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert waves[1, 0] == pytest.approx(torch.sin(torch.tensor(1.0)).item())
    # The slowest wave has not come far in 999 steps, and tells them apart all the same.
    assert waves[2, 3] == pytest.approx(0.0998, abs=1e-4)


def test_every_parameter_gets_a_gradient() -> None:
    gradients = serial_reference(Case(model_kind="unet", steps=1)).gradients[0]
    _, modules, named = serial_model(Case(model_kind="unet"))
    assert gradients.keys() == named.keys()
    assert len(modules) == 16
    assert all(gradient.abs().max() > 1e-9 for gradient in gradients.values())


def test_what_comes_out_depends_on_every_pixel_and_on_the_time() -> None:
    case = Case(model_kind="unet")
    _, modules, named = serial_model(case)
    for name, parameter in named.items():
        nn.init.normal_(parameter, std=0.2) if "norm" not in name else nn.init.ones_(parameter)
    (images, times), _ = batch_of(case, 0)
    (before,) = run(modules, images, times)[-1]
    changed = images.clone()
    changed[0, 1, 7, 0] += 1
    (other_pixel,) = run(modules, changed, times)[-1]
    assert (other_pixel - before)[0].abs().min() > 0
    assert torch.equal(other_pixel[1:], before[1:])
    (other_time,) = run(modules, images, (times + 1) % UNET.noise_steps)[-1]
    assert (other_time - before).abs().min() > 0


def test_the_ends_of_branches_begin_small() -> None:
    model = UNet(UNET)
    assert model.initial("down0_residual0.conv2.weight").deviation * 10 == pytest.approx((9 * 8) ** -0.5)  # type: ignore[union-attr]
    assert model.initial("up1_residual0.conv1.weight").deviation == pytest.approx((9 * 32) ** -0.5)  # type: ignore[union-attr]
    assert model.initial("output.conv.weight").deviation * 10 == pytest.approx((9 * 8) ** -0.5)  # type: ignore[union-attr]
    assert model.initial("middle_attention0.attention.out_proj.weight").deviation * 10 == pytest.approx(0.25)  # type: ignore[union-attr]
    assert model.initial("output.norm.weight").value == 1  # type: ignore[union-attr]


def test_the_loss_falls_on_digits() -> None:
    config = config_of(channels=1, width=16, groups=8, noise_steps=200)
    data = ImageData(None, image_size=8, channels=1, noise_steps=200, seed=SEED)
    engine = Engine(UNet(config), grid=ProcessGrid(), batch_size=64, microbatch_size=32, seed=SEED)
    losses = [engine.train_batch(*data.batch(engine.shard(step))).loss for step in range(40)]
    assert losses[0] == pytest.approx(1, rel=0.1)
    assert sum(losses[-5:]) / 5 < 0.5


# --- on grids

GRIDS = {
    "row": {"row": 2},
    "col": {"col": 2},
    "row 4": {"row": 4},
    "col 4": {"col": 4},
    "row x col": {"row": 2, "col": 2},
    "inter": {"inter": 2, "microbatches": 3},
    "inter 5": {"inter": 5, "microbatches": 2},
    "inter x row x col": {"inter": 2, "row": 2, "col": 2, "microbatches": 3, "dropout": 0.2},
    "data x row": {"data": 2, "row": 2, "dropout": 0.2, "microbatches": 2},
    "sub-shards, recompute": {"row": 2, "col": 2, "sub_shards": 3, "recompute": 1, "dropout": 0.2},
    "sub-shards, recompute, inter": {"inter": 3, "col": 2, "sub_shards": 2, "recompute": 2, "dropout": 0.2},
    "zero-bubble": {"inter": 2, "row": 2, "schedule": "zero-bubble", "microbatches": 3},
}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_a_grid_trains_like_one_rank(grid: dict[str, Any]) -> None:
    case = Case(model_kind="unet", steps=2, **grid)
    check_every_rank(case, train_in_process(case))


def test_dropout_changes_the_training_and_not_the_evaluation() -> None:
    dropped, kept = (serial_reference(Case(model_kind="unet", steps=2, dropout=p)) for p in (0.2, 0.0))
    assert dropped.losses[0] != kept.losses[0]
    assert dropped.evaluations[0] == kept.evaluations[0] == kept.losses[0]


def test_float32_is_near() -> None:
    case = Case(model_kind="unet", steps=2, row=2, col=2, dtype="float32")
    check_every_rank(case, train_in_process(case))


@pytest.mark.parametrize(("row", "col"), [(2, 1), (1, 2), (2, 2)])
def test_only_paths_of_odd_length_are_laid_out_again(row: int, col: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """1x1 shortcuts, down- and up-sampling: in no other place, and there once."""
    moved: list[tuple[int, ...]] = []
    original = unet_model.redistribute

    def counted(x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        moved.append(tuple(x.shape))
        return original(x, *arguments, **options)

    monkeypatch.setattr(unet_model, "redistribute", counted)
    case = Case(model_kind="unet", steps=1, row=row, col=col)
    train_in_process(case)
    links = unet_links(UNET)
    expected = sum(link.shortcut or link.kind in ("down", "up") for link in links)
    assert expected == 7
    sub_shards, passes = 2, 2
    assert len(moved) == expected * sub_shards * passes * case.grid.size


# --- what does not fit


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"col": 3}, r"heads \(4\) of down1_attention0 and 3 more cannot be cut along col = 3"),
        ({"row": 3}, r"channels \(8\) of input and \d+ more cannot be cut along row = 3"),
        ({"col": 8}, r"heads \(4\) of .* cannot be cut along col = 8; the nearest grids that work: G_row=2, G_col=4"),
        ({"row": 16}, r"channels \(8\) of .*the nearest grids that work: "),
    ],
)
def test_a_grid_that_does_not_fit_names_layers_sizes_and_grids_that_do(grid: dict[str, int], message: str) -> None:
    with pytest.raises(GridError, match=message):
        UNet(UNET).check(ProcessGrid(**grid))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 9}, r"image_size \(9\) is halved 1 times"),
        ({"width": 7}, r"width \(7\) must be even"),
        ({"groups": 3}, r"width x 1 \(8\) must be a multiple of groups"),
        ({"attention_levels": (2,)}, r"attention_levels has 2, but multipliers makes the levels 0 to 1"),
        ({"head_channels": 5}, r"the 16 channels of level 1 must be a multiple of head_channels"),
        ({"multipliers": (1, 0)}, r"multipliers \[1, 0\] must be positive"),
    ],
)
def test_a_network_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(**changes)


def test_there_can_be_as_many_stages_as_links() -> None:
    model = UNet(UNET)
    for stages in (2, 4, 8, 16):
        spans = virtual_spans(model, ChunkLayout(stages=stages))
        assert [i for span in spans for i in span] == list(range(16))
        assert all(sum(model.layers[i].cost for i in span) > 0 for span in spans)
