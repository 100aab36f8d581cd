"""A stand-in for the Hub over real HTTP, on the loopback: what the client asks for when it uploads.

It keeps repositories with one branch, and large files by their SHA-256 as the Hub does. Faults are
made on demand: ``hub.faults`` are tried in order, and each is used up by the request it meets.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

TOKEN = "hf_" + "standinstandinstandin"
OPEN = ("/storage/", "/cas/", "/api/validate-yaml", "/api/agent-harnesses", "/v1/telemetry")
"""What needs no token of an account: storage has its own, and anybody may ask about a card."""
REGULAR_BYTES = 16 * 1024
"""From this size on a file goes to large-file storage."""
INITIAL = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}

Handler = Callable[["Request", re.Match[str]], None]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens instead of an answer: a status, or a connection that breaks.

    ``after_bytes`` of the request's body are read first; with ``too_late`` the request is done, and
    its answer is lost.
    """

    method: str
    path: str
    status: int | None = None
    after_bytes: int = 0
    too_late: bool = False


@dataclass(kw_only=True)
class Repo:
    """A repository: its commits, each with all of its files."""

    private: bool = False
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [dict(INITIAL)])
    large: set[str] = field(default_factory=set)

    @property
    def files(self) -> dict[str, bytes]:
        """The files of the latest commit."""
        return self.commits[-1]

    @property
    def head(self) -> str:
        """The name of the latest commit."""
        return self.name_of(len(self.commits) - 1)

    def name_of(self, number: int) -> str:
        """Return a name of 40 digits for a commit."""
        return hashlib.sha1(f"{number}".encode()).hexdigest()

    def at(self, revision: str) -> dict[str, bytes]:
        """Return the files of a revision."""
        names = {self.name_of(number): files for number, files in enumerate(self.commits)}
        return self.files if revision == "main" else names[revision]


@dataclass(kw_only=True)
class Hub:
    """What the stand-in holds, what it was asked, and what is to go wrong."""

    url: str = ""
    token: str = TOKEN
    namespaces: tuple[str, ...] = ("org",)
    repos: dict[str, Repo] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)
    packed_bytes: int = 0
    stored: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    before_commit: Callable[[], None] = lambda: None
    lock: threading.RLock = field(default_factory=threading.RLock)

    def asked(self, words: str) -> int:
        """Return how many requests held ``words``."""
        return sum(words in request for request in self.requests)

    def fault(self, method: str, path: str) -> Fault | None:
        """Take the first fault that is for this request, if any."""
        with self.lock:
            for fault in self.faults:
                if fault.method == method and fault.path in path:
                    self.faults.remove(fault)
                    return fault
        return None


class Request(BaseHTTPRequestHandler):
    """One request; answers of the Hub's API are JSON."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.serve("GET")

    def do_POST(self) -> None:
        self.serve("POST")

    def do_PUT(self) -> None:
        self.serve("PUT")

    def serve(self, method: str) -> None:
        address = urlsplit(self.path)
        self.hub.requests.append(f"{method} {address.path}")
        fault = self.hub.fault(method, address.path)
        if fault and not fault.too_late:
            if fault.status is None:
                self.rfile.read(fault.after_bytes)
                return self.break_off()
            self.read_body()
            return self.answer({"error": "said the stand-in"}, fault.status)
        self.body = self.read_body()
        if fault:
            self.answer = lambda *_: self.break_off()  # type: ignore[method-assign]
        if not address.path.startswith(OPEN) and not self.is_known():
            return self.answer({"error": "Invalid username or password."}, 401)
        for (wanted, pattern), handle in ROUTES.items():
            if method == wanted and (match := re.fullmatch(pattern, address.path)):
                with self.hub.lock:
                    return handle(self, match)
        return self.answer({"error": f"the stand-in has no {method} {address.path}"}, 404)

    def is_known(self) -> bool:
        return self.headers["authorization"] == f"Bearer {self.hub.token}"

    def read_body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers["content-length"] or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def document(self) -> Any:
        return json.loads(self.body)

    def answer(self, document: Any, status: int = 200, **headers: str) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def break_off(self) -> None:
        """Reset the connection, as a network that goes away would."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
        self.connection.close()
        self.rfile.close()

    def repo(self, match: re.Match[str]) -> Repo | None:
        """Return the repository that is asked for; without one, answer that there is none."""
        repo = self.hub.repos.get(match["repo"])
        if repo is None:
            self.answer({"error": "Repository not found"}, 404, **{"X-Error-Code": "RepoNotFound"})
        return repo


def create(request: Request, match: re.Match[str]) -> None:
    asked, hub = request.document(), request.hub
    if asked["organization"] not in hub.namespaces:
        return request.answer({"error": "You don't have the rights to create a model there"}, 403)
    repo = f"{asked['organization']}/{asked['name']}"
    url = f"{hub.url}/{repo}"
    if repo in hub.repos:
        return request.answer({"error": "You already created this model repo", "url": url}, 409)
    hub.repos[repo] = Repo(
        private=asked.get("visibility") == "private" or bool(asked.get("private"))
    )
    return request.answer({"url": url})


def describe(request: Request, match: re.Match[str]) -> None:
    if repo := request.repo(match):
        siblings = [{"rfilename": name} for name in repo.files]
        request.answer(
            {"id": match["repo"], "sha": repo.head, "private": repo.private, "siblings": siblings}
        )


def list_files(request: Request, match: re.Match[str]) -> None:
    if repo := request.repo(match):
        request.answer([entry(repo, *each) for each in repo.at(match["revision"]).items()])


def entry(repo: Repo, name: str, content: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    found: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": blob}
    if name in repo.large:
        sha256 = hashlib.sha256(content).hexdigest()
        found["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
    return found


def choose_storage(request: Request, match: re.Match[str]) -> None:
    if repo := request.repo(match):
        files = [storage_of(repo, each) for each in request.document()["files"]]
        for each in files:
            each["shouldIgnore"] = each["path"] in request.hub.ignored
        request.answer({"files": files})


def storage_of(repo: Repo, asked: dict[str, Any]) -> dict[str, Any]:
    name, there = asked["path"], repo.files.get(asked["path"])
    large = asked["size"] >= REGULAR_BYTES or name.endswith(".safetensors")
    found = {"path": name, "uploadMode": "lfs" if large else "regular"}
    if there is not None:
        facts = entry(repo, name, there)
        found["oid"] = facts["lfs"]["oid"] if "lfs" in facts else facts["oid"]
    return found


def offer_storage(request: Request, match: re.Match[str]) -> None:
    """Say where to put large files; of those that are there already, nothing."""
    objects = []
    for asked in request.document()["objects"]:
        facts = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in request.hub.stored:
            href = f"{request.hub.url}/storage/{asked['oid']}?X-Amz-Signature=0123456789abcdef"
            facts["actions"] = {"upload": {"href": href}}
        objects.append(facts)
    request.answer({"transfer": "basic", "objects": objects})


def store(request: Request, match: re.Match[str]) -> None:
    sha256 = hashlib.sha256(request.body).hexdigest()
    if sha256 != match["oid"]:
        return request.answer({"error": "other contents than were announced"}, 400)
    request.hub.stored[sha256] = request.body
    return request.answer({})


def admit_to_xet(request: Request, match: re.Match[str]) -> None:
    """Say where the newer large-file storage is, and let the client in."""
    expires = int(time.time()) + 3600
    request.answer({"casUrl": f"{request.hub.url}/cas", "exp": expires, "accessToken": "xet"})


def take_packed(request: Request, match: re.Match[str]) -> None:
    """Take a part of a file as Xet packs it; nothing here unpacks it again."""
    request.hub.packed_bytes += len(request.body)
    request.answer({"was_inserted": True})


def take_shard(request: Request, match: re.Match[str]) -> None:
    """Take the list of the parts that make a file."""
    request.answer({"result": 1})


def check_card(request: Request, match: re.Match[str]) -> None:
    known = "license: no-such-licence" not in request.document()["content"]
    errors = [] if known else [{"message": "license must be one of those that there are"}]
    request.answer({"errors": errors, "warnings": []}, 400 if errors else 200)


def commit(request: Request, match: re.Match[str]) -> None:
    """Make all of a commit or nothing."""
    repo = request.repo(match)
    if repo is None:
        return None
    request.hub.before_commit()
    lines = [json.loads(line) for line in request.body.splitlines()]
    parent = next(line["value"] for line in lines if line["key"] == "header").get("parentCommit")
    if parent not in (None, repo.head):
        return request.answer({"error": "the branch has moved"}, 412)
    files, large = dict(repo.files), set(repo.large)
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            if value["oid"] not in request.hub.stored:
                return request.answer({"error": "a large file was not uploaded"}, 400)
            files[value["path"]] = request.hub.stored[value["oid"]]
            large.add(value["path"])
    repo.commits.append(files)
    repo.large = large
    url = f"{request.hub.url}/{match['repo']}/commit/{repo.head}"
    return request.answer({"commitUrl": url, "commitOid": repo.head})


REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES: dict[tuple[str, str], Handler] = {
    ("POST", "/api/repos/create"): create,
    ("POST", "/api/validate-yaml"): check_card,
    ("GET", f"/api/models/{REPO}(?:/revision/main)?"): describe,
    ("GET", f"/api/models/{REPO}/tree/(?P<revision>\\w+)"): list_files,
    ("POST", f"/api/models/{REPO}/preupload/main"): choose_storage,
    ("POST", f"/{REPO}\\.git/info/lfs/objects/batch"): offer_storage,
    ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})"): store,
    ("GET", f"/api/models/{REPO}/xet-write-token/main"): admit_to_xet,
    ("POST", r"/cas/v1/xorbs/default/\w+"): take_packed,
    ("POST", r"/cas/v1/shards"): take_shard,
    ("POST", f"/api/models/{REPO}/commit/main"): commit,
}


@contextmanager
def stand_in() -> Iterator[Hub]:
    """Serve a Hub on a free port of the loopback while the block runs."""
    hub = Hub()
    handler = type("Request", (Request,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
