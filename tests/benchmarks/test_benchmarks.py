"""The benchmarks: every framework has its files, workers measure, and the report says what was not measured."""

from __future__ import annotations

import doctest
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from _starting import run_from_scratch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Imports a module of the benchmarks by name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def run_script(*command: str) -> str:
    result = run_from_scratch(*command)
    assert result.returncode == 0, result.stderr
    return result.stdout


def results_with(*figures: dict[str, Any]) -> dict[str, Any]:
    return {
        "command": "make bench",
        "date": "2026-01-01",
        "machine": "a machine",
        "num_rounds": 2,
        "num_peer_rounds": 1,
        "versions": {"hand_written": "2.0", "pytorch_accelerated": "0.2", "keras": None},
        "figures": [{"at": None, "seconds": None, "baseline": None, **figure} for figure in figures],
        "errors": {"keras A": "ValueError: none"},
    }


def ratio(framework: str, value: float, row: str = "A") -> dict[str, Any]:
    return {"row": row, "framework": framework, "value": value}


def test_every_framework_has_a_file_an_environment_and_known_cases(load):
    frameworks, cases = load("frameworks"), load("_cases")
    for name, framework in frameworks.FRAMEWORKS.items():
        assert (BENCHMARKS / "frameworks" / f"{framework.module or name}.py").is_file()
        assert set(framework.cases.split()) <= set(cases.CASES)
        if framework.environment != "own":
            suffix = "" if framework.environment == "peers" else f"-{framework.environment}"
            pins = (BENCHMARKS / f"requirements{suffix}.txt").read_text().lower()
            assert f"\n{framework.package}==" in pins


def test_every_file_of_a_framework_is_used(load):
    frameworks = load("frameworks").FRAMEWORKS
    files = {path.stem for path in (BENCHMARKS / "frameworks").glob("[!_]*.py")}
    assert files == {framework.module or name for name, framework in frameworks.items()}


@pytest.mark.parametrize("module", ["run", "report"])
def test_the_examples_in_docstrings_pass(load, module):
    outcome = doctest.testmod(load(module))
    assert outcome.attempted > 0
    assert outcome.failed == 0


def test_a_worker_counts_host_reads_and_calls_of_a_step(tmp_path):
    """There are no host reads in a step, and the number of calls does not depend on the speed of the machine."""
    output = tmp_path / "results.json"
    run_script(str(BENCHMARKS / "_worker.py"), "hand_written", "S", "--output", str(output))
    results = json.loads(output.read_text())
    figures = {figure["row"]: figure["value"] for figure in results["figures"]}
    assert results["errors"] == {}
    assert figures["S"] == 0
    assert figures["S-calls"] > 100


def test_a_case_that_fails_is_reported_with_its_reason(tmp_path):
    output = tmp_path / "results.json"
    run_script(str(BENCHMARKS / "_worker.py"), "no_such_framework", "S", "--output", str(output))
    assert list(json.loads(output.read_text())["errors"]) == ["S"]


def test_the_table_shows_medians_extremes_missed_budgets_and_what_failed(load):
    figures = [ratio("pytorch_accelerated", 1.2), ratio("pytorch_accelerated", 1.4), ratio("hand_written", 1.0)]
    text = load("report").markdown(results_with(*figures))
    assert f"| 1.300 (1.200 to 1.400) | {load('_cases').ROWS['A'].budget} | **no** |" in text
    assert "2 rounds (1 for the other frameworks)" in text
    assert "| Keras (torch) | not installed |" in text
    assert "- keras A failed: ValueError: none" in text


def test_memory_peaks_are_relative_to_the_loop_written_by_hand(load):
    figures = [ratio("hand_written", 50.0, "M-peak"), ratio("pytorch_accelerated", 53.0, "M-peak")]
    found = load("report").spreads(results_with(*figures))
    assert found["M-peak", "pytorch_accelerated"].median == 3.0
    assert ("M-peak", "hand_written") not in found


def test_the_page_has_no_placeholder_left_and_has_the_table(load):
    page = load("report").page(results_with(ratio("pytorch_accelerated", 1.2), ratio("hand_written", 1.0)))
    assert "$" not in page.replace("$ make", "")
    assert "| A |" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which the benchmark would use")
def test_without_a_gpu_the_gpu_benchmark_says_so():
    assert run_script(str(BENCHMARKS / "gpu.py")).startswith("There is no GPU")
