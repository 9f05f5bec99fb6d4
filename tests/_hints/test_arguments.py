"""Keyword arguments of other libraries: each is answered with what it is called here."""

from __future__ import annotations

import inspect
import re

import pytest
from torch import nn

from _support import make_dataset, make_trainer
from pytorch_accelerated import Trainer, callbacks
from pytorch_accelerated._hints.arguments import _FOREIGN_ARGUMENTS, _arguments, explains_arguments
from pytorch_accelerated.trainer import TrainerWithTimmScheduler

FUNCTIONS = {"Trainer": Trainer, "train": Trainer.train, "evaluate": Trainer.evaluate, "predict": Trainer.predict}
CALLBACKS = [
    value
    for value in vars(callbacks).values()
    if inspect.isclass(value)
    and issubclass(value, callbacks.TrainerCallback)
    and len(inspect.signature(value.__init__).parameters) > 1
    and "__init__" in vars(value)
    and inspect.Parameter.VAR_KEYWORD
    not in {each.kind for each in inspect.signature(value.__init__).parameters.values()}
]
"""Those with a fixed list of settings; the others explain theirs themselves."""


def answer_to(function, name):
    with pytest.raises(TypeError) as caught:
        function(**{name: None})
    return str(caught.value)


@pytest.mark.parametrize(
    ("function", "name", "words"),
    [
        ("train", "batch_size", "Here it is called `per_device_batch_size`."),
        ("train", "max_grad_norm", "Here it is called `gradient_clip_norm`."),
        ("train", "clipvalue", "Here it is called `gradient_clip_value`."),
        ("train", "max_epochs", "Here it is called `num_epochs`."),
        ("train", "accumulate_grad_batches", "Here it is called `gradient_accumulation_steps`."),
        ("train", "validation_data", "Here it is called `eval_dataset`."),
        ("train", "train_dataloaders", "Here it is called `train_dataset`."),
        ("train", "ckpt_path", "Here it is called `resume_from`."),
        ("train", "num_workers", "pass `train_dataloader_kwargs={'num_workers': ...}` to `train`"),
        ("train", "lr", "`torch.optim.AdamW(model.parameters(), lr=...)`"),
        ("train", "callbacks", "Pass it to `Trainer`."),
        ("train", "monitor", "Pass `watch_metric` to "),
        ("train", "max_num_train_step", "Did you mean `max_num_train_steps`?"),
        ("train", "nonsense", "It takes `train_dataset`, `num_epochs`, "),
        ("Trainer", "fp16", 'Pass `mixed_precision="fp16"` to the Trainer.'),
        ("Trainer", "criterion", "Here it is called `loss_func`."),
        ("Trainer", "max_epochs", "Pass `num_epochs` to `train`."),
        ("Trainer", "epochs", "Pass `num_epochs` to `train`."),
        ("Trainer", "optimizers", "Here it is called `optimizer`."),
        ("Trainer", "devices", "`accelerate launch`"),
        ("Trainer", "enable_model_summary", "add a `ModelSummaryCallback`"),
        ("evaluate", "batch_size", "Here it is called `per_device_batch_size`."),
        ("evaluate", "test_dataset", "Here it is called `dataset`."),
        ("predict", "dataloaders", "Here it is called `dataset`."),
    ],
)
def test_an_argument_is_answered_with_what_it_is_called_here(function, name, words):
    answer = answer_to(FUNCTIONS[function], name)
    assert answer.startswith(f"`{function}` has no argument `{name}`. ")
    assert words in answer


@pytest.mark.parametrize("name", _FOREIGN_ARGUMENTS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_each_argument_of_the_table_has_an_answer_that_names_what_exists(function, name):
    if name in _arguments[function]:
        return
    answer = answer_to(FUNCTIONS[function], name)
    assert "It takes" not in answer
    for argument, home in re.findall(r"Pass `(\w+)` to `(\w+)`", answer):
        assert argument in _arguments[home]
    for argument in re.findall(r"is called `(\w+)`", answer):
        assert argument in _arguments[function]


@pytest.mark.parametrize("callback", CALLBACKS, ids=lambda callback: callback.__name__)
def test_each_callback_with_settings_explains_its_arguments(callback):
    assert answer_to(callback, "nonsense").startswith(f"`{callback.__name__}` has no argument `nonsense`. It takes `")


def test_several_arguments_are_answered_together():
    with pytest.raises(TypeError, match=r"`batch_size`.*`per_device_batch_size`.*`epochs`.*`num_epochs`"):
        make_trainer().train(make_dataset(), batch_size=4, epochs=2)


def test_a_subclass_that_passes_its_arguments_on_explains_them_too():
    model = nn.Linear(3, 1)
    with pytest.raises(TypeError, match="`Trainer` has no argument `fp16`"):
        TrainerWithTimmScheduler(model, None, None, fp16=True)


def test_the_signature_stays_and_arguments_are_passed_on():
    @explains_arguments
    def add(left, right=1, *, extra=0):
        """Add."""
        return left + right + extra

    assert (add(1), add(1, 2), add(1, right=3, extra=4), add.__doc__) == (2, 3, 8, "Add.")
    assert str(inspect.signature(add)) == "(left, right=1, *, extra=0)"
    with pytest.raises(TypeError, match="takes from 1 to 2 positional arguments"):
        add(1, 2, 3)
