"""Start processes for tests quickly: a fork server that has imported everything forks them.

An interpreter that imports PyTorch and everything that PyTorch imports later takes seconds to start. Here only the fork
server does. The processes that it forks are real ones, with separate state, environment, signal handlers, process
group and exit code. This file is also the script of the fork server.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

CAN_FORK = hasattr(os, "fork") and hasattr(os, "pidfd_open") and hasattr(socket, "send_fds")
"""Whether the system can fork processes, as Linux can. If not, each process is a new interpreter."""

_LENGTH = struct.Struct("!I")
_IMPORTED = (
    "accelerate",
    "torch._dynamo",  # optimizers import it at their first step
    "torch.distributed.fsdp",
    "pytorch_accelerated.verification",
    "matplotlib.pyplot",
    "sklearn.datasets",
)
_COVERAGE = ("COVERAGE_PROCESS_CONFIG", "COVERAGE_PROCESS_START")


def environment_for_tests(**more: str) -> dict[str, str]:
    """Return the environment of a process that can import the package and the helpers of the tests, with one thread."""
    import pytorch_accelerated

    paths = [Path(pytorch_accelerated.__file__).parents[1], Path(__file__).parent]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1", **more}


# --- for the tests -----------------------------------------------------------------------------------------------


def start(
    script: Path | str,
    *arguments: str,
    stdin: int | None = None,
    stdout: int,
    stderr: int | None = None,
    cwd: Path | None = None,
    has_own_group: bool = False,
    is_measured: bool = True,
    **environment: str,
) -> Started:
    """Start a Python script in a separate process.

    Args:
        script: The script.
        arguments: Its arguments.
        stdin: A file descriptor; ``None`` for no input.
        stdout: A file descriptor.
        stderr: A file descriptor; ``None`` for that of ``stdout``.
        cwd: The working directory.
        has_own_group: Whether the process leads a new process group, so that a signal can be sent to the group.
        is_measured: Whether coverage is measured in the process, if it is measured at all.
        environment: Changes to the environment of the tests.
    """
    variables = environment_for_tests(**environment)
    if not is_measured:
        variables = {name: value for name, value in variables.items() if name not in _COVERAGE}
    command = [str(script), *arguments]
    with Path(os.devnull).open() as nothing:
        files = (nothing.fileno() if stdin is None else stdin, stdout, stdout if stderr is None else stderr)
        if CAN_FORK:
            request = {
                "command": command,
                "environment": variables,
                "cwd": cwd and str(cwd),
                "is_leader": has_own_group,
            }
            return _Forked(*_fork_server().fork(request, files))
        return subprocess.Popen(
            [sys.executable, *command],
            env=variables,
            cwd=cwd,
            stdin=files[0],
            stdout=files[1],
            stderr=files[2],
            start_new_session=has_own_group,
        )


def run(script: Path | str, *arguments: str, timeout: float = 240, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Run a Python script to its end, with the arguments of `start`, and return its exit code and output."""
    return _run(functools.partial(start, script, *arguments, has_own_group=True, **kwargs), timeout)


def run_from_scratch(
    script: Path | str, *arguments: str, timeout: float = 240, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a Python script to its end in a new interpreter, which has imported nothing yet."""
    command = [sys.executable, str(script), *arguments]
    settings: Any = {"env": environment_for_tests(**environment), "cwd": cwd, "start_new_session": True}
    return _run(functools.partial(subprocess.Popen, command, stdin=subprocess.DEVNULL, **settings), timeout)


def _run(start: Callable[..., Started], timeout: float) -> subprocess.CompletedProcess[str]:
    """Start a process that leads a group, and wait for its end. The rest of the group ends with it."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:  # pipes may stay open
        process = start(stdout=output.fileno(), stderr=errors.fileno())
        try:
            returncode = process.wait(timeout)
        except subprocess.TimeoutExpired:
            errors.seek(0)
            raise TimeoutError(f"still running after {timeout:g} s; its errors:\n{errors.read()[-5000:]}") from None
        finally:
            _kill_group(process)
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess([], returncode, output.read(), errors.read())


def _kill_group(leader: Started) -> None:
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):
            os.killpg(leader.pid, signal.SIGKILL)
    else:
        leader.kill()


class _Forked:
    """A process that the fork server forked, with the interface of `subprocess.Popen`."""

    def __init__(self, pid: int, replies: IO[str]) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._replies = replies

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._replies], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            with self._replies:
                self.returncode = int(self._replies.readline())
        return self.returncode

    def send_signal(self, number: int) -> None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


Started = subprocess.Popen[bytes] | _Forked


@functools.cache
def _fork_server() -> _ForkServer:
    return _ForkServer()


class _ForkServer:
    """Starts the fork server, and sends requests to it. It ends with this process."""

    def __init__(self) -> None:
        self._requests, theirs = socket.socketpair()
        environment = {name: value for name, value in environment_for_tests().items() if name not in _COVERAGE}
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            env=environment,
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is for the tests, not for the fork server
        )
        theirs.close()
        atexit.register(self._close)

    def fork(self, request: Mapping[str, Any], files: tuple[int, int, int]) -> tuple[int, IO[str]]:
        """Return the process id of the forked process, and a file from which its exit code can be read."""
        data = json.dumps(request).encode()
        reading, writing = os.pipe()
        socket.send_fds(self._requests, [_LENGTH.pack(len(data))], [*files, writing])
        os.close(writing)
        self._requests.sendall(data)
        replies = os.fdopen(reading, buffering=1)
        return int(_read_line(reading)), replies

    def _close(self) -> None:
        self._requests.close()
        self._process.wait()


def _read_line(descriptor: int) -> bytes:
    """Read one line, and nothing after it."""
    line = b""
    while not line.endswith(b"\n"):
        read = os.read(descriptor, 1)
        if not read:
            raise RuntimeError("The fork server has ended, so no process can be started. Look for its error above.")
        line += read
    return line


# --- the fork server ---------------------------------------------------------------------------------------------


@dataclass
class _Child:
    pid: int
    replies: int
    """The file descriptor that its exit code is written to."""


def _import_everything() -> None:
    for name in _IMPORTED:
        with suppress(ImportError):  # the examples need what is not always installed
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # spares every forked process a look at these objects


def _serve(requests: socket.socket) -> dict[str, Any] | None:
    """Fork a process per request.

    Returns:
        The request in a forked process; ``None`` in the fork server, at its end.
    """
    children: dict[int, _Child] = {}
    while True:
        for ready in select.select([requests, *children], [], [])[0]:
            if ready is not requests:
                _report_exit_code(children.pop(ready))
                os.close(ready)
                continue
            length, files, *_ = socket.recv_fds(requests, _LENGTH.size, 4)
            if not length:
                return None
            data = b""
            while len(data) < _LENGTH.unpack(length)[0]:
                data += requests.recv(1 << 16)
            *standard, replies = files
            pid = os.fork()
            if pid == 0:
                requests.close()
                for child in (*children, *(child.replies for child in children.values()), replies):
                    os.close(child)
                for number, descriptor in enumerate(standard):
                    os.dup2(descriptor, number)
                    os.close(descriptor)
                return json.loads(data)
            for descriptor in standard:
                os.close(descriptor)
            os.write(replies, f"{pid}\n".encode())
            children[os.pidfd_open(pid)] = _Child(pid, replies)


def _report_exit_code(child: _Child) -> None:
    status = os.waitpid(child.pid, 0)[1]
    with suppress(BrokenPipeError):  # nobody waits for it any more
        os.write(child.replies, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os.close(child.replies)


def _imitate_new_interpreter(request: dict[str, Any]) -> str:
    """Put this process into the state of a new interpreter that was started with the script, and return the script."""
    import numpy as np

    if request["is_leader"]:
        os.setsid()
    if request["cwd"] is not None:
        os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    random.seed()
    np.random.seed()
    script, *_ = sys.argv = request["command"]
    sys.path[0] = str(Path(script).parent)
    if any(name in os.environ for name in _COVERAGE):
        import coverage

        coverage.process_startup(force=True)
    return script


if __name__ == "__main__":
    sys.stdin.close()
    _import_everything()
    _request = _serve(socket.socket(fileno=int(sys.argv[1])))
    if _request is not None:
        sys.stdin = os.fdopen(0)
        runpy.run_path(_imitate_new_interpreter(_request), run_name="__main__")
