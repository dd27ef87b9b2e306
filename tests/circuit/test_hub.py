"""Circuits on the Hub: the real huggingface_hub client, in its own process, against a loopback server."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pahq_hf import Circuit, PAHQConfig, PAHQModel
from pahq_hf.circuit.hub import signed
from tests.forked import PAHQ, Ended, run_forked
from tests.helpers import FP32, run_main
from tests.hub_server import HubServer, client_environment, run_client
from tests.models import random_task, tiny_llama

TOKENS = {"hf_mine": "me", "hf_other": "other"}
PUSH = """
    from pahq_hf import Circuit
    print(Circuit.from_pretrained({folder!r}).push_to_hub({repo!r}, **{options!r}))
"""
PULL = """
    from pahq_hf import Circuit
    circuit = Circuit.from_pretrained({repo!r}, **{options!r})
    circuit.save_pretrained({out!r})
    print(circuit)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A discovered circuit of a tiny Llama."""
    out = tmp_path_factory.mktemp("circuits") / "run"
    model = PAHQModel(tiny_llama(), FP32, base_model="meta/tiny-llama")
    model.discover(random_task(), threshold=0.02, out=out, progress=False)
    return out


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(TOKENS) as server:
        yield server


class Client:
    """A user's machine: a cache, and maybe a token."""

    def __init__(
        self, hub: HubServer, home: Path, token: str | None = "hf_mine", *, xet: bool = False
    ) -> None:
        self.env = client_environment(hub, home, token, xet)

    def run(self, code: str) -> str:
        done = run_client(code, self.env)
        assert done.code == 0, done.stderr
        return done.stdout.strip()

    def fails(self, code: str) -> str:
        """The one line of our own that says why."""
        caught = f"""
            from pahq_hf.errors import PAHQError
            try:
                exec({textwrap.dedent(code)!r})
            except PAHQError as error:
                print(type(error).__name__, error)
            else:
                raise SystemExit("it worked")
        """
        said = self.run(caught)
        assert len(said.splitlines()) == 1, said
        return said

    def push(self, folder: Path, repo: str, **options: Any) -> str:
        return self.run(PUSH.format(folder=str(folder), repo=repo, options=options))

    def pull(self, repo: str, out: Path, **options: Any) -> Circuit:
        self.run(PULL.format(repo=repo, out=str(out), options=options))
        return Circuit.from_pretrained(out)


def same(a: Circuit, b: Circuit) -> None:
    assert np.array_equal(a.scores, b.scores) and a.scores.tobytes() == b.scores.tobytes()
    assert np.array_equal(a.kept, b.kept) and np.array_equal(a.tested, b.tested)
    assert a.model == b.model and a.discovery == b.discovery
    assert a.means is not None and b.means is not None
    assert all(np.array_equal(a.means[name], b.means[name]) for name in a.means)


def test_push_and_pull(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    client = Client(hub, tmp_path / "home")
    url = client.push(folder, "me/circuit", commit_message="First")
    files = hub.repos["me/circuit"].files()
    assert url.startswith(f"{hub.url}/me/circuit/commit/")
    assert set(files) >= {"circuit.json", "scores.safetensors", "discovery.json", "means.safetensors"}
    assert {"README.md", "circuit.png"} <= set(files) and files["circuit.png"].startswith(b"\x89PNG")
    assert files["scores.safetensors"] == (folder / "scores.safetensors").read_bytes()
    pulled = client.pull("me/circuit", tmp_path / "pulled")
    same(pulled, Circuit.from_pretrained(folder))
    assert (tmp_path / "pulled" / "scores.safetensors").read_bytes() == files["scores.safetensors"]
    model, task = PAHQModel(tiny_llama(), FP32), random_task()
    kl = [model.evaluate(circuit, task)["kl"] for circuit in (pulled, Circuit.from_pretrained(folder))]
    assert kl[0] == kl[1] > 0


def test_the_card_is_a_model_card(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    Client(hub, tmp_path).push(folder, "me/circuit")
    card = hub.repos["me/circuit"].files()["README.md"].decode()
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    for line in ("base_model: meta/tiny-llama", "library_name: pahq_hf", "- mechanistic-interpretability"):
        assert line in front
    assert "Circuit.from_pretrained('me/circuit')" in body and "](circuit.png)" in body
    assert "model.apply(circuit)" in body and "PAHQModel.from_pretrained('meta/tiny-llama')" in body


def test_private_repositories_open_with_the_right_token(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    owner = Client(hub, tmp_path / "owner")
    owner.push(folder, "me/secret", private=True)
    assert hub.repos["me/secret"].private
    same(owner.pull("me/secret", tmp_path / "own"), Circuit.from_pretrained(folder))
    for number, token in enumerate(("hf_other", "hf_wrong", None)):
        stranger = Client(hub, tmp_path / f"stranger{number}", token)
        said = stranger.fails(PULL.format(repo="me/secret", out=str(tmp_path / "no"), options={}))
        assert said.startswith("HubError there is no folder me/secret here, and on the Hub: ")
        assert "token" in said
    assert not (tmp_path / "no").exists()
    given = Client(hub, tmp_path / "given", None).pull("me/secret", tmp_path / "with", token="hf_mine")
    same(given, Circuit.from_pretrained(folder))


def test_revisions(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    client = Client(hub, tmp_path / "home")
    client.push(folder, "me/circuit")
    first = hub.repos["me/circuit"].commit().sha
    other = Circuit.from_pretrained(folder)
    other.kept[:] = False
    other.save_pretrained(tmp_path / "other")
    client.push(tmp_path / "other", "me/circuit")
    client.push(folder, "me/circuit", revision="ioi")
    assert client.pull("me/circuit", tmp_path / "main").edge_count == 0
    for number, revision in enumerate((first, "ioi")):
        pulled = client.pull("me/circuit", tmp_path / str(number), revision=revision)
        same(pulled, Circuit.from_pretrained(folder))
    said = client.fails(PULL.format(repo="me/circuit", out="x", options={"revision": "v9"}))
    assert "no such revision" in said


def test_pull_requests(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    hub.create("other/circuit", {"README.md": b"theirs"})
    url = Client(hub, tmp_path).push(folder, "other/circuit", create_pr=True)
    assert "/discussions/" in url
    assert "circuit.json" not in hub.repos["other/circuit"].files()
    assert "circuit.json" in hub.repos["other/circuit"].files("refs/pr/1")
    options = {"create_pr": True, "revision": "ioi"}
    said = Client(hub, tmp_path).fails(PUSH.format(folder=str(folder), repo="me/x", options=options))
    assert "either revision or create_pr" in said


def test_a_push_is_one_commit_with_xet_too(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    client = Client(hub, tmp_path, xet=True)
    client.push(folder, "me/circuit", commit_message="All at once")
    made = [commit for commit in hub.repos["me/circuit"].commits.values() if commit.title == "All at once"]
    assert len(made) == 1 and {"circuit.json", "scores.safetensors", "README.md"} <= set(made[0].files)


def test_several_circuits_in_one_repository(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    client = Client(hub, tmp_path / "home")
    for name in ("ioi", "greater-than"):
        client.push(folder, "me/circuits", subfolder=name)
    assert "ioi/circuit.json" in hub.repos["me/circuits"].files()
    pulled = client.pull("me/circuits", tmp_path / "out", subfolder="greater-than")
    same(pulled, Circuit.from_pretrained(folder))
    assert "subfolder='ioi'" in hub.repos["me/circuits"].files()["ioi/README.md"].decode()


CARDS = {
    "written": ("# My own words\n", True),
    "edited": (signed("# Generated\n").replace("Generated", "Generated, then improved"), True),
    "generated": (signed("# Generated\n"), False),
    "empty": ("", False),
}


def test_a_card_edited_by_hand_is_kept(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    client = Client(hub, tmp_path)
    for name, (card, kept) in CARDS.items():
        repo = f"me/{name}"
        hub.create(repo, {"README.md": card.encode()})
        client.push(folder, repo)
        assert (hub.repos[repo].files()["README.md"].decode() == card) == kept, name
        client.push(folder, repo, overwrite_card=True)
        assert b"library_name: pahq_hf" in hub.repos[repo].files()["README.md"], name


def test_what_is_missing_or_refused_is_said_in_one_line(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    client = Client(hub, tmp_path / "home")
    pull = PULL.format(repo="me/nothing", out="x", options={})
    assert "no such repository" in client.fails(pull)
    hub.create("me/empty", {"README.md": b"no circuit here"})
    assert "circuit.json" in client.fails(pull.replace("me/nothing", "me/empty"))
    push = PUSH.format(folder=str(folder), repo="other/circuit", options={})
    assert client.fails(push).startswith("HubError other/circuit")
    stranger = Client(hub, tmp_path / "stranger", "hf_wrong")
    assert "token" in stranger.fails(push.replace("other/circuit", "me/circuit"))
    assert "cannot be a repository id" in client.fails(push.replace("other/circuit", "not an id"))
    hub.create("me/circuit")
    hub.fail_next("/api/models/me/circuit", 403)
    assert "HubError" in client.fails(push.replace("other/circuit", "me/circuit"))


def test_a_torn_upload_leaves_the_repository_as_it_was(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    client = Client(hub, tmp_path / "home")
    client.push(folder, "me/circuit")
    before, sha = hub.repos["me/circuit"].files(), hub.repos["me/circuit"].commit().sha
    other = Circuit.from_pretrained(folder)
    other.kept[:] = False
    other.save_pretrained(tmp_path / "other")
    hub.drop_next_upload(times=9)
    push = PUSH.format(folder=str(tmp_path / "other"), repo="me/circuit", options={})
    assert client.fails(push).startswith("HubError me/circuit")
    assert hub.repos["me/circuit"].commit().sha == sha and hub.repos["me/circuit"].files() == before


def test_a_torn_download_is_an_error_and_the_next_one_works(
    hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    client = Client(hub, tmp_path / "home")
    client.push(folder, "me/circuit")
    hub.truncate_next_download("scores.safetensors")
    out = tmp_path / "out"
    assert "HubError" in client.fails(PULL.format(repo="me/circuit", out=str(out), options={}))
    assert not out.exists()
    same(client.pull("me/circuit", out), Circuit.from_pretrained(folder))


def test_files_larger_than_any_circuit_are_not_downloaded(
    hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    client = Client(hub, tmp_path / "home")
    client.push(folder, "me/circuit")
    small = f"import pahq_hf.circuit.hub; pahq_hf.circuit.hub._MAX_BYTES = 100\n{textwrap.dedent(PULL)}"
    said = client.fails(small.format(repo="me/circuit", out="x", options={}))
    assert "more than any circuit" in said
    asked = [request for request in hub.requests if request.method == "GET" and "resolve" in request.path]
    assert not any("circuit.json" in request.path for request in asked)


@pytest.mark.parametrize(
    ("name", "damage", "match"),
    [
        ("circuit.json", b'{"cfg": {"n_layers": 1e9, "n_heads": 4}, "edges": {}}', "CircuitError"),
        ("circuit.json", b"[]", "does not hold a JSON object"),
        ("circuit.json", b'{"cfg": {"format_version": 99}, "edges": {}}', "circuit format 99"),
        (
            "circuit.json",
            b'{"cfg": {"n_layers": 2, "n_heads": 4}, "edges": {"../x->logits": {}}}',
            "CircuitError",
        ),
        ("scores.safetensors", b"\x80\x04", "its checksum is not that in"),
        ("means.safetensors", b"\x80\x04", "its checksum is not that in"),
    ],
)
def test_what_comes_from_the_hub_is_checked(
    hub: HubServer, folder: Path, tmp_path: Path, name: str, damage: bytes, match: str
) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir()} | {name: damage}
    hub.create("me/damaged", files)
    out = tmp_path / "out"
    said = Client(hub, tmp_path / "home").fails(PULL.format(repo="me/damaged", out=str(out), options={}))
    assert match in said and not out.exists()


def test_unknown_keys_warn_and_nothing_else_is_fetched(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    document = json.loads((folder / "circuit.json").read_text())
    document["cfg"]["flavour"] = "new"
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    extra = {"circuit.json": json.dumps(document).encode(), "evil.py": b"raise SystemExit", "x.pt": b"\x80"}
    hub.create("me/newer", files | extra)
    client = Client(hub, tmp_path / "home")
    done = run_client(PULL.format(repo="me/newer", out=str(tmp_path / "out"), options={}), client.env)
    assert done.code == 0 and "unknown keys in cfg are ignored: flavour" in done.stderr
    fetched = {request.path.rpartition("/")[2] for request in hub.requests if "resolve" in request.path}
    assert not fetched & {"evil.py", "x.pt"}


def test_a_pull_overwrites_nothing(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    Client(hub, tmp_path / "home").push(folder, "me/circuit")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert run_main("pull", "me/circuit", "--out", str(folder)) == 2
    assert run_main("import", str(folder / "circuit.json"), "--out", str(folder)) == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_command_line(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    client = Client(hub, tmp_path / "home")

    def pahq(*argv: str) -> Ended:
        return run_forked(PAHQ, *argv, env=client.env, clean=True)

    command = [sys.executable, "-m", "pahq_hf", "push", str(folder), "me/circuit", "--private", "--json"]
    pushed = subprocess.run(
        command, env=client.env, capture_output=True, text=True
    )  # one as a user starts it
    assert pushed.returncode == 0, pushed.stderr
    assert json.loads(pushed.stdout)["url"].startswith(hub.url) and hub.repos["me/circuit"].private
    pulled = pahq("pull", "me/circuit", "--out", str(tmp_path / "out"), "--json")
    assert pulled.code == 0, pulled.stderr
    same(Circuit.from_pretrained(tmp_path / "out"), Circuit.from_pretrained(folder))
    shown = pahq("show", "me/circuit", "--json")
    assert json.loads(shown.stdout)["cfg"]["n_layers"] == 2
    missing = pahq("pull", "me/nothing", "--out", str(tmp_path / "no"))
    assert missing.code == 2 and missing.stdout == "" and not (tmp_path / "no").exists()
    assert len(missing.stderr.strip().splitlines()) == 1 and "no such repository" in missing.stderr


def test_configurations_and_patched_models(hub: HubServer, tmp_path: Path) -> None:
    """`pahq_config.json` is to a patched model what an adapter's config is to PEFT."""
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    code = f"""
        import torch
        from pahq_hf import PAHQConfig, PAHQModel
        from pahq_hf.errors import ConfigError
        config = PAHQConfig("rtn", "int8", policy={{"m*": "bf16"}})
        config.push_to_hub("me/config")
        assert PAHQConfig.from_pretrained("me/config") == config
        model = PAHQModel.from_pretrained("demo", config)
        model.push_to_hub("me/patched", private=True)
        again = PAHQModel.from_pretrained("me/patched")
        assert again.pahq_config == model.pahq_config and again.identity == model.identity
        ids = torch.arange(1, 9)[None]
        assert torch.equal(again(ids).logits, model(ids).logits)
        local = PAHQModel.from_pretrained({str(base)!r}, config)
        try:
            local.push_to_hub("me/nobodys")
        except ConfigError as error:
            assert "base_model='owner/name'" in str(error) and {str(base)!r} not in str(error)
        PAHQModel.from_pretrained({str(base)!r}, config, base_model="me/base").push_to_hub("me/local")
    """
    Client(hub, tmp_path / "home").run(code)
    assert set(hub.repos["me/patched"].files()) - {".gitattributes"} == {"pahq_config.json"}
    document = json.loads(hub.repos["me/patched"].files()["pahq_config.json"])
    assert document["base_model"] == "demo" and document["precision"]["format"] == "int8"
    text = hub.repos["me/local"].files()["pahq_config.json"]
    assert json.loads(text)["base_model"] == "me/base" and str(tmp_path).encode() not in text
    assert "me/nobodys" not in hub.repos


def test_wrappers_in_folders(tmp_path: Path) -> None:
    model = PAHQModel.from_pretrained("demo", PAHQConfig("rtn", "int8"))
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pahq_config.json"]
    again = PAHQModel.from_pretrained(tmp_path)
    assert again.pahq_config == model.pahq_config and again.identity == model.identity
    assert PAHQModel.from_pretrained(tmp_path, FP32).pahq_config.regime == "fp32"
    assert PAHQConfig.from_pretrained(tmp_path) == model.pahq_config


def test_a_saved_configuration_knows_its_base_model(tmp_path: Path) -> None:
    """As in PEFT; what pins a run, and the format of the file, know nothing of it."""
    model = PAHQModel.from_pretrained("demo", PAHQConfig("rtn", "int8"))
    model.save_pretrained(tmp_path / "one")
    found = PAHQConfig.from_pretrained(tmp_path / "one")
    assert (found.base_model, found.revision) == ("demo", None)
    assert found == model.pahq_config and found.to_dict() == model.pahq_config.to_dict()
    assert set(found.to_dict()) == {
        *("regime", "format", "split_kv_groups", "active", "compute", "policy", "quantize_embeddings")
    }
    found.save_pretrained(tmp_path / "two")
    first, second = (tmp_path / name / "pahq_config.json" for name in ("one", "two"))
    assert first.read_text() == second.read_text()
    assert set(json.loads(first.read_text())) == {"format_version", "base_model", "revision", "precision"}
