"""Configurations of strangers, and damaged ones: read as valid ones, or refused in words that name the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from axonn.config.loading import read_yaml, shortened
from axonn.config.train_config import TrainConfig, load_yaml
from axonn.errors import ConfigError
from axonn.models.unet.unet_config import UNetConfig
from axonn.perf.machine.machine_file import load_machine
from baselines.comparison import load_tolerances
from baselines.contenders import FILE, load_contenders
from experiments.definition import HERE, ROOT, load_experiment, load_model
from experiments.validation.published_sets import load_data_set
from jobscripts.site import load_site
from jobscripts.system import load_system
from tests.helpers.command_line import tiny
from tests.helpers.fuzzing import altered, bounded_memory, damaged, fuzz, odd, read_or_refused, special_files

SITE = """
account: abc123
queue: batch
wall_time: "2:00"
options: ["--exclusive"]
modules: [gcc/12, cuda]
setup: ["source env/bin/activate"]
environment: {NAME: "$HOME/x"}
programs: {megatron: /home/me/Megatron-LM}
data: /data/tokens
cores_per_rank: 7
"""
UNET = next(path for path in sorted((HERE / "models").glob("unet-*.yaml")))
TRAINING = yaml.safe_dump(tiny(steps=3, initial_weights="start.safetensors").model_dump(mode="json")).encode()
PLANNED = (
    b"# Chosen by axonn plan for 2 GPUs\n"
    + yaml.safe_dump(tiny(steps=3).model_dump(mode="json", exclude_defaults=True)).encode()
)
READERS: dict[str, tuple[bytes, Callable[[Path], Any]]] = {
    "training": (TRAINING, lambda path: load_yaml(path, TrainConfig)),
    "plan": (PLANNED, lambda path: load_yaml(path, TrainConfig)),
    "gpt": ((HERE / "models" / "gpt-12b.yaml").read_bytes(), lambda path: load_model(str(path))),
    "unet": (UNET.read_bytes(), lambda path: load_yaml(path, UNetConfig)),
    "machine": ((HERE / "machines" / "summit.yaml").read_bytes(), load_machine),
    "experiment": ((HERE / "fig6.yaml").read_bytes(), load_experiment),
    "runs": ((HERE / "inflight.yaml").read_bytes(), load_experiment),
    "data-set": ((HERE / "validation" / "ipdps22-fig11.yaml").read_bytes(), load_data_set),
    "derived-set": ((HERE / "validation" / "poster-unet.yaml").read_bytes(), load_data_set),
    "site": (SITE.encode(), load_site),
    "system": (
        (ROOT / "jobscripts" / "systems" / "summit.yaml").read_bytes(),
        lambda path: load_system(str(path)),
    ),
    "contenders": (FILE.read_bytes(), load_contenders),
    "tolerances": (
        next((ROOT / "baselines" / "tolerances").glob("*.yaml")).read_bytes(),
        lambda path: load_tolerances(path, ""),
    ),
}
kinds = pytest.mark.parametrize("kind", READERS)


def check(kind: str, path: Path) -> Any:
    found = read_or_refused(lambda: READERS[kind][1](path), names=path)
    if isinstance(found, BaseModel):
        # What was accepted is whole: as plain data it says the same.
        assert type(found).model_validate(found.model_dump(by_alias=True)) == found
    return found


@kinds
def test_good_files_are_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_bytes(READERS[kind][0])
    assert check(kind, path) is not None


@kinds
@fuzz(25)
@given(choice=st.data())
def test_damaged_bytes(kind: str, tmp_path: Path, choice: st.DataObject) -> None:
    path = tmp_path / "damaged.yaml"
    path.write_bytes(choice.draw(damaged(READERS[kind][0])))
    check(kind, path)


@kinds
@fuzz(30)
@given(choice=st.data())
def test_other_values(kind: str, tmp_path: Path, choice: st.DataObject) -> None:
    path = tmp_path / "other.yaml"
    data = choice.draw(altered(yaml.safe_load(READERS[kind][0])))
    path.write_text(yaml.safe_dump(data), encoding="utf-8", errors="surrogatepass")
    check(kind, path)


@kinds
def test_what_is_no_file(kind: str, tmp_path: Path) -> None:
    for path in special_files(tmp_path, ".yaml"):
        with pytest.raises(ConfigError) as caught:
            READERS[kind][1](path)
        assert shortened(str(path), plain=True) in str(caught.value) or str(path) in str(caught.value)


LAUGHS = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]
)
MERGES = "\n".join(
    ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12))]
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LAUGHS, "more than 100000 values, all aliases followed"),
        (MERGES, "more than 100000 values, all aliases followed"),
        ("a: &a [*a]", "line 1: an alias stands inside of what it stands for"),
        ("[" * 100_000, "nested too deeply"),
        ("a: " * 3000 + "1", "is not valid YAML"),
        (f"a: {'9' * 5000}", "line 1: a number of 5000 digits"),
        (f"a: 0x{'f' * 5000}", "line 1: a number of 5002 digits"),
        ("- 1\n" * 200_000, "more than 100000 values"),
        ("x" * (2**21 + 1), "is larger than 2097152 bytes"),
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("a: !!timestamp x", "a value is not of the type that it claims"),
        ("a: 2001-99-99", "month must be in 1..12"),
        ("a: \x1b", "special characters are not allowed"),
    ],
    ids=lambda value: value[:12],
)
def test_bombs(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bomb.yaml"
    path.write_text(text, encoding="utf-8")
    with bounded_memory(2**30), pytest.raises(ConfigError, match=said) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value)


def test_aliases_of_people_are_read(tmp_path: Path) -> None:
    path = tmp_path / "aliases.yaml"
    path.write_text("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]\n", encoding="utf-8")
    assert read_yaml(path) == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": [{"x": 1}, {"x": 1}]}


@fuzz(100)
@given(value=odd)
def test_a_message_is_never_longer_than_people_read(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(yaml.safe_dump({"model": value, "steps": value}), encoding="utf-8", errors="surrogatepass")
    with pytest.raises(ConfigError) as caught:
        load_yaml(path, TrainConfig)
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e999"])
@pytest.mark.parametrize("key", ["lr", "eps", "weight_decay", "clip_norm"])
def test_settings_are_finite(tmp_path: Path, key: str, value: str) -> None:
    path = tmp_path / "train.yaml"
    path.write_bytes(TRAINING)
    data = yaml.safe_load(TRAINING)
    data["optimizer"][key] = "HERE"
    path.write_text(yaml.safe_dump(data).replace("HERE", value), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"optimizer.{key}.*finite number"):
        load_yaml(path, TrainConfig)
