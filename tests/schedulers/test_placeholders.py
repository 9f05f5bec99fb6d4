"""Placeholders: arithmetic with them, and their replacement by the numbers of a run."""

from __future__ import annotations

import functools
import operator
import pickle
import re
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch

from _support import make_dataset, make_optimizer, make_trainer, recorder_of
from pytorch_accelerated.schedulers._placeholders import (
    PlaceholderExpression,
    TrainerPlaceholderValues,
    resolve_placeholders,
)

P = TrainerPlaceholderValues
VALUES = {
    P.NUM_EPOCHS: 7,
    P.NUM_UPDATE_STEPS_PER_EPOCH: 50,
    P.PER_PROCESS_NUM_UPDATE_STEPS_PER_EPOCH: 50,
    P.TRAIN_DATALOADER_LEN: 100,
    P.EVAL_DATALOADER_LEN: None,
}
OPERATORS = [
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.floordiv,
    operator.mod,
    operator.pow,
]


def resolve(value):
    return resolve_placeholders(value, VALUES)


def test_the_five_placeholders_are_distinct_members():
    assert [member.name for member in P] == [
        "NUM_EPOCHS",
        "NUM_UPDATE_STEPS_PER_EPOCH",
        "PER_PROCESS_NUM_UPDATE_STEPS_PER_EPOCH",
        "TRAIN_DATALOADER_LEN",
        "EVAL_DATALOADER_LEN",
    ]


def test_the_repr_of_a_placeholder_is_its_qualified_name():
    assert repr(P.NUM_EPOCHS) == str(P.NUM_EPOCHS) == "TrainerPlaceholderValues.NUM_EPOCHS"


def test_a_placeholder_resolves_to_its_number():
    assert resolve(P.NUM_EPOCHS) == 7
    assert resolve(P.TRAIN_DATALOADER_LEN) == 100


@pytest.mark.parametrize("apply", OPERATORS)
@pytest.mark.parametrize("number", [3, 2.5, np.float64(2.5), np.int64(3)])
def test_every_operator_works_with_the_number_on_either_side(apply, number):
    for expression, expected in [
        (apply(P.NUM_EPOCHS, number), apply(7, number)),
        (apply(number, P.NUM_EPOCHS), apply(number, 7)),
    ]:
        assert isinstance(expression, PlaceholderExpression)
        assert resolve(expression) == expected


@pytest.mark.parametrize("apply", OPERATORS)
def test_every_operator_combines_two_placeholders(apply):
    assert resolve(apply(P.NUM_EPOCHS, P.NUM_UPDATE_STEPS_PER_EPOCH)) == apply(7, 50)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        (2 * P.NUM_EPOCHS * P.NUM_UPDATE_STEPS_PER_EPOCH // 3, 2 * 7 * 50 // 3),
        (1 + P.NUM_EPOCHS * 2, 1 + 7 * 2),
        ((1 + P.NUM_EPOCHS) * 2, (1 + 7) * 2),
        (-P.NUM_EPOCHS, -7),
        (-((P.NUM_EPOCHS - 10) ** 2), -((7 - 10) ** 2)),
        (10 - (P.NUM_EPOCHS - (2 - P.NUM_EPOCHS)), 10 - (7 - (2 - 7))),
        (2 ** (P.NUM_EPOCHS % 4) / P.NUM_UPDATE_STEPS_PER_EPOCH, 2 ** (7 % 4) / 50),
    ],
    ids=repr,
)
def test_a_chain_of_operators_keeps_the_precedence_of_python(expression, expected):
    assert resolve(expression) == expected


def test_integer_arithmetic_stays_integer():
    assert type(resolve(P.NUM_EPOCHS * P.NUM_UPDATE_STEPS_PER_EPOCH // 3 - 1)) is int
    assert type(resolve(P.NUM_EPOCHS / 7)) is float


def test_the_repr_of_an_expression_shows_the_order_of_evaluation():
    assert repr(2 * P.NUM_EPOCHS // 3) == "(2 * TrainerPlaceholderValues.NUM_EPOCHS) // 3"


@pytest.mark.parametrize("other", ["3", None, [1], {}, np.ones(2)], ids=repr)
def test_combining_a_placeholder_with_a_non_number_is_a_type_error(other):
    with pytest.raises(TypeError):
        P.NUM_EPOCHS + other
    with pytest.raises(TypeError):
        other - P.NUM_EPOCHS


@pytest.mark.parametrize("value", [*P, 2 * P.NUM_EPOCHS // 3], ids=repr)
def test_placeholders_and_expressions_can_be_pickled_compared_and_hashed(value):
    restored = pickle.loads(pickle.dumps(value))
    assert restored == value
    assert {restored: "found"}[value] == "found"


def test_the_arguments_of_a_partial_are_resolved_in_a_new_partial():
    inner = functools.partial(dict, length=P.NUM_UPDATE_STEPS_PER_EPOCH)
    original = functools.partial(dict, [("epochs", P.NUM_EPOCHS)], total=P.NUM_EPOCHS * 2, make=inner, x="y")
    resolved = resolve(original)
    assert resolved.func is dict
    assert resolved() == {"epochs": 7, "total": 14, "make": resolved.keywords["make"], "x": "y"}
    assert resolved.keywords["make"]() == {"length": 50}
    assert original.args == ([("epochs", P.NUM_EPOCHS)],)
    assert original.keywords == {"total": P.NUM_EPOCHS * 2, "make": inner, "x": "y"}
    assert inner.keywords == {"length": P.NUM_UPDATE_STEPS_PER_EPOCH}


def test_containers_are_resolved_at_any_depth_and_keep_their_type():
    pair = namedtuple("pair", "left right")
    value = {
        "list": [P.NUM_EPOCHS, {"deep": (1, [P.NUM_EPOCHS + 1])}],
        "pair": pair(P.NUM_EPOCHS, 0),
        "ordered": OrderedDict(b=P.NUM_EPOCHS, a=1),
    }
    resolved = resolve(value)
    assert resolved == {
        "list": [7, {"deep": (1, [8])}],
        "pair": pair(7, 0),
        "ordered": OrderedDict(b=7, a=1),
    }
    assert isinstance(resolved["pair"], pair)
    assert isinstance(resolved["ordered"], OrderedDict)
    assert value["list"][0] is P.NUM_EPOCHS


@pytest.mark.parametrize(
    "value",
    [3, 2.5, None, "NUM_EPOCHS", object(), print, [1, (2, {"a": 3})], functools.partial(print, 1, end="")],
    ids=["integer", "float", "none", "text", "object", "function", "nested", "partial"],
)
def test_a_value_without_placeholders_is_returned_as_the_same_object(value):
    assert resolve(value) is value


@pytest.mark.parametrize("values", [VALUES, {}])
def test_a_placeholder_without_a_known_number_is_an_error_that_names_it(values):
    expected = re.escape("`TrainerPlaceholderValues.EVAL_DATALOADER_LEN` has no value in this run.")
    with pytest.raises(ValueError, match=expected + r".*Pass that to `train`, or replace the placeholder"):
        resolve_placeholders(functools.partial(print, [2 * P.EVAL_DATALOADER_LEN]), values)


def test_zero_counts_as_a_known_number():
    assert resolve_placeholders(P.EVAL_DATALOADER_LEN, {P.EVAL_DATALOADER_LEN: 0}) == 0


def test_a_division_by_zero_is_an_error_that_shows_the_operands():
    expected = re.escape("`5 // TrainerPlaceholderValues.NUM_EPOCHS` is 5 // 0 in this run, a division by zero.")
    with pytest.raises(ValueError, match=expected):
        resolve_placeholders(5 // P.NUM_EPOCHS, {P.NUM_EPOCHS: 0})


# --- a run that a number of updates ends -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        (P.NUM_EPOCHS * P.NUM_UPDATE_STEPS_PER_EPOCH, 4),
        (P.PER_PROCESS_NUM_UPDATE_STEPS_PER_EPOCH * P.NUM_EPOCHS, 4),
        (P.NUM_EPOCHS * P.TRAIN_DATALOADER_LEN, 8),
        (P.NUM_EPOCHS * P.NUM_UPDATE_STEPS_PER_EPOCH // 2, 2),
        (0.25 * (P.NUM_EPOCHS * P.NUM_UPDATE_STEPS_PER_EPOCH), 1),
        (P.NUM_UPDATE_STEPS_PER_EPOCH, 3),
        (P.NUM_EPOCHS * P.NUM_EPOCHS, None),
        (P.NUM_EPOCHS + P.NUM_UPDATE_STEPS_PER_EPOCH, None),
    ],
    ids=str,
)
def test_the_product_of_epochs_and_updates_is_the_number_of_updates_of_the_run(expression, expected):
    """`max_num_train_steps` may end the run within an epoch, so it is not the product of the numbers."""
    resolved = {}

    def create(optimizer, n):
        resolved["n"] = n
        return torch.optim.lr_scheduler.ConstantLR(optimizer)

    trainer = make_trainer()
    kwargs = {"per_device_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer.train(
        make_dataset(12),
        100,
        max_num_train_steps=4,
        create_scheduler_fn=functools.partial(create, n=expression),
        **kwargs,
    )
    num_epochs = trainer.run_config.num_epochs
    assert resolved["n"] == {None: num_epochs**2 if "*" in str(expression) else num_epochs + 3}.get(expected, expected)
    trainer.train(make_dataset(12), 2, create_scheduler_fn=functools.partial(create, n=expression), **kwargs)
    numbers = {P.NUM_EPOCHS: 2, P.TRAIN_DATALOADER_LEN: 6}
    numbers |= {P.NUM_UPDATE_STEPS_PER_EPOCH: 3, P.PER_PROCESS_NUM_UPDATE_STEPS_PER_EPOCH: 3}
    assert resolved["n"] == resolve_placeholders(expression, numbers)


@pytest.mark.parametrize("limit", [4, 6, 7])
def test_a_schedule_of_the_length_of_the_run_ends_with_it(limit):
    create = functools.partial(
        torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=P.NUM_EPOCHS * P.NUM_UPDATE_STEPS_PER_EPOCH
    )
    recorder, rates = recorder_of(lambda trainer: trainer.optimizer.param_groups[0]["lr"], "on_optimizer_step_start")
    make_trainer(callbacks=[recorder]).train(
        make_dataset(12), 100, per_device_batch_size=4, max_num_train_steps=limit, create_scheduler_fn=create
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(make_optimizer(0.1), max_lr=0.1, total_steps=limit)
    expected = [scheduler.get_last_lr()[0]]
    for _ in range(limit - 1):
        scheduler.optimizer.step()
        scheduler.step()
        expected.append(scheduler.get_last_lr()[0])
    assert rates == pytest.approx(expected)
