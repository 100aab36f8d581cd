"""Publishing: every condition, what is uploaded, and a Hub over HTTP that fails in every way."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from conftest import run_day0
from hub_stand_in import INITIAL, TOKEN, Fault, Hub, Repo, stand_in
from huggingface_hub import constants
from report_documents import accept, row
from test_release import SilentObserver

from conductor import closeout
from conductor.config import load_config, load_recorded
from conductor.digests import Digests, tree_digest
from conductor.evidence.seal import reseal
from conductor.evidence.verify import verify
from conductor.failure import Failure
from conductor.files import read_json, write_json
from conductor.journal import read_history
from conductor.publishing.hub import ATTEMPTS, File, Revision, check_repo_id, upload
from conductor.publishing.model_card import model_card, source_metadata
from conductor.publishing.publish import Outcome, evaluated_files, publish
from conductor.publishing.rejected import move_rejected, put_back
from conductor.recorded_tools import RecordedTools, find_record, recorded_world
from conductor.release import Conductor
from conductor.smoke.record import Record, ScenarioRecord, write_record
from conductor.tracking import Tracking, TrackingStatus
from gates import FailureClass
from gates.smoke import Outcome as SmokeOutcome

REPO = "org/demo-int8"
DIGEST = "ab" * 32


def now() -> datetime:
    return datetime.now(UTC)


def no_wait(seconds: float) -> None:
    """Take the place of waiting between attempts."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on the loopback, and a client that knows of no other."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with stand_in() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        yield served
        huggingface_hub.close_session()


@pytest.fixture
def candidate(tmp_path: Path) -> list[File]:
    """Files of a candidate: small ones, an empty one, and two for large-file storage."""
    contents = {
        "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
        "empty.txt": b"",
        "model-1.safetensors": os.urandom(300_000),
        "model-2.safetensors": os.urandom(200_000),
        "sub/tokenizer.json": b"{}" * 20_000,
    }
    files = []
    for name, content in contents.items():
        path = tmp_path / "candidate" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        files.append(File(path=name, content=path, sha256=sha256, size_bytes=len(content)))
    return [*files, File.of_bytes("README.md", b"---\nlicense: mit\n---\n# A card\n")]


def send(files: list[File], **options: Any) -> Revision:
    wanted = {"repo": REPO, "private": False, "message": "m", "sleep": no_wait, **options}
    return upload(files, **wanted)


def contents(files: list[File]) -> dict[str, bytes]:
    return {
        file.path: file.content if isinstance(file.content, bytes) else file.content.read_bytes()
        for file in files
    }


def test_an_upload_is_one_commit_that_holds_every_file(hub: Hub, candidate: list[File]) -> None:
    revision = send(candidate)
    repo = hub.repos[REPO]
    assert repo.commits == [INITIAL, INITIAL | contents(candidate)]
    assert (revision.commit, revision.private) == (repo.head, False)
    assert repo.large == {"model-1.safetensors", "model-2.safetensors", "sub/tokenizer.json"}


def test_what_is_there_already_is_neither_sent_nor_committed_again(
    hub: Hub, candidate: list[File]
) -> None:
    first = send(candidate)
    hub.requests.clear()
    assert send(candidate).commit == first.commit
    assert len(hub.repos[REPO].commits) == 2
    assert hub.asked("PUT") == 0


def test_a_later_candidate_replaces_an_earlier_one_of_the_same_files(
    hub: Hub, candidate: list[File]
) -> None:
    send(candidate)
    later = [File.of_bytes("config.json", b'{"later": true}'), *candidate[1:]]
    send(later)
    assert hub.repos[REPO].files == INITIAL | contents(later)


@pytest.mark.parametrize("private", [True, False], ids=["private", "public"])
def test_a_new_repository_is_seen_by_whom_was_asked(
    hub: Hub, candidate: list[File], private: bool
) -> None:
    assert send(candidate, private=private).private is private
    assert hub.repos[REPO].private is private


STORAGE = "/storage/"
PASSING: list[Any] = [
    pytest.param([Fault(method="PUT", path=STORAGE, after_bytes=100_000)], id="breaks-mid-upload"),
    pytest.param([Fault(method="PUT", path=STORAGE, status=500)], id="500-of-the-storage"),
    pytest.param([Fault(method="PUT", path=STORAGE, too_late=True)], id="answer-lost-storage"),
    pytest.param([Fault(method="POST", path="/repos/create")], id="breaks-at-creation"),
    pytest.param([Fault(method="POST", path="/repos/create", status=500)], id="500-at-creation"),
    pytest.param(
        [Fault(method="POST", path="/repos/create", too_late=True)], id="answer-lost-creation"
    ),
    pytest.param([Fault(method="GET", path=f"/api/models/{REPO}", status=429)], id="429"),
    pytest.param([Fault(method="POST", path="/commit/", status=503)], id="503-at-the-commit"),
    pytest.param([Fault(method="POST", path="/commit/", too_late=True)], id="answer-lost-commit"),
    pytest.param([Fault(method="POST", path="/commit/")], id="breaks-at-the-commit"),
    pytest.param(
        [Fault(method="POST", path="/commit/", status=502)] * (ATTEMPTS - 1), id="almost-too-often"
    ),
    pytest.param([Fault(method="POST", path="/validate-yaml")], id="breaks-at-the-card"),
]


@pytest.mark.parametrize("faults", PASSING)
def test_what_passes_leaves_no_trace(hub: Hub, candidate: list[File], faults: list[Fault]) -> None:
    hub.faults += faults
    revision = send(candidate)
    assert not hub.faults
    assert hub.repos[REPO].commits == [INITIAL, INITIAL | contents(candidate)]
    assert revision.commit == hub.repos[REPO].head


def test_a_listing_that_fails_after_the_commit_is_asked_for_again(
    hub: Hub, candidate: list[File]
) -> None:
    tree = f"/api/models/{REPO}/tree/"
    hub.before_commit = lambda: hub.faults.append(Fault(method="GET", path=tree, status=500))
    send(candidate)
    assert len(hub.repos[REPO].commits) == 2


def test_an_upload_that_was_cut_short_goes_on_and_sends_no_file_twice(
    hub: Hub, candidate: list[File]
) -> None:
    hub.faults += [Fault(method="POST", path="/commit/", status=500)] * ATTEMPTS
    with pytest.raises(Failure, match="publish again: what was uploaded is not sent twice") as gone:
        send(candidate)
    assert gone.value.failure_class is FailureClass.INFRA_TRANSIENT
    assert hub.repos[REPO].commits == [INITIAL]
    assert hub.asked("PUT") == 3
    send(candidate)
    assert hub.repos[REPO].files == INITIAL | contents(candidate)
    assert hub.asked("PUT") == 3


def test_a_file_that_changed_since_it_was_evaluated_is_not_committed(
    hub: Hub, candidate: list[File]
) -> None:
    path = candidate[2].content
    assert isinstance(path, Path)
    path.write_bytes(os.urandom(300_000))
    with pytest.raises(Failure, match=r"model-1.safetensors changed .* nothing was published"):
        send(candidate)
    assert hub.repos[REPO].commits == [INITIAL]


def test_a_file_that_the_repository_ignores_is_missed(hub: Hub, candidate: list[File]) -> None:
    hub.ignored = {"config.json"}
    with pytest.raises(Failure, match=r"config.json is missing; delete that revision") as found:
        send(candidate)
    assert found.value.failure_class is FailureClass.SYSTEMIC


def test_a_revision_that_holds_other_bytes_is_told(hub: Hub, candidate: list[File]) -> None:
    def damage_what_is_stored() -> None:
        for sha256 in hub.stored:
            hub.stored[sha256] = b"something else"

    hub.before_commit = damage_what_is_stored
    with pytest.raises(Failure, match=r"model-1.safetensors has other contents.*delete that"):
        send(candidate)


def test_whoever_commits_in_between_is_not_overwritten(hub: Hub, candidate: list[File]) -> None:
    def commit_something_else() -> None:
        hub.repos[REPO].commits.append({**INITIAL, "theirs.txt": b""})
        hub.before_commit = lambda: None

    hub.before_commit = commit_something_else
    with pytest.raises(Failure, match="changed by somebody else meanwhile"):
        send(candidate)
    assert hub.repos[REPO].files == {**INITIAL, "theirs.txt": b""}


def put_file(hub: Hub) -> None:
    hub.repos[REPO] = Repo(private=True, commits=[{**INITIAL, "old-3.safetensors": b"x"}])


def forget_token(hub: Hub) -> None:
    hub.token = "hf_another"


def take_namespace(hub: Hub) -> None:
    hub.namespaces = ()


def make_public(hub: Hub) -> None:
    hub.repos[REPO] = Repo()


REFUSED_BY_THE_HUB: list[Any] = [
    pytest.param(forget_token, "does not know this token (HTTP 401", id="401"),
    pytest.param(take_namespace, "may not write to org/demo-int8 (HTTP 403: You don't", id="403"),
    pytest.param(put_file, "holds files that this candidate has not: old-3.saf", id="other-files"),
    pytest.param(make_public, "there already and public", id="public-already"),
]


@pytest.mark.parametrize(("prepare", "words"), REFUSED_BY_THE_HUB)
def test_what_the_account_may_not_is_said_before_anything_is_sent(
    hub: Hub, candidate: list[File], prepare: Callable[[Hub], None], words: str
) -> None:
    prepare(hub)
    before = {name: list(repo.commits) for name, repo in hub.repos.items()}
    with pytest.raises(Failure) as refused:
        send(candidate, private=True)
    assert words in refused.value.message
    assert refused.value.failure_class is FailureClass.USER_CONFIG_ERROR
    assert {name: repo.commits for name, repo in hub.repos.items()} == before
    assert hub.asked("PUT") == 0


def test_a_card_that_the_hub_does_not_take_is_refused(hub: Hub, candidate: list[File]) -> None:
    with pytest.raises(Failure, match=r"does not take it: .*license must be one of"):
        send([*candidate[:-1], File.of_bytes("README.md", b"---\nlicense: no-such-licence\n---\n")])
    assert hub.repos[REPO].commits == [INITIAL]
    assert hub.asked("PUT") == 0


def test_without_a_token_nothing_is_asked(
    hub: Hub, candidate: list[File], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(Failure, match="no token for the Hub; set HF_TOKEN"):
        send(candidate)
    assert hub.requests == []


def test_offline_mode_is_named(
    hub: Hub, candidate: list[File], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(Failure, match="unset HF_HUB_OFFLINE"):
        send(candidate)


def test_a_hub_that_is_not_there_is_tried_again_and_told(
    hub: Hub, candidate: list[File], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    waits: list[float] = []
    with pytest.raises(Failure, match=r"was not published \(ConnectError: .*refused") as gone:
        send(candidate, sleep=waits.append)
    assert gone.value.failure_class is FailureClass.INFRA_TRANSIENT
    assert len(waits) == ATTEMPTS - 1


@pytest.mark.parametrize(
    "repo", ["", "name", "a/b/c", "org/na me", "org/..", "org/name.git", "/name", "org/", "a--b/c"]
)
def test_a_name_that_is_no_repository_is_refused(repo: str) -> None:
    with pytest.raises(Failure, match="namespace/name") as refused:
        check_repo_id(repo)
    assert refused.value.failure_class is FailureClass.USER_CONFIG_ERROR


def release(workspace: Path, run_id: str, **options: Any) -> Path:
    """Release the demo model with recorded tools in place of real ones, and nothing else faked."""
    wanted = {"model": "demo", "recipe": "int8", "workspace": str(workspace), "overlap": "never"}
    config = load_config(None, wanted | options)
    run_dir = workspace / "runs" / run_id
    conductor_of(run_dir).run(config, run_dir)
    return run_dir


def conductor_of(run_dir: Path) -> Conductor:
    record = find_record(load_config(None, {"model": "demo", "recipe": "int8"}))
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    return Conductor(
        world=recorded_world(record, {}),
        clock=now,
        sleep=no_wait,
        observer=SilentObserver(),
        open_tools=lambda _, note: RecordedTools(record, note),
    )


@pytest.fixture(scope="module", autouse=True)
def untracked() -> Iterator[None]:
    """Let a fake answer for the tracking server: sending is not what is tried here."""
    answer = Tracking(status=TrackingStatus.UNAVAILABLE, uri=None, detail="a fake for this test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(closeout, "log_release", lambda *args, **kwargs: answer)
        yield


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with an accepted release and one that regressed, to be copied."""
    workspace = tmp_path_factory.mktemp("releases")
    accepted = release(workspace, "accepted")
    assert read_json(accepted / "report.json")["publish"] == "publish"
    regressed = release(workspace, "regressed", rule="threshold", threshold=0.0005)
    assert read_json(regressed / "report.json")["decision"] == "REGRESSION"
    return workspace


@pytest.fixture
def accepted(releases: Path, tmp_path: Path) -> Path:
    """An accepted run whose candidate has passed its smoke scenarios."""
    run_dir = tmp_path / "workspace" / "runs" / "accepted"
    shutil.copytree(releases / "runs" / "accepted", run_dir)
    smoke(run_dir)
    return run_dir


@pytest.fixture
def regressed(releases: Path, tmp_path: Path) -> Path:
    run_dir = tmp_path / "workspace" / "runs" / "regressed"
    shutil.copytree(releases / "runs" / "regressed", run_dir)
    return run_dir


def smoke(run_dir: Path, **facts: Any) -> None:
    """File what the smoke scenarios of the candidate came to."""
    scenario = ScenarioRecord(
        name="chat-with-the-candidate",
        definition=DIGEST,
        outcome=facts.pop("outcome", SmokeOutcome.PASSED),
        problems=(),
        seconds=1.0,
        outputs={"stdout": DIGEST},
    )
    record = Record(
        owner="candidate",
        passed=scenario.outcome is SmokeOutcome.PASSED,
        detail="said the test",
        when="2026-01-02T03:04:05Z",
        code=DIGEST,
        checkpoint=tree_digest(evaluated_files(read_history(run_dir))),
        scenarios=(scenario,),
    )
    write_record(run_dir / "smoke" / "candidate.json", replace(record, **facts))
    reseal(run_dir, ("smoke",), clock=now)


def attempt(run_dir: Path, **options: Any) -> Outcome:
    return publish(run_dir, REPO, clock=now, digests=Digests(None), sleep=no_wait, **options)


def everything(run_dir: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(run_dir)): path.read_bytes()
        for path in run_dir.rglob("*")
        if path.is_file() and path.name != "lock"
    }


def test_an_accepted_candidate_is_published_as_it_was_evaluated(hub: Hub, accepted: Path) -> None:
    outcome = attempt(accepted)
    files = hub.repos[REPO].files
    checkpoint = everything(accepted / "checkpoint")
    assert files == INITIAL | checkpoint | {"README.md": outcome.card.encode()}
    assert outcome.refused == ()
    assert outcome.document()["published"] is True
    last = json.loads((accepted / "events.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["repo"], last["commit"]) == (
        "candidate_published",
        REPO,
        hub.repos[REPO].head,
    )
    assert verify(accepted).problems == ()


def test_publishing_twice_makes_one_commit(hub: Hub, accepted: Path) -> None:
    first, second = attempt(accepted), attempt(accepted)
    assert first.revision == second.revision
    assert len(hub.repos[REPO].commits) == 2


def test_the_token_is_written_nowhere(hub: Hub, accepted: Path) -> None:
    outcome = attempt(accepted)
    hub.token = "hf_another"
    with pytest.raises(Failure) as refused:
        attempt(accepted)
    told = [json.dumps(outcome.document()).encode(), refused.value.message.encode()]
    workspace = accepted.parent.parent
    assert not any(TOKEN.encode() in each for each in [*told, *everything(workspace).values()])


def test_a_dry_run_shows_everything_and_asks_and_changes_nothing(hub: Hub, accepted: Path) -> None:
    before = everything(accepted)
    outcome = attempt(accepted, dry_run=True)
    assert hub.requests == []
    assert everything(accepted) == before
    assert {file.path for file in outcome.files} == {
        *everything(accepted / "checkpoint"),
        "README.md",
    }
    assert outcome.revision is None
    assert outcome.card.startswith("---\n")


def change_weights(run_dir: Path) -> None:
    path = run_dir / "checkpoint" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def lose_a_file(run_dir: Path) -> None:
    (run_dir / "checkpoint" / "config.json").unlink()


def lose_the_directory(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "checkpoint")


def add_a_file(run_dir: Path) -> None:
    (run_dir / "checkpoint" / "pytorch_model.bin").write_bytes(b"x")


def change_a_verdict(run_dir: Path) -> None:
    path = run_dir / "verdicts" / "ptq.json"
    path.write_text(path.read_text().replace("true", "false", 1))


def change_the_report(run_dir: Path) -> None:
    write_json(run_dir / "report.json", {"decision": "ACCEPT"})


def forget_smoke(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "smoke")


def fail_smoke(run_dir: Path) -> None:
    smoke(run_dir, outcome=SmokeOutcome.FAILED)


def skip_smoke(run_dir: Path) -> None:
    smoke(run_dir, outcome=SmokeOutcome.SKIPPED)


def claim_smoke(run_dir: Path) -> None:
    smoke(run_dir, outcome=SmokeOutcome.FAILED, passed=True)


def smoke_another(run_dir: Path) -> None:
    smoke(run_dir, checkpoint="cd" * 32)


def smoke_of_another_owner(run_dir: Path) -> None:
    smoke(run_dir, owner="engines")


REFUSED: list[Any] = [
    pytest.param(change_weights, "checkpoint/model.safetensors has other contents", id="weights"),
    pytest.param(lose_a_file, "checkpoint/config.json is missing", id="file-lost"),
    pytest.param(lose_the_directory, "checkpoint is missing", id="directory-lost"),
    pytest.param(add_a_file, "checkpoint/pytorch_model.bin was not there when", id="file-added"),
    pytest.param(change_a_verdict, "day0 verify: verdicts/ptq.json", id="verdict"),
    pytest.param(change_the_report, "report.json is missing, or not a whole report", id="report"),
    pytest.param(forget_smoke, "smoke scenarios of the candidate were not run", id="no-smoke"),
    pytest.param(fail_smoke, "smoke scenarios of the candidate did not pass", id="smoke-failed"),
    pytest.param(skip_smoke, "smoke scenarios of the candidate did not pass", id="smoke-skipped"),
    pytest.param(claim_smoke, "its scenarios did not pass", id="smoke-only-claimed"),
    pytest.param(smoke_another, "were run on another checkpoint", id="smoke-of-another"),
    pytest.param(smoke_of_another_owner, "is the record of engines", id="smoke-of-another-owner"),
]


@pytest.mark.parametrize(("break_it", "words"), REFUSED)
@pytest.mark.parametrize("dry_run", [False, True], ids=["real", "dry-run"])
def test_a_condition_that_does_not_hold_refuses_and_nothing_is_asked(
    hub: Hub, accepted: Path, break_it: Callable[[Path], None], words: str, dry_run: bool
) -> None:
    break_it(accepted)
    outcome = attempt(accepted, dry_run=dry_run)
    assert any(words in reason for reason in outcome.refused), outcome.refused
    assert (outcome.revision, outcome.rejected, hub.requests) == (None, None, [])
    assert not (accepted / "REJECTED-checkpoint").exists()


def test_every_reason_is_told_at_once(hub: Hub, accepted: Path) -> None:
    for break_it in (change_weights, add_a_file, change_a_verdict, forget_smoke):
        break_it(accepted)
    reasons = "\n".join(attempt(accepted).refused)
    for words in ("model.safetensors has other", "pytorch_model.bin", "ptq.json", "were not run"):
        assert words in reasons


def test_an_acceptance_for_a_person_to_decide_is_not_published(hub: Hub, tmp_path: Path) -> None:
    run_dir = release(tmp_path, "dry", dry_run=True)
    outcome = attempt(run_dir)
    assert outcome.refused[0].startswith("the report says: a person has to decide. Release again")
    assert (run_dir / "checkpoint").is_dir()


def test_a_release_without_a_decision_is_refused_and_stays(hub: Hub, accepted: Path) -> None:
    lines = (accepted / "events.jsonl").read_text().splitlines(keepends=True)
    (accepted / "events.jsonl").write_text("".join(lines[: len(lines) // 2]))
    outcome = attempt(accepted)
    assert outcome.refused[0] == "there is no decision"
    assert (accepted / "checkpoint").is_dir()


def test_a_rejected_candidate_gets_a_name_that_says_so_and_stays_verifiable(
    hub: Hub, regressed: Path
) -> None:
    checkpoint = everything(regressed / "checkpoint")
    outcome = attempt(regressed)
    assert outcome.refused[0] == "the decision is REGRESSION, not ACCEPT"
    assert outcome.rejected == regressed / "REJECTED-checkpoint"
    assert everything(outcome.rejected) == checkpoint
    assert not (regressed / "checkpoint").exists()
    assert verify(regressed).problems == ()
    assert hub.requests == []


def test_rejecting_twice_changes_nothing_more(hub: Hub, regressed: Path) -> None:
    attempt(regressed)
    before = everything(regressed)
    outcome = attempt(regressed)
    assert outcome.rejected == regressed / "REJECTED-checkpoint"
    assert "the candidate was rejected, and lies in REJECTED-checkpoint" in outcome.refused
    assert everything(regressed) == before


def test_a_death_between_moving_and_sealing_is_made_good(hub: Hub, regressed: Path) -> None:
    (regressed / "checkpoint").rename(regressed / "REJECTED-checkpoint")
    assert verify(regressed).problems
    attempt(regressed)
    assert verify(regressed).problems == ()


def test_moving_hides_no_changed_byte(hub: Hub, regressed: Path) -> None:
    change_weights(regressed)
    attempt(regressed)
    problems = verify(regressed).problems
    assert any("model.safetensors" in problem.file for problem in problems), problems


def test_a_dry_run_moves_nothing(hub: Hub, regressed: Path) -> None:
    before = everything(regressed)
    assert attempt(regressed, dry_run=True).rejected is None
    assert everything(regressed) == before


def test_a_rejected_release_that_goes_on_has_its_candidate_again(hub: Hub, regressed: Path) -> None:
    attempt(regressed)
    then, config = load_recorded(regressed / "config.resolved.yaml", None, {"threshold": 0.01})
    document = conductor_of(regressed).resume(regressed, then, config, accept_drift=True)
    assert document["decision"] == "ACCEPT"
    assert (regressed / "checkpoint").is_dir()
    assert not (regressed / "REJECTED-checkpoint").exists()
    ptq = read_history(regressed).stages["ptq"]  # type: ignore[index]
    assert (ptq.attempts, verify(regressed).problems) == (1, ())


def test_nothing_is_moved_where_nothing_is_rejected(tmp_path: Path) -> None:
    assert move_rejected(tmp_path, clock=now) is None
    put_back(tmp_path)
    assert list(tmp_path.iterdir()) == []


def card_of(report: dict[str, Any], **source: Any) -> tuple[dict[str, Any], str]:
    """Return a card's metadata and text, as the Hub's own client reads it."""
    text = model_card(report, repo=REPO, source=source, checkpoint_digest=DIGEST)
    card = huggingface_hub.ModelCard(text)
    return card.data.to_dict(), card.text


def test_the_card_has_every_score_with_its_interval_and_nothing_that_was_not_measured() -> None:
    report = accept()
    data, text = card_of(report)
    results = {
        each["dataset"]["type"]: each["metrics"][0] for each in data["model-index"][0]["results"]
    }
    assert results.keys() == {task["task"] for task in report["tasks"]}
    for task in report["tasks"]:
        metric = results[task["task"]]
        assert (metric["type"], metric["value"]) == (task["metric"], task["candidate"])
        assert metric["args"]["drop_bounds"] == [task["drop_lower"], task["drop_upper"]]
        assert task["task"] in text
    for fact in (report["run_id"], report["recipe"]["name"], report["engine"]["name"], DIGEST):
        assert fact in text


def test_a_task_without_a_score_has_no_result() -> None:
    report = accept()
    report["tasks"].append(row("unmeasured", candidate=None, metric=None))
    data, _ = card_of(report)
    assert len(data["model-index"][0]["results"]) == 3


def test_the_card_says_its_limits() -> None:
    report = accept() | {"deviations": ["the release was resumed: 2 sessions worked on it"]}
    _, text = card_of(report)
    assert "- Only gsm8k, hellaswag, ifeval were measured" in text
    assert "- the release was resumed: 2 sessions worked on it" in text
    assert "The release recorded no licence" in text


def test_a_release_by_threshold_claims_no_intervals() -> None:
    report = accept() | {"rule": "threshold"}
    for task in report["tasks"]:
        for name in ("outcome", "drop_lower", "drop_upper", "method"):
            task[name] = None
    _, text = card_of(report)
    assert "without intervals" in text
    assert "bounds of the drop" not in text


@pytest.mark.parametrize(
    ("requested", "revision", "base", "shown"),
    [
        pytest.param("org/model@main", "c" * 40, "org/model", "org/model, quantized", id="hub"),
        pytest.param(
            "/home/someone/secret/model", None, None, "\nmodel, quantized", id="directory"
        ),
    ],
)
def test_the_source_is_named_and_no_path_is_told(
    requested: str, revision: str | None, base: str | None, shown: str
) -> None:
    report = accept()
    report["model"] |= {"requested": requested, "revision": revision, "path": "/home/someone/x"}
    report["recipe"]["calibration"] = {
        "source": "/home/someone/texts.jsonl",
        "samples": 8,
        "max_length": 512,
        "tokens": 4096,
    }
    data, text = card_of(report)
    assert data.get("base_model") == base
    assert shown in text
    assert "texts.jsonl, 8 samples" in text
    assert "/home/someone" not in text


SOURCE_CARD = """---
license: apache-2.0
base_model: org/grandparent
model-index: [{name: x, results: [{task: {type: t}, dataset: {type: d, name: d},
  metrics: [{type: acc, value: 0.99}]}]}]
tags: [best]
---
# The best model there is
"""


def test_of_the_source_s_card_licence_and_descent_stay_and_claims_do_not(
    hub: Hub, accepted: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text(SOURCE_CARD)
    source = source_metadata([tmp_path / "none", tmp_path / "README.md"])
    assert source == {"license": "apache-2.0", "base_model": "org/grandparent"}
    data, text = card_of(accept() | {"model": {**accept()["model"], "revision": None}}, **source)
    assert (data["license"], data["base_model"]) == ("apache-2.0", "org/grandparent")
    assert data["tags"] == ["day0"]
    assert "as its card has it: apache-2.0" in text
    assert "best model" not in text


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe", b"---\n[a, b]\n---\n", b"---\na: [\n---\n", b"", b"# no metadata\n"],
    ids=["no-text", "list", "no-yaml", "empty", "no-metadata"],
)
def test_a_source_s_card_that_cannot_be_read_says_nothing(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(content)
    assert source_metadata([tmp_path / "README.md"]) == {}


def test_hostile_names_stay_text() -> None:
    report = accept()
    report["tasks"][0]["task"] = "a|b\n# <script>alert(1)</script>\u202e"
    data, text = card_of(report)
    assert "<script>" not in text
    assert "\u202e" not in json.dumps(data, ensure_ascii=False) + text


def day0(hub: Hub, accepted: Path, *arguments: str, **environ: str) -> Any:
    return run_day0(
        "publish",
        str(accepted),
        "--repo",
        REPO,
        "--workspace",
        str(accepted.parent.parent),
        *arguments,
        environ={
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(accepted.parent / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
            **environ,
        },
    )


def test_the_command_publishes_through_a_connection_that_breaks(hub: Hub, accepted: Path) -> None:
    hub.faults.append(Fault(method="PUT", path=STORAGE, after_bytes=100_000))
    done = day0(hub, accepted, "--private", "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["published"], document["commit"]) == (True, hub.repos[REPO].head)
    assert hub.repos[REPO].private
    assert not hub.faults
    assert TOKEN not in done.stdout + done.stderr
    assert "X-Amz-Signature" not in done.stderr


def test_the_command_publishes_through_xet_which_the_client_prefers(
    hub: Hub, accepted: Path
) -> None:
    # The Hub unpacks what Xet sends; the stand-in is told beforehand what that comes to.
    for content in everything(accepted / "checkpoint").values():
        hub.stored[hashlib.sha256(content).hexdigest()] = content
    hub.faults.append(Fault(method="POST", path="/cas/v1/xorbs/", after_bytes=100_000))
    done = day0(hub, accepted, HF_HUB_DISABLE_XET="0")
    assert done.exit_code == 0, done.stderr
    assert not hub.faults
    assert hub.packed_bytes > 1_000_000
    assert hub.asked("PUT") == 0
    assert hub.repos[REPO].files.keys() == {
        *INITIAL,
        *everything(accepted / "checkpoint"),
        "README.md",
    }


def test_the_command_shows_what_it_would_upload(hub: Hub, accepted: Path) -> None:
    done = day0(hub, accepted, "--dry-run")
    assert done.exit_code == 0, done.stderr
    assert f"would be published as {REPO} (public), in one commit:" in done.stdout
    for words in ("  model.safetensors\n", "  README.md\n", "bytes in 8 files", "model-index:"):
        assert words in done.stdout
    assert hub.requests == []


def test_the_command_refuses_with_every_reason_and_exit_code_1(hub: Hub, regressed: Path) -> None:
    done = day0(hub, regressed)
    assert done.exit_code == 1
    for words in ("is not published:\n", "- the decision is REGRESSION", "REJECTED-checkpoint"):
        assert words in done.stdout
    assert hub.requests == []


def test_the_command_names_a_token_that_is_not_known(hub: Hub, accepted: Path) -> None:
    hub.token = "hf_another"
    done = day0(hub, accepted)
    assert done.exit_code == 2
    assert "error: the Hub does not know this token (HTTP 401" in done.stderr
    assert TOKEN not in done.stderr
