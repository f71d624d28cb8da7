"""A double of the Hugging Face Hub on 127.0.0.1, for tests of what pushes to it and loads from it.

It answers the requests that huggingface_hub makes to create a repository, commit to a branch of it (large files by LFS),
list it, download any of its revisions, gate it, and collect repositories. It keeps everything in memory, and checks hashes
and sizes of what is uploaded. A large file that it has is not asked for again, and an uploaded one stays if the commit
fails. It is not the Hub: it has no organisations' roles, no quotas and no Xet storage, its files come without a redirect to
other servers, and of a card's front matter it checks only that it is YAML. What it accepts, the Hub may still refuse.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import torch
import yaml

TOKEN, READ_TOKEN = "hf_may_write", "hf_may_read"
USER = "tester"
ROOT = Path(__file__).parent.parent
PATIENCE_SECONDS = 500


@dataclass
class Repository:
    """What is stored of one: files by path and the paths that each commit touched, on its main branch and the others."""

    private: bool = False
    writable: bool = True
    gated: str | bool = False
    granted: set[str] = field(default_factory=lambda: {TOKEN})  # tokens that may read what is gated
    branches: dict[str, Repository] = field(default_factory=dict)
    past: dict[str, Repository] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    commits: list[list[str]] = field(default_factory=list)

    @property
    def sha(self) -> str:
        """Of the newest commit."""
        return hashlib.sha1(repr((self.commits, len(self.commits))).encode()).hexdigest()

    def at(self, revision: str) -> Repository:
        """A branch, or a commit that is past."""
        tips = {"main": self, **self.branches}
        found = tips.get(revision) or next(
            (one for one in tips.values() if one.sha == revision), self.past.get(revision)
        )
        if found is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def snapshot(self) -> Repository:
        """A copy that later commits do not change."""
        return Repository(files=dict(self.files), large=set(self.large), commits=copy.copy(self.commits))

    def etag(self, path: str) -> str:
        """SHA-256 of a large file, git's hash of a small one."""
        content = self.files[path]
        if path in self.large:
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(ThreadingHTTPServer):
    """The server, and what tests look at or change in it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # uploaded large files by SHA-256
        self.collections: dict[str, dict[str, Any]] = {}
        self.requests: list[str] = []
        self.refuse_commits = False
        self.refused_objects: set[str] = set()  # large files by SHA-256 whose upload breaks

    @property
    def endpoint(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A server without repositories that runs in a thread."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def call(
    hub: Hub, home: Path, command: list[str], token: str | None = TOKEN, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run Python with another HF_HOME that knows the double as its Hub; further environment variables as keywords."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "COLUMNS": "1000"}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # sums in the same order as here
    environment |= more
    if token:
        environment["HF_TOKEN"] = token
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert not (home / "token").exists()
    return done


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str = "", **details: str) -> None:
        super().__init__(message)
        self.status, self.code, self.details = status, code, details


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        body, headers, status = self.read_body(), {}, 200
        try:
            result = self.route(path, body)
        except Refusal as refusal:
            status, result = refusal.status, {"error": str(refusal), **refusal.details}
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)}
        if isinstance(result, tuple):
            content, headers = result
        else:
            content = json.dumps(result).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = answer

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def route(self, path: str, body: bytes) -> Any:
        fixed = {
            "GET /api/whoami-v2": self.whoami,
            "POST /api/repos/create": self.create,
            "POST /api/validate-yaml": self.validate_yaml,
        }
        if answer := fixed.get(f"{self.command} {path}"):
            return answer(body)
        patterns = {
            r"GET /api/(?:models/)?((?:datasets/)?[^/]+/[^/]+)(?:/revision/([^/]+))?": self.info,
            r"GET /api/models/([^/]+/[^/]+)/auth-check/write": self.check_write,
            r"GET /api/(?:models/)?((?:datasets/)?[^/]+/[^/]+)/tree/([^/]+)": self.tree,
            r"PUT /api/models/([^/]+/[^/]+)/settings": self.set,
            r"POST /api/models/([^/]+/[^/]+)/branch/([^/]+)": self.branch,
            r"POST /api/models/([^/]+/[^/]+)/preupload/([^/]+)": self.preupload,
            r"POST /api/models/([^/]+/[^/]+)/commit/([^/]+)": self.commit,
            r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch": self.lfs_batch,
            r"(?:GET|HEAD) /((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)": self.resolve,
            r"PUT /objects/(\w+)": self.store,
            r"POST /objects/(\w+)/verify": self.verify,
            r"POST /api/collections": self.make_collection,
            r"GET /api/collections/(.+)": self.collection,
            r"POST /api/collections/([^/]+/[^/]+)/items": self.collect,
            r"PATCH /api/collections/([^/]+/[^/]+)/items/(\w+)": self.change_item,
        }
        for pattern, answer in patterns.items():
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                return answer(*found.groups(), body)
        raise Refusal(404, f"the double has no route {self.command} {path}")

    def require_token(self, write: bool = True) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in (TOKEN, READ_TOKEN):
            raise Refusal(401, "Invalid credentials")
        if write and token != TOKEN:
            raise Refusal(403, "this token may only read")

    def repository(self, name: str, write: bool = False) -> Repository:
        if write:
            self.require_token()
        repository = self.server.repositories.get(name)
        may_see = repository and (not repository.private or TOKEN in self.headers.get("Authorization", ""))
        if not may_see:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if write and not repository.writable:
            raise Refusal(403, f"no right to write to {name}")
        return repository

    def whoami(self, body: bytes) -> Any:
        self.require_token(write=False)
        return {"type": "user", "name": USER, "orgs": []}

    def create(self, body: bytes) -> Any:
        self.require_token()
        asked = json.loads(body)
        name = f"{asked['organization'] or USER}/{asked['name']}"
        # Before the rights, which the Hub may do the other way round: its client takes no 127.0.0.1 in the answer to that.
        if name in self.server.repositories:
            raise Refusal(409, "This model repo exists", url=f"{self.server.endpoint}/{name}")
        if not name.startswith(f"{USER}/"):
            raise Refusal(403, f"no right to create a model in {asked['organization']}")
        private = asked.get("visibility") == "private" or asked.get("private", False)
        self.server.repositories[name] = Repository(
            private, files={".gitattributes": b""}, commits=[[".gitattributes"]]
        )
        return {"url": f"{self.server.endpoint}/{name}", "name": name}

    def validate_yaml(self, body: bytes) -> Any:
        content = json.loads(body)["content"]
        try:
            assert isinstance(yaml.safe_load(content.split("---\n")[1]), dict)
        except (AssertionError, IndexError, yaml.YAMLError) as error:
            raise Refusal(400, f"invalid front matter: {error}") from error
        return {"errors": [], "warnings": []}

    def info(self, name: str, revision: str | None, body: bytes) -> Any:
        repository = self.repository(name)
        state = repository.at(revision or "main")
        siblings = [{"rfilename": path} for path in state.files]
        described = {"id": name, "private": repository.private, "gated": repository.gated, "tags": []}
        return described | {"sha": state.sha, "siblings": siblings}

    def set(self, name: str, body: bytes) -> Any:
        repository, asked = self.repository(name, write=True), json.loads(body)
        repository.gated = asked.get("gated", repository.gated)
        return {}

    def branch(self, name: str, branch: str, body: bytes) -> Any:
        repository = self.repository(name, write=True)
        if branch in {"main", *repository.branches}:
            raise Refusal(409, f"Reference already exists: {branch}")
        repository.branches[branch] = repository.snapshot()
        return {}

    def check_write(self, name: str, body: bytes) -> Any:
        self.repository(name, write=True)
        return {}

    def tree(self, name: str, revision: str, body: bytes) -> Any:
        repository, entries = self.repository(name).at(revision), []
        for path, content in repository.files.items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": repository.etag(path)}
            if path in repository.large:
                entry["lfs"] = {"oid": repository.etag(path), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        return entries

    def preupload(self, name: str, revision: str, body: bytes) -> Any:
        self.repository(name, write=True).at(revision)
        modes = []
        for file in json.loads(body)["files"]:
            mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
            modes.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
        return {"files": modes}

    def lfs_batch(self, name: str, body: bytes) -> Any:
        self.repository(name, write=True)
        objects = []
        for wanted in json.loads(body)["objects"]:
            place = f"{self.server.endpoint}/objects/{wanted['oid']}"
            if wanted["oid"] in self.server.objects:
                objects.append(wanted)
                continue
            objects.append(wanted | {"actions": {"upload": {"href": place}, "verify": {"href": f"{place}/verify"}}})
        return {"transfer": "basic", "objects": objects}

    def store(self, oid: str, body: bytes) -> Any:
        if oid in self.server.refused_objects:
            raise Refusal(403, "the double lets this upload break")
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "the content has another hash")
        self.server.objects[oid] = body
        return {}

    def verify(self, oid: str, body: bytes) -> Any:
        if len(self.server.objects.get(oid, b"")) != json.loads(body)["size"]:
            raise Refusal(422, "the object is not there, or of another size")
        return {}

    def commit(self, name: str, revision: str, body: bytes) -> Any:
        whole = self.repository(name, write=True)
        repository = whole.at(revision)
        if self.server.refuse_commits:
            raise Refusal(500, "Internal error: the double refuses commits")
        whole.past[repository.sha] = repository.snapshot()
        touched = []
        for line in body.splitlines():
            operation = json.loads(line)
            kind, value = operation["key"], operation["value"]
            if kind == "header":
                continue
            path = value["path"]
            touched.append(path)
            repository.large.discard(path)
            if kind == "file":
                repository.files[path] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                repository.files[path] = self.server.objects[value["oid"]]
                repository.large.add(path)
            elif kind == "deletedFile":
                del repository.files[path]
            else:
                raise Refusal(400, f"the double knows no operation {kind}")
        repository.commits.append(touched)
        return {"success": True, "commitOid": repository.sha, "commitUrl": f"{self.server.endpoint}/{name}/commit/1"}

    def resolve(self, name: str, revision: str, path: str, body: bytes) -> Any:
        whole = self.repository(name)
        if whole.gated and self.headers.get("Authorization", "").removeprefix("Bearer ") not in whole.granted:
            raise Refusal(403, f"Access to model {name} is restricted", "GatedRepo")
        repository = whole.at(revision)
        if path not in repository.files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        return repository.files[path], {"ETag": f'"{repository.etag(path)}"', "X-Repo-Commit": repository.sha}

    def make_collection(self, body: bytes) -> Any:
        self.require_token()
        asked = json.loads(body)
        slug = f"{asked['namespace']}/{asked['title'].lower().replace(' ', '-')}-0123456789abcdef01234567"
        if slug in self.server.collections:
            raise Refusal(409, "This collection exists", slug=slug)
        if asked["namespace"] != USER:
            raise Refusal(403, f"no right to create a collection in {asked['namespace']}")
        described = {"slug": slug, "owner": {"name": USER}, "items": [], "position": 0, "theme": "blue", "upvotes": 0}
        described |= {"lastUpdated": "2026-01-01T00:00:00.000Z", "description": asked.get("description")}
        self.server.collections[slug] = described | {"title": asked["title"], "private": asked["private"]}
        return self.server.collections[slug]

    def collection(self, slug: str, body: bytes) -> Any:
        if slug not in self.server.collections:
            raise Refusal(404, "Collection not found")
        return self.server.collections[slug]

    def collect(self, slug: str, body: bytes) -> Any:
        self.require_token()
        found, asked = self.collection(slug, b""), json.loads(body)
        item = {**asked["item"], "position": len(found["items"]), "_id": f"{len(found['items']):024x}"}
        self.repository(item["id"])
        if item["id"] in [one["id"] for one in found["items"]]:
            raise Refusal(409, "This item is in the collection")
        found["items"].append(item | ({"note": {"text": asked["note"]}} if "note" in asked else {}))
        return found

    def change_item(self, slug: str, item: str, body: bytes) -> Any:
        self.require_token()
        (found,) = [one for one in self.collection(slug, b"")["items"] if one["_id"] == item]
        asked = json.loads(body)
        found["note"] = {"text": asked["note"]}
        return {"success": True}
