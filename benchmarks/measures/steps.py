"""Time a step, an evaluation and a short complete run, relative to the hand-written loop in the same process."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from _common import Job, SingleSamples, make_conv_net, make_dataset, make_mlp, make_wide_mlp
from frameworks import OURS
from measures import Figure, Measurement, compare, do


def step_of_training(make_job: Callable[[], Job]) -> Measurement:
    """Measure a step, including its fraction of the end of an epoch and the start of the next."""

    def measurement(framework: Any) -> float:
        job = make_job()
        return statistics.median(do(job, framework.train).epochs) / job.num_steps_per_epoch

    return measurement


def step_of_evaluation(make_job: Callable[[], Job]) -> Measurement:
    """Measure a step, including its fraction of the end of the evaluation."""

    def measurement(framework: Any) -> float:
        job = make_job()
        return float(do(job, framework.evaluate).pass_over_data) / job.num_steps_per_epoch

    return measurement


def whole_call(make_job: Callable[[], Job]) -> Measurement:
    """Measure a training from creating the trainer to the end."""
    return lambda framework: float(do(make_job(), framework.train).call)


class Plan(NamedTuple):
    """How a case is measured."""

    measure: Callable[[Callable[[], Job]], Measurement]
    make_job: Callable[[], Job]
    num_pairs: int
    """Number of measurements of this library, alternating with the hand-written loop. Other frameworks get a third."""


def mlp_job(num_steps: int = 200, num_epochs: int = 3, **kwargs: Any) -> Job:
    return Job(make_mlp, make_dataset(32 * num_steps), num_epochs, **kwargs)


def evaluation_job(**kwargs: Any) -> Job:
    return mlp_job(num_steps=400, num_epochs=1, **kwargs)


def conv_net_job() -> Job:
    return Job(make_conv_net, make_dataset(32 * 8, (3, 32, 32)), num_epochs=3)


def exact_job(num_processes: int = 1) -> Job:
    dataset = SingleSamples(64 * 20 * num_processes, num_features=64)
    return Job(make_wide_mlp, dataset, num_epochs=3, batch_size=64, is_distributed=num_processes > 1)


def single_samples_job() -> Job:
    return Job(make_mlp, SingleSamples(32 * 200, num_features=64), num_epochs=3)


def distributed_job() -> Job:
    return Job(make_mlp, make_dataset(2 * 32 * 200), num_epochs=3, is_distributed=True)


PLANS = {
    "A": Plan(step_of_training, mlp_job, num_pairs=20),
    "A'": Plan(step_of_training, partial(mlp_job, has_own_loader=True), num_pairs=20),
    "A-off": Plan(step_of_training, partial(mlp_job, is_quiet=True), num_pairs=20),
    "A-single": Plan(step_of_training, single_samples_job, num_pairs=20),
    "B": Plan(step_of_evaluation, evaluation_job, num_pairs=20),
    "B'": Plan(step_of_evaluation, partial(evaluation_job, has_own_loader=True), num_pairs=20),
    "C": Plan(whole_call, partial(mlp_job, num_steps=16, num_epochs=20, has_own_loader=True), num_pairs=9),
    "D": Plan(step_of_training, conv_net_job, num_pairs=9),
    "G": Plan(step_of_training, partial(mlp_job, num_accumulated=4, is_bf16=True), num_pairs=12),
    "H": Plan(step_of_training, distributed_job, num_pairs=12),
    "R": Plan(step_of_training, exact_job, num_pairs=9),
    "R-2": Plan(step_of_training, partial(exact_job, num_processes=2), num_pairs=9),
}


def measure(case: str, framework: str) -> list[Figure]:
    plan = PLANS[case]
    num_pairs = plan.num_pairs if framework == OURS else plan.num_pairs // 3
    return [compare(case, framework, plan.measure(plan.make_job), num_pairs)]
