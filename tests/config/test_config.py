"""Strict configuration: what is misspelt, missing, twice or of the wrong type is an error that names file and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from axonn.config.train_config import TrainConfig, load_yaml, read_yaml
from axonn.errors import ConfigError
from axonn.models.gpt.gpt_config import GPTConfig
from axonn.models.gpt.gpt_model import GPT
from axonn.tensor import TensorContext

CONFIG = """\
model: {name: tiny, layers: 2, hidden: 8, heads: 2, seq_len: 4, vocab: 256}
batch_size: 4
microbatch_size: 2
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def error_of(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_yaml(path, TrainConfig)
    assert str(error.value).startswith(f"{path}: ")
    return str(error.value).replace(str(path), "FILE")


def test_a_short_file_is_complete(path: Path) -> None:
    path.write_text(CONFIG)
    config = load_yaml(path, TrainConfig)
    assert config.model == GPTConfig(name="tiny", layers=2, hidden=8, heads=2, seq_len=4, vocab=256)
    assert (config.batch_size, config.microbatch_size) == (4, 2)
    assert config.schedule.name == "message-driven"
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("batchsize: 3", "FILE: unknown key 'batchsize'; did you mean 'batch_size'?"),
        ("grid: {interr: 2}", "FILE: unknown key 'grid.interr'; did you mean 'inter'?"),
        ("schedule: {in_fligth_limit: 2}", "did you mean 'in_flight_limit'?"),
        ("optimizer: {xyz: 0.1}", "known keys: name, lr, clip_norm, schedule, "),
        ("optimizer: {name: sgd, momentun: 0.1}", "unknown key 'optimizer.momentun'; did you mean 'momentum'?"),
        ("optimizer: {name: sgd, betas: [0, 0]}", "'optimizer.betas'; it belongs to the optimizer 'adamw'"),
        ("optimizer: {momentum: 0.1}", "unknown key 'optimizer.momentum'; it belongs to the optimizer 'sgd'"),
        ("1: 2", "FILE: '1': Keys should be strings"),
    ],
)
def test_an_unknown_key_names_file_key_and_the_nearest(path: Path, line: str, message: str) -> None:
    assert message in error_of(path, CONFIG + line + "\n")


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        (CONFIG + "batch_size: 8\n", "batch_size", 4),
        (CONFIG + "grid:\n  data: 1\n  inter: 2\n  data: 2\n", "data", 7),
        (CONFIG + "grid: {data: 1, data: 1}\n", "data", 4),
    ],
)
def test_a_key_given_twice_names_key_and_line(path: Path, text: str, key: str, line: int) -> None:
    message = error_of(path, text)
    assert f"the key '{key}' is given twice" in message
    assert f"line {line}" in message


def test_the_same_key_in_two_places_is_fine(path: Path) -> None:
    path.write_text("a: {x: 1}\nb: {x: 1}\n")
    assert read_yaml(path) == {"a": {"x": 1}, "b": {"x": 1}}


@pytest.mark.parametrize(
    ("line", "key", "found"),
    [
        ("steps: '5'", "steps", "'5'"),
        ("steps: 2.5", "steps", "2.5"),
        ("steps: true", "steps", "true"),
        ("steps: 0", "steps", "0"),
        ("precision: float8", "precision", "'float8'"),
        ("optimizer: {lr: fast}", "optimizer.lr", "'fast'"),
        ("optimizer: {lr: -1.0}", "optimizer.lr", "-1.0"),
        ("optimizer: {betas: [0.9, x]}", "optimizer.betas.1", "'x'"),
        ("optimizer: {name: sgd, momentum: 1}", "optimizer.momentum", "1"),
        ("optimizer: {name: sdg}", "optimizer", "name being 'adamw' (the default) or 'sgd' (found {'name': 'sdg'})"),
        ("activation_checkpointing: 0", "activation_checkpointing", "0"),
        ("schedule: {placement: w}", "schedule.placement", "'w'"),
        ("precision: {master: float16}", "precision.master", "'float16'"),
        ("grid: 4", "grid", "4"),
        ("data: {path: 3}", "data.path", "3"),
    ],
)
def test_a_wrong_type_or_value_names_key_and_what_was_found(path: Path, line: str, key: str, found: str) -> None:
    message = error_of(path, CONFIG + line + "\n")
    assert f"'{key}" in message
    assert found in message


def test_a_missing_key_is_named(path: Path) -> None:
    assert error_of(path, CONFIG.replace("batch_size: 4\n", "", 1)) == "FILE: the key 'batch_size' is missing"
    assert "the key 'model.heads' is missing" in error_of(path, CONFIG.replace("heads: 2, ", ""))


def test_all_mistakes_are_told_at_once(path: Path) -> None:
    message = error_of(path, CONFIG + "stepps: 3\nseed: x\n")
    assert "did you mean 'steps'?" in message
    assert "'seed'" in message


def test_heads_that_do_not_divide_are_refused(path: Path) -> None:
    message = error_of(path, CONFIG.replace("heads: 2", "heads: 3"))
    assert "'model'" in message
    assert "hidden (8) must be a multiple of heads (3)" in message


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("1E3", 1e3), ("-2.5e+4", -2.5e4), ("3.e-2", 3e-2), ("0.001", 1e-3)]
)
def test_numbers_with_an_exponent_are_numbers(path: Path, text: str, value: float) -> None:
    path.write_text(f"x: {text}\n")
    found = read_yaml(path)["x"]
    assert isinstance(found, float)
    assert found == value


@pytest.mark.parametrize("text", ["1e3x", "e5", "12", "0x1e3"])
def test_what_only_looks_like_an_exponent_stays_what_it_was(path: Path, text: str) -> None:
    path.write_text(f"x: {text}\n")
    assert not isinstance(read_yaml(path)["x"], float)


@pytest.mark.parametrize("text", ["", "- 1\n- 2\n", "just text\n"])
def test_a_file_without_keys_is_refused(path: Path, text: str) -> None:
    assert "expected keys and values" in error_of(path, text)


@pytest.mark.parametrize("text", ["a: [1, 2\n", "a: b: c\n", "? [1, 2]\n: 3\n", "? {a: 1}\n: 3\n", "a: &x 1\nb: *y\n"])
def test_broken_yaml_names_the_file(path: Path, text: str) -> None:
    assert "FILE: is not valid YAML" in error_of(path, text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_yaml(path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00x")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(binary)


def test_configurations_do_not_change() -> None:
    config = GPTConfig(name="t", layers=1, hidden=8, heads=2, seq_len=4, vocab=16)
    with pytest.raises(ValueError, match="frozen"):
        config.layers = 2  # type: ignore[misc]


@pytest.mark.parametrize("tied", [False, True])
def test_the_number_of_parameters_is_that_of_the_model(tied: bool) -> None:
    config = GPTConfig(name="t", layers=3, hidden=24, heads=2, seq_len=10, vocab=61, tied_head=tied)
    built = sum(p.numel() for layer in GPT(config).layers for p in layer.build(TensorContext.serial()).parameters())
    assert config.parameters == built - (61 * 24 if tied else 0)
