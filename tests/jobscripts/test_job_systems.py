"""How the machines start jobs is what their references say; templates of the user stand in for ours."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from axonn.errors import ConfigError
from axonn.training.engine_framework import EngineAdapter
from axonn.training.framework import load_adapter
from jobscripts.generate import TEMPLATES
from jobscripts.job_plan import JobPlan
from jobscripts.site import Site
from jobscripts.system import load_system, systems
from tests.helpers.cluster_jobs import planned, planned_small, site, write
from tests.helpers.scheduler_options import Script, read_script


def script_of(machine: str, job: str, folder: Path, *, own: Site | None = None) -> tuple[Script, dict[str, str]]:
    """What the script says to scheduler and launcher, and what it exports."""
    (one,) = [found for found in planned("fig6", machine).jobs if found.name == job]
    write(JobPlan(jobs=[one]), folder, machine=machine, own=own or site(environment={}))
    text = (folder / job / "job.sh").read_text()
    exports = dict(re.findall(r'^export (\w+)="(.*)"$', text, re.MULTILINE))
    return read_script(text, launcher=load_system(machine).launcher), exports


def test_summit(tmp_path: Path) -> None:
    script, exports = script_of("summit", "gpt-12b-48-axonn", tmp_path)
    expected = {"--smpiargs": "-gpu", "--nrs": "8", "--tasks_per_rs": "6", "--gpu_per_rs": "6"}
    expected |= {"--cpu_per_rs": "42", "--rs_per_host": "1"}
    assert {name: script.step[name] for name in expected} == {name: [value] for name, value in expected.items()}
    assert exports["PAMI_ENABLE_STRIPING"] == exports["PAMI_IBV_ADAPTER_AFFINITY"] == "1"
    # Both rails.
    assert exports["PAMI_IBV_DEVICE_NAME"] == "mlx5_0:1,mlx5_3:1"
    assert exports["PAMI_IBV_DEVICE_NAME_1"] == "mlx5_3:1,mlx5_0:1"
    rank = (tmp_path / "gpt-12b-48-axonn" / "rank.sh").read_text()
    assert 'export RANK="$OMPI_COMM_WORLD_RANK"' in rank


def test_perlmutter(tmp_path: Path) -> None:
    script, exports = script_of("perlmutter", "gpt-12b-48-megatron-lm", tmp_path)
    job, step = script.job, script.step
    assert (job["--constraint"], job["--gpus-per-node"], job["--ntasks-per-node"]) == (["gpu"], ["4"], ["4"])
    assert (step["--cpus-per-task"], step["--cpu-bind"], step["--ntasks-per-node"]) == (["32"], ["cores"], ["4"])
    # A queue of Perlmutter is a quality of service.
    assert job["--qos"] == ["regular"]
    assert "--partition" not in job
    said = {name: value for name, value in exports.items() if name.startswith(("NCCL", "FI_", "CUDA", "MPICH"))}
    assert said == {
        "NCCL_NET": "AWS Libfabric",
        "NCCL_SOCKET_IFNAME": "hsn",
        "NCCL_CROSS_NIC": "1",
        "NCCL_NET_GDR_LEVEL": "PHB",
        "FI_CXI_RDZV_EAGER_SIZE": "0",
        "FI_CXI_RDZV_GET_MIN": "0",
        "FI_CXI_RDZV_THRESHOLD": "0",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    rank = (tmp_path / "gpt-12b-48-megatron-lm" / "rank.sh").read_text()
    assert all(f'export {pair}"' in rank for pair in ('RANK="$SLURM_PROCID', 'WORLD_SIZE="$SLURM_NTASKS'))


def test_frontier(tmp_path: Path) -> None:
    script, exports = script_of("frontier", "gpt-12b-48-deepspeed", tmp_path)
    assert {script.step[name][0] for name in ("--gpus-per-task", "--gpu-bind")} == {"1", "closest"}
    assert (script.step["--cpus-per-task"], exports["OMP_NUM_THREADS"], exports["FI_CXI_ATS"]) == (["7"], "7", "0")
    assert script.job["--partition"] == ["regular"]
    rank = (tmp_path / "gpt-12b-48-deepspeed" / "rank.sh").read_text()
    # Only now is its one GPU the first; one rank of a node prints the clocks before.
    assert rank.index('if [ "$LOCAL_RANK" -eq 0 ]') < rank.index("export LOCAL_RANK=0\n") < rank.index("cd run")
    script_of("perlmutter", "gpt-12b-48-deepspeed", tmp_path / "all GPUs")
    assert "LOCAL_RANK=0" not in (tmp_path / "all GPUs" / "gpt-12b-48-deepspeed" / "rank.sh").read_text()


@pytest.mark.parametrize(("machine", "word"), [("frontier", "rccl"), ("perlmutter", "nccl")])
def test_a_plugin_of_the_network_is_asked_for_until_the_site_brings_it(machine: str, word: str) -> None:
    system = load_system(machine)
    (line,) = Site().missing(system.provide)
    assert "plugin" in line
    assert Site(modules=[f"{word}/2.18"]).missing(system.provide) == []
    assert Site(environment={"LD_LIBRARY_PATH": f"$HOME/aws-ofi-{word}/lib"}).missing(system.provide) == []


def test_mpi_is_told_of_buffers_on_the_device_only_where_there_are_any(tmp_path: Path) -> None:
    _, exports = script_of("perlmutter", "gpt-12b-48-axonn", tmp_path / "ours")
    assert exports["MPICH_GPU_SUPPORT_ENABLED"] == "1"
    (job,) = [found for found in planned("fig6", "perlmutter").jobs if found.framework == "AxoNN"]
    assert load_adapter("reference").launch(job.work).mpi_on_device  # type: ignore[arg-type]
    launch = EngineAdapter().launch(replace(job.work, device="cpu"))  # type: ignore[type-var]
    assert not launch.mpi_on_device
    write(JobPlan(jobs=[replace(job, launch=launch)]), tmp_path / "processors", machine="perlmutter")
    assert "MPICH_GPU" not in (tmp_path / "processors" / job.name / "job.sh").read_text()


def test_options_of_the_machine_are_those_of_its_own_launcher(tmp_path: Path) -> None:
    plan = planned_small("fig3", "perlmutter")
    write(plan, tmp_path, machine="perlmutter", launcher="mpiexec", own=site(launcher_options=["--mca btl tcp,self"]))
    script = read_script((tmp_path / plan.jobs[0].name / "job.sh").read_text(), launcher="mpiexec")
    assert script.step["--mca"] == ["btl tcp,self"]
    # What the job exports reaches ranks on other nodes.
    assert {"MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "NCCL_NET", "ROOT", "PATH"} <= set(script.step["-x"])


def test_variables_of_a_site_stand_after_the_machines_in_its_order(tmp_path: Path) -> None:
    own = site(environment={"ZONE": "$HOME/z", "A_PATH": "$ZONE/a", "NCCL_NET": "Socket"})
    _, exports = script_of("perlmutter", "gpt-12b-48-axonn", tmp_path, own=own)
    assert list(exports)[-3:] == ["ZONE", "A_PATH", "NCCL_NET"]
    assert exports["NCCL_NET"] == "Socket"


def test_a_changed_template_stands_in_for_ours(tmp_path: Path) -> None:
    mine = tmp_path / "templates"
    mine.mkdir()
    ours = (TEMPLATES / "rank.sh.j2").read_text()
    (mine / "rank.sh.j2").write_text(ours.replace("cd run\n", "cd run\nulimit -s unlimited\n"))
    plan = planned_small("fig3", "summit")
    write(plan, tmp_path / "changed", machine="summit", templates=mine)
    write(plan, tmp_path / "plain", machine="summit")
    for job in plan.jobs:
        changed, plain = tmp_path / "changed" / job.name, tmp_path / "plain" / job.name
        assert "ulimit -s unlimited\n" in (changed / "rank.sh").read_text()
        assert (changed / "job.sh").read_text() == (plain / "job.sh").read_text()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rank.sh.j2", "{% if %}\n", r"rank\.sh\.j2, line 1: "),
        ("job.sh.j2", "{{ nodez }}\n", r"job\.sh\.j2, line 1: 'nodez' is undefined"),
        ("submit-all.sh.j2", "{{ jobz }}\n", r"submit-all\.sh\.j2, line 1: 'jobz' is undefined"),
        ("ranks.sh.j2", "", "has no template; copy what you want to change of .*: body.sh.j2, job.sh.j2"),
    ],
)
def test_a_wrong_template_is_named_and_nothing_is_written(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=said):
        write(planned_small("fig3", "perlmutter"), tmp_path / "jobs", machine="perlmutter", templates=tmp_path)
    assert not (tmp_path / "jobs").exists()


def test_a_machine_that_takes_no_jobs_any_more_says_so() -> None:
    ended = {name: load_system(name).ended for name in systems()}
    assert {name for name, text in ended.items() if text} == {"summit"}
    assert "November 2024" in (ended["summit"] or "")
