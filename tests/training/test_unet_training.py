"""Training a U-Net as people start it: chosen by `kind` in the configuration, recorded by its own formula, exported."""

from __future__ import annotations

from typing import Any

import pytest
from safetensors.torch import load_file

from axonn.config.train_config import TrainConfig, validate
from axonn.errors import ConfigError
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.models.gpt.gpt_model import GPT
from axonn.models.registry import make_model
from axonn.models.unet.unet_config import UNetConfig
from axonn.models.unet.unet_model import UNet
from axonn.observability.records import Workload, read_records
from axonn.training.loop import CHECKPOINTS
from axonn.training.metrics import BATCHES, EVALUATIONS, read_rows
from baselines.adapters.pytorch.pytorch_loop import PlainLoop
from baselines.adapters.pytorch.pytorch_pipelining import TorchPipelining, TorchPipeliningZBV
from experiments.definition import load_model
from tests.helpers.command_line import CommandLine, tiny
from tests.helpers.training import UNET

DIGITS = UNET.model_copy(update={"name": "digits", "channels": 1})
MODEL = DIGITS.model_dump(mode="json")
SAVES = {"checkpoints": {"every": 2, "keep": 3}, "evaluation": {"every": 2}}


def config_of(model: Any) -> TrainConfig:
    return validate(tiny(inter=1).model_dump() | {"model": model}, TrainConfig, where="FILE")


def test_train_goes_on_on_another_grid_and_exports(axonn: CommandLine) -> None:
    """One story, since every start takes seconds."""
    folder = axonn.root / "runs" / "config"

    def train(**changes: Any) -> str:
        plain = {"model": MODEL, "data": {"path": None}, "microbatch_size": 4}
        code, output, error = axonn("train", axonn.config(**(plain | SAVES | changes)))
        assert code == 0, output + error
        return output.replace("\n", " ")

    output = train(steps=2)
    assert f"{DIGITS.parameters / 1e6:.1f}M parameters, 1 rank on the CPU" in output
    assert "1797 images" in output
    assert " images/s" in output
    first = [row["loss"] for row in read_rows(folder / BATCHES)]
    output = train(steps=4, grid={"inter": 2})
    assert "going on after batch 2" in output
    rows = read_rows(folder / BATCHES)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["loss"] for row in rows[:2]] == first
    flops = 3 * 8 * DIGITS.forward_flops
    for row, ranks in zip(rows, (1, 1, 2, 2), strict=True):
        assert row["images_per_s"] * row["seconds"] == pytest.approx(8)
        assert row["tflops_per_gpu"] * row["seconds"] == pytest.approx(flops / ranks / 1e12)
    assert [row["batches"] for row in read_rows(folder / EVALUATIONS)] == [2, 4]
    (record,) = read_records(folder / "record.json")
    assert record.asked == Workload.of(DIGITS, gpus=2, batch_size=8, precision="float32")
    assert record.tflops_formula == "3 x forward of convolutions and matrix products (no recompute)"
    out = axonn.root / "weights.safetensors"
    code, _, error = axonn("export", folder / CHECKPOINTS / "step-00000004", "--out", out)
    assert code == 0, error
    assert sum(weight.numel() for weight in load_file(out).values()) == DIGITS.parameters


def test_a_u_net_that_does_not_fit_is_refused_before_ranks_start(axonn: CommandLine) -> None:
    config = axonn.config(model=MODEL, data={"path": None}, grid={"col": 3})
    axonn.refuses("heads (4) of down1_attention0 and 3 more cannot be cut along col = 3", "train", config)
    config = axonn.config(model=MODEL, data={"path": str(axonn.root / "none.npy")})
    axonn.refuses("none.npy: cannot be read", "train", config)


def test_a_model_is_chosen_by_its_kind() -> None:
    gpt = tiny(inter=1).model.model_dump(mode="json")
    assert gpt.pop("kind") == "gpt"
    for model, config_type, model_type in ((gpt, GPTConfig, GPT), (MODEL, UNetConfig, UNet)):
        config = config_of(model)
        assert type(config.model) is config_type
        assert type(make_model(config.model)) is model_type
        assert TrainConfig.model_validate_json(config.model_dump_json()) == config
        assert config_of(config.model_dump(mode="json")["model"]) == config


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (MODEL | {"widht": 3}, "FILE: unknown key 'model.widht'; did you mean 'width'?"),
        (MODEL | {"hidden": 3}, "FILE: unknown key 'model.hidden'; it belongs to a model of kind 'gpt'"),
        (
            tiny(inter=1).model.model_dump() | {"width": 3},
            "FILE: unknown key 'model.width'; it belongs to a model of kind 'unet'",
        ),
        ({"kind": "unet"}, "FILE: the key 'model.image_size' is missing"),
        (
            MODEL | {"kind": "u-net"},
            "FILE: 'model': expected the keys of a model, kind being 'gpt' (the default) or 'u",
        ),
        ("unet-1m", "FILE: 'model': expected the keys of a model"),
        (MODEL | {"multipliers": [1, "2"]}, "FILE: 'model.multipliers.1': Input should be a valid integer"),
    ],
)
def test_a_wrong_model_is_explained_by_the_keys_of_its_kind(model: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_of(model)
    assert message in str(error.value)


def test_work_counts_by_the_formula_of_its_model() -> None:
    asked = Workload.of(DIGITS, gpus=2, batch_size=8, precision="float32")
    assert asked.flops(recompute=False) == 24 * DIGITS.forward_flops
    assert asked.flops(recompute=True) == 32 * DIGITS.forward_flops
    assert asked.model_dump(exclude_none=True).keys() == {
        "model", "parameters", "gpus", "batch_size", "precision", "forward_flops",
    }  # fmt: skip
    gpt = Workload.of(tiny(inter=1).model, gpus=1, batch_size=8, precision="float32")  # type: ignore[arg-type]
    for changes in ({"forward_flops": 3}, {"seq_len": None}, dict.fromkeys(("seq_len", "layers", "hidden", "vocab"))):
        with pytest.raises(ValueError, match="work has either seq_len, layers, hidden and vocab, or forward_flops"):
            Workload(**(gpt.model_dump() | changes))


@pytest.mark.parametrize("framework", [PlainLoop, TorchPipelining, TorchPipeliningZBV])
def test_baselines_say_that_they_only_train_gpts(framework: Any) -> None:
    assert framework().unavailable(config_of(MODEL)) == "the baselines train GPTs, and digits is none"


def test_models_are_found_by_name_whatever_their_kind() -> None:
    assert load_model("unet-1m").kind == "unet"
    assert load_model("gpt-12b").kind == "gpt"
    with pytest.raises(ConfigError, match=r"there is no model 'unet-2m'; .*known are"):
        load_model("unet-2m")
