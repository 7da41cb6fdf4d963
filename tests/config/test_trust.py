"""What files of strangers cannot make the suite do: run code, read or write elsewhere, or speak for the page."""

from __future__ import annotations

import ast
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from axonn.config.loading import is_plain, validate
from axonn.config.train_config import load_yaml
from axonn.errors import AxonnError, ConfigError, RecordError
from axonn.perf.machine.machine_file import MachineFile
from experiments.definition import HERE, ROOT, Experiment, PublishedReading, find_machine, load_model, slug
from experiments.templates import rendered, sandbox
from experiments.validation.published_sets import DataSet
from jobscripts.generate import JobEntry, Manifest, load_manifest, write_jobs
from jobscripts.launchers import load_launcher
from jobscripts.schedulers import load_scheduler
from jobscripts.site import Site, in_quotes
from jobscripts.system import System, load_system
from tests.helpers.command_line import tiny
from tests.helpers.job_folders import Small, attempt, gather, only, small_job, trail

SOURCES = ("axonn", "experiments", "jobscripts", "plots", "baselines", "tools")
UNPICKLER = "axonn/data/image_files.py"
"""The one place that reads pickles, of CIFAR, in a class that makes nothing but numbers."""


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call, by the dotted name that it is written with."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def given(call: ast.Call, name: str) -> object:
    """The constant that an argument has; "nothing" without it, and "computed" for what is no constant."""
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value.value if isinstance(keyword.value, ast.Constant) else "computed"
    return "nothing"


STARTS = {"subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_call", "subprocess.check_output"}


def why_not(name: str, call: ast.Call, where: str) -> str | None:
    """Why a call may not be there."""
    last = name.rpartition(".")[2]
    if name in {"eval", "exec", "compile", "__import__"}:
        return "runs text"
    if name in {"os.system", "os.popen"} or "getoutput" in name:
        return "runs a line of shell"
    if name.startswith(("pickle.", "cPickle.", "dill.", "joblib.", "marshal.", "shelve.")) and last in {
        "load", "loads", "Unpickler", "open",
    }:  # fmt: skip
        return "unpickles"
    if name == "torch.load" and given(call, "weights_only") is not True:
        return "unpickles"
    if name == "np.load" and given(call, "allow_pickle") is not False:
        return "unpickles"
    if name.startswith("yaml.") and last in {"load", "load_all", "unsafe_load", "full_load"}:
        return "reads YAML in another way than axonn.config.loading"
    if name in {"yaml.safe_load", "json.load"}:
        return "reads without bounds; use axonn.config.loading or axonn.durable_files"
    if name in {"Environment", "jinja2.Environment", "Template", "jinja2.Template"} and "jinja2" in where:
        return "is a template outside of the sandbox"
    if given(call, "shell") not in {"nothing", False}:
        return "runs a line of shell"
    if name in STARTS and call.args:
        command = call.args[0]
        if isinstance(command, ast.JoinedStr) or (isinstance(command, ast.Constant) and isinstance(command.value, str)):
            return "runs a line of shell"
    return None


def faults(text: str) -> list[str]:
    where = " ".join(line for line in text.splitlines() if "import" in line)
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and (why := why_not(ast.unparse(node.func), node, where)):
            found.append(why)
    return found


def project_files() -> list[Path]:
    return [path for folder in SOURCES for path in sorted((ROOT / folder).rglob("*.py"))]


def test_nothing_runs_what_a_file_says() -> None:
    found = {
        str(path.relative_to(ROOT)): own
        for path in project_files()
        if (own := faults(path.read_text(encoding="utf-8")))
    }
    assert found == {}
    assert len(project_files()) > 200


def test_pickles_are_read_in_one_place_by_a_class_that_calls_nothing() -> None:
    users = []
    for path in project_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if {name.partition(".")[0] for name in names} & {"pickle", "dill", "marshal", "shelve", "joblib"}:
                users.append(str(path.relative_to(ROOT)))
    assert set(users) == {UNPICKLER}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import pickle\npickle.loads(x)", "unpickles"),
        ("torch.load(path)", "unpickles"),
        ("torch.load(path, weights_only=False)", "unpickles"),
        ("torch.load(path, weights_only=flag)", "unpickles"),
        ("np.load(path)", "unpickles"),
        ("np.load(path, allow_pickle=True)", "unpickles"),
        ("yaml.load(text, Loader=yaml.Loader)", "reads YAML in another way than axonn.config.loading"),
        ("eval(text)", "runs text"),
        ("subprocess.run('ls | wc', shell=True)", "runs a line of shell"),
        ("subprocess.run(f'ls {x}')", "runs a line of shell"),
        ("os.system('ls')", "runs a line of shell"),
        ("from jinja2 import Environment\nEnvironment()", "is a template outside of the sandbox"),
    ],
)
def test_what_is_looked_for_is_found(text: str, said: str) -> None:
    assert faults(text) == [said]


# Templates


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "{{ ''.__class__.__mro__ }}",
            r"job\.sh\.j2, line 2: access to attribute '__class__'",
        ),
        ("{{ exports.append('x') }}", r"job\.sh\.j2, line 2: .*append.* is (unsafe|not safely callable)"),
        ("{{ cycler.__init__.__globals__ }}", r"job\.sh\.j2, line 2: access to attribute '__init__'"),
        ("{% include '../../etc/passwd' %}", r"job\.sh\.j2, line 2: .*passwd"),
        ("{% include '/etc/passwd' %}", r"job\.sh\.j2, line 2: .*passwd"),
        ("{% include 'link.j2' %}", r"job\.sh\.j2, line 2: .*link\.j2 leads out of its folder"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", r"job\.sh\.j2, line 2: OverflowError: Range too big"),
        ("{{ 'x' * 10 ** 12 }}", r"job\.sh\.j2, line 2: a product of more than"),
        ("{{ 9 ** 99 ** 99 }}", r"job\.sh\.j2, line 2: a power of more than"),
        ("{{ 1 / 0 }}", r"job\.sh\.j2, line 2: ZeroDivisionError"),
        ("{{ secrets }}", r"job\.sh\.j2, line 2: 'secrets' is undefined"),
        ("{{ title", r"job\.sh\.j2, line 2: "),
        ("{% include 'job.sh.j2' %}", r"job\.sh\.j2, line 2: RecursionError"),
    ],
)
def test_templates_of_strangers_see_their_values_alone(tmp_path: Path, text: str, said: str) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "job.sh.j2").write_text(f"#!/bin/bash\n{text}\n")
    (own / "link.j2").symlink_to("/etc/passwd")
    system = System(machine="m", scheduler="none", launcher="mpiexec", cores_per_rank=1, source="a test")
    with pytest.raises(ConfigError, match=said):
        write_jobs(
            [small_job("tiny-1r", "axonn", tiny(inter=1, steps=3))], tmp_path / "jobs", experiment="fig6",
            command="axonn jobs", system=system, site=Site(), scheduler=load_scheduler("none"),
            launcher=load_launcher("mpiexec"), templates=own,
        )  # fmt: skip
    assert not (tmp_path / "jobs").exists()


def test_templates_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.j2").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"a\.j2: UnicodeDecodeError"):
        rendered(sandbox([tmp_path], autoescape=True), "a.j2", {})


def test_templates_count_as_ours_do(tmp_path: Path) -> None:
    (tmp_path / "a.j2").write_text("{{ 2 * x }} {{ 'ab' * 2 }} {{ 2 ** 3 }} {{ '<b>' }}")
    assert rendered(sandbox([tmp_path], autoescape=True), "a.j2", {"x": 4}) == "8 abab 8 &lt;b&gt;"


# Names that become paths

AWAY = ["../away", "/etc/passwd", "..", ".", "", "a/b", "a\0b", "a\nb", "-rf", "x" * 101, "ä", "$(id)", "a b"]


@pytest.mark.parametrize("name", AWAY)
def test_names_lead_nowhere_else(name: str, tmp_path: Path) -> None:
    assert not is_plain(name)
    plain = yaml.safe_load((HERE / "fig6.yaml").read_text(encoding="utf-8"))
    with pytest.raises(ConfigError, match=r"fig6: 'name': .* is no name of a folder or file"):
        validate(plain | {"name": name}, Experiment, where="fig6")
    machine = yaml.safe_load((HERE / "machines" / "summit.yaml").read_text(encoding="utf-8"))
    with pytest.raises(ConfigError, match="is no name of a folder or file"):
        validate(machine | {"name": name}, MachineFile, where="summit")
    own = {"machine": name, "scheduler": "none", "launcher": "mpiexec", "cores_per_rank": 1, "source": "x"}
    with pytest.raises(ConfigError, match="is no name of a folder or file"):
        validate(own, System, where="system")
    points = yaml.safe_load((HERE / "validation" / "ipdps22-fig11.yaml").read_text(encoding="utf-8"))
    with pytest.raises(ConfigError, match="is no name of a folder or file"):
        validate(points | {"name": name}, DataSet, where="set")
    for key in ("data_set", "ratios"):
        with pytest.raises(ConfigError, match=rf"'{key}': .* is no name of a folder or file"):
            validate({"name": "x", "title": "x", key: name}, Experiment, where="x")


@pytest.mark.parametrize("path", ["../x.json", "/etc/passwd", "a/../../b", "a\0b", "a\nb"])
def test_files_of_an_experiment_are_those_of_the_repository(path: str) -> None:
    with pytest.raises(ConfigError, match="leads out of the repository"):
        validate({"name": "x", "title": "x", "published": path}, Experiment, where="x")
    with pytest.raises(ConfigError, match="leads out of the repository"):
        validate({"file": path, "source": "x"}, PublishedReading, where="x")


@pytest.mark.parametrize("look_up", [load_model, find_machine, load_system])
@pytest.mark.parametrize("name", AWAY)
def test_look_ups_by_name_stay_in_their_folder(look_up: Callable[[str], Any], name: str) -> None:
    with pytest.raises(ConfigError, match=r"there is no (model|machine)"):
        look_up(name)


def test_look_ups_do_not_climb(tmp_path: Path) -> None:
    """Also where such a file is there."""
    target = HERE / "models" / "gpt-12b.yaml"
    assert target.exists()
    for look_up, name in ((load_model, "../models/gpt-12b"), (find_machine, "../machines/summit")):
        with pytest.raises(ConfigError, match="there is no"):
            look_up(name)
    with pytest.raises(ConfigError, match="there is no"):
        load_system("../systems/summit")


@pytest.mark.parametrize("name", [*AWAY, "../" * 40, "\\..\\", "a" * 400])
def test_a_slug_is_a_name_in_its_folder(name: str, tmp_path: Path) -> None:
    found = f"fig6-{slug(name)}-axonn-0.json"
    assert is_plain(found) or len(found) > 100
    (tmp_path / found).write_text("fits")
    assert [path.name for path in tmp_path.iterdir()] == [found]


def test_long_slugs_are_told_apart() -> None:
    assert slug("x" * 400 + "a") != slug("x" * 400 + "b")
    assert slug("GPT 12B, 48") == "GPT-12B-48"


@pytest.mark.parametrize("name", AWAY)
def test_a_manifest_names_jobs_of_its_folder(name: str, small: Small) -> None:
    folder, _ = small
    data = json.loads((folder / "manifest.json").read_text())
    for place in ("experiment", "machine"):
        (folder / "manifest.json").write_text(json.dumps(data | {place: name}))
        with pytest.raises(RecordError, match=rf"manifest\.json: '{place}'"):
            load_manifest(folder)
    entry = data["jobs"][0]
    files = {key.replace(entry["name"], name, 1): value for key, value in entry["files"].items()}
    (folder / "manifest.json").write_text(json.dumps(data | {"jobs": [entry | {"name": name, "files": files}]}))
    with pytest.raises(RecordError, match=r"manifest\.json: 'jobs\.0"):
        load_manifest(folder)


def test_files_of_a_job_are_its_own() -> None:
    files = {f"a/{name}": "0" for name in ("job.sh", "rank.sh", "work.json")}
    entry = {"name": "a", "point": "p", "framework": "f", "adapter": "axonn", "nodes": 1, "gpus": 1, "node_hours": 1.0}
    assert JobEntry(**entry, files=files).name == "a"
    for other in ("b/x", "a/../x", "/x", "a/b/c", "a/", "a/x\n"):
        with pytest.raises(ValueError, match="is no file of the job"):
            JobEntry(**entry, files=files | {other: "0"})
    with pytest.raises(ValueError, match="is no name of a folder"):
        Manifest(
            experiment="x", machine="m", scheduler="none", launcher="mpiexec", command="c", jobs=[],
            files={"../x": "0"},
        )  # fmt: skip


def test_collected_records_stay_among_the_results(small: Small) -> None:
    folder, job = small
    attempt(folder, job)
    trail(folder, job)
    only(folder)
    before = sorted(folder.parent.rglob("*.json"))
    sums = next(folder.glob("*/run/attempt-1/sha256.txt"))
    sums.write_text(f"{'0' * 64}  ../../../../etc/passwd\n")
    (found,) = gather(folder)
    assert found.broken
    assert "is no file of the run folder" in found.why
    assert sorted(folder.parent.rglob("*.json")) == before


# Values that go into scripts

HOSTILE = [
    *("$(touch owned)", "`touch owned`", '"; touch owned; "', "'; touch owned; '", "a\ntouch owned", "a & touch owned"),
    *("${x:-$(touch owned)}", "${x@P}", "$((x[$(touch owned)]))", "\\$(touch owned)", "\\`touch owned\\`", "a b * ? ~"),
    *("\\", '\\"; touch owned; \\"', "${x[$(touch owned)]}", "$$(touch owned)", "<(touch owned)", "!!"),
]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_between_quotes_is_run(text: str, tmp_path: Path) -> None:
    script = f'x="\\$(touch owned)"\nprintf "%s" "{in_quotes(text)}"\n'
    found = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout == text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$HOME/x", "/home/me/x"),
        ("${HOME}/x", "/home/me/x"),
        ("/lib:${LIB:-}", "/lib:"),
        ("${LIB:-$HOME}", "/home/me"),
        ("${HOME:+yes}", "yes"),
        ("5 $", "5 $"),
    ],
)
def test_variables_are_expanded(text: str, expected: str) -> None:
    found = subprocess.run(
        ["bash", "-uc", f'printf "%s" "{in_quotes(text)}"'], env={"HOME": "/home/me"}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert found.stdout == expected


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("launcher", ["mpiexec", "srun", "jsrun", "hydra"])
def test_a_script_of_hostile_values_runs_none_of_them(text: str, launcher: str, tmp_path: Path) -> None:
    site = Site(
        modules=[f"gcc {text}"],
        environment={"A_VALUE": text},
        container=["container", text],
        programs={"axonn": f"/opt/{text}"},
    )
    system = System(machine="m", scheduler="none", launcher=launcher, cores_per_rank=1, source="a test")
    job = small_job("tiny-1r", "axonn", tiny(inter=1, steps=3))
    folder = tmp_path / "jobs"
    write_jobs(
        [job], folder, experiment="fig6", command="axonn jobs", system=system, site=site,
        scheduler=load_scheduler("none"), launcher=load_launcher(launcher),
    )  # fmt: skip
    own = folder / job.name
    for name in ("job.sh", "rank.sh"):
        subprocess.run(["bash", "-n", own / name], check=True, capture_output=True)
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name in ("container", "mpiexec", "srun", "jsrun", "python", "hostname"):
        (bin_ / name).write_text("#!/bin/bash\nexit 0\n")
        (bin_ / name).chmod(0o755)
    # Modules, exports, the container, the launcher: all but the ranks.
    (own / "job.sh").write_text((own / "job.sh").read_text().replace("cd ", "module() { :; }\ncd ", 1))
    subprocess.run(
        ["bash", "job.sh"], cwd=own, env={"PATH": f"{bin_}:/usr/bin:/bin", "HOME": "/home/me"}, capture_output=True,
        check=False, timeout=60,
    )  # fmt: skip
    subprocess.run(
        ["bash", "rank.sh"], cwd=own, capture_output=True, check=False, timeout=60,
        env={"PATH": f"{bin_}:/usr/bin:/bin", "RANK": "0", "LOCAL_RANK": "1", "ATTEMPT": str(own)},
    )  # fmt: skip
    assert not list(tmp_path.rglob("owned"))
    assert (own / "run").is_dir()


@pytest.mark.parametrize("key", ["account", "queue", "constraint"])
@pytest.mark.parametrize("text", ["a b", "a\nb", "", "a\x1b", "a\u2028b"])
def test_words_for_the_scheduler_are_words(key: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(json.dumps({key: text}), encoding="utf-8")
    with pytest.raises(AxonnError, match=rf"site\.yaml: '{key}'.*is not one word"):
        load_yaml(path, Site)
