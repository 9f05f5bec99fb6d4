"""Both verifications on two real processes, which split each batch. They run this file as a script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.optim import SGD

import _runs
from _processes import launch, read_results, run_cases
from _support import make_dataset, make_model
from pytorch_accelerated import Trainer
from pytorch_accelerated.verification import check_invariance, verify_resume

pytestmark = pytest.mark.distributed


class RankTrainer(Trainer):
    """Its loss depends on the rank, as if one rank had other data."""

    def calculate_train_batch_loss(self, batch: Any) -> Any:
        output = super().calculate_train_batch_loss(batch)
        return {**output, "loss": output["loss"] * (1 + self.process_index * (output["batch_size"] < 16))}


class SumTrainer(Trainer):
    """Its loss is the sum over the batch."""

    def calculate_train_batch_loss(self, batch: Any) -> Any:
        output = super().calculate_train_batch_loss(batch)
        return {**output, "loss": output["loss"] * output["batch_size"]}


def check(trainer_class: type[Trainer]) -> Any:
    def make_trainer() -> Trainer:
        model = make_model()
        return trainer_class(model, nn.MSELoss(), SGD(model.parameters(), lr=0.1))

    return check_invariance(make_trainer, make_dataset(48))


def case_mean(rank: int, directory: Path) -> Any:
    return check(Trainer)


def case_sum(rank: int, directory: Path) -> Any:
    return check(SumTrainer)


def case_rank(rank: int, directory: Path) -> Any:
    return check(RankTrainer)


def verify(dataset: Any) -> Any:
    def make_trainer() -> Trainer:
        model = _runs.Net()
        return Trainer(model, nn.MSELoss(), SGD(model.parameters(), lr=0.01, momentum=0.9))

    return verify_resume(
        make_trainer,
        dataset,
        per_device_batch_size=4,
        gradient_accumulation_steps=2,
        train_dataloader_kwargs={"num_workers": 0},
        collate_fn=_runs.masked,
    )


def case_resume(rank: int, directory: Path) -> Any:
    return verify(_runs.NoisySamples())


class UnreproducibleOnRank1(_runs.NoisySamples):
    """On rank 1, its samples depend on how many were loaded before."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.count = rank, 0

    def __getitem__(self, index: int) -> Any:
        self.count += 1
        inputs, targets = super().__getitem__(index)
        return inputs + self.rank * self.count, targets


def case_resume_unreproducible(rank: int, directory: Path) -> Any:
    return verify(UnreproducibleOnRank1(rank))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("results")
    launch(Path(__file__), path, 2)
    return path


def test_splits_over_two_processes_match_the_full_batch_on_one(folder):
    reports = read_results(folder, "mean", 2)
    assert reports[0] == reports[1]
    assert reports[0].is_invariant
    assert reports[0].num_processes == 2
    assert "on 2 processes" in str(reports[0])
    assert [(split.per_device_batch_size, split.gradient_accumulation_steps) for split in reports[0].splits] == [
        (8, 1),
        (4, 2),
        (3, 3),
        (2, 4),
    ]


def test_resumed_runs_on_two_processes_are_exact(folder):
    """With augmentation, batch statistics, dropout, and stops in the middle of an accumulation window."""
    reports = read_results(folder, "resume", 2)
    assert reports[0] == reports[1]
    assert reports[0].is_exact, str(reports[0])
    assert (reports[0].num_steps, reports[0].stops) == (6, (1, 3, 4))


def test_a_resume_that_differs_on_one_rank_is_reported_on_both(folder):
    reports = read_results(folder, "resume_unreproducible", 2)
    assert reports[0] == reports[1]
    assert "rank 1: the batch" in str(reports[0])


def test_a_loss_that_is_a_sum_is_reported_on_both_ranks(folder):
    reports = read_results(folder, "sum", 2)
    assert reports[0] == reports[1]
    assert "returns a sum as its loss" in reports[0].likely_cause
    assert reports[0].splits[0].factor == pytest.approx(0.5, abs=0.01)  # although there is no accumulation


def test_a_loss_that_depends_on_the_rank_is_reported_on_both_ranks(folder):
    reports = read_results(folder, "rank", 2)
    assert reports[0] == reports[1]
    assert not reports[0].splits[0].largest <= reports[0].tolerance


if __name__ == "__main__":
    run_cases({name.removeprefix("case_"): case for name, case in list(globals().items()) if name.startswith("case_")})
