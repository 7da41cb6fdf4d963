"""Sequence parallelism and selective recomputation: memory by the published formulas, the same bytes on the wire."""

from collections.abc import Iterator

import pytest

from axonn.config.train_config import load_yaml
from axonn.errors import ConfigError
from axonn.grid import ProcessGrid
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.models.registry import outline_of
from axonn.models.unet.unet_config import UNetConfig
from axonn.perf.layers.layer_cost import Exchange
from axonn.perf.layers.model_outline import with_sequence_parallelism
from axonn.perf.prediction import messages, predict
from axonn.perf.strategy import Strategy
from axonn.perf.timing.communication import Training
from axonn.perf.timing.memory_model import stage_memory
from axonn.perf.timing.stage_times import stage_times
from axonn.schedules import ScheduleSpec
from experiments.definition import ROOT, find_machine

SELENE = find_machine("selene")
S, H, A, V = 256, 512, 8, 1024


def model(layers: int = 4, *, hidden: int = H, heads: int = A) -> GPTConfig:
    sizes = {"layers": layers, "hidden": hidden, "heads": heads, "seq_len": S, "vocab": V}
    return GPTConfig(name="gpt", dropout=0.1, attention_dropout=0.1, **sizes)


def kept(*, t: int, b: int, layers: int, **fields: object) -> int:
    """Bytes that a middle stage of `layers` layers keeps of one microbatch."""
    strategy = Strategy(grid=ProcessGrid(inter=3, col=t), microbatch_size=b, **fields)
    return stage_memory(outline_of(model(3 * layers)), SELENE, strategy, stage=1, held=1).checkpoints


@pytest.mark.parametrize("t", [1, 2, 8])
@pytest.mark.parametrize("b", [1, 4])
def test_activations_are_the_published_formulas_to_the_byte(t: int, b: int) -> None:
    """Korthikanti et al., arXiv 2205.05198: equations 1 and 2, equation 4, and the rows of its Table 2."""
    sbh, scores, layers = S * b * H, 5 * A * S * S * b // t, 2
    assert kept(t=t, b=b, layers=layers, recompute="none") == layers * (10 * sbh + 24 * sbh // t + scores)
    whole = {"recompute": "none", "sequence_parallel": True}
    assert kept(t=t, b=b, layers=layers, **whole) == layers * (34 * sbh // t + scores)
    assert kept(t=t, b=b, layers=layers, recompute="selective") == layers * (10 * sbh + 24 * sbh // t)
    selective = {"recompute": "selective", "sequence_parallel": True}
    assert kept(t=t, b=b, layers=layers, **selective) == layers * 34 * sbh // t  # equation 6
    assert kept(t=t, b=b, layers=layers, recompute="full") == layers * 2 * sbh
    assert kept(t=t, b=b, layers=layers, recompute="full", sequence_parallel=True) == layers * 2 * sbh // t


def test_what_is_recomputed_is_held_once_beside_what_is_kept() -> None:
    outline = outline_of(model())
    for recompute, working in (("none", 0), ("selective", 5 * A * S * S), ("full", S * H * 34 + 5 * A * S * S)):
        strategy = Strategy(grid=ProcessGrid(inter=2), microbatch_size=1, recompute=recompute)
        assert stage_memory(outline, SELENE, strategy, stage=0, held=2).working == working


def test_interleaved_stages_hold_the_published_share_more() -> None:
    """The same, section 4.2.3: with m chunks on each of p stages L (1 + (p - 1) / (p m)) layers' worth."""
    p, m, layers = 4, 2, 16
    strategy = Strategy(
        grid=ProcessGrid(inter=p, col=2),
        order=("inter", "data", "row", "col"),
        microbatch_size=1,
        recompute="selective",
        sequence_parallel=True,
        schedule=ScheduleSpec(name="interleaved-1f1b", chunks=m),
    )
    prediction = predict(model(layers), SELENE, strategy, batch_size=16)
    assert prediction.simulation.most_held[0] == p * m + p - 1
    memory = stage_memory(outline_of(model(layers)), SELENE, strategy, stage=0, held=p * m + p - 1)
    # Embedding and positions keep nothing; the dropout after them a mask, which is no layer's.
    mask = (p * m + p - 1) * (S * H // 2) // m
    assert memory.checkpoints - mask == pytest.approx(layers * (1 + (p - 1) / (p * m)) * 34 * S * H / 2, abs=1)


def exchanged(grid: ProcessGrid, *, spread: bool) -> Iterator[tuple[Exchange, float]]:
    """Exchanges of the layers of a model and the elements that each sends over a ring."""
    outline = outline_of(model())
    outline = with_sequence_parallelism(outline) if spread else outline
    for link in outline.links:
        if link.block is None:
            continue
        for part in link.parts.values():
            for exchange in (*part.forward(grid, 2), *part.backward(grid, 2)):
                n = grid.extent(exchange.axis)
                factor = {"all-gather": n - 1.0, "reduce-scatter": (n - 1) / n}.get(exchange.kind, 2 * (n - 1) / n)
                yield exchange, factor * exchange.elements


def test_sums_become_scatters_and_gathers_of_the_same_volume() -> None:
    grid = ProcessGrid(col=4)
    plain, spread = (list(exchanged(grid, spread=s)) for s in (False, True))
    assert {e.kind for e, _ in plain} == {"all-reduce sum"}
    assert {e.kind for e, _ in spread} == {"reduce-scatter", "all-gather"}
    again = sum(sent for e, sent in spread if e.when == "beside")
    assert sum(sent for _, sent in spread) - again == sum(sent for _, sent in plain)
    # The input of QKV and of FC1 is gathered once more in the backward: half an all-reduce each, of four per layer.
    assert again == sum(sent for _, sent in plain) / 4
    counted = Training(
        outline=with_sequence_parallelism(outline_of(model())), grid=grid, batch_size=2, microbatch_size=2
    )
    assert {c.kind for c in counted.step(0)} >= {"reduce-scatter", "all-gather"}


def test_along_row_nothing_changes_but_the_positions() -> None:
    grid = ProcessGrid(row=2, col=2)
    for spread in (False, True):
        along_row = sum(sent for e, sent in exchanged(grid, spread=spread) if e.axis == "row" and not e.wide)
        moments = sum(sent for e, sent in exchanged(grid, spread=spread) if e.wide)
        assert along_row == sum(sent for e, sent in exchanged(grid, spread=False) if e.axis == "row" and not e.wide)
        assert moments == sum(s for e, s in exchanged(grid, spread=False) if e.wide) / (2 if spread else 1)


def test_a_layer_takes_as_long_as_published() -> None:
    """Korthikanti et al., Table 4: forward and backward of a 22B layer on 8 ranks (ms); nothing was fitted on it."""
    base = {"overlap_input_gradients": True, "accumulate": "in-place"}
    rows: list[tuple[float, float, dict[str, object]]] = [
        (7.7, 11.9, {"recompute": "none"}),
        (7.2, 11.8, {"recompute": "none", "sequence_parallel": True}),
        (7.7, 19.5, {"recompute": "full"}),
        (7.7, 13.2, {"recompute": "selective"}),
        (7.2, 13.1, {"recompute": "selective", "sequence_parallel": True}),
    ]
    for forward, backward, fields in rows:
        strategy = Strategy(grid=ProcessGrid(col=8), microbatch_size=4, **base, **fields)
        one, two = (
            stage_times(
                outline_of(model(n, hidden=6144, heads=64).model_copy(update={"seq_len": 2048})), SELENE, strategy
            )[0]
            for n in (1, 2)
        )
        assert 1e3 * (two.forward - one.forward) == pytest.approx(forward, rel=0.03)
        assert 1e3 * (two.backward - one.backward) == pytest.approx(backward, rel=0.04)


def test_collectives_beside_products_slow_them_down() -> None:
    slow = SELENE.beside_collectives
    assert slow == pytest.approx(108 / 84)
    free = SELENE.network.all_reduce.model_copy(update={"multiprocessors": None})
    fast = SELENE.model_copy(update={"network": SELENE.network.model_copy(update={"all_reduce": free})})
    strategy = Strategy(grid=ProcessGrid(col=8), microbatch_size=4, overlap_input_gradients=True)
    alone = strategy.model_copy(update={"overlap_input_gradients": False})
    outline = outline_of(model(hidden=4096, heads=32))
    with_it, without = (stage_times(outline, m, strategy)[0].backward for m in (SELENE, fast))
    assert without < with_it < stage_times(outline, SELENE, alone)[0].backward
    assert stage_times(outline, SELENE, alone) == stage_times(outline, fast, alone)


def test_spread_activations_travel_in_parts_and_are_not_gathered() -> None:
    base = Strategy(grid=ProcessGrid(inter=2, col=8), order=("inter", "data", "row", "col"), microbatch_size=4)
    spread = base.model_copy(update={"sequence_parallel": True, "partition_messages": False})
    whole = base.model_copy(update={"partition_messages": False})
    outline = outline_of(model())
    assert messages(outline, SELENE, spread)(0, 1) == messages(outline, SELENE, base)(0, 1)
    assert messages(outline, SELENE, whole)(0, 1).transfer == 8 * messages(outline, SELENE, spread)(0, 1).transfer


def test_a_unet_has_no_sequence_to_cut() -> None:
    unet = load_yaml(ROOT / "experiments/models/unet-1m.yaml", UNetConfig)
    strategy = Strategy(grid=ProcessGrid(), microbatch_size=1, sequence_parallel=True)
    with pytest.raises(ConfigError, match=r"has a \w+: set sequence_parallel to false"):
        stage_times(outline_of(unet), SELENE, strategy)
