"""Measure the import time relative to ``import torch``, and the time from script start to the first update."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from frameworks import FRAMEWORKS, HAND_WRITTEN, OURS
from measures import Figure, compare

FOLDER = Path(__file__).parent.parent
OWN_OPTIMIZERS = ("fastai", "keras", "skorch")
"""Frameworks that create their own optimizer, so their first update cannot be detected."""

IMPORT = """
import time
start = time.perf_counter()
import torch
{statement}
print("seconds", time.perf_counter() - start)
"""

FIRST_UPDATE = """
import os, sys, time
import torch

torch.set_num_threads(1)
from {module} import train
from _common import Job, make_dataset, make_mlp

def stop(*arguments):
    print("seconds", time.time() - float(sys.argv[1]), flush=True)
    os._exit(0)

job = Job(make_mlp, make_dataset(32 * 50))
job.optimizer.register_step_post_hook(stop)
train(job)
"""


def time_script(script: str) -> float:
    """Run a script in a fresh process, and return the seconds that it prints."""
    command = [sys.executable, "-c", script, str(time.time())]
    result = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False)
    if "seconds " not in result.stdout:
        raise RuntimeError(result.stderr.strip().rpartition("\n")[2] or "The script ended without making an update.")
    return float(result.stdout.rpartition("seconds ")[2].split()[0])


def measure(case: str, framework: str) -> list[Figure]:
    num_pairs = 5 if framework == OURS else 1

    def importing(module: Any) -> float:
        is_baseline = module.__name__ == f"frameworks.{HAND_WRITTEN}"
        statement = FRAMEWORKS[HAND_WRITTEN if is_baseline else framework].import_statement
        return time_script(IMPORT.format(statement=statement))

    def starting(module: Any) -> float:
        return time_script(FIRST_UPDATE.format(module=module.__name__))

    figures = [compare("E-import", framework, importing, num_pairs)]
    if framework not in OWN_OPTIMIZERS:
        figures.append(compare("E-start", framework, starting, num_pairs))
    return figures
