"""How messages reach the user."""

from __future__ import annotations

import ast
import logging

import pytest

from _support import SOURCE, Probe, make_dataset, make_trainer, train
from pytorch_accelerated import _messages
from pytorch_accelerated.callbacks import (
    EarlyStoppingCallback,
    LimitBatchesCallback,
    PrintProgressCallback,
    TerminateOnNaNCallback,
    get_default_callbacks,
)


def line_of(function):
    return function.__code__.co_filename, function.__code__.co_firstlineno


@pytest.mark.parametrize("depth", [0, 1, 5])
def test_a_warning_points_at_the_line_that_called_the_library(depth):
    namespace = {"__name__": "pytorch_accelerated._anything", "warn": _messages.warn}
    exec("def inside(depth):\n    return inside(depth - 1) if depth else warn('look')", namespace)
    with pytest.warns(UserWarning, match="look") as caught:
        namespace["inside"](depth)
    here, first_line = line_of(test_a_warning_points_at_the_line_that_called_the_library)
    assert (caught[0].filename, caught[0].lineno) == (here, first_line + 5)


def test_a_warning_of_a_run_points_at_the_call_of_train():
    trainer = make_trainer()
    with pytest.warns(UserWarning, match="`gradient_accumulation_steps` is 99") as caught:
        trainer.train(make_dataset(), 1, gradient_accumulation_steps=99)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_every_warning_goes_the_same_way(path):
    """A number of frames would be wrong as soon as another function stands between."""
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert path.name == "_messages.py" or "warnings.warn" not in map(ast.unparse, calls)


# --- what is logged ----------------------------------------------------------------------------------------------


@pytest.fixture
def logged(monkeypatch, caplog):
    monkeypatch.setattr(_messages, "_logged", set())
    return lambda: [record.getMessage() for record in caplog.records if record.name == "pytorch_accelerated"]


def test_a_hint_is_logged_once(logged):
    for text in ("one", "two", "one"):
        _messages.log_once(text)
    assert logged() == ["one", "two"]


def test_it_is_said_once_that_no_losses_are_printed(logged):
    for _ in range(2):
        train(make_trainer(callbacks=[TerminateOnNaNCallback, EarlyStoppingCallback(watch_metric="train_loss_epoch")]))
    assert len(logged()) == 1
    assert "prints no losses" in logged()[0]
    assert "`callbacks=[*get_default_callbacks(), ...]`" in logged()[0]


@pytest.mark.parametrize(
    "callbacks",
    [
        (),
        [],
        None,
        get_default_callbacks(),
        [*get_default_callbacks(progress_bar=False), LimitBatchesCallback(1)],
        PrintProgressCallback,
        [LimitBatchesCallback(1), Probe(on_train_epoch_end=lambda trainer, **kwargs: None)],
    ],
)
def test_it_is_not_said_where_something_is_printed_or_nothing_was_asked_for(logged, callbacks):
    train(make_trainer(callbacks=callbacks))
    assert logged() == []


def test_it_is_said_for_one_callback_outside_a_list(logged):
    train(make_trainer(callbacks=TerminateOnNaNCallback()))
    assert len(logged()) == 1


def test_it_can_be_silenced_by_the_level_of_the_logger(logged, caplog):
    with caplog.at_level(logging.ERROR, logger="pytorch_accelerated"):
        train(make_trainer(callbacks=TerminateOnNaNCallback()))
    assert logged() == []
