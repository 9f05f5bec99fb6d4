"""Compare this library with other frameworks and with a hand-written loop.

    python benchmarks/run.py
    python benchmarks/run.py --cases A,B --rounds 3 --frameworks pytorch_accelerated,lightning

`make bench` sets up the environments first. In each round, each framework runs in fresh processes, one framework after
the other. In each process, it alternates with the hand-written loop. The results are written to `benchmarks/results`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

import report
from _cases import CASES
from _environments import FOLDER, measure, version_of
from frameworks import FRAMEWORKS, HAND_WRITTEN, OURS

SECONDS_PER_PROCESS = 900


def main() -> None:
    arguments = parse_arguments()
    versions = {name: version_of(name) for name in arguments.frameworks}
    for name, version in versions.items():
        print(f"{FRAMEWORKS[name].title}: {version or 'not installed'}")
    results: dict[str, Any] = {
        "command": f"make bench {os.environ.get('BENCH_OPTIONS', '')}".strip(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "num_rounds": arguments.rounds,
        "num_peer_rounds": min(arguments.rounds, arguments.peer_rounds),
        "cases": arguments.cases,
        "versions": versions,
        "figures": [],
        "errors": {},
    }
    installed = [name for name, version in versions.items() if version]
    for round_number in range(arguments.rounds):
        run_round(round_number, arguments.cases, frameworks_of_round(round_number, installed, arguments), results)
    write(results, arguments.output)
    print(report.markdown(results))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated list (default: all)")
    parser.add_argument("--frameworks", default=",".join(FRAMEWORKS), help="comma-separated list (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds (default: 5)")
    parser.add_argument("--peer-rounds", type=int, help="number of rounds for the other frameworks (default: the same)")
    parser.add_argument("--output", type=Path, default=FOLDER / "results", help="folder for the results")
    arguments = parser.parse_args()
    for name, known in (("cases", CASES), ("frameworks", FRAMEWORKS)):
        chosen = [part.strip() for part in getattr(arguments, name).split(",")]
        unknown = [part for part in chosen if part not in known]
        if unknown:
            parser.error(f"--{name}: unknown {', '.join(unknown)}. Known: {', '.join(known)}.")
        setattr(arguments, name, chosen)
    if arguments.peer_rounds is None:
        arguments.peer_rounds = arguments.rounds
    if arguments.rounds < 1 or arguments.peer_rounds < 0:
        parser.error("--rounds must be at least 1, and --peer-rounds at least 0.")
    return arguments


def frameworks_of_round(round_number: int, installed: list[str], arguments: argparse.Namespace) -> list[str]:
    """Return the frameworks measured in a round. This library and the hand-written loop are in every round.

    Example:
        >>> frameworks_of_round(1, [OURS, "keras"], argparse.Namespace(peer_rounds=1))
        ['pytorch_accelerated']
    """
    return [name for name in installed if name in (HAND_WRITTEN, OURS) or round_number < arguments.peer_rounds]


def describe_machine() -> str:
    return f"{processor_name()}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__}"


def processor_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def run_round(round_number: int, cases: list[str], frameworks: list[str], results: dict[str, Any]) -> None:
    """Measure everything once, and add it to the results."""
    for process_cases in cases_by_process(cases, is_first_round=round_number == 0):
        for framework in frameworks:
            chosen = [case for case in process_cases if case in FRAMEWORKS[framework].cases.split()]
            if not chosen:
                continue
            start = time.monotonic()
            measured = measure(framework, chosen, CASES[chosen[0]].num_processes, SECONDS_PER_PROCESS)
            for figure in measured["figures"]:
                results["figures"].append({"framework": framework, "round": round_number, **figure})
            for case, message in measured["errors"].items():
                results["errors"][f"{framework} {case}"] = message
            print(progress_line(round_number, framework, measured, time.monotonic() - start), file=sys.stderr)


def cases_by_process(cases: list[str], is_first_round: bool) -> list[list[str]]:
    """Return the cases of a round, grouped by the process that they share.

    Example:
        >>> cases_by_process(["A", "B", "G", "S"], is_first_round=False)
        [['A', 'B'], ['G']]
    """
    groups: dict[str, list[str]] = {}
    for name in cases:
        case = CASES[name]
        if case.is_repeated or is_first_round:
            groups.setdefault(name if case.process == "own" else case.process, []).append(name)
    return list(groups.values())


def progress_line(round_number: int, framework: str, measured: dict[str, Any], seconds: float) -> str:
    values = [f"{figure['row']} {figure['value']:.3f}" for figure in measured["figures"] if figure["at"] is None]
    failed = [f"{case} failed: {message}" for case, message in measured["errors"].items()]
    return f"round {round_number + 1}  {framework}  {seconds:.0f} s  {'  '.join(values + failed)}"


def write(results: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    (folder / "results.md").write_text(report.markdown(results))
    report.plot(results, folder / "ratios.svg")


if __name__ == "__main__":
    main()
