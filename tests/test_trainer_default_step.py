"""The default step: models that return their loss, and batches of any structure."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from _support import (
    IN_ORDER,
    assert_same_weights,
    losses,
    make_dataset,
    make_model,
    make_trainer,
    mse,
    train,
    weights_of,
)

# --- models that return their loss -------------------------------------------------------------------------------


Output = namedtuple("Output", ["loss", "logits"])


class ModelWithLoss(nn.Module):
    """Computes its loss, and returns what ``wrap`` makes of loss and outputs."""

    def __init__(self, wrap):
        super().__init__()
        self.linear = make_model()
        self.wrap = wrap

    def forward(self, inputs, labels):
        outputs = self.linear(inputs)
        return self.wrap(mse(outputs, labels), outputs)


def as_object(loss, outputs):
    return SimpleNamespace(loss=loss, logits=outputs)


def stack(samples, index):
    return torch.stack([sample[index] for sample in samples])


@pytest.mark.parametrize(
    "wrap",
    [as_object, lambda loss, outputs: {"loss": loss, "logits": outputs}, Output],
    ids=["object", "dict", "namedtuple"],
)
@pytest.mark.parametrize("kind", ["dict", "tuple", "list"])
def test_a_model_that_returns_its_loss_trains_as_with_a_loss_function(kind, wrap):
    dataset = make_dataset(10)
    collate = {
        "dict": lambda samples: {"inputs": stack(samples, 0), "labels": stack(samples, 1)},
        "tuple": lambda samples: (stack(samples, 0), stack(samples, 1)),
        "list": lambda samples: [stack(samples, 0), stack(samples, 1)],
    }[kind]
    trainer = make_trainer(ModelWithLoss(wrap), loss_func=None)
    train(trainer, dataset, collate_fn=collate, eval_dataset=dataset, train_dataloader_kwargs=IN_ORDER)
    reference = make_trainer()
    train(reference, dataset, eval_dataset=dataset, train_dataloader_kwargs=IN_ORDER)
    assert_same_weights(weights_of(reference.model), weights_of(trainer.model.linear))
    assert losses(trainer) == losses(reference)
    assert losses(trainer, "eval_loss_epoch") == losses(reference, "eval_loss_epoch")


@pytest.mark.parametrize("wrap", [lambda loss, outputs: outputs, lambda loss, outputs: {"logits": outputs}])
def test_without_a_loss_function_a_model_that_returns_no_loss_is_explained(wrap):
    with pytest.raises(ValueError, match=r"`loss_func` is None.*`outputs.loss` or `outputs\['loss'\]`.*labels"):
        train(make_trainer(ModelWithLoss(wrap), loss_func=None))


# --- batches -----------------------------------------------------------------------------------------------------


class ReadyBatches:
    """An iterable of given batches."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


@dataclass
class Batch:
    inputs: torch.Tensor
    labels: torch.Tensor
    names: list


def test_the_fields_of_a_dataclass_batch_are_the_models_arguments():
    class Named(ModelWithLoss):
        def forward(self, inputs, labels, names):
            seen.append(names)
            return super().forward(inputs, labels)

    seen = []
    dataset = make_dataset(8)
    batches = [Batch(*dataset[start : start + 4], names=[start]) for start in (0, 4)]
    trainer = make_trainer(Named(as_object), loss_func=None)
    train(trainer, ReadyBatches(batches))
    assert seen == [[0], [4]]
    assert trainer.progress.num_samples == 8


def test_a_tensor_batch_is_the_models_only_argument():
    class Norm(nn.Linear):
        def forward(self, inputs):
            return {"loss": super().forward(inputs).square().mean()}

    trainer = make_trainer(Norm(3, 1), loss_func=None)
    train(trainer, ReadyBatches([torch.ones(5, 3)]))
    assert trainer.progress.num_samples == 5


def test_a_batch_that_is_not_a_pair_is_explained():
    dataset = make_dataset(4)
    with pytest.raises(TypeError, match=r"batch is a dict.*pair of inputs and targets.*`loss_func=None`"):
        train(make_trainer(), ReadyBatches([{"inputs": dataset.tensors[0]}]))


def test_the_batch_size_is_found_in_nested_inputs():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = make_model()

        def forward(self, inputs):
            return self.linear(inputs["parts"][1]["features"])

    dataset = make_dataset(6)
    inputs = {"id": "text", "scale": torch.tensor(2.0), "parts": ["a", {"features": dataset.tensors[0]}]}
    trainer = make_trainer(Nested())
    train(trainer, ReadyBatches([(inputs, dataset.tensors[1])]))
    assert trainer.progress.num_samples == 6


def test_a_batch_whose_size_cannot_be_found_is_explained():
    class Constant(nn.Linear):
        def forward(self, inputs):
            return {"loss": self.weight.sum()}

    with pytest.raises(ValueError, match=r"No batch size was found.*return the `batch_size` yourself"):
        train(make_trainer(Constant(3, 1), loss_func=None), ReadyBatches([("text",)]))
