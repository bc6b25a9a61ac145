"""A local server that speaks the part of the Hugging Face Hub's API that uploads and downloads use."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest


class FakeHub:
    """Repositories in memory, one list of commits each; private ones want the token."""

    def __init__(self, token: str = "secret") -> None:
        self.token = token
        self.private: dict[str, bool] = {}
        self.commits: dict[str, list[dict[str, bytes]]] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_POST = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self._thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()

    def answer(self, http) -> None:
        size = int(http.headers.get("Content-Length") or 0)
        body = http.rfile.read(size)
        path = unquote(urlsplit(http.path).path)
        known = http.headers.get("Authorization") == f"Bearer {self.token}"
        status, headers, content = self.route(http.command, path, body, known)
        http.send_response(status)
        for name, value in headers.items():
            http.send_header(name, value)
        http.send_header("Content-Length", str(len(content)))
        http.end_headers()
        if http.command != "HEAD":
            http.wfile.write(content)

    def route(self, method, path, body, known):
        if path == "/api/repos/create":
            if not known:
                return _error(401, "", "Invalid credentials")
            wanted = json.loads(body)
            repo = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]  # fmt: skip
            if repo in self.commits:
                return _json({"url": f"{self.url}/{repo}"}, 409)
            self.private[repo] = wanted.get("visibility") == "private" or bool(
                wanted.get("private")
            )
            self.commits[repo] = []
            return _json({"url": f"{self.url}/{repo}"})
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/(.+)", path)
        if match and not known:
            return _error(401, "", "Invalid credentials")
        if match and match[2] == "preupload":
            files = json.loads(body)["files"]
            return _json(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for f in files
                    ]
                }
            )
        if match:
            return self._commit(match[1], body)
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if match:
            return self._file(*match.groups(), known)
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/.+|/tree/.+)?", path)
        if match and match[1] in self.commits:
            return _json({"id": match[1], "siblings": [], "sha": "0" * 40})
        return _error(404, "RepoNotFound", "Repository not found")

    def _commit(self, repo, body):
        files = dict(self.commits[repo][-1]) if self.commits[repo] else {}
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        self.commits[repo].append(files)
        number = len(self.commits[repo])
        page = f"{self.url}/{repo}/commit/{_sha(number)}"
        return _json({"success": True, "commitOid": _sha(number), "commitUrl": page})

    def _file(self, repo, revision, name, known):
        if repo not in self.commits or (self.private[repo] and not known):
            return _error(401, "RepoNotFound", "Repository not found")
        commits = self.commits[repo]
        numbers = {"main": len(commits)} | {_sha(i): i for i in range(1, len(commits) + 1)}
        if revision not in numbers:
            return _error(404, "RevisionNotFound", "Invalid rev id")
        content = commits[numbers[revision] - 1].get(name)
        if content is None:
            return _error(404, "EntryNotFound", "Entry not found")
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": _sha(numbers[revision]),
            "Content-Type": "application/octet-stream",
        }
        return 200, headers, content


def hub_in_use(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[FakeHub]:
    """A hub that huggingface_hub talks to, with its token and an empty cache: a fixture's body."""
    fake = FakeHub()
    monkeypatch.setenv("HF_ENDPOINT", fake.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_TOKEN", fake.token)
    yield fake
    fake.close()


def _sha(number: int) -> str:
    return f"{number:040x}"


def _json(value, status=200):
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _error(status, code, message):
    headers = {"X-Error-Code": code, "X-Error-Message": message} if code else {}
    return status, headers, json.dumps({"error": message}).encode()
