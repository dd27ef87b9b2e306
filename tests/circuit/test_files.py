"""Where and how files are written: links, devices, pipes, modes, and what dead processes left."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pahq_hf.circuit.files import remove_leftovers, text_writer, write_atomically, write_text, write_together
from pahq_hf.errors import RunError
from tests.circuit.test_circuit import small
from tests.helpers import files_of, run_main


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# -- modes -----------------------------------------------------------------------------------------------


def test_a_new_file_has_the_mode_of_the_umask(umask: None, tmp_path: Path) -> None:
    write_text(tmp_path / "new", "text")
    assert mode_of(tmp_path / "new") == 0o640


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o755])
def test_a_file_keeps_its_mode(umask: None, mode: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(mode)
    write_text(path, "new")
    assert (path.read_text(), mode_of(path)) == ("new", mode)


def test_every_file_of_a_circuit_has_the_mode_of_the_umask(umask: None, tmp_path: Path) -> None:
    """Safetensors writes for the owner only."""
    small().save_pretrained(tmp_path / "out")
    modes = {path.name: mode_of(path) for path in (tmp_path / "out").iterdir()}
    assert {"scores.safetensors", "circuit.json", "circuit.png"} <= set(modes)
    assert set(modes.values()) == {0o640}


def test_a_file_goes_on_belonging_to_its_owner(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    path = tmp_path / "file"
    path.write_text("old")
    os.chown(path, 12345, 23456)
    write_text(path, "new")
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 23456)


# -- links, devices, pipes -------------------------------------------------------------------------------


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    target = tmp_path / "far" / "file"
    target.write_text("old")
    (tmp_path / "link").symlink_to("far/file")
    (tmp_path / "chain").symlink_to(tmp_path / "link")
    write_text(tmp_path / "chain", "new")
    assert target.read_text() == "new" and target.is_file() and not target.is_symlink()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "chain").is_symlink()
    (tmp_path / "dangling").symlink_to("far/none yet")
    write_text(tmp_path / "dangling", "made")
    assert (tmp_path / "far" / "none yet").read_text() == "made" and (tmp_path / "dangling").is_symlink()
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(RunError, match=r"cannot write .*round: Too many levels of symbolic links"):
        write_text(tmp_path / "round", "x")


@pytest.mark.parametrize("fmt", ["csv", "mib"])
def test_a_pipe_gets_what_a_file_would(fmt: str, tmp_path: Path) -> None:
    small().save_pretrained(tmp_path / "run")
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    assert run_main("export", str(tmp_path / "run"), "--format", fmt, "--out", str(pipe)) == 0
    reader.join(timeout=60)
    assert run_main("export", str(tmp_path / "run"), "--format", fmt, "--out", str(tmp_path / "file")) == 0
    assert read == [(tmp_path / "file").read_bytes()]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_device_stays_a_device(tmp_path: Path) -> None:
    """As root a rename would replace it."""
    device = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        device.open("wb").close()
    except OSError:
        pytest.skip("no devices can be made here")
    small().save_pretrained(tmp_path / "run")
    for command in (["show", "--html"], ["show", "--svg"], ["show", "--png"], ["export", "--out"]):
        assert run_main(command[0], str(tmp_path / "run"), command[1], str(device)) == 0
    assert stat.S_ISCHR(device.stat().st_mode)
    assert {path.name for path in tmp_path.iterdir()} == {"null", "run"}


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_stdout_is_written_into(name: str, tmp_path: Path) -> None:
    """Also where it is a file: what the shell appended before and appends later stays."""
    code = f"""
from pathlib import Path
from pahq_hf.circuit.files import write_text
print("before")
write_text(Path({name!r}), "text\\n")
print("after")
"""
    with (tmp_path / "file").open("w") as file:
        file.write("first\n")
        file.flush()
        subprocess.run([sys.executable, "-c", code], stdout=file, check=True)
    assert (tmp_path / "file").read_text() == "first\nbefore\ntext\nafter\n"


def test_a_full_device_is_an_error() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("there is none")
    with pytest.raises(RunError, match="cannot write /dev/full: No space left on device"):
        write_text(full, "x")
    assert stat.S_ISCHR(full.stat().st_mode)


# -- several files ---------------------------------------------------------------------------------------


def test_all_or_none(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "c").mkdir()
    with pytest.raises(RunError, match=r"cannot write .*c: Is a directory"):
        write_together({tmp_path / name: text_writer(name) for name in "abc"})
    assert files_of(tmp_path) == {"a": b"old"}


# -- what was left ---------------------------------------------------------------------------------------


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from pahq_hf.circuit.files import write_atomically
def write(path):
    path.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
write_atomically(Path(sys.argv[1]), write)
"""
    path = tmp_path / "circuit.json"
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert len(files_of(tmp_path)) == 1 and not path.exists()
    write_text(tmp_path / "other", "x")
    assert len(files_of(tmp_path)) == 2  # those of other files stay
    write_text(path, "whole")
    assert files_of(tmp_path) == {"circuit.json": b"whole", "other": b"x"}


def test_only_what_dead_processes_left_is_removed(tmp_path: Path) -> None:
    stays = [
        f".a.json.{os.getpid()}-0123abcd.tmp",
        ".a.json.original",
        "a.json.1-0123abcd.tmp",
        ".a.json.tmp",
    ]
    for name in [*stays, f".a.json.{dead_pid()}-0123abcd.tmp"]:
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path)
    assert set(files_of(tmp_path)) == set(stays)
    remove_leftovers(tmp_path / "nowhere")  # nothing to do


def test_one_process_leaves_anothers_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    code = (
        "import sys, pathlib, pahq_hf.circuit.files as f; f.write_text(pathlib.Path(sys.argv[1]), 'theirs')"
    )

    def write(temporary: Path) -> None:
        subprocess.run([sys.executable, "-c", code, str(path)], check=True)
        assert temporary.exists() and path.read_text() == "theirs"
        temporary.write_text("ours")

    write_atomically(path, write)
    assert files_of(tmp_path) == {"file": b"ours"}
