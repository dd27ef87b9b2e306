"""A Hugging Face Hub on loopback, for model repositories, that the real huggingface_hub talks to.

Commits, branches, tags and pull requests are Git's; access rules, error codes and the first commit, of
`.gitattributes`, are the Hub's. Every file is a regular one: no LFS, no Xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import textwrap
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import RepoCard
from yaml import YAMLError

from tests.forked import Ended, run_forked

Env = dict[str, str]
_HEADS, _TAGS, _PULLS = "refs/heads/", "refs/tags/", "refs/pr/"


class Answer(Exception):
    """What the server says, returned or raised: bytes, JSON, or the message (and code) of an error."""

    def __init__(self, body: Any = None, status: int = 200, code: str | None = None, **headers: str):
        super().__init__(status, body)
        self.status, self.headers = status, {name.replace("_", "-"): text for name, text in headers.items()}
        if isinstance(body, str):
            self.headers["X-Error-Message"] = " ".join(body.encode("ascii", "replace").decode().split())
            self.headers |= {"X-Error-Code": code} if code else {}
            body = {"error": body}
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()


class Request(NamedTuple):
    method: str
    path: str  # unquoted, without the query
    token: str | None


class Commit(NamedTuple):
    sha: str
    parent: str | None
    title: str
    author: str
    files: dict[str, bytes]


@dataclass
class Repo:
    """A model repository: commits by sha, and the sha of each ref (`refs/heads/main`, `refs/pr/1`)."""

    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.owner = self.id.split("/")[0]  # the only one who may write, and see a private one
        self.add(_HEADS + "main", {".gitattributes": b"*.bin filter=lfs\n"}, "initial commit", self.owner)

    def add(self, ref: str, files: dict[str, bytes], title: str, author: str) -> Commit:
        """Commit these files, and no others, to a ref."""
        parent = self.refs.get(ref)
        seed = (self.id, len(self.commits), parent, title, sorted(files.items()))
        sha = hashlib.sha1(repr(seed).encode()).hexdigest()
        self.commits[sha], self.refs[ref] = Commit(sha, parent, title, author, dict(files)), sha
        return self.commits[sha]

    def commit(self, rev: str = "main") -> Commit:
        """The commit of a branch, tag, pull request or full sha."""
        sha = next((self.refs[ref] for ref in (rev, _HEADS + rev, _TAGS + rev) if ref in self.refs), rev)
        if sha not in self.commits:
            raise Answer(f"Invalid rev id: {rev}", 404, "RevisionNotFound")
        return self.commits[sha]

    def files(self, rev: str = "main") -> dict[str, bytes]:
        """Content of every file at a revision, `.gitattributes` included."""
        return dict(self.commit(rev).files)

    def open_pull(self, sha: str) -> int:
        """Open a pull request at a commit; returns its number."""
        number = 1 + sum(name.startswith(_PULLS) for name in self.refs)
        self.refs[f"{_PULLS}{number}"] = sha
        return number


class HubServer:
    """The server, a context manager. `tokens` gives each token's user; those in `read_only` cannot write."""

    def __init__(self, tokens: dict[str, str], read_only: frozenset[str] = frozenset()):
        self.tokens, self.read_only = dict(tokens), read_only
        self.repos: dict[str, Repo] = {}
        self.ownerless: set[str] = set()
        self.requests: list[Request] = []
        self.faults: list[tuple[str, str, int, str | None]] = []  # kind, text in the path, status, method
        self.lock = threading.RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def create(self, repo_id: str, files: dict[str, bytes] | None = None, private: bool = False) -> Repo:
        """Make a repository without a client, with a commit of files if given."""
        if "/" not in repo_id:
            self.ownerless.add(repo_id)
            repo_id = f"{repo_id}/{repo_id}"
        repo = self.repos[repo_id] = Repo(repo_id, private)
        if files:
            repo.add(_HEADS + "main", repo.files() | files, "Add files", repo.owner)
        return repo

    def fail_next(self, path: str, status: int, times: int = 1, method: str | None = None) -> None:
        """Answer the next requests whose path holds a text with an error; the client retries some."""
        self.faults.extend([("fail", path, status, method)] * times)

    def truncate_next_download(self, path: str, resumable: bool = False) -> None:
        """Send half of the next matching file; what the client asks for next, the rest, fails or not."""
        self.faults.append(("truncate", path, 0 if resumable else 503, "GET"))

    def drop_next_upload(self, times: int = 1) -> None:
        """Hang up within the next commits; `upload_folder` tries 6 times with Xet on, all else only once."""
        self.faults.extend([("drop", "/commit/", 0, "POST")] * times)


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        hub, url, length = self.hub, urlsplit(self.path), int(self.headers.get("Content-Length") or 0)
        self.path, self.query = unquote(url.path), parse_qs(url.query)
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        hub.requests.append(Request(self.command, self.path, self.token))
        dropped = self._struck("drop") is not None
        self.body = self.rfile.read(length // 2 if dropped else length)
        if dropped:
            self.close_connection = True
            return
        with hub.lock:
            try:
                if status := self._struck("fail"):
                    raise Answer("injected failure", status)
                if self.token not in (None, *hub.tokens):
                    raise Answer("Invalid credentials in Authorization header", 401)
                # Split before unquoting: a revision such as refs%2Fpr%2F1 is one part.
                answer = self._route(*(unquote(part) for part in url.path.split("/")[1:]))
            except Answer as error:
                answer = error
            except (ValueError, LookupError, TypeError, YAMLError) as error:
                answer = Answer(f"bad request: {error!r}", 400)
            cut = self._struck("truncate") if "/resolve/" in self.path and answer.status < 300 else None
            if cut:
                hub.fail_next(self.path, cut, method="GET")
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body if cut is None else answer.body[: len(answer.body) // 2])
        self.close_connection = self.close_connection or cut is not None

    do_GET = do_HEAD = do_POST = _answer

    def _struck(self, kind: str) -> int | None:
        """The status of a fault that hits the request, if any; that uses it up."""
        for fault in self.hub.faults:
            if fault[0] == kind and fault[1] in self.path and fault[3] in (None, self.command):
                self.hub.faults.remove(fault)
                return fault[2]
        return None

    def _login(self) -> str:
        """The user, who has to be known."""
        if self.token is None:
            # The Hub gives no code with this 401; the client infers it, but only from an https address.
            code = None if self.path.startswith(("/api/repos/", "/api/whoami")) else "RepoNotFound"
            raise Answer("Invalid username or password.", 401, code)
        return self.hub.tokens[self.token]

    def _writer(self, owner: str | None = None) -> str:
        """The user, who has to be allowed to write (to a namespace)."""
        user = self._login()
        if self.token in self.hub.read_only or owner not in (None, user):
            raise Answer(f"You don't have the rights to write to the namespace {owner or user}", 403)
        return user

    def _repo(self, *parts: str) -> Repo:
        """A repository that the user may see."""
        repo = self.hub.repos.get("/".join(parts))
        if repo is None or (repo.private and self._login() != repo.owner):
            raise Answer(f"Repository not found by {self._login()}", 404, "RepoNotFound")
        return repo

    def _route(self, *parts: str) -> Answer:
        """Find what answers a path: of a repository, a method by verb and name (`_post_commit`)."""
        verb = self.command.lower().replace("head", "get")
        match parts:  # some old repositories, such as gpt2, have no owner: here their name is doubled
            case "api", "models", name, *rest if name in self.hub.ownerless:
                parts = ("api", "models", name, name, *rest)
            case name, "resolve", *rest if name in self.hub.ownerless:
                parts = (name, name, "resolve", *rest)
        match parts:
            case "api", "whoami-v2":
                return Answer({"type": "user", "name": self._login(), "orgs": []})
            case "api", "validate-yaml":
                RepoCard(json.loads(self.body)["content"])  # raises if its metadata make no sense
                return Answer({})
            case "api", "repos", "create":
                return self._create()
            case "api", "models", owner, name:
                return self._get_revision(self._repo(owner, name))
            case "api", "models", owner, name, action, *rest if hasattr(self, f"_{verb}_{action}"):
                return getattr(self, f"_{verb}_{action}")(self._repo(owner, name), *rest)
            case owner, name, "resolve", rev, *path if path and verb == "get":
                return self._resolve(self._repo(owner, name), rev, "/".join(path))
        raise Answer("Sorry, we can't find the page you are looking for.", 404)

    def _create(self) -> Answer:
        asked = json.loads(self.body)
        repo_id = f"{self._writer(asked.get('organization'))}/{asked['name']}"
        url = {"url": f"{self.hub.url}/{repo_id}"}
        if repo_id in self.hub.repos:
            return Answer({**url, "error": "You already created this model repo"}, 409)
        self.hub.create(repo_id, private=asked.get("visibility") == "private")
        return Answer(url)

    def _get_revision(self, repo: Repo, rev: str = "main") -> Answer:
        files = [{"rfilename": path} for path in sorted(repo.commit(rev).files)]
        facts = {"id": repo.id, "private": repo.private, "gated": "auto" if repo.gated else False}
        return Answer({**facts, "sha": repo.commit(rev).sha, "tags": [], "siblings": files})

    def _get_tree(self, repo: Repo, rev: str, folder: str = "") -> Answer:
        commit = repo.commit(rev)
        names = {str(parent) for path in commit.files for parent in PurePosixPath(path).parents} - {"."}
        entries: dict[str, Any] = {n: {"type": "directory", "path": n, "oid": "", "size": 0} for n in names}
        for path, data in commit.files.items():
            entries[path] = {"type": "file", "path": path, "oid": blob_sha(data), "size": len(data)}
        inside = sorted(path for path in entries if not folder or path.startswith(folder + "/"))
        if folder and not inside:
            raise Answer(f"{folder} does not exist on {rev}", 404, "EntryNotFound")
        depth = None if self.query.get("recursive") == ["true"] else len(PurePosixPath(folder).parts)
        return Answer([entries[path] for path in inside if depth in (None, path.count("/"))])

    def _post_branch(self, repo: Repo, name: str) -> Answer:
        return self._post_tag(repo, json.loads(self.body).get("startingPoint", "main"), _HEADS + name)

    def _post_tag(self, repo: Repo, rev: str, ref: str | None = None) -> Answer:
        self._writer(repo.owner)
        ref = ref or _TAGS + json.loads(self.body)["tag"]
        if ref in repo.refs:
            raise Answer(f"Reference already exists: {ref}", 409)
        repo.refs[ref] = repo.commit(rev).sha
        return Answer()

    def _post_discussions(self, repo: Repo) -> Answer:
        self._writer()
        return self._get_discussions(repo, str(repo.open_pull(repo.commit().sha)))

    def _get_discussions(self, repo: Repo, number: str) -> Answer:
        facts = {"num": int(number), "title": "", "status": "open", "isPullRequest": True, "events": []}
        facts |= {"createdAt": "2026-01-01T00:00:00.000Z", "repo": {"name": repo.id, "type": "model"}}
        return Answer({**facts, "filesWithConflicts": [], "changes": {"base": _HEADS + "main"}})

    def _post_preupload(self, repo: Repo, rev: str) -> Answer:
        self._writer(None if "create_pr" in self.query or rev.startswith(_PULLS) else repo.owner)
        old = {path: blob_sha(data) for path, data in repo.commit(rev).files.items()}
        paths = [asked["path"] for asked in json.loads(self.body)["files"]]
        mode = {"uploadMode": "regular", "shouldIgnore": False}
        return Answer({"files": [{"path": path, "oid": old.get(path), **mode} for path in paths]})

    def _post_commit(self, repo: Repo, rev: str) -> Answer:
        pull = "create_pr" in self.query
        user = self._writer(None if pull or rev.startswith(_PULLS) else repo.owner)
        ref = rev if rev.startswith(_PULLS) else _HEADS + rev
        head, url = repo.commit(ref), f"{self.hub.url}/{repo.id}"
        header, *changes = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        if not head.sha.startswith(header["value"].get("parentCommit", "")):
            raise Answer("A commit has happened since. Please refresh and try again.", 412)
        files = dict(head.files)
        for change in changes:
            _apply(files, change["key"], change["value"])
        number = repo.open_pull(head.sha) if pull else 0
        sha = repo.add(f"{_PULLS}{number}" if pull else ref, files, header["value"]["summary"], user).sha
        facts = {"success": True, "commitUrl": f"{url}/commit/{sha}", "commitOid": sha}
        return Answer(facts | ({"pullRequestUrl": f"{url}/discussions/{number}"} if pull else {}))

    def _resolve(self, repo: Repo, rev: str, path: str) -> Answer:
        if repo.gated and self.hub.tokens.get(self.token or "") != repo.owner:
            raise Answer(f"Access to model {repo.id} is restricted", 403 if self.token else 401, "GatedRepo")
        commit = repo.commit(rev)
        if path not in commit.files:
            raise Answer("Entry not found", 404, "EntryNotFound", X_Repo_Commit=commit.sha)
        data = commit.files[path]
        headers = {"X_Repo_Commit": commit.sha, "ETag": f'"{blob_sha(data)}"'}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked is None:
            return Answer(data, **headers)
        span = f"bytes {asked[1]}-{len(data) - 1}/{len(data)}"
        return Answer(data[int(asked[1]) :], 206, **headers, Content_Range=span)


def blob_sha(data: bytes) -> str:
    """Git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _apply(files: dict[str, bytes], key: str, value: dict[str, str]) -> None:
    """Carry out one line of a commit."""
    path = value["path"].rstrip("/")
    if key == "file" and not {"", ".", "..", ".git"} & set(path.split("/")):
        files[path] = base64.b64decode(value["content"], validate=True)
    elif key in ("deletedFile", "deletedFolder"):
        gone = [n for n in files if n == path or (key == "deletedFolder" and n.startswith(path + "/"))]
        if not gone:
            raise Answer(f"A file with this name doesn't exist: {path}", 404, "EntryNotFound")
        for name in gone:
            del files[name]
    else:
        raise Answer(f"cannot carry out: {key} {path}", 400)


def client_environment(hub: HubServer, home: Path, token: str | None = None, xet: bool = False) -> Env:
    """Environment of a client that caches below `home`; `upload_folder` goes another way with Xet on."""
    away = ("HF_", "HUGGING", "TRANSFORMERS_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    env = {name: value for name, value in os.environ.items() if not name.upper().startswith(away)}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return env | {"HF_HUB_DISABLE_XET": str(int(not xet))} | ({"HF_TOKEN": token} if token else {})


def run_client(code: str, env: Env) -> Ended:
    """Run Python code in a process of its own, which has read the environment and nothing from the Hub."""
    return run_forked(textwrap.dedent(code), env=env, clean=True)
