"""A Hub in memory on a loopback port, as far as uploads, downloads and metadata go. Tests read `Hub.repositories`.

Point `HF_ENDPOINT` at `hub.url` before `huggingface_hub` is imported, that is in a new process.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


KINDS = {"models": "model", "datasets": "dataset", "spaces": "space", "kernels": "kernel"}
_API = re.compile(r"/api/(models|datasets|spaces|kernels)/([^/]+/[^/]+)(/.*)?")
_FILE = re.compile(r"/(?:(datasets|spaces|kernels)/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)")


@dataclass
class Repository:
    """What was uploaded: files by path, and what was set when or after it was created."""

    files: dict[str, bytes] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    created_with: dict = field(default_factory=dict)

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


class InMemoryHub:
    """Serves until `close`. `repositories`: {(kind, "owner/name"): Repository}."""

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: InMemoryHub

    def log_message(self, *_) -> None:
        """Quiet."""

    def _reply(self, code: int, body: bytes | dict | list = b"", headers: dict | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/whoami"):
            return self._reply(200, {"type": "user", "name": "tester", "orgs": []})
        if match := _API.fullmatch(path):
            kind, name, rest = match.groups()
            repository = self.hub.repositories.get((KINDS[kind], name))
            if repository is None:
                return self._reply(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            if rest and rest.startswith("/tree/"):
                tree = [
                    {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for file, data in repository.files.items()
                ]
                return self._reply(200, tree)
            files = [{"rfilename": file} for file in repository.files]
            return self._reply(200, {"id": name, "_id": "0", "sha": repository.sha, "siblings": files, "tags": []})
        if match := _FILE.fullmatch(path):
            kind, name, file = match.groups()
            repository = self.hub.repositories.get((KINDS.get(kind, "model"), name))
            if repository is None or file not in repository.files:
                code = "RepoNotFound" if repository is None else "EntryNotFound"
                return self._reply(404, {"error": "not found"}, {"X-Error-Code": code})
            data = repository.files[file]
            headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": repository.sha}
            return self._reply(200, data, headers)
        return self._reply(404, {"error": path})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path, data = unquote(urlsplit(self.path).path), self._body()
        if path == "/api/repos/create":
            values = json.loads(data)
            name = f"{values.get('organization') or 'tester'}/{values['name']}"
            created = Repository(created_with=values)
            self.hub.repositories.setdefault((values.get("type") or "model", name), created)
            return self._reply(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})
        if path == "/api/validate-yaml":
            return self._reply(200, {"errors": [], "warnings": []})
        match = _API.fullmatch(path)
        if match is None or (KINDS[match[1]], match[2]) not in self.hub.repositories:
            return self._reply(404, {"error": path}, {"X-Error-Code": "RepoNotFound"})
        repository, rest = self.hub.repositories[KINDS[match[1]], match[2]], match[3] or ""
        if rest.startswith("/preupload/"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(data)["files"]
            ]
            return self._reply(200, {"files": files})
        if rest.startswith("/commit/"):
            for line in data.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    repository.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            url = f"{self.hub.url}/{match[2]}/commit/{repository.sha}"
            answer = {"success": True, "commitOid": repository.sha, "commitUrl": url}
            return self._reply(200, answer)
        if rest == "/variables":
            values = json.loads(data)
            repository.variables[values["key"]] = values["value"]
            return self._reply(200, {})
        return self._reply(404, {"error": path})
