"""A model hub on loopback for the unmodified ``huggingface_hub`` client, with faults on demand.

It keeps what it is given in memory and speaks the part of the Hub's protocol that pushing and loading experts uses:
repositories, branches, LFS, commits, listings, downloads with ranges, tokens. The client reads its address when it is
imported, so client code runs in a process of its own: see ``tests/helpers/hub_client.py``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, unquote

import yaml

WRITER, READER = "hf_writer", "hf_stranger"
"""Tokens of the users ``user`` (who owns what ``user/...`` names) and ``stranger``."""
LFS_SUFFIXES = (".safetensors", ".gif", ".mp4")
DATE = "2000-01-01T00:00:00.000Z"


@dataclass
class Fault:
    """What happens instead of, or to, the answer of the next ``times`` requests that match.

    kind: "status" answers with it; "stall" with nothing for ``value`` seconds; "drop" closes within the request;
    "lose" does what is asked, then closes; "cut" closes after ``value`` bytes; "flip" changes a byte of the body.
    """

    pattern: str
    kind: str
    value: float = 0
    times: int = 1
    body: bytes = b'{"error": "injected"}'
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Repository:
    """Branches and commits; a commit is the files of a moment: bytes, or the hash of an LFS object."""

    owner: str
    private: bool
    commits: dict[str, dict[str, bytes | str]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: Mapping[str, bytes | str], message: str) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {message} {id(self)}".encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        self.messages.append(message)
        return sha


class Answer(NamedTuple):
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = {}


class Refusal(Exception):
    """An error answer; ``code`` is the Hub's own name for it."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer(status, json.dumps({"error": message}).encode(), headers)


def as_json(data: object, status: int = 200) -> Answer:
    return Answer(status, json.dumps(data).encode(), {"Content-Type": "application/json"})


class Hub:
    """The server; a context manager. ``requests`` lists what was asked, ``faults`` what will go wrong."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.tokens = {WRITER: "user", READER: "stranger"}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self.server = _Server(self)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def fail(self, pattern: str, kind: str = "status", value: float = 500, times: int = 1, **more: Any) -> None:
        """Let the next requests whose "METHOD /path" matches go wrong; see ``Fault``."""
        self.faults.append(Fault(pattern, kind, value, times, **more))

    def asked(self, pattern: str) -> list[str]:
        """The requests so far whose "METHOD /path" matches."""
        return [request for request in self.requests if re.search(pattern, request)]

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Path to content."""
        found = self.repositories[repo]
        return {path: self.content(blob) for path, blob in found.commits[found.branches[revision]].items()}

    def put(self, repo: str, files: Mapping[str, bytes], private: bool = False, branch: str = "main") -> str:
        """A commit with exactly these files, in a repository that is made when needed; returns its hash."""
        found = self.repositories.setdefault(repo, Repository(repo.partition("/")[0], private))
        stored = {path: self.store(content) if is_lfs(path) else content for path, content in files.items()}
        return found.commit(branch, stored, "put")

    def store(self, content: bytes) -> str:
        oid = hashlib.sha256(content).hexdigest()
        self.objects[oid] = content
        return oid

    def content(self, blob: bytes | str) -> bytes:
        return self.objects[blob] if isinstance(blob, str) else blob

    def take_fault(self, request: str) -> Fault | None:
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None


def is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


def oid_of(blob: bytes | str) -> str:
    """As the client compares it: SHA-256 of an LFS object, git's hash of another file."""
    return blob if isinstance(blob, str) else hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def handle_one(self) -> None:
        self.hub = self.server.hub
        self.path, _, query = self.path.partition("?")
        self.query = parse_qs(query)
        fault = self.hub.take_fault(f"{self.command} {unquote(self.path)}")
        if fault and fault.kind == "drop":
            self.rfile.read(min(1, int(self.headers.get("Content-Length") or 0)))
            return self.hang_up()
        self.body = self.read_body()
        if fault and fault.kind == "stall":
            self.hub.closing.wait(fault.value)
            return self.hang_up()
        refused = fault and fault.kind == "status" and Answer(int(fault.value), fault.body, fault.headers)
        answer = refused or self.answer()
        if fault and fault.kind == "lose":
            return self.hang_up()
        flipped = bool(fault and fault.kind == "flip")
        body = answer.body[:-1] + bytes([answer.body[-1] ^ 1]) if flipped else answer.body
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        if fault and fault.kind == "cut":
            self.wfile.write(body[: int(fault.value)])
            return self.hang_up()
        self.wfile.write(body)
        return None

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self) -> Answer:
        try:
            for method, pattern, name in ROUTES:
                match = re.fullmatch(pattern, self.path)
                if match and self.command in method.split():
                    arguments = {key: unquote(value) for key, value in match.groupdict().items()}
                    return getattr(self, name)(**arguments)
            raise Refusal(404, f"this hub does not know {self.command} {self.path}")
        except Refusal as refusal:
            return refusal.answer

    # --- who asks ------------------------------------------------------------

    def user(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.hub.tokens.get(header.removeprefix("Bearer "))
        if user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return user

    def readable(self, repo: str) -> Repository:
        user, found = self.user(), self.hub.repositories.get(repo)
        if found is None or (found.private and user != found.owner):
            message = "Repository not found" if user else "Invalid username or password."
            raise Refusal(404 if user else 401, message, "RepoNotFound")
        return found

    def writable(self, repo: str) -> Repository:
        found, user = self.readable(repo), self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if user != found.owner:
            raise Refusal(403, "you need write access to this repository")
        return found

    def snapshot(self, found: Repository, revision: str) -> tuple[str, dict[str, bytes | str]]:
        sha = found.branches.get(revision, revision)
        if sha not in found.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, found.commits[sha]

    # --- writing ------------------------------------------------------------

    def whoami(self) -> Answer:
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        return as_json({"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token"}})

    def validate_card(self) -> Answer:
        parts = json.loads(self.body)["content"].split("---\n", 2)
        metadata = yaml.safe_load(parts[1]) if len(parts) == 3 else {}
        errors = []
        if metadata.get("license") == "other" and not {"license_name", "license_link"} <= set(metadata):
            errors.append({"message": '"license_name" and "license_link" are required with "license: other"'})
        return as_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def create(self) -> Answer:
        data, user = json.loads(self.body), self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        owner = data.get("organization") or user
        if owner != user:
            raise Refusal(403, f"you may not create a repository for {owner}")
        repo = f"{owner}/{data['name']}"
        known = repo in self.hub.repositories
        if not known:
            created = Repository(owner, data.get("visibility") == "private" or bool(data.get("private")))
            created.commit("main", {".gitattributes": b""}, "initial commit")
            self.hub.repositories[repo] = created
        return as_json({"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo}, 409 if known else 200)

    def create_branch(self, repo: str, branch: str) -> Answer:
        found = self.writable(repo)
        if branch in found.branches:
            raise Refusal(409, f"Reference already exists: {branch}")
        found.branches[branch] = self.snapshot(found, "main")[0]
        return as_json({})

    def preupload(self, repo: str, revision: str) -> Answer:
        _, files = self.snapshot(self.writable(repo), revision)
        rows = []
        for entry in json.loads(self.body)["files"]:
            path = entry["path"]
            row = {"path": path, "uploadMode": "lfs" if is_lfs(path) else "regular", "shouldIgnore": False}
            rows.append(row | ({"oid": oid_of(files[path])} if path in files else {}))
        return as_json({"files": rows})

    def lfs_batch(self, repo: str) -> Answer:
        self.writable(repo)
        rows = []
        for entry in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}", "header": {}}}
            known = entry["oid"] in self.hub.objects
            rows.append({"oid": entry["oid"], "size": entry["size"]} | ({} if known else {"actions": upload}))
        return as_json({"transfer": "basic", "objects": rows})

    def lfs_put(self, oid: str) -> Answer:
        if self.hub.store(self.body) != oid:
            raise Refusal(400, "this is not the object that was announced")
        return as_json({})

    def commit(self, repo: str, revision: str) -> Answer:
        found = self.writable(repo)
        _, before = self.snapshot(found, revision)
        files, message = dict(before), ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile" and value["oid"] in self.hub.objects:
                files[value["path"]] = value["oid"]
            else:
                raise Refusal(400, f"cannot commit {entry['key']} {value.get('path')}")
        sha = found.commit(revision, files, message)
        return as_json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})

    # --- reading ------------------------------------------------------------

    def info(self, repo: str, revision: str = "main") -> Answer:
        found = self.readable(repo)
        sha, files = self.snapshot(found, revision)
        card = files.get("README.md", b"")
        parts = (card if isinstance(card, bytes) else b"").decode().split("---\n", 2)
        data = {
            "id": repo,
            "modelId": repo,
            "sha": sha,
            "private": found.private,
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }
        data |= {"siblings": [{"rfilename": path} for path in files], "createdAt": DATE, "lastModified": DATE}
        return as_json(data | ({"cardData": yaml.safe_load(parts[1])} if len(parts) == 3 else {}))

    def tree(self, repo: str, revision: str) -> Answer:
        _, files = self.snapshot(self.readable(repo), revision)
        return as_json([self.entry(path, blob) for path, blob in files.items()])

    def paths_info(self, repo: str, revision: str) -> Answer:
        _, files = self.snapshot(self.readable(repo), revision)
        asked = parse_qs(self.body.decode()).get("paths", [])
        return as_json([self.entry(path, files[path]) for path in asked if path in files])

    def entry(self, path: str, blob: bytes | str) -> dict[str, Any]:
        size = len(self.hub.content(blob))
        row = {"type": "file", "path": path, "size": size, "oid": oid_of(blob)}
        return row | ({"lfs": {"oid": blob, "size": size, "pointerSize": 134}} if isinstance(blob, str) else {})

    def resolve(self, repo: str, revision: str, path: str) -> Answer:
        sha, files = self.snapshot(self.readable(repo), revision)
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if path not in files:
            refused = Refusal(404, "Entry not found", "EntryNotFound").answer
            return refused._replace(headers={**refused.headers, **headers})
        content = self.hub.content(files[path])
        headers["ETag"] = f'"{oid_of(files[path])}"'
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return Answer(206, content[start:], headers)
        return Answer(200, content, headers)


_REPO, _REVISION = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/validate-yaml", "validate_card"),
    ("POST", "/api/repos/create", "create"),
    ("POST", f"/api/models/{_REPO}/branch/(?P<branch>[^/]+)", "create_branch"),
    ("POST", f"/api/models/{_REPO}/preupload/{_REVISION}", "preupload"),
    ("POST", f"/{_REPO}\\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    ("POST", f"/api/models/{_REPO}/commit/{_REVISION}", "commit"),
    ("GET", f"/api/models/{_REPO}", "info"),
    ("GET", f"/api/models/{_REPO}/revision/{_REVISION}", "info"),
    ("GET", f"/api/models/{_REPO}/tree/{_REVISION}", "tree"),
    ("POST", f"/api/models/{_REPO}/paths-info/{_REVISION}", "paths_info"),
    ("GET HEAD", f"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", "resolve"),
]
