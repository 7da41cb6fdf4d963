"""The performance model on U-Nets: convolutions, shortcuts that are laid out anew, several stages, sub-shards."""

from pathlib import Path
from typing import Any

import pytest

from axonn.models.unet.unet_config import UNetConfig
from axonn.perf.layers.kernel_operations import Convolution, Product
from axonn.perf.machine.kernel_times import Kernels
from axonn.perf.machine.machine_file import MachineFile, load_machine
from axonn.perf.prediction import Prediction, predict
from axonn.perf.strategy import Strategy
from axonn.spans import breakdown, overlap
from experiments.definition import load_model

ROOT = Path(__file__).parents[2]
UNET = UNetConfig(name="u", image_size=32, width=512, multipliers=(1, 2, 2), blocks=2, head_channels=64, dropout=0.1)


@pytest.fixture(scope="module")
def machine() -> MachineFile:
    return load_machine(ROOT / "experiments/machines/summit.yaml")


def run(machine: MachineFile, model: UNetConfig = UNET, **given: Any) -> Prediction:
    base = {"microbatch_size": 8, "schedule": {"name": "1f1b"}, "message_library": "nccl"}
    strategy = Strategy.model_validate(base | {"grid": {"data": 2}} | given)
    return predict(model, machine, strategy, batch_size=64, record=True)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"grid": {"row": 2}},
        {"grid": {"col": 2, "data": 2}},
        {"grid": {"row": 2, "col": 2, "data": 2}, "overdecomposition": 2},
        {"grid": {"inter": 3, "data": 2}, "partition": "work"},
        {"grid": {"inter": 2, "row": 2}, "overlap_input_gradients": True, "overdecomposition": 2},
    ],
    ids=str,
)
def test_a_unet_is_predicted_on_any_grid(machine: MachineFile, given: dict[str, Any]) -> None:
    prediction = run(machine, **given)
    found, parts = breakdown(prediction.spans()), prediction.parts
    assert found.total == pytest.approx(prediction.batch_time_s)
    assert found.compute == pytest.approx(parts.compute)
    assert found.tensor == pytest.approx(parts.tensor_all_reduce, abs=1e-9)
    assert found.unexplained == pytest.approx(0, abs=1e-9)
    # No faster than the peak on the work that there is, and no slower than a tenth of it.
    assert 10 < prediction.pct_peak < 100


def test_shipped_unets_are_predicted(machine: MachineFile) -> None:
    small, large = (load_model(name) for name in ("unet-3.5b", "unet-7.5b"))
    grid = {"row": 4, "col": 4, "data": 2}
    assert isinstance(small, UNetConfig)
    assert isinstance(large, UNetConfig)
    times = [run(machine, model, grid=grid, microbatch_size=2) for model in (small, large)]
    work = large.forward_flops / small.forward_flops
    assert 0.6 * work < times[1].batch_time_s / times[0].batch_time_s < 1.2 * work


def test_a_convolution_takes_what_its_matrix_product_takes(machine: MachineFile) -> None:
    kernels = Kernels(machine.gpu)
    conv = Convolution(images=8, inputs=512, outputs=512, size=16, kernel=3)
    assert kernels.seconds(conv) == kernels.seconds(Product(8 * 16 * 16, 512, 512 * 9))
    assert conv.flops == Product(8 * 16 * 16, 512, 512 * 9).flops
    # A stride of two reads four times as many places for the same work.
    strided = conv._replace(stride=2)
    assert strided.flops == conv.flops
    backward = strided._replace(role="input")
    assert kernels.seconds(backward) == kernels.seconds(Product(8 * 32 * 32, 512, 512 * 9 // 4))


def test_sub_shards_hide_collectives_where_there_is_something_to_hide(machine: MachineFile) -> None:
    one, two = (run(machine, grid={"row": 4}, microbatch_size=16, overdecomposition=n) for n in (1, 2))
    assert two.parts.tensor_all_reduce < 0.8 * one.parts.tensor_all_reduce
    assert overlap(one.spans()).hidden == pytest.approx(0, abs=1e-9)
    assert overlap(two.spans()).reached > 0.5
    assert two.parts.compute > one.parts.compute
