"""What `axonn jobs` refuses, and what it warns of: each names the place and what to change, and writes nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from axonn.errors import ConfigError
from experiments.definition import HERE, load_experiment
from jobscripts.generate import title_of
from jobscripts.job_plan import plan_jobs, plan_small_jobs
from jobscripts.site import Site, load_site
from jobscripts.system import load_system
from tests.helpers.cluster_jobs import SCHEME, few, planned, site
from tests.helpers.command_line import CommandLine, tiny
from tests.helpers.job_folders import small_job, written


@pytest.fixture
def axonn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    monkeypatch.chdir(tmp_path)
    return CommandLine(tmp_path, monkeypatch, capsys)


def experiment_file(folder: Path, name: str, **changes: Any) -> Path:
    """A copy of an experiment whose `predicted` is changed."""
    content = yaml.safe_load((HERE / f"{name}.yaml").read_text(encoding="utf-8"))
    content["predicted"] |= changes
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def site_file(folder: Path, **content: Any) -> Path:
    path = folder / "site.yaml"
    path.write_text(yaml.safe_dump({"account": "abc123"} | content), encoding="utf-8")
    return path


def refused(axonn: CommandLine, *arguments: str | Path) -> str:
    """The error, which may have a line for each point; nothing is written."""
    before = sorted(axonn.root.rglob("*"))
    code, _, error = axonn("jobs", *arguments)
    assert code == 2
    assert error.startswith("error: ")
    assert sorted(axonn.root.rglob("*")) == before
    return error


FIG6 = HERE / "fig6.yaml"
POINT = {"framework": "AxoNN", "model": "gpt-12b", "gpus": 48}
STRATEGY = {"microbatch_size": 8, "grid": {"inter": 6, "data": 8}, "schedule": {"in_flight_limit": 6}}


def test_an_unknown_machine_has_a_nearest_name(axonn: CommandLine) -> None:
    error = refused(axonn, FIG6, "--machine", "sumit", "--site", site_file(axonn.root))
    assert "no machine 'sumit'" in error
    assert "did you mean summit?" in error
    assert "frontier, perlmutter, summit" in error


def test_an_unknown_file_of_a_machine(axonn: CommandLine) -> None:
    assert "no machine 'mine.yaml'" in refused(axonn, FIG6, "--machine", "mine.yaml")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"acount": "x"}, "'acount'.*account"),
        ({"wall_time": "2h"}, "wall_time.*hours:minutes, in quotes"),
        # 1:30 without quotes is a number to YAML 1.1.
        ({"wall_time": 90}, "wall_time"),
        ({"wall_time": "0:05", "warn": "0:05"}, r"warn \(0:05\) has to be less than wall_time \(0:05\)"),
        ({"environment": {"MY-NAME": "x"}}, "environment.*'MY-NAME' is no name of a variable"),
        ({"account": "my project"}, "account.*'my project' is not one word"),
        ({"options": ["exclusive"]}, "options.*'exclusive' is no option"),
        ({"options": ["--exclusive\r#BSUB -P other"]}, "options.*is no option; write one a line"),
        ({"launcher_options": ["--cpu-bind=cores\n"]}, "launcher_options.*is no option"),
        ({"queue": "batch\u001b[2J"}, "queue.*is not one word"),
        ({"data": "$SCRATCH/tokens"}, "data.*no shell reads it; write the path itself"),
        ({"scheduler": "slrum"}, "no scheduler 'slrum'; known are lsf, none, slurm"),
        ({"launcher": "aprun"}, "no launcher 'aprun'; known are hydra, jsrun, mpiexec, srun"),
        ({"cores_per_rank": 0}, "cores_per_rank"),
    ],
)
def test_a_wrong_site_file_is_named_with_its_key(axonn: CommandLine, content: dict[str, Any], said: str) -> None:
    path = site_file(axonn.root, **content)
    error = refused(axonn, FIG6, "--machine", "summit", "--site", path)
    assert re_search(said, error), error
    if not {"scheduler", "launcher"} & set(content):
        assert str(path) in error


def re_search(pattern: str, text: str) -> bool:
    return re.search(pattern, " ".join(text.split())) is not None


def test_an_account_that_is_missing_is_asked_for_by_name(axonn: CommandLine) -> None:
    assert "needs account; add account: ..." in refused(axonn, FIG6, "--machine", "summit")
    (axonn.root / "site.yaml").write_text("queue: debug\n")
    error = refused(axonn, FIG6, "--machine", "summit", "--site", axonn.root / "site.yaml")
    assert "site.yaml: a job on summit needs account; add account: ..." in error


def test_ranks_that_do_not_fill_nodes_and_memory_that_is_not_there(axonn: CommandLine) -> None:
    error = refused(axonn, HERE / "fig5.yaml", "--machine", "summit", "--site", site_file(axonn.root))
    assert "3 job(s) cannot run on summit" in error
    assert "gpt-10b-1x8-2-sub-shards-axonn: 8 ranks do not fill nodes of 6" in error
    assert "choose a grid of 6 or 12 ranks" in error
    assert "needs 34.1 GB on the fullest GPU, which has 17.2 GB (predicted); lower microbatch_size" in error


def test_more_nodes_than_the_machine_has(axonn: CommandLine) -> None:
    content = yaml.safe_load((HERE.parent / "jobscripts" / "systems" / "summit.yaml").read_text(encoding="utf-8"))
    machine = axonn.root / "part.yaml"
    machine.write_text(yaml.safe_dump(content | {"nodes": 7}), encoding="utf-8")
    path = experiment_file(axonn.root, "fig6", points=[{**POINT, "strategy": STRATEGY}])
    error = refused(axonn, path, "--machine", machine, "--site", site_file(axonn.root))
    assert "1 job(s) cannot run on summit" in error
    assert "gpt-12b-48-axonn: 8 nodes are more than the 7 of summit" in error


def test_an_unknown_framework_is_named_with_those_that_there_are(axonn: CommandLine) -> None:
    error = refused(axonn, FIG6, "--machine", "summit", "--site", site_file(axonn.root), "--framework", "Megatron")
    assert "no point is of Megatron; the frameworks of fig6 are AxoNN, DeepSpeed, Megatron-LM" in " ".join(
        error.split()
    )


def test_an_unknown_adapter_of_an_experiment(axonn: CommandLine) -> None:
    path = experiment_file(axonn.root, "fig6", adapters={"AxoNN": "axon"}, points=[{**POINT, "strategy": STRATEGY}])
    error = refused(axonn, path, "--machine", "summit", "--site", site_file(axonn.root))
    assert "gpt-12b-48-axonn: unknown framework 'axon'; did you mean 'axonn'?" in " ".join(error.split())


def test_points_of_one_name(axonn: CommandLine) -> None:
    points = [{**POINT, "strategy": STRATEGY, "label": label} for label in ("one point", "One-Point")]
    path = experiment_file(axonn.root, "fig6", points=points)
    error = refused(axonn, path, "--machine", "summit", "--site", site_file(axonn.root))
    assert "several points would have jobs called one-point-axonn; give them other labels" in error


def test_small_points_have_their_own_number_of_batches(axonn: CommandLine) -> None:
    error = refused(axonn, FIG6, "--machine", "summit", "--small", "--steps", "3", "--site", site_file(axonn.root))
    assert "--steps is for points at the published scale" in error


def test_an_experiment_without_small_work(axonn: CommandLine) -> None:
    error = refused(axonn, HERE / "ginter.yaml", "--machine", "summit", "--small", "--site", site_file(axonn.root))
    assert "experiments/ginter.yaml has nothing small to measure; leave out --small" in error


def test_a_dry_run_writes_nothing_and_its_hours_add_up(axonn: CommandLine) -> None:
    path = site_file(axonn.root, wall_time="2:30")
    arguments = ("jobs", HERE / "fig5.yaml", "--machine", "perlmutter", "--site", path, "--dry-run")
    code, out, _ = axonn(*arguments, "--repeats", "2")
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    hours = {row[0]: float(row[-1]) for row in rows if len(row) == 5 and row[0].startswith("gpt-10b")}
    assert len(hours) == 6
    assert set(hours.values()) == {5.0}
    assert ["all", "30.0"] in rows
    assert sorted(axonn.root.iterdir()) == [path]


def test_names_of_jobs_are_whole_on_a_narrow_screen(axonn: CommandLine) -> None:
    code, out, _ = axonn(
        "jobs", HERE / "fig3.yaml", "--machine", "summit", "--site", site_file(axonn.root), "--dry-run"
    )
    assert code == 0
    assert "g_inter-24-state-on-the-device-axonn" in out
    assert "…" not in out
    warnings, table = [], []
    for line in out[: out.index("AxoNN: ")].splitlines():
        (warnings if line.startswith("warning: ") else table).append(line)
    assert len(warnings) == 1
    assert "summit takes no jobs any more" in warnings[0]
    assert max(map(len, table)) <= 80


def test_a_folder_with_other_files_or_jobs_that_ran_is_left_alone(axonn: CommandLine) -> None:
    folder, path = axonn.root / "jobs", site_file(axonn.root)
    arguments = (HERE / "fig5.yaml", "--machine", "perlmutter", "--site", path, "--out", folder)
    folder.mkdir()
    (folder / "mine.txt").touch()
    assert "has other files (mine.txt); choose an empty folder with --out" in " ".join(
        refused(axonn, *arguments).split()
    )
    (folder / "mine.txt").unlink()
    assert axonn("jobs", *arguments)[0] == 0
    # Once more, over what nobody started.
    assert axonn("jobs", *arguments)[0] == 0
    (folder / "gpt-10b-1x8-2-sub-shards-axonn" / "run").mkdir()
    assert "gpt-10b-1x8-2-sub-shards-axonn ran already" in " ".join(refused(axonn, *arguments).split())


def test_a_folder_without_a_template_of_ours(axonn: CommandLine) -> None:
    arguments = (HERE / "fig5.yaml", "--machine", "perlmutter", "--site", site_file(axonn.root))
    mine, out = axonn.root / "templates", axonn.root / "jobs"
    mine.mkdir()
    error = refused(axonn, *arguments, "--templates", mine, "--out", out)
    assert f"{mine}: has no template; copy what you want to change of" in error
    (mine / "submit-all.sh.j2").write_text("#!/usr/bin/env bash\necho mine\n")
    assert axonn("jobs", *arguments, "--templates", mine, "--out", out)[0] == 0
    assert (out / "submit-all.sh").read_text().endswith("echo mine\n")


def test_groups_that_straddle_nodes_are_warned_of_with_their_cost() -> None:
    experiment = load_experiment(FIG6)
    panel = experiment.predicted
    assert panel is not None
    points = [p for p in panel.points if p.name == "gpt-100b-384" and p.framework == "Megatron-LM"]
    one = experiment.model_copy(update={"predicted": panel.model_copy(update={"points": points})})
    (line,) = plan_jobs(one, system=load_system("summit"), site=site(warn="1:00", wall_time="9:00")).warnings
    assert line.startswith("gpt-100b-384-megatron-lm: 32 of 32 groups along col lie on several nodes")
    assert re_search(r"of a batch of \d+\.\d\d s .* take (\d+\.\d\d) s, of which \1 s \(55% of the batch\)", line)


def test_what_runs_under_compute_is_said_apart_from_what_is_waited_for() -> None:
    found = {line.split(":")[0]: line for line in planned("fig5", "perlmutter").warnings}
    one_ring = found["gpt-10b-1x8-2-sub-shards-axonn"]
    assert "predicted to take 0.44 s, of which 0.00 s (0% of the batch) are not hidden under compute" in one_ring
    assert planned("fig5", "frontier").warnings == []


def test_what_the_engine_refuses_is_left_out_with_its_reason() -> None:
    plan = planned("fig7", "perlmutter")
    assert [job.work.name for job in plan.jobs] == ["unet-3.5b-32px-32"]
    (line,) = plan.left_out_lines()
    assert line.startswith("unet-7b-32px-64-our-engine")
    assert "heads (50) of middle_attention0 cannot be cut along col = 4" in line


def test_points_left_out_for_one_reason_are_one_line() -> None:
    experiment = load_experiment(FIG6)
    assert experiment.measured is not None
    measured = experiment.measured.model_copy(update={"max_ranks": 2})
    plan = plan_small_jobs(
        experiment.model_copy(update={"measured": measured}), system=load_system("summit"), site=site()
    )
    (line,) = plan.left_out_lines()
    assert line.startswith("gpt-4x256-1r-deepspeed-pipeline, gpt-4x256-1r-megatron-pipeline, ")
    assert len({job.name for job in plan.jobs}) == 4


def test_nothing_to_write_is_an_error() -> None:
    only = few("fig7", frameworks=(SCHEME,))
    assert only.predicted is not None
    panel = only.predicted.model_copy(update={"adapters": {}, "points": only.predicted.points[:1]})
    with pytest.raises(ConfigError, match=r"there is no job to write(?s:.*)no adapter is called 'our engine"):
        plan_jobs(only.model_copy(update={"predicted": panel}), system=load_system("perlmutter"), site=site())


def test_without_a_site_file_everything_has_a_default() -> None:
    assert load_site(None) == Site()
    assert (Site().seconds, Site().warn_seconds) == (3600, 300)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "../away"}, "job '../away': name it with letters"),
        ({"name": ".."}, "job '..': name it with letters"),
        ({"framework": "AxoNN\ntouch /tmp/pwned"}, "the label .*has control characters"),
        ({"framework": "AxoNN\x1b[2J"}, "the label .*has control characters"),
    ],
)
def test_names_that_leave_the_folder_or_the_line_are_refused(
    tmp_path: Path, changes: dict[str, str], said: str
) -> None:
    job = replace(small_job("tiny-1r", "axonn", tiny(inter=1, steps=3)), **changes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=said):
        written(tmp_path / "jobs", [job])
    assert not list(tmp_path.iterdir())
    assert "\n" not in title_of(job)


def test_a_point_of_two_lines_is_refused(tmp_path: Path) -> None:
    job = small_job("tiny-1r", "axonn", tiny(inter=1, steps=3))
    job = replace(job, work=replace(job.work, name="tiny\n$(id)"))
    with pytest.raises(ConfigError, match="has control characters; write it in one line"):
        written(tmp_path / "jobs", [job])
    for name in ("my experiment", "../fig6"):
        with pytest.raises(ConfigError, match=r"experiment '.*': name it"):
            written(tmp_path / "jobs", [small_job("a", "axonn", tiny(inter=1, steps=3))], experiment=name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"options": ["--exclusive\ntouch x"]}, "is no option; write one a line"),
        ({"launcher_options": ["--bind\rx"]}, "is no option; write one a line"),
        ({"launcher_options": ["rm"]}, "is no option; write one a line"),
        ({"environment": {"A": "one\ntwo"}}, "is more than one line"),
        ({"environment": {"A-B": "x"}}, "is no name of a variable"),
    ],
)
def test_a_machine_file_has_one_line_each(axonn: CommandLine, content: dict[str, Any], said: str) -> None:
    path = axonn.root / "mine.yaml"
    base = {"machine": "m", "scheduler": "none", "launcher": "mpiexec", "cores_per_rank": 1, "source": "a test"}
    path.write_text(yaml.safe_dump(base | content), encoding="utf-8")
    assert re_search(said, refused(axonn, FIG6, "--machine", path))
