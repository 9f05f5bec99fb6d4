"""Start benchmark processes in the environments of the frameworks, each on its own pseudo-terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import tempfile
import termios
import threading
from pathlib import Path
from typing import Any

from frameworks import FRAMEWORKS

FOLDER = Path(__file__).parent
_VERSION = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
_ERROR_LENGTH = 3000
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONDONTWRITEBYTECODE": "",  # packages are compiled once, not at each import
    "ACCELERATE_USE_CPU": "true",  # set by `accelerate launch --cpu`; 0.1.61 needs it to use DDP
}


def interpreter_of(framework: str) -> Path:
    """Return the path of the Python interpreter of the framework's environment, whether or not it exists."""
    return FOLDER / ".venv" / FRAMEWORKS[framework].environment / "bin" / "python"


def version_of(framework: str) -> str | None:
    """Return the installed version of a framework, or ``None`` if it is not installed."""
    python = interpreter_of(framework)
    if not python.exists():
        return None
    command = [str(python), "-c", _VERSION, FRAMEWORKS[framework].package]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None


def measure(framework: str, cases: list[str], num_processes: int, limit: float) -> dict[str, Any]:
    """Measure cases of a framework in a fresh process, and return the figures and errors.

    Args:
        framework: Name of the framework.
        cases: Names of the cases.
        num_processes: Number of processes. If there are several, torchrun starts them.
        limit: Seconds after which the process is killed.
    """
    torchrun = []
    if num_processes > 1:  # `--standalone` picks a free port
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        output = Path(folder) / "results.json"
        worker = [str(FOLDER / "_worker.py"), framework, *cases, "--output", str(output)]
        shown = run_on_terminal([str(interpreter_of(framework)), *torchrun, *worker], folder, limit)
        if output.exists():
            results: dict[str, Any] = json.loads(output.read_text())
            return results
    print(shown, file=sys.stderr)
    return {"figures": [], "errors": dict.fromkeys(cases, "the process failed or timed out")}


def run_on_terminal(command: list[str], folder: str, limit: float) -> str:
    """Run a command in a folder on a pseudo-terminal, and return the last part of its output.

    On a terminal, progress bars are drawn as they are for a user. The process computes on one thread and uses no GPU,
    whatever the machine.
    """
    environment = os.environ | ENVIRONMENT
    parent_end, child_end = pty.openpty()
    fcntl.ioctl(child_end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    shown = bytearray()
    reader = threading.Thread(target=_read_all, args=(parent_end, shown))
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=child_end, stderr=child_end)
    os.close(child_end)
    reader.start()
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    reader.join()
    os.close(parent_end)
    return shown.decode(errors="replace")


def _read_all(terminal: int, shown: bytearray) -> None:
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # Linux raises this when the other end is closed
            return
        if not data:
            return
        shown += data
        del shown[:-_ERROR_LENGTH]
