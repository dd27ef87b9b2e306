"""Processes of their own without the seconds of a start: forked from one that has imported everything.

Where a fresh start is the point (what it imports or prints), tests start Python itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[1]
PAHQ = "from pahq_hf.cli.app import main\nmain()"  # as `python -m pahq_hf` does
_SERVER = """
import gc
gc.disable()  # until all is imported, which takes a third longer with it
import atexit, importlib, json, os, signal, sys, tempfile, traceback
import huggingface_hub.constants, huggingface_hub.hf_api, huggingface_hub.file_download
import torch, transformers, torchao
import transformers.models.auto.modeling_auto, transformers.models.llama.modeling_llama
import transformers.models.gpt2.modeling_gpt2
import matplotlib.backends.backend_agg, matplotlib.figure, safetensors.numpy
import pahq_hf.cli.app, pahq_hf.model, pahq_hf.search.acdc, pahq_hf.engine.sparse.engine

def reread_hub_settings():
    # As huggingface_hub finds them in the environment when imported, everywhere they went by their name.
    constants = huggingface_hub.constants
    before = dict(vars(constants))
    importlib.reload(constants)
    new = {name: value for name, value in vars(constants).items() if name.isupper() and before[name] != value}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("huggingface_hub", "transformers"):
            for setting in new.keys() & vars(module).keys():
                setattr(module, setting, new[setting])
    huggingface_hub.hf_api.api.endpoint = constants.ENDPOINT

def child(code, arguments, environment, out, err):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the parent ignores it
    for number, path in enumerate((os.devnull, out, err)):
        os.dup2(os.open(path, os.O_RDWR if number else os.O_RDONLY), number)
    os.environ.clear()
    os.environ.update(environment)
    reread_hub_settings()
    tempfile.tempdir = None  # of TMPDIR, whatever it was before
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = arguments
    status = 0
    try:
        exec(compile(code, "<forked>", "exec"), {"__name__": "__main__"})
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

gc.freeze()  # what is imported stays: collections pass over it, here and in every child
gc.enable()
answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    request = json.loads(line)
    if "code" in request:
        answer = os.fork()
        if not answer:
            child(**request)
    else:
        pid, status = os.waitpid(request["pid"], os.WNOHANG)
        answer = os.waitstatus_to_exitcode(status) if pid else None
    print(json.dumps(answer), file=answers, flush=True)
"""


class Ended(NamedTuple):
    """What a process left."""

    code: int
    stdout: str
    stderr: str


@cache
def _server() -> subprocess.Popen[str]:
    """The process that has imported everything and computed nothing; it ends with this one."""
    pipe, command = subprocess.PIPE, [sys.executable, "-c", _SERVER]
    # Commands set this before they import transformers, which remembers it; whatever ran here before.
    environment = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=environment)


def _ask(request: dict[str, Any]) -> Any:
    server = _server()
    assert server.stdin and server.stdout
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


class Forked:
    """A process that runs code, with as many threads as this one.

    It takes Ctrl-C even where this process ignores it: shells start background jobs that way, and what
    is ignored is inherited.

    Args:
        code: What it runs.
        *arguments: `sys.argv` after the program's name.
        env: Added to the environment of this process, or all of its own.
        clean: Whether it is all.
    """

    def __init__(
        self, code: str, *arguments: str, env: dict[str, str] | None = None, clean: bool = False
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name) / name for name in ("out", "err")]
        for path in self._files:
            path.touch()
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        inherited = {} if clean else dict(os.environ)
        self.pid: int = _ask(
            {
                "code": code,
                "arguments": ["pahq", *arguments],
                "environment": inherited | threads | (env or {}),
                "out": str(self._files[0]),
                "err": str(self._files[1]),
            }
        )
        self._code: int | None = None

    def poll(self) -> int | None:
        """Its exit code once it has ended, minus the number of a signal that killed it."""
        if self._code is None:
            self._code = _ask({"pid": self.pid})
        return self._code

    def ended(self) -> Ended:
        """Wait for its end."""
        while (code := self.poll()) is None:
            time.sleep(0.005)
        with self._folder:
            return Ended(code, *(path.read_text() for path in self._files))


def run_forked(code: str, *arguments: str, env: dict[str, str] | None = None, clean: bool = False) -> Ended:
    """What code leaves that runs in a process of its own; arguments as `Forked`."""
    return Forked(code, *arguments, env=env, clean=clean).ended()
