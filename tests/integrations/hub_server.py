"""A small server that speaks the endpoints of the Hugging Face Hub that an upload and a download need."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_right"
READ_ONLY = "hf_reader"
LARGE = (".safetensors", ".png")  # what goes to the store of large files


@dataclass
class Repository:
    """Branches, each a list of commits, each a mapping from path to content."""

    private: bool = False
    branches: dict[str, list[dict[str, bytes]]] = field(default_factory=lambda: {"main": [{}]})

    def commits(self) -> dict[str, dict[str, bytes]]:
        """All states by an id that follows from their content."""
        return {commit_id(files): files for states in self.branches.values() for files in states}


def commit_id(files: dict[str, bytes]) -> str:
    digest = hashlib.sha1()
    for name, content in sorted(files.items()):
        digest.update(name.encode() + b"\0" + content)
    return digest.hexdigest()


@dataclass
class Hub:
    """What the server holds.

    Attributes:
        failures: answers to give instead, by a part of the path: statuses, used up one after another.
        requests: method and path of every request.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    failures: dict[str, list[int]] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        return self.repositories[repo_id].branches[branch][-1]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else b""
        self.hub.requests.append((self.command, path))
        for part, statuses in self.hub.failures.items():
            if part in path and statuses:
                status = statuses.pop(0)
                if status == 0:  # the connection breaks off
                    self.close_connection = True
                    self.connection.close()
                    return
                self._answer(status, {"error": "not now"})
                return
        for pattern, method in ROUTES:
            if pattern in path:
                method(self, path)
                return
        self._answer(404, {"error": f"unknown {path}"}, X_Error_Code="EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _may_write(self) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token == TOKEN:
            return True
        self._answer(403 if token == READ_ONLY else 401, {"error": "no"})
        return False

    def create(self, _path: str) -> None:
        if not self._may_write():
            return
        wanted = json.loads(self.body)
        organization = wanted.get("organization") or "user"
        name = f"{organization}/{wanted['name']}"
        known = name in self.hub.repositories
        if not known:
            self.hub.repositories[name] = Repository(wanted.get("visibility") == "private")
        url = f"http://{self.headers['Host']}/{name}"
        self._answer(409 if known else 200, {"url": url, "name": name})

    def branch(self, path: str) -> None:
        repo_id, _, branch = path.removeprefix("/api/models/").partition("/branch/")
        branches = self.hub.repositories[repo_id].branches
        if branch in branches:
            self._answer(409, {"error": "exists"})
            return
        branches[branch] = [dict(branches["main"][-1])]
        self._answer(201, {})

    def preupload(self, _path: str) -> None:
        if not self._may_write():
            return
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self._answer(200, {"files": files})

    def batch(self, _path: str) -> None:
        objects = [
            {
                **wanted,
                "actions": {
                    "upload": {"href": f"http://{self.headers['Host']}/store/{wanted['oid']}"}
                },
            }
            for wanted in json.loads(self.body)["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def store(self, path: str) -> None:
        oid = path.rpartition("/")[2]
        if hashlib.sha256(self.body).hexdigest() != oid:
            self._answer(400, {"error": "broken"})
            return
        self.hub.stored[oid] = self.body
        self._answer(200)

    def commit(self, path: str) -> None:
        if not self._may_write():
            return
        repo_id, _, branch = path.removeprefix("/api/models/").partition("/commit/")
        states = self.hub.repositories[repo_id].branches[branch]
        files = dict(states[-1])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        states.append(files)
        oid = commit_id(files)
        url = f"http://{self.headers['Host']}/{repo_id}/commit/{oid}"
        self._answer(200, {"commitUrl": url, "commitOid": oid, "success": True})

    def _files_of(self, repo_id: str, revision: str) -> dict[str, bytes] | None:
        repository = self.hub.repositories.get(repo_id)
        if repository is None:
            self._answer(404, {"error": "none"}, X_Error_Code="RepoNotFound")
            return None
        states = repository.branches.get(revision)
        files = states[-1] if states else repository.commits().get(revision)
        if files is None:
            self._answer(404, {"error": "none"}, X_Error_Code="RevisionNotFound")
        return files

    def resolve(self, path: str) -> None:
        repo_id, _, rest = path[1:].partition("/resolve/")
        revision, _, name = rest.partition("/")
        files = self._files_of(repo_id, revision)
        if files is None:
            return
        oid = commit_id(files)
        if name not in files:
            self._answer(404, {"error": "none"}, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
            return
        etag = hashlib.sha256(files[name]).hexdigest()
        self._answer(200, files[name], ETag=f'"{etag}"', X_Repo_Commit=oid)

    def info(self, path: str) -> None:
        repo_id, _, revision = path.removeprefix("/api/models/").partition("/revision/")
        files = self._files_of(repo_id, revision or "main")
        if files is None:
            return
        siblings = [{"rfilename": name} for name in files]
        self._answer(200, {"id": repo_id, "sha": commit_id(files), "siblings": siblings})

    def tree(self, path: str) -> None:
        repo_id, _, revision = path.removeprefix("/api/models/").partition("/tree/")
        files = self._files_of(repo_id, revision)
        if files is not None:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": "0"}
                for name, content in files.items()
            ]
            self._answer(200, entries)

    def valid(self, _path: str) -> None:
        self._answer(200, {"errors": [], "warnings": []})


# In the order in which they are looked through: a part of the path, and what answers it.
ROUTES: list[tuple[str, Callable[[_Handler, str], None]]] = [
    ("/api/repos/create", _Handler.create),
    ("/api/validate-yaml", _Handler.valid),
    ("/branch/", _Handler.branch),
    ("/preupload/", _Handler.preupload),
    ("/info/lfs/objects/batch", _Handler.batch),
    ("/store/", _Handler.store),
    ("/commit/", _Handler.commit),
    ("/resolve/", _Handler.resolve),
    ("/tree/", _Handler.tree),
    ("/api/models/", _Handler.info),
]


class HubServer:
    """The server, running in a thread until it is closed."""

    def __init__(self) -> None:
        self.hub = Hub()
        handler = type("Handler", (_Handler,), {"hub": self.hub})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
