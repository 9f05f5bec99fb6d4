"""Starts processes of benchmarks in the environments of the frameworks, on a terminal of their own."""

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
    "PYTHONDONTWRITEBYTECODE": "",  # what is installed is compiled, and not anew at each import
    "ACCELERATE_USE_CPU": "true",  # as `accelerate launch --cpu` sets it; 0.1.61 does not take part in DDP without
}


def interpreter_of(framework: str) -> Path:
    """Return the Python of the framework's environment, whether it exists or not."""
    return FOLDER / ".venv" / FRAMEWORKS[framework].environment / "bin" / "python"


def version_of(framework: str) -> str | None:
    """Return the installed version of a framework, ``None`` if it is not installed."""
    python = interpreter_of(framework)
    if not python.exists():
        return None
    command = [str(python), "-c", _VERSION, FRAMEWORKS[framework].package]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None


def measure(framework: str, cases: list[str], num_processes: int, limit: float) -> dict[str, Any]:
    """Measure cases of a framework in a fresh process, and return its figures and errors.

    Args:
        framework: Name of the framework.
        cases: Names of cases.
        num_processes: With more than one, torchrun starts them.
        limit: Seconds after which the process is ended.
    """
    torchrun = []
    if num_processes > 1:  # on a port that is free
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        output = Path(folder) / "results.json"
        worker = [str(FOLDER / "_worker.py"), framework, *cases, "--output", str(output)]
        shown = run_on_terminal([str(interpreter_of(framework)), *torchrun, *worker], folder, limit)
        if output.exists():
            results: dict[str, Any] = json.loads(output.read_text())
            return results
    print(shown, file=sys.stderr)
    return {"figures": [], "errors": dict.fromkeys(cases, "the process failed, or took too long")}


def run_on_terminal(command: list[str], folder: str, limit: float) -> str:
    """Run a command in a folder of its own, where progress bars are drawn as for a person, and return the last of it.

    One thread does the computing, and no GPU is used, on any machine.
    """
    environment = os.environ | ENVIRONMENT
    own_side, its_side = pty.openpty()
    fcntl.ioctl(its_side, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    shown = bytearray()
    reader = threading.Thread(target=_read_all, args=(own_side, shown))
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=its_side, stderr=its_side)
    os.close(its_side)
    reader.start()
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    reader.join()
    os.close(own_side)
    return shown.decode(errors="replace")


def _read_all(terminal: int, shown: bytearray) -> None:
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # how Linux says that the other side is closed
            return
        if not data:
            return
        shown += data
        del shown[:-_ERROR_LENGTH]
