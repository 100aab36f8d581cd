"""A server over several nodes: its commands, and how its processes begin and end together.

In the place of vLLM and of ``srun`` there are small processes that behave as told.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from conductor.compatibility import Device
from conductor.engines import Sides, multi_node, vllm
from conductor.engines.multi_node import Host, Meeting
from conductor.engines.vllm import ServerSettings, VllmSession
from conductor.executors.local import WORKERS
from conductor.failure import Failure
from gates import FailureClass
from gates.canary import Health

TWO = (Host(name="n1", address="127.0.0.1"), Host(name="n2", address="127.0.0.1"))
MEETING = Meeting(
    hosts=(Host(name="n1", address="head"), Host(name="n2", address="other")),
    addresses=("10.0.0.1", "10.0.0.2"),
    port=20123,
    interface="ib0",
)
# Two lines of scontrol 22.05, shortened.
SHOWN = (
    "NodeName=n1 Arch=x86_64 Gres=gpu:1 NodeAddr=10.0.0.1 NodeHostName=vm Port=1 Version=22.05.8\n"
    "NodeName=n2 Arch=x86_64 Gres=gpu:1 NodeAddr=n2.cluster NodeHostName=vm Comment=NodeAddr\n"
)
JOB = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURMD_NODENAME": "n2"}


def test_hosts_are_told_by_slurm_and_ours_leads() -> None:
    hosts = multi_node.read_hosts(SHOWN, "n2")
    assert hosts == (Host(name="n2", address="n2.cluster"), Host(name="n1", address="10.0.0.1"))


@pytest.mark.parametrize("environ", [{}, {"SLURM_JOB_NUM_NODES": "1"}], ids=["no-job", "one-node"])
def test_where_there_is_one_node_slurm_is_not_asked(environ: dict[str, str]) -> None:
    assert multi_node.hosts_of_job(environ, run=lambda *_, **__: pytest.fail("asked")) == ()


def answer(returncode: int = 0, stdout: str = "", stderr: str = "") -> Callable[..., Any]:
    return lambda *_, **__: SimpleNamespace(returncode=returncode, stdout=stdout, stderr=stderr)


def test_slurm_is_asked_for_the_nodes_of_the_job() -> None:
    asked = []

    def run(command: list[str], **how: Any) -> Any:
        asked.append((command, how["timeout"]))
        return answer(stdout=SHOWN)()

    assert [host.name for host in multi_node.hosts_of_job(JOB, run=run)] == ["n2", "n1"]
    assert asked == [(["scontrol", "--oneliner", "show", "node", "n[1-2]"], 60.0)]


def late(*_: Any, **__: Any) -> Any:
    raise subprocess.TimeoutExpired("scontrol", 60)


def absent(*_: Any, **__: Any) -> Any:
    raise FileNotFoundError(2, "No such file or directory", "scontrol")


@pytest.mark.parametrize(
    ("run", "said"),
    [
        pytest.param(answer(1, stderr="Unable to contact slurm controller\n"), "Unable", id="down"),
        pytest.param(late, "timed out after 60", id="late"),
        pytest.param(absent, "No such file", id="no-scontrol"),
        pytest.param(answer(stdout=SHOWN.splitlines()[0]), "it names 1 nodes", id="one-missing"),
        pytest.param(answer(stdout="nonsense"), "it names 0 nodes", id="nonsense"),
    ],
)
def test_nodes_that_slurm_does_not_tell_are_no_fault_of_the_release(
    run: Callable[..., Any], said: str
) -> None:
    with pytest.raises(Failure, match=said) as caught:
        multi_node.hosts_of_job(JOB, run=run)
    assert caught.value.failure_class is FailureClass.INFRA_TRANSIENT
    assert "scontrol --oneliner show node n[1-2]" in caught.value.message


def test_a_meeting_is_at_our_address_as_the_others_see_it() -> None:
    meeting = multi_node.arrange(TWO)
    assert meeting.addresses == ("127.0.0.1", "127.0.0.1")
    assert meeting.interface == "lo"
    assert meeting.port in multi_node.PORTS


def test_a_node_that_is_not_found_is_named() -> None:
    hosts = (TWO[0], Host(name="n2", address="no.such.node.invalid"))
    with pytest.raises(Failure, match=r"node n1 finds no way to no\.such\.node\.invalid"):
        multi_node.arrange(hosts)


def test_a_port_that_somebody_has_is_not_free() -> None:
    with multi_node.socket.create_server(("127.0.0.1", 0)) as taken:
        assert not multi_node.is_free("127.0.0.1", taken.getsockname()[1])


def test_every_rank_is_told_where_the_first_is() -> None:
    told = "--nnodes 2 --node-rank {} --master-addr 10.0.0.1 --master-port 20123"
    assert [" ".join(multi_node.rank_arguments(MEETING, rank)) for rank in (0, 1)] == [
        told.format(0),
        told.format(1),
    ]


@pytest.mark.parametrize(
    ("rank", "given", "expected"),
    [
        pytest.param(
            0,
            {"VLLM_API_KEY": "k", "VLLM_RPC_BASE_PATH": "/d"},
            {"VLLM_API_KEY": "k", "VLLM_RPC_BASE_PATH": "/d", "GLOO_SOCKET_IFNAME": "ib0"},
            id="the-server-keeps-its-own",
        ),
        pytest.param(
            1,
            {"VLLM_API_KEY": "k", "VLLM_RPC_BASE_PATH": "/d", "A": "b"},
            {"A": "b", "GLOO_SOCKET_IFNAME": "ib0"},
            id="a-companion-gets-neither-key-nor-directory",
        ),
        pytest.param(
            1,
            {"GLOO_SOCKET_IFNAME": "eth7", "VLLM_HOST_IP": "1.2.3.4"},
            {"GLOO_SOCKET_IFNAME": "eth7"},
            id="the-interface-of-the-caller-stays-the-address-cannot",
        ),
    ],
)
def test_every_rank_has_its_address(
    rank: int, given: dict[str, str], expected: dict[str, str]
) -> None:
    address = {"VLLM_HOST_IP": MEETING.addresses[rank]}
    assert multi_node.rank_environ(given, MEETING, rank) == expected | address


def test_slurm_starts_a_companion_on_its_node_beside_whatever_runs_there() -> None:
    command = multi_node.companion_command(Path("/e/python"), ["--model", "m"], MEETING, 1)
    assert command == [
        *("srun", "--overlap", "--nodes=1", "--ntasks=1", "--export=ALL", "--nodelist=n2"),
        *("/e/python", str(WORKERS / "join_server.py"), "--model", "m"),
        *multi_node.rank_arguments(MEETING, 1),
    ]


SERVER = """
    import http.server, json, sys, time
    from pathlib import Path
    behaviour = Path(sys.argv[1]).read_text()
    root = Path(sys.argv[1]).parent
    while behaviour and not (root / "started").exists():
        time.sleep(0.02)
    while behaviour == "refuses-later" and list(root.rglob("*-node1.process.json")):
        time.sleep(0.02)
    if behaviour.startswith("refuses"):
        sys.exit("this checkpoint is not for me")
    if behaviour == "loads":
        time.sleep(60)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps({"data": [{"id": "source"}]}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
"""
SRUN = """
    import json, os, signal, sys, time
    from pathlib import Path
    told = Path(sys.argv[0]).parent
    names = ("VLLM_HOST_IP", "VLLM_API_KEY")
    document = {"pid": os.getpid(), "arguments": sys.argv[1:],
                "environ": {name: os.environ.get(name) for name in names}}
    (told / "writing").write_text(json.dumps(document))
    (told / "writing").rename(told / "started")
    behaviour = (told / "companion").read_text()
    if behaviour == "fails":
        sys.exit("srun: error: Unable to create step for job 1")
    if behaviour == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    while not (told / "leave").exists():
        time.sleep(0.02)
    sys.exit(int((told / "leave").read_text()))
"""


class Nodes:
    """A session over two nodes whose processes behave as told."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.stage_dir = root / "stage"
        self.server = root / "server"
        self.companion = root / "companion"
        self.server.write_text("")
        self.companion.write_text("stays")
        self.session = VllmSession(
            Sides(source=root, candidate=root),
            interpreter=Path(sys.executable),
            settings=ServerSettings(
                device=Device.CPU,
                dtype="auto",
                max_model_len=64,
                tensor_parallel_size=2,
                seed=0,
                cpu_kv_cache_gib=1,
                extra_arguments=(),
            ),
            environ={**os.environ, "PATH": str(root)},
            health_timeout_s=20.0,
            silence_s=30.0,
            port=None,
            capacity=2,
            prompts_per_request=8,
            note=lambda event, **facts: None,
            hosts=TWO,
        )

    def start(self, side: str = "source") -> Any:
        backend = self.session.backend(side, self.stage_dir, lambda *_: None)
        while not (self.root / "started").exists():
            time.sleep(0.02)
        return backend

    @property
    def started(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.root / "started").read_text())
        return document

    def fails(self) -> Failure:
        """Return the failure that the next looks at the server come to."""
        end = time.monotonic() + 10
        while time.monotonic() < end:
            try:
                self.session.check("source")
            except Failure as failure:
                return failure
            time.sleep(0.02)
        raise AssertionError("the server counts as well")


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    script = tmp_path / "server.py"
    script.write_text(textwrap.dedent(SERVER))
    srun = tmp_path / "srun"
    srun.write_text(f"#!{sys.executable}\n{textwrap.dedent(SRUN)}")
    srun.chmod(0o755)
    monkeypatch.setattr(
        vllm,
        "server_command",
        lambda interpreter, settings, *, port, **_: [
            *(str(interpreter), str(script), str(tmp_path / "server"), str(port))
        ],
    )
    monkeypatch.setattr(vllm, "POLL_S", 0.02)
    monkeypatch.setattr(vllm, "REFUSES_WITHIN_S", 1.0)
    found = Nodes(tmp_path)
    yield found
    found.session.close()
    assert not list(tmp_path.rglob("*.process.json"))
    if (tmp_path / "started").exists():
        assert not psutil.pid_exists(found.started["pid"])


def test_server_and_companion_begin_and_end_together(nodes: Nodes) -> None:
    nodes.start()
    assert sorted(path.name for path in nodes.stage_dir.iterdir()) == [
        *("server-source-node1.log", "server-source-node1.process.json"),
        *("server-source.log", "server-source.process.json"),
    ]
    assert "--nodelist=n2" in nodes.started["arguments"]
    assert "--tensor-parallel-size" in nodes.started["arguments"]
    assert nodes.started["environ"] == {"VLLM_HOST_IP": "127.0.0.1", "VLLM_API_KEY": None}
    assert nodes.session.settings("source")["nodes"] == 2
    nodes.session.check("source")
    nodes.session.discard("source")
    assert not psutil.pid_exists(nodes.started["pid"])


@pytest.mark.parametrize(
    ("signal_or_status", "said"),
    [pytest.param("kill", "SIGKILL", id="killed"), pytest.param("1", "exit status 1", id="fails")],
)
def test_a_companion_that_dies_makes_the_server_unhealthy(
    nodes: Nodes, signal_or_status: str, said: str
) -> None:
    nodes.start()
    if signal_or_status == "kill":
        psutil.Process(nodes.started["pid"]).kill()
    else:
        (nodes.root / "leave").write_text(signal_or_status)
    failure = nodes.fails()
    assert failure.failure_class is FailureClass.INFRA_TRANSIENT
    assert f"the companion on node n2 of the source ended with {said}" in failure.message
    assert str(nodes.stage_dir / "server-source-node1.log") in failure.message


def test_a_companion_that_left_in_order_is_not_the_cause(nodes: Nodes) -> None:
    nodes.start()
    (nodes.root / "leave").write_text("0")
    psutil.Process(nodes.started["pid"]).wait(10)
    nodes.session.check("source")
    nodes.session._server("source")._parts["server"].stop()
    assert "the server of the source ended with" in nodes.fails().message


@pytest.mark.parametrize(
    ("server", "companion", "health", "said"),
    [
        pytest.param(
            "refuses-later", "fails", Health.DIED, "the server ended with exit", id="refused"
        ),
        pytest.param("refuses", "stays", Health.DIED, "the server ended with exit", id="first"),
        pytest.param("loads", "fails", Health.KILLED, "node n2 ended with exit", id="not-started"),
        pytest.param("loads", "killed", Health.KILLED, "node n2 ended with SIGKILL", id="killed"),
        pytest.param(
            "refuses-later", "killed", Health.KILLED, "node n2 ended with SIGKILL", id="both"
        ),
    ],
)
def test_an_accident_of_a_node_is_told_from_a_refusal(
    nodes: Nodes, server: str, companion: str, health: Health, said: str
) -> None:
    nodes.server.write_text(server)
    nodes.companion.write_text(companion)
    with pytest.raises(Failure, match=f"cannot be served .{health}.*{said}.* while loading"):
        nodes.start()


def test_where_a_companion_cannot_be_started_nothing_stays(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = vllm.SupervisedProcess

    def fails(command: list[str], **how: Any) -> Any:
        if command[0] == "srun":
            raise OSError(28, "No space left on device")
        return started(command, **how)

    monkeypatch.setattr(vllm, "SupervisedProcess", fails)
    with pytest.raises(OSError, match="No space"):
        nodes.start()
    assert not list(nodes.root.rglob("*.process.json"))


LIFELINE = """
    import sys, time
    sys.path.insert(0, {workers!r})
    import join_server
    join_server.RETRY_S = 0.02
    join_server.end_with("127.0.0.1", int(sys.argv[1]))
"""


def test_a_companion_ends_in_order_when_the_server_is_gone() -> None:
    with multi_node.socket.create_server(("127.0.0.1", 0)) as listening:
        port = str(listening.getsockname()[1])
        script = textwrap.dedent(LIFELINE).format(workers=str(WORKERS))
        companion = subprocess.Popen([sys.executable, "-c", script, port], stderr=subprocess.PIPE)
        line, _ = listening.accept()
    assert companion.poll() is None
    line.close()
    _, said = companion.communicate(timeout=10)
    assert companion.returncode == 0
    assert b"the server has ended" in said
