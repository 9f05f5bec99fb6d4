"""The loss of a batch by default, and what the loop reads of a step's output."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from pytorch_accelerated._step import batch_loss, predictions, raise_bad_loss, read_batch_output

INPUTS, TARGETS = torch.arange(6.0).reshape(3, 2), torch.ones(3)


@dataclass
class Batch:
    inputs: torch.Tensor
    factor: float


def model_with_loss(inputs, factor=1.0):
    return SimpleNamespace(loss=inputs.sum() * factor)


@pytest.mark.parametrize("kind", [tuple, list])
def test_with_a_loss_function_a_batch_is_inputs_and_targets(kind):
    output = batch_loss(
        lambda inputs: 2 * inputs, lambda outputs, targets: (outputs.sum(), targets), kind((INPUTS, TARGETS, "more"))
    )
    assert output["loss"] == (30.0, TARGETS)
    assert torch.equal(output["model_outputs"], 2 * INPUTS)
    assert output["batch_size"] == 3


@pytest.mark.parametrize("batch", [INPUTS, {"a": INPUTS}, (INPUTS,), None])
def test_any_other_batch_is_explained(batch):
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
def test_an_error_of_the_model_or_the_loss_tells_the_shapes(compute, note):
    with pytest.raises(IndexError, match="too small") as caught:
        compute()
    assert caught.value.__notes__ == [note]


def test_the_keys_of_a_batch_may_be_any_names():
    def of_all(model, name, function, args):
        return {"loss": model + name + function + args}

    batch = {name: torch.tensor([float(value)]) for value, name in enumerate(("model", "name", "function", "args"))}
    assert batch_loss(of_all, None, batch)["loss"] == 6
    assert predictions(of_all, batch)["loss"] == 6


class Closed(list):
    """Can be neither copied nor printed."""

    def __iter__(self):
        raise LookupError

    __repr__ = __iter__


def test_the_note_hides_no_error_and_is_not_endless():
    with pytest.raises(IndexError, match="too small") as caught:
        batch_loss(fail, len, (Closed(), TARGETS))
    assert getattr(caught.value, "__notes__", []) == []
    with pytest.raises(IndexError, match="too small") as caught:
        batch_loss(fail, len, (["text"] * 1000, TARGETS))
    assert len(caught.value.__notes__[0]) == 400


def test_the_death_of_a_worker_is_not_blamed_on_the_model():
    """PyTorch raises it at any place."""

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
def test_without_a_loss_function_the_model_gets_the_whole_batch(batch, factor):
    output = batch_loss(model_with_loss, None, batch)
    assert output["loss"].item() == 15.0 * factor
    assert output["batch_size"] == 3


@pytest.mark.parametrize(
    "outputs", [SimpleNamespace(loss=None), {"loss": None}, {}, INPUTS, None, SimpleNamespace(logits=INPUTS)]
)
def test_a_model_without_a_loss_is_explained(outputs):
    with pytest.raises(ValueError, match=rf"returned a {type(outputs).__name__} without a loss.*pass a `loss_func`"):
        batch_loss(lambda inputs: outputs, None, INPUTS)


def test_the_loss_is_taken_from_an_entry_if_there_is_no_attribute():
    assert batch_loss(lambda inputs: {"loss": 5.0}, None, INPUTS)["loss"] == 5.0


def test_the_weight_of_a_batch_is_its_items_or_else_its_size():
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
def test_an_output_that_lacks_something_is_explained(output, error, words):
    with pytest.raises(error, match=words):
        read_batch_output(output, "hook")


def test_a_loss_alone_is_explained_without_a_warning_of_pytorch():
    torch.set_warn_always(True)  # else it warns of such an index once in a process
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises(TypeError, match="of type Tensor"):
                read_batch_output(torch.tensor(0.5), "hook")
    finally:
        torch.set_warn_always(False)
    assert caught == []


def test_an_error_in_the_backward_pass_that_the_loss_is_not_to_blame_for_is_raised_as_it_is():
    error = RuntimeError("mine")
    with pytest.raises(RuntimeError) as caught:
        raise_bad_loss(torch.ones(1, requires_grad=True).sum(), error)
    assert caught.value is error
