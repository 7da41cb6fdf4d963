"""Experiment files as what they ask for, point by point, read from the plain YAML without the code that carries it out.

A setting has the dotted name of a field of `Strategy`, or of the model behind `model.`, or is `batch_size` or `gpus`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from axonn.config.loading import FileValue
from axonn.config.train_config import TrainConfig
from axonn.training.framework import Launch
from experiments.definition import HERE, ROOT

BLOCK = re.compile(r"```yaml\n(.*?)```", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class AskedFor:
    """One point at the published scale. `decided`: settings that a rule or the planner chooses, whatever is said."""

    file: Path
    name: str
    framework: str
    settings: dict[str, Any]
    decided: frozenset[str] = frozenset()


def over(base: Mapping[str, Any], *others: Mapping[str, Any]) -> dict[str, Any]:
    """The later ones win, key by key at every depth."""
    found = dict(base)
    for other in others:
        for key, value in other.items():
            inside = isinstance(value, dict) and isinstance(found.get(key), dict)
            found[key] = over(found[key], value) if inside else value
    return found


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """By dotted name."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def leaf_names(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all that a schema has."""
    for name, field in kind.model_fields.items():
        inside = field.annotation
        if isinstance(inside, type) and issubclass(inside, FileValue):
            inside = inside.file_keys()
        if isinstance(inside, type) and issubclass(inside, BaseModel):
            yield from leaf_names(inside, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def files_of_documents(folder: Path) -> Iterator[Path]:
    """The experiment files that the pages show, with their models beside them, written into `folder`."""
    for page in sorted((ROOT / "docs").glob("*.md")):
        blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
        contents = [content for content in map(yaml.safe_load, blocks) if isinstance(content, dict)]
        models = {content["name"]: content for content in contents if "hidden" in content and "name" in content}
        for content in (content for content in contents if "title" in content):
            own = folder / page.stem
            own.mkdir(exist_ok=True)
            for name, model in models.items():
                (own / f"{name}.yaml").write_text(yaml.safe_dump(model), encoding="utf-8")
            for point in content.get("predicted", {}).get("points", []):
                if point["model"] in models:
                    point["model"] = str(own / f"{point['model']}.yaml")
            path = own / f"{content['name']}.yaml"
            path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
            yield path


def model_settings(model: str | Mapping[str, Any]) -> dict[str, Any]:
    """Of a model by name, by file or by its keys."""
    if isinstance(model, str):
        path = Path(model) if model.endswith(".yaml") else HERE / "models" / f"{model}.yaml"
        model = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {f"model.{key}": value for key, value in leaves(model).items()}


def asked_for(path: Path) -> list[AskedFor]:
    """The points of an experiment file, or of the data set that it names."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "data_set" in content:
        return _of_data_set(path, yaml.safe_load((HERE / f"validation/{content['data_set']}.yaml").read_text()))
    panel = content.get("predicted", {})
    return [
        AskedFor(
            file=path,
            name=point.get("label") or f"{point['model']}-{point['gpus']}",
            framework=point["framework"],
            settings=leaves(
                over(
                    {"compute": panel["precision"]},
                    panel["frameworks"].get(point["framework"], {}),
                    point.get("strategy", {}),
                )
            )
            | model_settings(point["model"])
            | {"batch_size": point.get("batch_size", panel["batch_size"]), "gpus": point["gpus"]},
        )
        for point in panel.get("points", [])
    ]


def _of_data_set(path: Path, data: dict[str, Any]) -> list[AskedFor]:
    panel: dict[str, Any] = {}
    if "experiment" in data:
        panel = yaml.safe_load((HERE / data["experiment"]).read_text(encoding="utf-8"))["predicted"]
    defaults = data.get("defaults", {})
    found = []
    for point in data["points"]:
        group = point.get("group", "")
        of_group = over(panel.get("frameworks", {}), data.get("groups", {})).get(group, {})
        compute = {"compute": panel["precision"]} if panel else {}
        strategy = leaves(over(compute, defaults.get("strategy", {}), of_group, point.get("strategy", {})))
        rules = [r for r in data.get("open", []) if "take" in r and point["label"] in r.get("points", [point["label"]])]
        found.append(
            AskedFor(
                file=path,
                name=point["label"],
                framework=group or "AxoNN",
                settings=strategy
                | model_settings(point.get("model", defaults.get("model")))
                | {"batch_size": point.get("batch_size", defaults.get("batch_size")), "gpus": point["gpus"]},
                decided=frozenset(key for rule in rules for value in rule["among"] for key in leaves(value)),
            )
        )
    return found


def flags_of(launch: Launch) -> dict[str, str]:
    """Flags of a command with their values, of a switch the empty text."""
    found: dict[str, str] = {}
    name = ""
    for word in launch.command:
        if word.startswith("--"):
            name = word
            found[name] = ""
        elif name:
            found[name] = f"{found[name]} {word}".strip()
    return found


def stated_by_engine(launch: Launch) -> dict[str, Any]:
    """What the ranks of this suite will do, in the words of an experiment file."""
    config = TrainConfig.model_validate(json.loads(launch.files["spec.json"])["config"])
    optimizer = config.optimizer
    recomputes = config.activation_checkpointing is not None
    return (
        {f"grid.{axis}": extent for axis, extent in config.grid.extents().items()}
        | {f"schedule.{key}": value for key, value in asdict(config.schedule).items()}
        | {f"model.{key}": value for key, value in leaves(config.model.model_dump(mode="json")).items()}
        | {
            "batch_size": config.batch_size,
            "microbatch_size": config.microbatch_size,
            "message_library": {"mpi": "mpi", "torch": "nccl"}[config.transport],
            "optimizer": optimizer.placement,
            "bsize": optimizer.bsize,
            "k": optimizer.k,
            "buckets_resident": optimizer.buckets_resident,
            "compute": config.precision.compute,
            "reduce_type": config.precision.gradient_type,
            "recompute": "full" if recomputes else "none",
            "overdecomposition": config.overdecomposition,
            "clip_norm": optimizer.clip_norm is not None,
        }
        | ({"checkpoint_layers": config.activation_checkpointing} if recomputes else {})
    )


def stated_by_megatron(launch: Launch) -> dict[str, Any]:
    """What flags of Megatron-LM say, or of Megatron-DeepSpeed beside its JSON file."""
    flags = flags_of(launch)
    stages, heads = int(flags["--pipeline-model-parallel-size"]), int(flags["--num-attention-heads"])
    found = {
        "grid.inter": stages,
        "grid.col": int(flags["--tensor-model-parallel-size"]),
        "grid.row": 1,
        "microbatch_size": int(flags["--micro-batch-size"]),
        "batch_size": int(flags["--global-batch-size"]),
        "compute": "float16" if "--fp16" in flags else "bfloat16" if "--bf16" in flags else "float32",
        "recompute": flags.get("--recompute-granularity", "none"),
        "clip_norm": float(flags["--clip-grad"]) > 0,
        "model.layers": int(flags["--num-layers"]),
        "model.hidden": int(flags["--hidden-size"]),
        "model.heads": heads,
        "model.seq_len": int(flags["--seq-length"]),
        "model.vocab": int(flags["--vocab-size"]) + 1,
        "model.tied_head": "--untie-embeddings-and-output-weights" not in flags,
        "model.dropout": float(flags["--hidden-dropout"]),
        "model.attention_dropout": float(flags["--attention-dropout"]),
    }
    if "--recompute-num-layers" in flags:
        found["checkpoint_layers"] = int(flags["--recompute-num-layers"])
    if "ds_config.json" not in launch.files:
        chunk = flags.get("--num-layers-per-virtual-pipeline-stage")
        layers = int(flags["--num-layers"])
        return found | {
            "schedule.chunks": 1 if chunk is None else layers // (stages * int(chunk)),
            "optimizer": "sharded" if "--use-distributed-optimizer" in flags else "device",
        }
    settings = json.loads(launch.files["ds_config.json"])
    assert settings["train_batch_size"] == found["batch_size"]
    assert settings["train_micro_batch_size_per_gpu"] == found["microbatch_size"]
    assert settings.get("fp16", {}).get("enabled", False) == (found["compute"] == "float16")
    assert settings.get("bf16", {}).get("enabled", False) == (found["compute"] == "bfloat16")
    replicas = found["batch_size"] // found["microbatch_size"] // settings["gradient_accumulation_steps"]
    return found | {
        "grid.data": replicas,
        "optimizer": {0: "device", 1: "sharded"}[settings["zero_optimization"]["stage"]],
        "partition_messages": settings["pipeline"]["pipe_partitioned"],
    }


STATED = {
    "axonn": stated_by_engine,
    "megatron": stated_by_megatron,
    "deepspeed": stated_by_megatron,
}
"""By adapter, what a launch says of each setting."""
