"""The loopback Hub, driven by the real client in processes of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import HubServer, blob_sha, client_environment, run_client

FILES = {"config.json": b'{"a": 1}', "weights.bin": bytes(range(256)) * 40, "sub/deep/x.txt": b"x\n"}
PRELUDE = """
import json, os, sys
from pathlib import Path
from huggingface_hub import CommitOperationAdd, HfApi, ResolvedRevision, hf_hub_download, snapshot_download
api = HfApi()
def outcome(function, *args, **kwargs):
    try:
        return ["ok", str(function(*args, **kwargs))]
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        return [type(error).__name__, status]
def tree(folder):
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes().hex() for path in files}
"""


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer({"hf_good": "me", "hf_other": "you", "hf_read": "me"}, frozenset({"hf_read"})) as server:
        yield server


def client(hub: HubServer, home: Path, code: str, token: str | None = "hf_good", xet: bool = False) -> Any:
    """Run code that sets `result`; returns it."""
    done = run_client(
        PRELUDE + code + "\nprint(json.dumps(result))", client_environment(hub, home, token, xet)
    )
    assert done.code == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def fill(folder: Path) -> Path:
    for name, data in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def hexed(files: dict[str, bytes]) -> dict[str, str]:
    return {name: data.hex() for name, data in files.items()}


def downloads(hub: HubServer) -> list[str]:
    return [path for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path]


def leftovers(home: Path) -> list[str]:
    """Finished files below a cache: blobs and links to them."""
    folders = [path for name in ("blobs", "snapshots") for path in home.rglob(name)]
    return [path.name for folder in folders for path in folder.rglob("*") if not path.is_dir()]


@pytest.mark.parametrize("xet", [False, True])
def test_upload_and_download(hub: HubServer, tmp_path: Path, xet: bool) -> None:
    card = "---\nlicense: mit\n---\n# Card\n"
    code = f"""
url = api.create_repo("x")  # in the token's own namespace
again = api.create_repo("me/x", exist_ok=True)
first = api.upload_folder(repo_id="me/x", folder_path={str(fill(tmp_path / "in"))!r}, commit_message="One")
second = api.upload_file(
    repo_id="me/x", path_or_fileobj={card.encode()!r}, path_in_repo="README.md", commit_message="Two"
)
same = api.upload_folder(repo_id="me/x", folder_path={str(tmp_path / "in")!r})
api.create_branch("me/x", branch="dev/a", revision=first.oid)
api.create_branch("me/x", branch="dev/a", exist_ok=True)
api.create_tag("me/x", tag="v1", revision=first.oid)
api.upload_file(repo_id="me/x", path_or_fileobj=b"dev", path_in_repo="sub/b", revision="dev/a")
api.delete_file("config.json", "me/x", revision="dev/a")
api.delete_folder("sub/deep", "me/x", revision="dev/a")
revisions = ["main", first.oid, "v1", "dev/a"]
result = {{
    "ids": [url.repo_id, again.repo_id], "oids": [first.oid, second.oid, same.oid],
    "commit": str(second), "user": api.whoami()["name"],
    "trees": [tree(snapshot_download("me/x", revision=revision)) for revision in revisions],
    "file": hf_hub_download("me/x", "x.txt", subfolder="sub/deep"),
    "some": tree(snapshot_download("me/x", allow_patterns="sub/*", local_dir={str(tmp_path / "l")!r})),
    "listed": api.list_repo_files("me/x"), "entries": len(list(api.list_repo_tree("me/x"))),
    "inside": [entry.path for entry in api.list_repo_tree("me/x", path_in_repo="sub/deep")],
    "exists": [api.file_exists("me/x", "README.md"), api.file_exists("me/x", "no"), api.repo_exists("me/y")],
}}
"""
    result = client(hub, tmp_path / "home", code, xet=xet)
    repo = hub.repos["me/x"]
    assert result["ids"] == ["me/x", "me/x"] and result["user"] == "me"
    first, second, same = result["oids"]
    assert second == same == repo.commit().sha and repo.commit().parent == first
    assert result["commit"] == f"{hub.url}/me/x/commit/{second}"
    assert [repo.commit(sha).title for sha in (first, second)] == ["One", "Two"]
    attributes = {".gitattributes": repo.files()[".gitattributes"]}
    assert repo.files(first) == {**FILES, **attributes}
    assert repo.files() == {**FILES, **attributes, "README.md": card.encode()}
    assert repo.files("dev/a") == {**attributes, "weights.bin": FILES["weights.bin"], "sub/b": b"dev"}
    assert result["trees"] == [hexed(repo.files(rev)) for rev in ("main", first, "v1", "dev/a")]
    assert Path(result["file"]).read_bytes() == FILES["sub/deep/x.txt"]
    assert Path(result["file"]).resolve().name == blob_sha(FILES["sub/deep/x.txt"])
    some = {name: data for name, data in result["some"].items() if not name.startswith(".cache")}
    assert some == hexed({"sub/deep/x.txt": FILES["sub/deep/x.txt"]})
    assert sorted(result["listed"]) == sorted(repo.files())
    assert result["entries"] == 5 and result["inside"] == ["sub/deep/x.txt"]
    assert result["exists"] == [True, False, False]
    assert {token for _, _, token in hub.requests} == {"hf_good"}


@pytest.mark.parametrize("xet", [False, True])
def test_pull_request(hub: HubServer, tmp_path: Path, xet: bool) -> None:
    hub.create("me/x", FILES)
    before = hub.repos["me/x"].files()
    code = f"""
info = api.upload_folder(repo_id="me/x", folder_path={str(tmp_path)!r}, create_pr=True)
one = info.pr_revision
other = api.upload_file(repo_id="me/x", path_or_fileobj=b"2", path_in_repo="b", create_pr=True).pr_revision
result = [one, other, info.pr_url, tree(snapshot_download("me/x", revision=other))]
"""
    (tmp_path / "a").write_bytes(b"1")
    one, other, url, files = client(hub, tmp_path / "home", code, token="hf_other", xet=xet)
    assert (one, other, url) == ("refs/pr/1", "refs/pr/2", f"{hub.url}/me/x/discussions/1")
    repo = hub.repos["me/x"]
    assert repo.files("refs/pr/1") == {**before, "a": b"1"}
    assert files == hexed(repo.files("refs/pr/2")) == hexed({**before, "b": b"2"})
    assert repo.files() == before and repo.commit(one).author == "you"


def test_second_download_comes_from_the_cache(hub: HubServer, tmp_path: Path) -> None:
    repo = hub.create("me/x", FILES)
    code = """
result = [hf_hub_download("me/x", "weights.bin"), snapshot_download("me/x")]
"""
    first = client(hub, tmp_path, code, token=None)
    assert sorted(downloads(hub)) == sorted(
        f"/me/x/resolve/{'main' if name == 'weights.bin' else repo.commit().sha}/{name}"
        for name in repo.files()
    )
    hub.requests.clear()
    assert client(hub, tmp_path, code, token=None) == first and not downloads(hub)
    repo.add("refs/heads/main", {**FILES, "config.json": b"new"}, "New", "me")
    second = client(hub, tmp_path, code, token=None)
    assert second != first and (Path(second[1]) / "config.json").read_bytes() == b"new"
    assert downloads(hub) == [f"/me/x/resolve/{repo.commit().sha}/config.json"]


def test_what_is_missing(hub: HubServer, tmp_path: Path) -> None:
    hub.create("me/x", FILES)
    code = """
sha = "0" * 40
result = [outcome(*call) for call in [
    (hf_hub_download, "me/x", "no.json"), (hf_hub_download, "me/no", "config.json"),
    (lambda: hf_hub_download("me/x", "config.json", revision="no")),
    (lambda: hf_hub_download("me/x", "config.json", revision=sha)),
    (snapshot_download, "me/no"), (lambda: snapshot_download("me/x", revision="no")),
    (lambda: snapshot_download("me/x", revision=sha)),
    (lambda: api.upload_file(repo_id="me/no", path_or_fileobj=b"", path_in_repo="a")),
    (lambda: api.upload_file(repo_id="me/x", path_or_fileobj=b"", path_in_repo="a", revision="no")),
    (api.delete_file, "no.json", "me/x"),
] for call in [call if isinstance(call, tuple) else (call,)]]
"""
    entry, repo, revision = (
        ["RemoteEntryNotFoundError", 404],
        "RepositoryNotFoundError",
        "RevisionNotFoundError",
    )
    for token, status in (("hf_good", 404), (None, 401)):
        result = client(hub, tmp_path / f"{token}", code, token=token)
        expected = [entry, [repo, status], [revision, 404], [revision, 404]]
        expected += [[repo, status], [revision, 404], [revision, 404]]
        assert result[:7] == expected
        assert result[7:] == [[repo, 404], [revision, 404], entry] if token else [[repo, 401]] * 3


def test_access(hub: HubServer, tmp_path: Path) -> None:
    hub.create("me/public", FILES)
    hub.create("me/gated", FILES).gated = True
    code = """
def push(repo):
    api.upload_file(repo_id=repo, path_or_fileobj=b"1", path_in_repo="a")
result = [
    outcome(api.create_repo, "me/secret", private=True, exist_ok=True),
    outcome(hf_hub_download, "me/secret", ".gitattributes"), outcome(snapshot_download, "me/secret"),
    outcome(hf_hub_download, "me/gated", "config.json"), outcome(hf_hub_download, "me/public", "config.json"),
    outcome(push, "me/public"), outcome(push, "me/secret"), outcome(api.create_repo, "me/public"),
]
result = [kind if kind == "ok" else [kind, status] for kind, status in result]
"""
    assert client(hub, tmp_path / "1", code) == ["ok"] * 7 + [["HfHubHTTPError", 409]]
    assert hub.repos["me/secret"].private and not hub.repos["me/public"].private
    plain, hidden, gated = "HfHubHTTPError", "RepositoryNotFoundError", "GatedRepoError"
    refused, gone = [plain, 403], [hidden, 404]
    other = [refused, gone, gone, [gated, 403], "ok", refused, gone, refused]
    assert client(hub, tmp_path / "2", code, token="hf_other") == other
    nobody = [[plain, 401], *[[hidden, 401]] * 2, [gated, 401], "ok", *[[hidden, 401]] * 2, [plain, 401]]
    assert client(hub, tmp_path / "3", code, token=None) == nobody
    reader = ["ok", "ok", "ok", "ok", "ok", refused, refused, refused]
    assert client(hub, tmp_path / "4", code, token="hf_read") == reader
    assert client(hub, tmp_path / "5", code, token="hf_wrong") == [[plain, 401]] * 8


def test_truncated_download(hub: HubServer, tmp_path: Path) -> None:
    hub.create("me/x", FILES)
    code = """
result = outcome(hf_hub_download, "me/x", "weights.bin")
"""
    hub.truncate_next_download("weights.bin")
    assert client(hub, tmp_path, code) == ["HfHubHTTPError", 503]
    assert leftovers(tmp_path) == []
    hub.truncate_next_download("weights.bin", resumable=True)
    hub.requests.clear()
    kind, path = client(hub, tmp_path, code)
    assert kind == "ok" and Path(path).read_bytes() == FILES["weights.bin"] and len(downloads(hub)) == 2


def test_dropped_upload(hub: HubServer, tmp_path: Path) -> None:
    repo = hub.create("me/x", FILES)
    before = dict(repo.refs), dict(repo.commits)
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "a.bin").write_bytes(bytes(3_000_000))
    code = f"result = outcome(api.upload_folder, repo_id='me/x', folder_path={str(tmp_path / 'up')!r})"
    hub.drop_next_upload()
    kind, _ = client(hub, tmp_path, code)
    assert kind in ("RemoteProtocolError", "ReadError", "WriteError")
    assert (repo.refs, repo.commits) == before
    hub.drop_next_upload()
    assert client(hub, tmp_path, code, xet=True)[0] == "ok", "with Xet on the client tries again"
    assert repo.files()["a.bin"] == bytes(3_000_000) and len(repo.commits) == 3


def test_injected_failures_and_conflicts(hub: HubServer, tmp_path: Path) -> None:
    repo = hub.create("me/x", FILES)
    start = repo.commit().sha
    hub.fail_next("/commit/main", 500)
    hub.fail_next("config.json", 501, method="HEAD")  # after a 500 the client would ask again
    code = f"""
def push(data, **kwargs):
    return api.upload_file(repo_id="me/x", path_or_fileobj=data, path_in_repo="a", **kwargs).oid
result = [
    outcome(push, b"1"), outcome(hf_hub_download, "me/x", "config.json")[0],
    outcome(push, b"1", parent_commit={start!r})[0], outcome(push, b"2", parent_commit={start!r}),
    outcome(push, b"2")[0], outcome(hf_hub_download, "me/x", "config.json")[0],
    outcome(lambda: api.upload_file(
        repo_id="me/x", path_or_fileobj=b"---\\na: [\\n---\\n", path_in_repo="README.md"))[0],
]
"""
    result = client(hub, tmp_path, code)
    conflict = ["HfHubHTTPError", 412]
    failed = [["HfHubHTTPError", 500], "LocalEntryNotFoundError"]
    assert result == [*failed, "ok", conflict, "ok", "ok", "ValueError"]
    assert repo.files()["a"] == b"2" and "README.md" not in repo.files()
