"""A hub on loopback: the few answers that its client asks for, from folders on this disk."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants as client
import pytest

TOKEN = "hf_secret"


def commit_of(folder: Path) -> str:
    """Return the commit of a folder's content."""
    names = "\n".join(sorted(path.name + str(path.stat().st_size) for path in folder.rglob("*")))
    return hashlib.sha1(names.encode()).hexdigest()


class HubServer:
    """Models by name and revision, what was asked for, and what was uploaded.

    Attributes
    ----------
    models
        The folder of each ``(name, revision)``.
    fetched
        The files whose content was sent.
    gated, private
        Names that only who has `TOKEN` gets.
    failing
        A status that everything is answered by, if it is not 0.
    cut
        A file of which the first request gets only half.
    branches
        Those that were made.
    uploaded
        The files of each model that was uploaded.
    """

    def __init__(self) -> None:
        self.models: dict[tuple[str, str], Path] = {}
        self.fetched: list[str] = []
        self.ranges: list[str] = []
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.failing = 0
        self.cut = ""
        self.uploaded: dict[str, dict[str, bytes]] = {}
        self.branches: list[str] = []
        self.blobs: dict[str, bytes] = {}
        self.endpoint = ""

    def revision(self, name: str, revision: str) -> Path | None:
        for (known, branch), folder in self.models.items():
            if known == name and revision in (branch, commit_of(folder)):
                return folder
        return None


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Serve a hub as long as the block runs."""
    hub = HubServer()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def client_of_server(place: Path, patch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Serve a hub that the client of this process asks, without a token and with a cache of its own."""
    with hub_server() as hub:
        template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr(client, "ENDPOINT", hub.endpoint)
        patch.setattr(client, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(client, "HF_HUB_CACHE", str(place / "cache"))
        patch.setattr(client, "HF_HUB_OFFLINE", False)
        patch.setattr(client, "HF_HUB_DISABLE_XET", True)  # whose store is no plain server
        patch.setattr(client, "HF_TOKEN_PATH", str(place / "token"))
        patch.delenv("HF_TOKEN", raising=False)
        patch.chdir(place)
        yield hub


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.hub.failing:
            return self._error(self.hub.failing, "")
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "whoami-v2"]:
            if not self._is_known():
                return self._error(401, "")
            return self._json({"name": "tester", "type": "user", "auth": {"type": "access_token"}})
        if parts[:2] == ["api", "models"]:
            return self._model("/".join(parts[2:4]), parts[4:])
        if len(parts) > 4 and parts[2] == "resolve":
            return self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return self._error(404, "EntryNotFound")

    def _is_known(self) -> bool:
        return self.headers.get("authorization") == f"Bearer {TOKEN}"

    def _found(self, name: str, revision: str) -> Path | None:
        """Return a model's folder; None when an error was sent."""
        known = {each for each, _ in self.hub.models}
        if name not in known or (name in self.hub.private and not self._is_known()):
            self._error(401 if not self._is_known() else 404, "RepoNotFound")
            return None
        if name in self.hub.gated and not self._is_known():
            self._error(403, "GatedRepo")
            return None
        folder = self.hub.revision(name, revision)
        if folder is None:
            self._error(404, "RevisionNotFound")
        return folder

    def _model(self, name: str, rest: list[str]) -> None:
        revision = "main"
        if rest[:1] in (["revision"], ["tree"]):
            revision = "/".join(rest[1:])
        folder = self._found(name, revision)
        if folder is None:
            return None
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = {path: path.relative_to(folder).as_posix() for path in files}
        if rest[:1] == ["tree"]:
            return self._json(
                [
                    {
                        "type": "file",
                        "path": names[path],
                        "size": path.stat().st_size,
                        "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
                    }
                    for path in files
                ]
            )
        siblings = [{"rfilename": names[path], "size": path.stat().st_size} for path in files]
        return self._json(
            {
                "_id": "1",
                "id": name,
                "modelId": name,
                "sha": commit_of(folder),
                "siblings": siblings,
            }
        )

    def _file(self, name: str, revision: str, file: str) -> None:
        folder = self._found(name, revision)
        if folder is None:
            return
        path = folder / file
        if not path.is_file():
            return self._error(404, "EntryNotFound")
        content = path.read_bytes()
        start = 0
        if asked := self.headers.get("range"):
            self.hub.ranges.append(asked)
            start = int(asked.removeprefix("bytes=").partition("-")[0])
        cut = self.hub.cut == file and self.command == "GET"
        if cut:
            self.hub.cut = ""
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", commit_of(folder))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "GET":
            self.hub.fetched.append(file)
            self.wfile.write(content[start : len(content) // 2] if cut else content[start:])
        if cut:
            self.close_connection = True

    def do_PUT(self) -> None:
        body = self._body()
        self.hub.blobs[hashlib.sha256(body).hexdigest()] = body
        self._json({})

    def do_POST(self) -> None:
        body = self._body()
        if self.hub.failing:
            return self._error(self.hub.failing, "")
        if not self._is_known():
            return self._error(401, "")
        path = urlsplit(self.path).path
        parts = unquote(path).strip("/").split("/")
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
            if name in self.hub.uploaded:
                return self._json({"url": f"{self.hub.endpoint}/{name}"}, 409)
            self.hub.uploaded[name] = {}
            return self._json({"url": f"{self.hub.endpoint}/{name}", "id": name, "name": name})
        if path.endswith(".git/info/lfs/objects/batch"):
            asked = json.loads(body)
            objects = [
                {
                    **each,
                    "actions": {"upload": {"href": f"{self.hub.endpoint}/blob", "header": {}}},
                }
                for each in asked["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        if parts[4:5] == ["branch"]:
            self.hub.branches.append(parts[5])
            return self._json({})
        if parts[4:5] == ["preupload"]:
            files = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for each in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        if parts[4:5] == ["commit"]:
            files = self.hub.uploaded["/".join(parts[2:4])]
            for line in body.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = self.hub.blobs[value["oid"]]
            return self._json(
                {
                    "success": True,
                    "commitOid": "0" * 40,
                    "commitUrl": f"{self.hub.endpoint}/{'/'.join(parts[2:4])}/commit/{'0' * 40}",
                }
            )
        return self._error(404, "EntryNotFound")

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def _json(self, value: object, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
