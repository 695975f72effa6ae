"""A hub on this machine, with as much of the Hugging Face hub's HTTP API as cartridges use."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Repo:
    """Commits are whole trees; branches and pull requests name them."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str) -> str:
        oid = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid


class Hub:
    """The server and what it holds.

    Attributes:
        repos: by id.
        gets: paths of files that were fetched.
        token: who says it may see private repositories, and write.
        broken: answers 500 to everything while it is set.
        before_file: called before a file is answered.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.gets: list[str] = []
        self.token = "hf_secret"
        self.broken = False
        self.before_file: Callable[[], None] = lambda: None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def _any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, headers, data = hub.answer(self.command, self.path, dict(self.headers), body)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if "Content-Length" not in headers:
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_HEAD = do_POST = do_PUT = _any  # noqa: N815

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(
        self, method: str, target: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        if self.broken:
            return 500, {}, b""
        url = urlsplit(target)
        parts, query = unquote(url.path).strip("/").split("/"), parse_qs(url.query)
        is_known = {k.lower(): v for k, v in headers.items()}.get("authorization") == f"Bearer {self.token}"
        if parts[0] == "lfs":
            self.blobs[parts[1]] = body
            return 200, {}, b""
        if parts[:3] == ["api", "repos", "create"]:
            return self._create(json.loads(body), is_known)
        if parts == ["api", "validate-yaml"]:
            return _json({"errors": [], "warnings": []})
        if parts[0] == "api":
            repo_id, rest = "/".join(parts[2:4]), parts[4:]
        else:
            repo_id, rest = "/".join(parts[:2]).removesuffix(".git"), parts[2:]
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and not is_known):
            return 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b""
        if method in ("POST", "PUT") and not is_known:
            return 403, {"X-Error-Message": "you may not write here"}, b""
        if rest[:1] == ["preupload"]:
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            return _json({"files": files})
        if rest[:2] == ["info", "lfs"]:
            objects = [
                one | {"actions": {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return _json({"transfer": "basic", "objects": objects})
        if rest[:1] == ["branch"]:
            if rest[1] in repo.branches:
                return 409, {}, b""
            repo.branches[rest[1]] = repo.branches["main"]
            return _json({})
        if rest[:1] == ["commit"]:
            return self._commit(repo, repo_id, rest[1], body, "create_pr" in query)
        revision = rest[1] if len(rest) > 1 else "main"
        oid = repo.branches.get(revision, revision)
        if oid not in repo.commits:
            return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}, b""
        tree = repo.commits[oid]
        if rest[:1] == ["tree"]:
            return _json([{"type": "file", "path": p, "size": len(d), "oid": _sha(d)} for p, d in sorted(tree.items())])
        if rest[:1] == ["resolve"]:
            return self._file(method, oid, tree, "/".join(rest[2:]))
        siblings = [{"rfilename": path} for path in sorted(tree)]
        return _json({"id": repo_id, "sha": oid, "siblings": siblings, "private": repo.private, "tags": []})

    def _create(self, asked: dict[str, Any], is_known: bool) -> tuple[int, dict[str, str], bytes]:
        if not is_known:
            return 401, {"X-Error-Message": "Invalid credentials"}, b""
        repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if repo_id in self.repos:
            return 409, {}, json.dumps({"url": f"{self.url}/{repo_id}"}).encode()
        repo = self.repos[repo_id] = Repo(bool(asked.get("private")) or asked.get("visibility") == "private")
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "main")
        return _json({"url": f"{self.url}/{repo_id}"})

    def _commit(
        self, repo: Repo, repo_id: str, branch: str, body: bytes, is_request: bool
    ) -> tuple[int, dict[str, str], bytes]:
        files = dict(repo.commits[repo.branches[branch]])
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    data = self.blobs[value["oid"]]
                    if hashlib.sha256(data).hexdigest() != value["oid"]:
                        return 400, {"X-Error-Message": "the blob is another"}, b""
                    files[value["path"]] = data
                case "deletedFile":
                    del files[value["path"]]
        oid = repo.commit(files, "refs/pr/1" if is_request else branch)
        made = {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo_id}/commit/{oid}"}
        return _json(made | ({"pullRequestUrl": f"{self.url}/{repo_id}/discussions/1"} if is_request else {}))

    def _file(self, method: str, oid: str, tree: dict[str, bytes], path: str) -> tuple[int, dict[str, str], bytes]:
        self.before_file()
        data = tree.get(path)
        if data is None:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid}, b""
        if method == "GET":
            self.gets.append(path)
        return 200, {"X-Repo-Commit": oid, "ETag": f'"{_sha(data)}"', "Content-Length": str(len(data))}, data


def _json(document: object) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(document).encode()


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
