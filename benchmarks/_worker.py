"""Measure cases of one framework in this process, and write the figures to a file. `run.py` starts it."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import traceback
from pathlib import Path
from typing import Any

import torch

from _cases import CASES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("framework")
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if "RANK" in os.environ:  # started by torchrun
        torch.distributed.init_process_group("gloo")
    results: dict[str, Any] = {"figures": [], "errors": {}}
    for case in arguments.cases:
        try:
            measures = importlib.import_module(f"measures.{CASES[case].module}")
            figures = measures.measure(case, arguments.framework)
            results["figures"] += [dataclasses.asdict(figure) for figure in figures]
        except Exception as error:  # a failing case must not prevent the others
            traceback.print_exc()
            results["errors"][case] = f"{type(error).__name__}: {error}"
    if os.environ.get("RANK", "0") == "0":
        arguments.output.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
