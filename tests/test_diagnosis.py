"""Each kind of curve is told from the others: over shapes, lengths, scales, noise, and metrics of both directions.

``PYTHONPATH=src NUM_CURVES=200 python -m pytest tests/test_diagnosis.py`` draws more curves of each kind.
"""

from __future__ import annotations

import math
import os
import random
import re

import pytest

from pytorch_accelerated._history.trends import noise_of, trend_of
from pytorch_accelerated.diagnosis import diagnose, diagnose_curves
from pytorch_accelerated.tracking import InMemoryRunHistory

NUM_CURVES = int(os.environ.get("NUM_CURVES", "12"))
LENGTHS = (8, 12, 30, 100)
CLAIMS = {"diverging", "over-fitting", "under-fitting", "still falling", "flat", "noisy"}


def exponential(num, gain=1.0, floor=0.1, share=1 / 12):
    return [floor + gain * math.exp(-index / (share * num)) for index in range(num)]


def line(num, first=1.0, last=0.2):
    return [first + (last - first) * index / (num - 1) for index in range(num)]


def power(num):
    return [0.05 + (index + 1) ** -0.3 for index in range(num)]


def valley(num, bottom=0.3, depth=0.4, rise=0.4):
    """Fall until three tenths of the way, then rise."""
    turn = max(round(0.3 * num), 1)
    return [
        bottom + depth * (1 - i / turn) if i <= turn else bottom + rise * (i - turn) / (num - turn) for i in range(num)
    ]


def bump(num):
    return [1 - index / num if index < num / 2 else 0.5 + 3 * (index / num - 0.5) for index in range(num)]


def plateau(num):
    return [2.3 - 0.25 * (1 - math.exp(-2 * index)) for index in range(num)]


SHAPES = {
    # name: curve of training, curve of evaluation, standard deviation of the noise, expected, allowed
    "falling line": (line, line, 0.002, {"still falling"}, set()),
    "falling line with noise": (line, line, 0.01, {"still falling"}, set()),
    "slow power law": (power, power, 0.0, {"still falling"}, set()),
    "converged": (exponential, exponential, 0.003, {"flat"}, set()),
    "converged above training": (exponential, lambda num: exponential(num, floor=0.3), 0.003, {"flat"}, set()),
    "valley": (lambda num: exponential(num, share=1 / 3), valley, 0.005, {"over-fitting"}, set()),
    "valley with noise": (lambda num: exponential(num, share=1 / 3), valley, 0.015, {"over-fitting"}, {"noisy"}),
    "rising from the start": (line, lambda num: line(num, 0.5, 0.9), 0.01, {"over-fitting"}, {"noisy"}),
    "bump": (bump, line, 0.01, {"diverging"}, set()),
    "explosion": (lambda num: [1 + 0.5 * index for index in range(num)], line, 0.01, {"diverging"}, set()),
    "high plateau": (plateau, plateau, 0.004, {"under-fitting", "flat"}, set()),
    "no change": (lambda num: [0.7] * num, lambda num: [0.7] * num, 0.0, {"flat"}, set()),
    "noise alone": (lambda num: [0.7] * num, lambda num: [0.7] * num, 0.1, {"flat", "noisy"}, set()),
}
TOO_LITTLE_IS_SAID = 0.25
WRONG_CLAIM = 0.05
"""The shares of curves for which less, or something else, may be found."""


def draw(shape, num, noise, scale, generator):
    return [scale * (value + generator.gauss(0, noise)) for value in shape(num)]


def kinds_of(train, evaluation, **kwargs):
    return {finding.kind for finding in diagnose_curves(train, evaluation, **kwargs)}


@pytest.mark.parametrize("is_reversed", [False, True], ids=["less is better", "more is better"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_curve_is_told_from_those_of_other_kinds(name, is_reversed):
    train_shape, eval_shape, noise, expected, allowed = SHAPES[name]
    generator, num_missed, num_wrong = random.Random(name), 0, 0
    lengths = LENGTHS[1:] if name == "high plateau" else LENGTHS
    for num in lengths:
        for _ in range(NUM_CURVES):
            scale = 10 ** generator.uniform(0 if is_reversed else -5, 4)
            train, evaluation = (draw(shape, num, noise, scale, generator) for shape in (train_shape, eval_shape))
            if is_reversed:
                train, evaluation = ([10 * scale - value for value in each] for each in (train, evaluation))
            found = kinds_of(train, evaluation, greater_is_better=is_reversed)
            found = {kind.replace("rising", "falling") for kind in found}
            unknown = {"under-fitting"} if is_reversed else set()  # the level of an unbounded metric says nothing
            num_missed += not (expected - unknown <= found)
            num_wrong += bool(found - expected - allowed)
    assert num_missed <= TOO_LITTLE_IS_SAID * NUM_CURVES * len(lengths)
    assert num_wrong <= WRONG_CLAIM * NUM_CURVES * len(lengths)


@pytest.mark.parametrize("num", [4, 5, 6])
def test_little_is_claimed_of_short_curves(num):
    generator, claims = random.Random(num), []
    for _ in range(20 * NUM_CURVES):
        claims += kinds_of(*(draw(lambda num: [0.7] * num, num, 0.02, 1.0, generator) for _ in range(2)))
    assert sum(kind in ("still falling", "over-fitting", "diverging") for kind in claims) <= 0.08 * 20 * NUM_CURVES


@pytest.mark.parametrize("num", [1, 2, 3])
def test_three_epochs_are_too_short_to_tell(num):
    findings = diagnose_curves(line(4)[:num], line(4)[:num])
    assert [finding.kind for finding in findings] == ["too short"]
    assert f"{num} epoch" in findings[0].text


@pytest.mark.parametrize("num", [4, 5, 8, 40])
def test_the_first_number_that_is_not_finite_is_told(num):
    values = line(num)
    values[2], values[3] = float("nan"), float("inf")
    (finding,) = diagnose_curves(values, line(num))
    assert (finding.kind, finding.since_epoch) == ("diverging", 3)
    assert "is nan in epoch 3" in finding.text
    assert finding.numbers["last finite value"] == values[1]
    (finding,) = diagnose_curves([float("inf")])
    assert (finding.kind, finding.since_epoch) == ("diverging", 1)


# --- what a finding says -----------------------------------------------------------------------------------------


def test_over_fitting_names_the_epoch_and_the_numbers():
    train = [1.0, 0.7, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15]
    evaluation = [1.1, 0.8, 0.6, 0.55, 0.6, 0.66, 0.71, 0.78]
    (finding,) = diagnose_curves(train, evaluation)
    assert (finding.kind, finding.since_epoch) == ("over-fitting", 5)
    assert "rose from 0.6 in epoch 4 to 0.78" in finding.text or "rose from 0.55 in epoch 4 to 0.78" in finding.text
    assert finding.numbers["last evaluation"] == 0.78
    assert finding.numbers["last training"] == 0.15


def test_an_evaluation_that_rises_with_training_is_no_over_fitting():
    assert "over-fitting" not in kinds_of(valley(12), valley(12))


def test_an_evaluation_that_rises_while_training_stands_still_is_no_over_fitting():
    generator = random.Random(0)
    train = [value + generator.gauss(0, 0.003) for value in [1.0, 0.7, *[0.5] * 18]]
    evaluation = [1.0, 0.7, *[0.5 + 0.01 * index for index in range(18)]]
    assert "over-fitting" not in kinds_of(train, evaluation)
    assert "over-fitting" in kinds_of([value - 0.01 * index for index, value in enumerate(train)], evaluation)


def test_a_fall_that_is_negligible_or_only_a_recovery_is_not_still_falling():
    creeping = [1.0, 0.5, 0.2, *[0.1 - 1e-5 * index for index in range(30)]]
    assert kinds_of(creeping, creeping) == {"flat"}
    recovering = [1.0, 0.5, 0.3, 0.2, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45]
    assert "still falling" not in kinds_of(recovering, recovering)


def test_a_single_bad_epoch_is_neither_divergence_nor_over_fitting():
    train, evaluation = exponential(20, share=1 / 4), exponential(20, share=1 / 4)
    for values in (train, evaluation):
        values[-1] = 2.0
    assert not kinds_of(train, evaluation) & {"diverging", "over-fitting"}
    train[10] = evaluation[10] = 3.0
    assert not kinds_of(train, evaluation) & {"diverging", "over-fitting"}


def test_a_loss_that_falls_by_the_same_factor_is_still_falling():
    assert kinds_of([0.5**index for index in range(30)], []) == {"still falling"}


def test_epochs_are_those_of_the_evaluations_if_these_are_rarer():
    rows = [{"epoch": epoch, "train_loss": 2 - epoch / 20} for epoch in range(1, 31)]
    for row in rows[2::3]:
        row["eval_loss"] = row["train_loss"]
    (finding,) = diagnose(rows)
    assert finding.kind == "still falling"
    assert "in the last 12 epochs" in finding.text


def test_a_baseline_decides_what_is_under_fitting():
    values = [2.31, 2.305, 2.303, 2.302, 2.303, 2.302, 2.303, 2.302]
    assert "under-fitting" in kinds_of(values, values, baseline=math.log(10))
    assert "under-fitting" not in kinds_of(values, values, baseline=math.log(1000))
    accuracies = [0.1, 0.1, 0.11, 0.1, 0.1, 0.11, 0.1, 0.1]
    assert "under-fitting" in kinds_of(accuracies, accuracies, baseline=0.1, greater_is_better=True)


def test_without_a_baseline_nothing_is_said_of_a_level_that_was_there_from_the_start():
    assert kinds_of([0.05] * 10, [0.05] * 10) == {"flat"}


def test_training_alone_or_evaluation_alone_is_enough():
    assert kinds_of(line(10), []) == kinds_of([], line(10)) == {"still falling"}


@pytest.mark.parametrize("name", SHAPES)
def test_a_finding_is_a_sentence_with_numbers_and_advice(name):
    train_shape, eval_shape, noise, _, _ = SHAPES[name]
    generator = random.Random(0)
    train, evaluation = (draw(shape, 20, noise, 1.0, generator) for shape in (train_shape, eval_shape))
    findings = diagnose_curves(train, evaluation)
    assert findings
    for finding in findings:
        assert finding.kind in CLAIMS
        assert re.fullmatch(r"[A-Z].*\d.*\.", finding.text)
        assert re.fullmatch(r"[A-Z].*\.", finding.advice)
        assert finding.numbers
        assert all(math.isfinite(number) for number in finding.numbers.values())
        assert str(finding).startswith(f"{finding.kind}: {finding.text}")


# --- sources -----------------------------------------------------------------------------------------------------


def test_a_history_is_diagnosed_by_metric(tmp_path):
    history = InMemoryRunHistory()
    for value in line(8):
        history.update_metric("train_loss_epoch", value)
        history.update_metric("eval_loss_epoch", value)
        history.update_metric("eval_accuracy", 1 - value)
    diagnosis = diagnose(history)
    assert (diagnosis.kinds, diagnosis.metric, diagnosis.num_epochs, len(diagnosis)) == (
        ["still falling"],
        "loss",
        8,
        1,
    )
    assert "evaluation loss fell" in str(diagnosis)
    assert diagnose(history, "accuracy").kinds == ["still rising"]
    assert "evaluation accuracy rose" in str(diagnose(history, "accuracy"))
    path = tmp_path / "log.csv"
    path.write_text("epoch,train_loss\n" + "".join(f"{epoch},{value}\n" for epoch, value in enumerate(line(8), 1)))
    assert diagnose(path).kinds == ["still falling"]
    with pytest.raises(ValueError, match="no curves of 'f1'"):
        diagnose(history, "f1")


def test_a_curve_in_which_nothing_stands_out_says_so():
    diagnosis = diagnose({"train_loss": [1.0, 0.5, 0.4, 0.39]})
    assert diagnosis.kinds == []
    assert str(diagnosis) == "Nothing stands out in the 4 epochs of the loss."


# --- numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.001, 0.1])
def test_the_noise_is_estimated_whatever_the_trend(noise):
    generator = random.Random(0)
    for shape in (line, power, lambda num: [1.0] * num):
        values = draw(shape, 400, noise, 1.0, generator)
        assert noise_of(values) == pytest.approx(noise, rel=0.2)


def test_a_trend_is_a_slope_and_its_distance_from_zero():
    assert trend_of([3.0, 2.0, 1.0]) == (-1.0, math.inf)
    assert trend_of([1.0, 1.0, 1.0]) == (0.0, 0.0)
    assert trend_of([1.0]) == (0.0, 0.0)
    slope, certainty = trend_of([0.0, 2.0, 1.0, 3.0])
    assert (slope, certainty) == (pytest.approx(0.8), pytest.approx(0.8 / math.sqrt(1.8 / 2 / 5)))
