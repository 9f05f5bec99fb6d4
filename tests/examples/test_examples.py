"""The digits examples, run as a user would run them, with fewer epochs."""

from __future__ import annotations

import re
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from _starting import run

EXAMPLES = Path(__file__).parents[2] / "examples"

pytest.importorskip("matplotlib", reason="the examples need the extra `examples`")
pytest.importorskip("sklearn", reason="the examples need the extra `examples`")


def run_example(name: str, *arguments: str, folder: Path) -> CompletedProcess[str]:
    result = run(EXAMPLES / name, *arguments, cwd=folder, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The working directory of the digits example after three epochs, and its output."""
    folder = tmp_path_factory.mktemp("digits")
    return folder, run_example("train_digits.py", "--epochs", "3", folder=folder)


def test_train_digits_reaches_an_accuracy_of_90_percent(trained):
    _, result = trained
    last_line = result.stdout.splitlines()[-1]
    accuracy = re.fullmatch(r"Test accuracy of the best model: ([01]\.\d{4})", last_line)
    assert accuracy is not None, last_line
    assert 0.9 < float(accuracy[1]) <= 1


def test_train_digits_prints_loss_and_accuracy_of_each_epoch(trained):
    _, result = trained
    assert "train loss  train accuracy  eval loss  eval accuracy" in result.stdout
    rows = re.findall(r"^ *\d/3( +\S+){7}$", result.stdout, flags=re.MULTILINE)
    assert len(rows) == 3
    assert result.stderr == "", "there is no progress bar without a terminal"


def test_train_digits_writes_the_best_model_and_the_learning_curves(trained):
    folder, _ = trained
    assert sorted(path.name for path in folder.iterdir()) == ["best_model.pt", "learning_curves.png"]
    checkpoint = torch.load(folder / "best_model.pt", weights_only=True)
    assert 1 <= checkpoint["epoch"] <= 3
    assert "0.weight" in checkpoint["model_state_dict"]
    png = (folder / "learning_curves.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) > 10_000


def test_train_digits_writes_only_to_the_output_folder(tmp_path):
    (tmp_path / "here").mkdir()
    run_example("train_digits.py", "--epochs", "1", "--output-dir", str(tmp_path / "there"), folder=tmp_path / "here")
    assert not list((tmp_path / "here").iterdir())
    assert {path.name for path in (tmp_path / "there").iterdir()} == {"best_model.pt", "learning_curves.png"}


def test_finetune_digits_changes_only_the_unfrozen_layer_groups(tmp_path):
    result = run_example("finetune_digits.py", "--epochs", "2", folder=tmp_path)
    header, *rows = [re.split(r"\s{2,}", line.strip()) for line in result.stdout.splitlines() if "  " in line]
    assert header == ["changed tensors", "stem", "lower", "upper", "head", "accuracy"]
    trained_groups = {
        row[0]: [name for name, cell in zip(header[1:-1], row[1:-1], strict=True) if cell != "unchanged"]
        for row in rows
    }
    assert trained_groups == {
        "pretrain on 0-4": ["stem", "lower", "upper", "head"],
        "5-9: head only": ["head"],
        "5-9: head first": ["head"],
        "5-9: unfreeze upper": ["upper", "head"],
        "5-9: unfreeze lower": ["lower", "upper", "head"],
        "5-9: unfreeze stem": ["stem", "lower", "upper", "head"],
    }
    assert all(re.fullmatch(r"unchanged|6 of 6|2 of 2", cell) for row in rows for cell in row[1:-1])

    head_only, gradual = re.findall(r"^Test accuracy on 5-9 with .*: (\d\.\d{4})$", result.stdout, flags=re.MULTILINE)
    assert float(head_only) < float(gradual)
    assert not list(tmp_path.iterdir())
