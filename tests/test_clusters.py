"""``clusters.yaml``: which files hold, how they merge, what is refused, and what comes of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conductor.chain import Stage
from conductor.cluster.description import GIB, Cluster, load_cluster, minutes_of
from conductor.cluster.files import FIELDS, OURS, SUBMITTED, find_described, read_clusters
from conductor.compatibility import Device
from conductor.documents import read_schema
from conductor.environments.builder import ENVIRONMENTS
from conductor.failure import Failure
from gates import FailureClass

Load = Callable[..., Cluster]


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"XDG_CONFIG_HOME": str(tmp_path / "config")}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory some way below the root of a project."""
    (tmp_path / "project" / "configs").mkdir(parents=True)
    below = tmp_path / "project" / "models" / "large"
    below.mkdir(parents=True)
    return below


@pytest.fixture
def load(tmp_path: Path, project: Path, environ: dict[str, str]) -> Load:
    """Write the entry of cluster ``c`` at both levels and load it."""

    def make(users: str | None, projects: str | None = None) -> Cluster:
        for path, entry in (
            (tmp_path / "config" / "day0" / "clusters.yaml", users),
            (tmp_path / "project" / "clusters.yaml", projects),
        ):
            if entry is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"clusters:\n  c: {entry}\n")
        return load_cluster("c", environ, project)

    return make


def test_the_schema_knows_every_environment_and_every_stage() -> None:
    definitions = read_schema("slurm_clusters")["$defs"]
    properties = definitions["cluster"]["properties"]
    assert set(properties["interpreters"]["properties"]) == set(ENVIRONMENTS)
    assert set(properties["stages"]["properties"]) == set(SUBMITTED)
    assert set(FIELDS.values()) <= {
        *definitions["resources"]["properties"],
        *("container.image", "container.mounts"),
    }


@pytest.mark.parametrize(
    ("device", "gpus"), [pytest.param("cpu", 0, id="cpu"), pytest.param("cuda", 1, id="cuda")]
)
def test_what_is_not_said_has_a_default(load: Load, device: str, gpus: int) -> None:
    cluster = load(f"{{device: {device}}}")
    assert cluster.device == device
    assert cluster.python == Path(sys.executable)
    assert (cluster.environments, cluster.interpreters, cluster.accelerator) == (None, {}, None)
    assert (cluster.max_jobs, cluster.continuations) == (None, 3)
    assert (cluster.poll_s, cluster.command_timeout_s) == (10, 60)
    assert set(cluster.resources) == set(SUBMITTED)
    for resources in cluster.resources.values():
        assert resources.document() == {
            **dict.fromkeys(["partition", "account", "qos", "constraint", "cpus", "memory_gib"]),
            "nodes": 1,
            "gpus": gpus,
            "time_minutes": 240,
            "container_image": None,
            "container_mounts": (),
            "modules": (),
            "setup": (),
            "extra": {},
        }


def test_everything_that_is_said_is_there(load: Load) -> None:
    cluster = load(
        """
    device: cuda
    accelerator: {name: NVIDIA H100, memory_gib: 80, compute_capability: "9.0"}
    python: /shared/bin/python
    environments: ~/environments
    interpreters: {serve-cuda: /shared/vllm/bin/python}
    resources:
      partition: gpu
      account: models
      qos: high
      constraint: "h100&ib"
      nodes: 1
      gpus: 8
      cpus: 64
      memory_gib: 900.5
      time: "1-00:00:00"
      container: {image: "registry#vllm:1", mounts: [/shared:/shared]}
      modules: [cuda/12.8]
      setup: ["export HF_HOME=/shared/hf", "export HF_TOKEN=$(cat ~/.token)"]
      extra: {reservation: day0, exclusive: true, nice: 5, overcommit: false}
    max_jobs: 4
    continuations: 0
    poll_s: 30
    command_timeout_s: 20
        """
    )
    accelerator = cluster.accelerator
    assert accelerator
    assert (accelerator.memory_bytes, accelerator.compute_capability) == (80 * GIB, (9, 0))
    assert cluster.environments == Path.home() / "environments"
    assert cluster.interpreters == {"serve-cuda": Path("/shared/vllm/bin/python")}
    assert (cluster.max_jobs, cluster.continuations) == (4, 0)
    assert (cluster.poll_s, cluster.command_timeout_s) == (30, 20)
    resources = cluster.resources[Stage.DEPLOY]
    assert (resources.time_minutes, resources.memory_gib) == (1440, 900.5)
    assert resources.container_mounts == ("/shared:/shared",)
    assert resources.extra == {"reservation": "day0", "exclusive": True, "nice": 5}
    assert json.loads(json.dumps(cluster.document()))["resources"]["ptq"]["gpus"] == 8


MERGED: list[Any] = [
    pytest.param("{device: cpu}", "{device: cuda}", "device", "cuda", id="project-over-user"),
    pytest.param("{device: cpu, max_jobs: 2}", "{device: cuda}", "max_jobs", 2, id="merged"),
    pytest.param(
        "{device: cpu, resources: {modules: [a, b]}}",
        "{resources: {modules: [c]}}",
        "stages.ptq.modules",
        ["c"],
        id="lists-replace",
    ),
    pytest.param(
        "{device: cpu, resources: {partition: a}, stages: {ptq: {partition: b}}}",
        "{}",
        "stages.ptq.partition",
        "b",
        id="stage-over-all",
    ),
    pytest.param(
        "{device: cpu, stages: {ptq: {partition: b}}}",
        "{resources: {partition: a}}",
        "stages.ptq.partition",
        "b",
        id="users-stage-over-projects-resources",
    ),
    pytest.param(
        "{device: cpu, resources: {partition: a}, stages: {ptq: {partition: null}}}",
        "{}",
        "stages.ptq.partition",
        None,
        id="null-in-a-stage",
    ),
    pytest.param(
        "{device: cpu, resources: {extra: {nice: 1, reservation: r}}}",
        "{resources: {extra: {nice: null}}}",
        "stages.ptq.extra.nice",
        None,
        id="null-removes",
    ),
    pytest.param(
        "{device: cpu, resources: {extra: {nice: 1, reservation: r}}}",
        "{stages: {ptq: {extra: null}}}",
        "stages.ptq.extra.reservation",
        None,
        id="null-removes-a-section",
    ),
    pytest.param(
        "{device: cpu, continuations: 1}", "{continuations: null}", "continuations", 3, id="default"
    ),
    pytest.param(
        "{device: cpu, resources: }", "{resources: {gpus: 2}}", "stages.ptq.gpus", 2, id="empty"
    ),
]


@pytest.mark.parametrize(("users", "projects", "name", "value"), MERGED)
def test_the_project_is_merged_over_the_user(
    load: Load,
    project: Path,
    environ: dict[str, str],
    users: str,
    projects: str,
    name: str,
    value: Any,
) -> None:
    load(users, projects)
    assert find_described("c", environ, project).value(name) == value


def test_every_value_is_known_with_its_file(
    load: Load, tmp_path: Path, project: Path, environ: dict[str, str]
) -> None:
    cluster = load(
        "{device: cpu, resources: {partition: a, gpus: 1}}", "{stages: {ptq: {gpus: 2}}}"
    )
    users = str(tmp_path / "config" / "day0" / "clusters.yaml")
    projects = str(tmp_path / "project" / "clusters.yaml")
    settings = find_described("c", environ, project).document()["settings"]
    assert settings["device"] == {"value": "cpu", "from": users}
    assert settings["stages.ptq.partition"] == {"value": "a", "from": users}
    assert settings["stages.ptq.gpus"] == {"value": 2, "from": projects}
    assert settings["stages.deploy.gpus"] == {"value": 1, "from": users}
    assert settings["stages.ptq.nodes"] == {"value": 1, "from": "default"}
    assert cluster.file == Path(projects)


def test_a_name_in_one_file_stands_alone(
    tmp_path: Path, project: Path, environ: dict[str, str]
) -> None:
    path = tmp_path / "project" / "clusters.yaml"
    path.write_text("clusters: {b: {device: cpu}}")
    assert load_cluster(None, environ, project).name == "b"
    chosen = tmp_path / "mine.yaml"
    chosen.write_text("clusters: {a: {device: cuda}}")
    environ["DAY0_CLUSTERS"] = str(chosen)
    assert {name: each.file for name, each in read_clusters(environ, project).items()} == {
        "a": chosen,
        "b": path,
    }
    with pytest.raises(Failure, match="several clusters are described; name one of them: a, b"):
        load_cluster(None, environ, project)
    with pytest.raises(Failure, match=r"cluster aa: is not described in .*did you mean a\?"):
        load_cluster("aa", environ, project)


def test_the_nearest_file_of_the_project_holds_and_none_beyond_it(
    tmp_path: Path, project: Path, environ: dict[str, str]
) -> None:
    (tmp_path / "clusters.yaml").write_text("clusters: {beyond: {device: cpu}}")
    with pytest.raises(Failure, match=r"no cluster is described: write .*/config/day0/clusters"):
        read_clusters(environ, project)
    (tmp_path / "project" / "clusters.yaml").write_text("clusters: {root: {device: cpu}}")
    assert list(read_clusters(environ, project)) == ["root"]
    (project / "clusters.yaml").write_text("clusters: {near: {device: cpu}}")
    assert list(read_clusters(environ, project)) == ["near"]


def test_one_file_at_both_levels_is_read_once(
    tmp_path: Path, project: Path, environ: dict[str, str]
) -> None:
    path = tmp_path / "project" / "clusters.yaml"
    path.write_text("clusters: {a: {device: cpu}}")
    assert read_clusters({**environ, "DAY0_CLUSTERS": str(path)}, project)["a"].file == path


def test_a_users_file_that_was_named_must_be_there(project: Path) -> None:
    with pytest.raises(Failure, match="DAY0_CLUSTERS: /no/such is no file"):
        read_clusters({"DAY0_CLUSTERS": "/no/such"}, project)


REFUSED: list[Any] = [
    pytest.param("{}", r"clusters\.c\.device: is missing; say cpu or cuda", id="no-device"),
    pytest.param("{device: gpu}", r"clusters\.c\.device: .*cpu.*cuda", id="device"),
    pytest.param("[]", r"clusters\.c: \[\] is not of type", id="no-mapping"),
    pytest.param(
        "{device: cpu, devise: cpu}", "clusters.c.devise: .*did you mean device", id="name"
    ),
    pytest.param(
        "{device: cpu, resources: {partion: x}}",
        r"clusters\.c\.resources\.partion: is no setting; did you mean partition\?",
        id="name-below",
    ),
    pytest.param(
        "{device: cpu, stages: {compare: {}}}",
        r"clusters\.c\.stages\.compare: is no setting \(known: ptq, deploy",
        id="stage-without-a-job",
    ),
    pytest.param(
        "{device: cpu, interpreters: {serve: /x}}", "did you mean serve-cpu|serve-cuda", id="env"
    ),
    pytest.param(
        "{device: cpu, resources: {time: 4:00:00}}",
        r"resources\.time: YAML reads this as 14400 \(int\); put it into quotes",
        id="sexagesimal-time",
    ),
    pytest.param("{device: cpu, resources: {time: 90}}", "put it into quotes", id="bare-minutes"),
    pytest.param("{device: cpu, resources: {account: 17}}", "put it into quotes", id="account"),
    *(
        pytest.param(
            f"{{device: cpu, resources: {{time: '{time}'}}}}",
            rf"c\.resources\.time: '{time}' does not fit; wanted: .* \"90\" are minutes",
            id=f"time-{time}",
        )
        for time in ("4h", "UNLIMITED", "-1", "0", "0:00:00", "0-0")
    ),
    pytest.param(
        "{device: cpu, resources: {memory_gib: 0.0004}}",
        r"resources\.memory_gib: 0\.0004",
        id="no-memory-would-be-all",
    ),
    pytest.param(
        "{device: cpu, stages: {1: {}}}",
        r"clusters\.c\.stages\.1: YAML reads this as 1 \(int\); put it into quotes",
        id="name-that-is-a-number",
    ),
    pytest.param("{device: cpu, resources: {nodes: 0}}", r"resources\.nodes: 0", id="no-nodes"),
    pytest.param("{device: cpu, resources: {gpus: true}}", r"resources\.gpus: true", id="bool"),
    pytest.param("{device: cpu, resources: {memory_gib: .nan}}", "nan|NaN", id="nan"),
    pytest.param("{device: cpu, resources: {nodes: 2}}", "a quantizer runs on one node", id="ptq"),
    pytest.param(
        "{device: cpu, stages: {deploy: {nodes: 2}}}",
        r"deploy\.nodes: both sides are served alike.*deploy 2, baseline_eval 1",
        id="unequal-nodes",
    ),
    pytest.param(
        "{device: cpu, stages: {deploy: {nodes: 2, container: {image: i}}}}",
        r"deploy\.container\.image: .*nodes: 1",
        id="nodes-in-a-container",
    ),
    pytest.param(
        "{device: cpu, python: bin/python}",
        r"clusters\.c\.python: 'bin/python' does not fit; wanted: an absolute path",
        id="relative",
    ),
    pytest.param(
        '{device: cpu, resources: {partition: "a\\nb"}}', r"resources\.partition: ", id="newline"
    ),
    pytest.param(
        '{device: cpu, resources: {modules: ["a; reboot"]}}', r"modules\.0: ", id="module"
    ),
    pytest.param(
        "{device: cpu, accelerator: {name: X}}",
        r"accelerator\.name: there is none on a cpu",
        id="accelerator-of-a-cpu",
    ),
    pytest.param(
        "{device: cuda, accelerator: {memory_gib: 80}}",
        r"accelerator\.name: is missing; nvidia-smi has it",
        id="nameless-accelerator",
    ),
    pytest.param(
        "{device: cuda, accelerator: {name: X, compute_capability: 9.0}}",
        r"compute_capability: YAML reads this as 9.0 \(float\); put it into quotes",
        id="capability-as-number",
    ),
    pytest.param(
        "{device: cpu, resources: {container: {mounts: ['/a:/a']}}}",
        r"container\.mounts: needs container.image",
        id="mounts-alone",
    ),
    pytest.param("{device: cpu, continuations: -1}", "continuations", id="negative"),
    pytest.param("{device: cpu, poll_s: 0}", "poll_s", id="storm"),
    pytest.param("{device: cpu, max_jobs: 0}", "max_jobs", id="no-jobs"),
    pytest.param(
        "{device: cpu, resources: {setup: ['export X_TOKEN=abcdefgh1234']}}",
        r"clusters\.c\.resources\.setup: holds a secret",
        id="secret-in-setup",
    ),
    pytest.param(
        "{device: cpu, resources: {extra: {comment: hf_abcdefghijklmnop1234}}}",
        r"extra\.comment: holds a secret",
        id="secret-in-extra",
    ),
    pytest.param("{device: cpu, device: cuda}", "device: stands there twice", id="said-twice"),
]


@pytest.mark.parametrize(("entry", "said"), REFUSED)
def test_refused_with_file_field_and_remedy(
    load: Load, tmp_path: Path, entry: str, said: str
) -> None:
    with pytest.raises(Failure, match=said) as caught:
        load(entry)
    assert caught.value.failure_class is FailureClass.USER_CONFIG_ERROR
    assert f"clusters {tmp_path / 'config' / 'day0' / 'clusters.yaml'}: " in caught.value.message
    assert "abcdefgh1234" not in caught.value.message


@pytest.mark.parametrize("option", [*OURS, "job-nam", "no-req", "Wrap", "a_b", "--nice"])
def test_extra_sets_nothing_that_we_depend_on(load: Load, option: str) -> None:
    with pytest.raises(Failure, match=option):
        load(f'{{device: cpu, stages: {{deploy: {{extra: {{"{option}": x}}}}}}}}')


@pytest.mark.parametrize(("option", "named"), FIELDS.items())
def test_extra_stands_for_no_field(load: Load, option: str, named: str) -> None:
    said = (
        rf"clusters\.c\.resources\.extra\.{option}: has a field .*clusters\.c\.resources\.{named}"
    )
    with pytest.raises(Failure, match=said):
        load(f"{{device: cpu, resources: {{extra: {{{option}: x}}}}}}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("", "must be a mapping", id="empty"),
        pytest.param("- a", "must be a mapping", id="list"),
        pytest.param("clusters: {}", "clusters", id="none"),
        pytest.param("cluster: {a: {device: cpu}}", "cluster: .*did you mean clusters", id="name"),
        pytest.param("clusters: [", "is not valid YAML", id="no-yaml"),
        pytest.param("clusters: {a b: {device: cpu}}", "a b", id="name-with-a-space"),
        pytest.param("clusters: {a: null}", r"clusters", id="says-nothing"),
        pytest.param("clusters: 3", "clusters: 3", id="number"),
        pytest.param("clusters: {1: {device: cpu}}", r"clusters\.1: YAML reads", id="number-name"),
    ],
)
def test_files_that_describe_nothing_are_refused(
    project: Path, environ: dict[str, str], text: str, said: str
) -> None:
    path = project / "clusters.yaml"
    path.write_text(text)
    with pytest.raises(Failure, match=said) as caught:
        read_clusters(environ, project)
    assert f"clusters {path}: " in caught.value.message


@pytest.mark.parametrize(
    ("time", "minutes"),
    [
        ("90", 90),
        ("1:30", 2),
        ("0:01", 1),
        ("4:00:00", 240),
        ("0:59:59", 60),
        ("1-0", 1440),
        ("1-12", 2160),
        ("1-12:30", 2190),
        ("2-00:00:01", 2881),
        ("0", 0),
    ],
)
def test_walltimes_are_read_as_slurm_reads_them(time: str, minutes: int) -> None:
    assert minutes_of(time) == minutes


def test_devices_are_those_of_the_compatibility_table() -> None:
    schema = read_schema("slurm_clusters")["$defs"]["cluster"]["properties"]["device"]
    assert schema["enum"] == [each.value for each in Device]
