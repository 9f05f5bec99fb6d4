"""The example of a language model learns, with the same losses on one process and on two."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from _starting import run, run_from_scratch

EXAMPLE = Path(__file__).parents[2] / "examples" / "char_gpt.py"
ARGUMENTS = ("--updates", "24", "--log-every", "3", "--batch-size", "8")


def run_example(folder: Path, *launcher: str) -> str:
    command = [*launcher, str(EXAMPLE), *ARGUMENTS]
    start = run_from_scratch if launcher else run
    result = start(*command, cwd=folder, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    return result.stdout


def training_losses(output: str) -> list[float]:
    """Return the printed losses, each a mean over three updates."""
    lines = re.findall(r"^update +(\d+): loss (\d+\.\d{6})$", output, flags=re.MULTILINE)
    assert [int(update) for update, _ in lines] == list(range(3, 25, 3))
    return [float(loss) for _, loss in lines]


def value_of(label: str, output: str) -> float:
    (value,) = re.findall(rf"^{label}: +(\d+\.\d+)", output, flags=re.MULTILINE)
    return float(value)


def in_table(column: str, output: str) -> float:
    """Return the value of the first epoch, in the table that the run prints."""
    header, row = re.findall(r"^(?:epoch  .*| +1/1  .*)$", output, flags=re.MULTILINE)
    return float(row.split()[re.split(r"  +", header).index(column)].rstrip("*"))


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """The output of the example on one process."""
    return run_example(tmp_path_factory.mktemp("one_process"))


def test_training_lowers_the_loss(output):
    losses = training_losses(output)
    assert losses[0] == pytest.approx(math.log(128), abs=0.5), "an untrained model knows nothing of the 128 tokens"
    assert losses[-1] < losses[0] - 0.5
    assert in_table("eval loss", output) < losses[0] - 0.5


def test_validation_loss_entropy_and_generated_code_are_printed_at_the_end(output):
    """The characters of code have an entropy of about 3 nats."""
    loss = value_of("Validation loss", output)
    assert loss == pytest.approx(in_table("eval loss", output), abs=1e-3)
    assert 2.8 < value_of("Entropy of the characters", output) < 3.4
    _, code = output.split("\nGenerated code:\n\n")
    assert code.startswith("def ")
    assert "class " in code
    assert "import " in code


@pytest.mark.distributed
def test_two_processes_print_the_losses_of_one(output, tmp_path):
    """24 updates of 8 pieces: 2 batches of 4 in one process, 2 batches of 2 in each of two."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    distributed_output = run_example(tmp_path, *launcher)
    assert training_losses(distributed_output) == pytest.approx(training_losses(output), rel=0, abs=1e-4)
    for column in ("train loss", "eval loss"):
        assert in_table(column, distributed_output) == pytest.approx(in_table(column, output), rel=0, abs=1e-3)
    assert distributed_output.count("Generated code:") == 1
