"""Experiment files: what they may say, and what is said of mistakes in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from axonn.errors import ConfigError
from experiments.definition import load_experiment
from experiments.predictor import points_to_predict
from experiments.runner import measured_work, points_of

RUNS = """
name: mine
title: Mine
data_set: ipdps22-fig6
runs:
  defaults:
    model: {name: tiny, layers: 2, hidden: 8, heads: 2, seq_len: 4, vocab: 16}
    batch_size: 8
    microbatch_size: 2
    optimizer: {bsize: 1000, k: null}
  runs:
    in a pipe: {grid: {inter: 2}}
    in host memory: {grid: {data: 2}, optimizer: {placement: offloaded}}
  batches: 3
  warmup_batches: 1
  repeats: 2
  loss_tolerance: 1.0e-4
"""
MEASURED = """
measured: {frameworks: [axonn], hidden: 8, heads: 2, seq_len: 4, vocab: 16, layers_per_rank: 1, microbatch_size: 1,
           microbatches_per_rank: 1, min_microbatches: 1, batches: 2, warmup_batches: 0, repeats: 1, loss_tolerance: 1}
"""
PREDICTED = "predicted: {machine: summit, batch_size: 1, precision: float16, frameworks: {}, points: []}\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_runs_have_their_keys_over_the_defaults(tmp_path: Path) -> None:
    experiment = load_experiment(written(tmp_path, RUNS))
    (pipe, first, framework), (host, second, _) = measured_work(experiment)
    assert (pipe, host, framework) == ("in a pipe", "in host memory", "axonn")
    assert (first.grid.inter, second.grid.inter, second.grid.data) == (2, 1, 2)
    # A run that says one key of a section keeps the others of it.
    assert (second.optimizer.placement, second.optimizer.bsize, second.optimizer.k) == ("offloaded", 1000, None)
    assert first.steps == second.steps == 3
    points = points_of(experiment)
    # All of it in turn, and all compute the same.
    assert [(p.label, p.repeat) for p in points] == [(label, i) for i in range(2) for label in (pipe, host)]
    assert len({p.function for p in points}) == 1
    assert len({p.fingerprint for p in points}) == 2


def test_a_data_set_gives_the_predicted_points(tmp_path: Path) -> None:
    machine, points = points_to_predict(load_experiment(written(tmp_path, RUNS)))
    assert (machine, [p.name for p in points]) == (
        "summit",
        ["G_inter 24, state on the device", "G_inter 6, memory optimisation"],
    )


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("bsize: 1000", "bsise: 1000", "runs: in a pipe: unknown key 'optimizer.bsise'; did you mean 'bsize'"),
        ("{grid: {data: 2}", "{gird: {data: 2}", "runs: in host memory: unknown key 'gird'; did you mean 'grid'"),
        ("placement: offloaded", "placement: ofloaded", "runs: in host memory: 'optimizer.placement'"),
        ("repeats: 2", "repeat: 2", "unknown key 'runs.repeat'; did you mean 'repeats'"),
        ("batch_size: 8\n", "\n", "runs: in a pipe: .*batch_size"),
        ("model: {name: tiny, ", "model: gpt-12c  # {", "there is no model 'gpt-12c'; did you mean gpt-12b"),
        ("title: Mine", PREDICTED + "title: Mine", "data_set stands for both published and predicted; give either"),
        ("title: Mine", "published: x.json\ntitle: Mine", "data_set stands for both published and predicted"),
        ("title: Mine", MEASURED + "title: Mine", "measured and runs are two ways to say what is measured; give one"),
    ],
)
def test_mistakes_name_the_file_the_run_and_the_key(tmp_path: Path, right: str, wrong: str, said: str) -> None:
    assert right in RUNS
    path = written(tmp_path, RUNS.replace(right, wrong, 1))
    with pytest.raises(ConfigError, match=said) as error:
        load_experiment(path)
    assert str(path) in str(error.value)


def test_a_data_set_that_is_not_there_is_named(tmp_path: Path) -> None:
    experiment = load_experiment(written(tmp_path, RUNS.replace("ipdps22-fig6", "ipdps22-fig66")))
    with pytest.raises(ConfigError, match=r"ipdps22-fig66\.yaml"):
        points_to_predict(experiment)
