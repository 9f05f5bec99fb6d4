"""The default step: the loss and the predictions of a batch, and what the loop reads of a step's output."""

from __future__ import annotations

import warnings
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from pytorch_accelerated._step import batch_loss, predictions, raise_bad_loss, read_batch_output

INPUTS, TARGETS = torch.arange(6.0).reshape(3, 2), torch.ones(3)

Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Batch:
    inputs: torch.Tensor
    factor: float


def model_with_loss(inputs, factor=1.0):
    return SimpleNamespace(loss=inputs.sum() * factor)


# --- the model and the loss function -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [tuple, list])
def test_with_a_loss_function_a_batch_is_inputs_and_targets(kind):
    output = batch_loss(
        lambda inputs: 2 * inputs, lambda outputs, targets: (outputs.sum(), targets), kind((INPUTS, TARGETS))
    )
    assert output["loss"] == (30.0, TARGETS)
    assert torch.equal(output["model_outputs"], 2 * INPUTS)
    assert output["batch_size"] == 3


def test_items_that_a_loss_function_leaves_unused_are_told_of():
    with pytest.warns(UserWarning, match=r"batch has 4 items, of which only the first two are used.*leave them out"):
        output = batch_loss(lambda inputs: inputs, lambda outputs, targets: targets, (INPUTS, TARGETS, "more", 1))
    assert output["loss"] is TARGETS


def test_a_batch_of_which_the_model_takes_all_items_has_none_that_are_unused():
    output = batch_loss(lambda first, second, loss: {"loss": loss}, None, (INPUTS, TARGETS, TARGETS.sum()))
    assert output["loss"] == TARGETS.sum()


@pytest.mark.parametrize("batch", [INPUTS, {"a": INPUTS}, (INPUTS,), None])
def test_with_a_loss_function_any_other_batch_is_explained(batch):
    with pytest.raises(TypeError, match=r"batch is a .*pair of inputs and targets"):
        batch_loss(lambda inputs: inputs, lambda outputs, targets: outputs, batch)


def fail(*args, **kwargs):
    raise IndexError("too small")


@pytest.mark.parametrize(
    ("compute", "note"),
    [
        (lambda: batch_loss(fail, len, (INPUTS, TARGETS)), "The model was called with float32 (3, 2)"),
        (
            lambda: batch_loss(lambda inputs: {"logits": inputs.half()}, fail, (INPUTS, TARGETS.long())),
            "The loss function was called with {'logits': 'float16 (3, 2)'}, int64 (3,)",
        ),
        (
            lambda: batch_loss(fail, None, {"tokens": INPUTS.long(), "names": ["a", "b"]}),
            "The model was called with tokens=int64 (3, 2), names=['str', 'str']",
        ),
        (lambda: batch_loss(fail, None, (INPUTS, 2.0)), "The model was called with float32 (3, 2), float"),
        (lambda: batch_loss(fail, None, INPUTS > 1), "The model was called with bool (3, 2)"),
        (lambda: predictions(fail, (INPUTS, TARGETS)), "The model was called with float32 (3, 2)"),
        (lambda: predictions(fail, {"a": INPUTS}), "The model was called with a=float32 (3, 2)"),
    ],
)
def test_an_error_in_the_model_or_the_loss_function_gets_a_note_with_the_shapes(compute, note):
    with pytest.raises(IndexError, match="too small") as caught:
        compute()
    assert caught.value.__notes__[0] == note


@pytest.mark.parametrize("outputs", [(INPUTS, INPUTS), {"logits": INPUTS}, None])
def test_a_loss_function_that_fails_on_a_structure_gets_a_remedy(outputs):
    """A model that returns a tuple, for example."""
    with pytest.raises((TypeError, AttributeError)) as caught:
        batch_loss(lambda inputs: outputs, nn.functional.mse_loss, (INPUTS, TARGETS))
    assert "override `calculate_train_batch_loss`" in caught.value.__notes__[-1]


def test_a_model_that_does_not_take_the_whole_batch_gets_a_remedy():
    with pytest.raises(TypeError) as caught:
        batch_loss(nn.Linear(2, 1), None, (INPUTS, TARGETS))
    assert "pass a `loss_func`" in caught.value.__notes__[-1]


def test_a_mapping_batch_may_have_any_keys():
    def of_all(model, name, function, args):
        return {"loss": model + name + function + args}

    batch = {name: torch.tensor([float(value)]) for value, name in enumerate(("model", "name", "function", "args"))}
    assert batch_loss(of_all, None, batch)["loss"] == 6
    assert predictions(of_all, batch)["loss"] == 6


class Opaque(list):
    """Can be neither iterated over nor printed."""

    def __iter__(self):
        raise LookupError

    __repr__ = __iter__


def test_the_note_never_hides_the_error_and_is_short():
    with pytest.raises(IndexError, match="too small") as caught:
        batch_loss(fail, len, (Opaque(), TARGETS))
    assert caught.value.__notes__ == ["The model was called with Opaque"]
    with pytest.raises(IndexError, match="too small") as caught:
        batch_loss(fail, len, (["text"] * 1000, TARGETS))
    assert len(caught.value.__notes__[0]) == len("The model was called with ") + 400


def test_the_failure_of_a_worker_gets_no_note_about_the_model():
    """PyTorch may raise it anywhere."""

    def die(inputs):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    with pytest.raises(RuntimeError, match="is killed") as caught:
        batch_loss(die, len, (INPUTS, TARGETS))
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize(
    ("batch", "factor"),
    [
        (INPUTS, 1.0),
        ((INPUTS, 2.0), 2.0),
        ([INPUTS, 2.0], 2.0),
        ({"inputs": INPUTS, "factor": 3.0}, 3.0),
        (Batch(INPUTS, 4.0), 4.0),
    ],
)
def test_without_a_loss_function_the_model_gets_all_of_the_batch(batch, factor):
    output = batch_loss(model_with_loss, None, batch)
    assert output["loss"].item() == 15.0 * factor
    assert output["batch_size"] == 3


@pytest.mark.parametrize(
    "outputs", [SimpleNamespace(loss=None), {"loss": None}, {}, INPUTS, None, SimpleNamespace(logits=INPUTS)]
)
def test_model_outputs_without_a_loss_are_explained(outputs):
    with pytest.raises(ValueError, match=rf"returned a {type(outputs).__name__} without a loss.*pass a `loss_func`"):
        batch_loss(lambda inputs: outputs, None, INPUTS)


def test_the_loss_may_be_an_entry_of_the_model_outputs():
    assert batch_loss(lambda inputs: {"loss": 5.0}, None, INPUTS)["loss"] == 5.0


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ((1, 2), ((1,), {})),
        ([1, 2], ((1,), {})),
        (Pair(1, 2), ((1,), {})),
        ({"a": 1, "b": 2}, ((), {"a": 1, "b": 2})),
        (OrderedDict(a=1), ((), {"a": 1})),
        (3, ((3,), {})),
    ],
)
def test_for_predictions_the_model_gets_the_inputs_of_a_pair_or_all_entries_of_a_mapping(batch, expected):
    assert predictions(lambda *args, **kwargs: (args, kwargs), batch) == expected


# --- the output of a step ----------------------------------------------------------------------------------------


def test_the_weight_of_a_batch_is_num_items_in_batch_or_else_batch_size():
    assert read_batch_output({"loss": 1, "batch_size": 4}, "hook") == (4, 4)
    assert read_batch_output({"loss": 1, "batch_size": 4, "num_items_in_batch": 9}, "hook") == (9, 4)
    assert read_batch_output({"loss": 1, "batch_size": torch.tensor(4)}, "hook") == (4, 4)


@pytest.mark.parametrize(
    ("output", "error", "words"),
    [
        (None, TypeError, "`hook` returned None"),
        ([1], TypeError, "of type list"),
        (torch.ones(2), TypeError, "of type Tensor"),
        ({"loss": 1}, ValueError, "without `batch_size`"),
        (
            {"batch_size": 1, "a": 2},
            ValueError,
            r"`hook` returned a dictionary without `loss`; it has \['a', 'batch_size'\]",
        ),
        ({1: 2}, ValueError, "without `loss` and `batch_size`"),
        ({1: 2, "a": 3}, ValueError, "without `loss` and `batch_size`"),
        (SimpleNamespace(loss=1), TypeError, "of type SimpleNamespace"),
    ],
)
def test_an_invalid_output_of_a_step_is_explained(output, error, words):
    with pytest.raises(error, match=words):
        read_batch_output(output, "hook")


def test_a_loss_returned_alone_is_explained_without_a_warning_of_pytorch():
    torch.set_warn_always(True)  # by default, PyTorch warns of such an index once per process
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises(TypeError, match="of type Tensor"):
                read_batch_output(torch.tensor(0.5), "hook")
    finally:
        torch.set_warn_always(False)
    assert caught == []


def test_an_error_in_the_backward_pass_of_a_valid_loss_is_raised_unchanged():
    error = RuntimeError("mine")
    with pytest.raises(RuntimeError) as caught:
        raise_bad_loss(torch.ones(1, requires_grad=True).sum(), error)
    assert caught.value is error


@pytest.mark.parametrize("name", ["num_items_in_batch", "batch_size"])
@pytest.mark.parametrize("value", ["four", "4", [4], (1, 2), 4j, {}, torch.ones(2), np.ones(2)])
def test_a_weight_or_size_that_is_no_number_is_refused_by_its_name(name, value):
    with pytest.raises(TypeError, match=rf"A step returned `{name}` as .*Expected a single number"):
        read_batch_output({"loss": 1, "batch_size": 4, name: value}, "hook")


@pytest.mark.parametrize(
    "value", [4, 4.0, np.int64(4), np.array(4), np.array([4]), torch.tensor(4), torch.tensor([4.0])]
)
def test_a_weight_or_size_may_be_any_single_number(value):
    weight, size = read_batch_output({"loss": 1, "batch_size": value, "num_items_in_batch": value}, "hook")
    assert float(weight) == size == 4


def test_a_weight_of_none_counts_as_not_given():
    assert read_batch_output({"loss": 1, "batch_size": 4, "num_items_in_batch": None}, "hook") == (4, 4)
