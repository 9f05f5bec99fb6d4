"""Hooks of other libraries and near misses: each is answered with what has its meaning here."""

from __future__ import annotations

import importlib
import re
import sys
import warnings

import pytest

from _support import make_trainer, train
from pytorch_accelerated import Trainer
from pytorch_accelerated._hints.hooks import _FOREIGN_EVENTS, _FOREIGN_HOOKS, HOOKS, event_meant, hook_meant
from pytorch_accelerated.callbacks import EVENTS, CallbackHandler, TrainerCallback
from pytorch_accelerated.exceptions import StopTrainingError

PER_UPDATE_OR_BATCH = ("on_optimizer_step_{0}", "on_train_step_{0}")
NO_EVENTS = ("predict", "calculate_predictions")
MEANT = {
    # Lightning
    "on_fit_start": ["on_training_run_start"],
    "on_train_start": ["on_training_run_start"],
    "on_train_end": ["on_training_run_end"],
    "on_train_batch_start": ["on_train_step_start"],
    "on_train_batch_end": ["on_train_step_end"],
    "on_validation_start": ["on_eval_epoch_start"],
    "on_validation_epoch_end": ["on_eval_epoch_end"],
    "on_validation_batch_end": ["on_eval_step_end"],
    "on_test_epoch_start": ["on_eval_epoch_start"],
    "on_before_backward": ["on_backward_start"],
    "on_after_backward": ["on_optimizer_step_start"],
    "on_before_optimizer_step": ["on_optimizer_step_start"],
    "on_before_zero_grad": ["on_optimizer_step_end"],
    "on_save_checkpoint": ["on_training_state_save", "state_dict"],
    "on_load_checkpoint": ["load_state_dict"],
    "on_predict_batch_end": NO_EVENTS,
    # Keras
    "on_train_begin": ["on_training_run_start"],
    "on_epoch_begin": ["on_train_epoch_start"],
    "on_epoch_end": ["on_training_run_epoch_end"],
    "on_batch_begin": ["on_train_step_start"],
    "on_test_batch_end": ["on_eval_step_end"],
    "on_test_begin": ["on_eval_epoch_start"],
    # Hugging Face
    "on_step_begin": [name.format("start") for name in PER_UPDATE_OR_BATCH],
    "on_step_end": [name.format("end") for name in PER_UPDATE_OR_BATCH],
    "on_substep_end": ["on_train_step_end"],
    "on_pre_optimizer_step": ["on_optimizer_step_start"],
    "on_optimizer_step": ["on_optimizer_step_end"],
    "on_evaluate": ["on_eval_epoch_end"],
    "on_save": ["on_training_state_save"],
    "on_log": ["on_log_point"],
    "on_prediction_step": ["on_eval_step_end"],
    # fastai
    "before_fit": ["on_training_run_start"],
    "before_epoch": ["on_train_epoch_start"],
    "before_train": ["on_train_epoch_start"],
    "before_batch": ["on_train_step_start"],
    "after_loss": ["on_backward_start"],
    "before_step": ["on_optimizer_step_start"],
    "after_batch": ["on_train_step_end"],
    "before_validate": ["on_eval_epoch_start"],
    "after_epoch": ["on_training_run_epoch_end"],
    "after_fit": ["on_training_run_end"],
    # near misses
    "on_train_epoch_begin": ["on_train_epoch_start"],
    "on_train_epochs_end": ["on_train_epoch_end"],
    "on_training_epoch_begin": ["on_train_epoch_start"],
    "on_train_begin_epoch": ["on_train_epoch_start"],
    "on_val_epoch_end": ["on_eval_epoch_end"],
    "on_valid_step_start": ["on_eval_step_start"],
    "on_run_end": ["on_training_run_end"],
    "train_epoch_end": ["on_train_epoch_end"],
}


@pytest.mark.parametrize("name", MEANT)
def test_a_method_of_a_callback_is_answered_with_the_event_of_its_meaning(name):
    assert re.findall(r"`(\w+)`", event_meant(name, EVENTS)) == list(MEANT[name])


@pytest.mark.parametrize("name", EVENTS)
@pytest.mark.parametrize(("moment", "synonyms"), [("start", ("begin", "starts")), ("end", ("finish", "ends"))])
def test_an_event_with_another_word_for_its_moment_keeps_its_moment(name, moment, synonyms):
    for synonym in synonyms:
        other = re.sub(rf"_{moment}$", f"_{synonym}", name)
        if other != name:
            assert event_meant(other, EVENTS) == f"Rename it to `{name}`."


@pytest.mark.parametrize("answer", sorted(map(str, {*_FOREIGN_EVENTS.values(), *_FOREIGN_HOOKS.values()})))
def test_what_an_answer_names_exists(answer):
    known = {*EVENTS, *dir(Trainer), *dir(TrainerCallback), "state_dict", "load_state_dict"}
    known |= {"loss", "batch_size", "metrics", "Trainer", "StopTrainingError", "create_scheduler_fn", "callbacks"}
    known |= {"gradient_clip_norm", "gradient_clip_value", "train_dataset", "eval_dataset"}
    names = re.findall(r"`(\w+)" if answer.endswith(".") else r"\w+", answer)
    assert set(names) - known == set()


def test_the_hooks_are_methods_of_the_trainer():
    assert [name for name in HOOKS if not callable(getattr(Trainer, name, None))] == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("training_step", ["`calculate_train_batch_loss(self, batch)`", "`loss`", "`batch_size`"]),
        ("validation_step", ["`calculate_eval_batch_loss(self, batch)`"]),
        ("compute_loss", ["`calculate_train_batch_loss(self, batch)` and `calculate_eval_batch_loss(self, batch)`"]),
        ("predict_step", ["`calculate_predictions`"]),
        ("configure_optimizers", ["`create_scheduler_fn`", "`create_scheduler`"]),
        ("get_eval_dataloader", ["`create_eval_dataloader(self, batch_size, eval_dl_kwargs)`"]),
        ("training_epoch_end", ["`train_epoch_end`"]),
        ("on_validation_epoch_end", ["`eval_epoch_end`"]),
        ("on_train_end", ["`training_run_end`"]),
        ("on_backward_start", ["Only callbacks get events", "`on_backward_start`"]),
        ("train_epoch_begin", ["`train_epoch_start`"]),
        ("create_val_dataloader", ["`create_eval_dataloader`"]),
        ("calc_train_batch_loss", ["`calculate_train_batch_loss`"]),
    ],
)
def test_a_method_of_a_trainer_is_answered_with_the_hook_of_its_meaning(name, words):
    with pytest.warns(UserWarning, match=f"`Own.{name}` is not a hook of the Trainer, so nothing calls it") as caught:
        make_trainer(cls=type("Own", (Trainer,), {name: lambda self, *args: None}))
    assert [word for word in words if word not in str(caught[0].message)] == []
    assert caught[0].filename == make_trainer.__code__.co_filename


# --- what is not told --------------------------------------------------------------------------------------------

NAMES_OF_PROGRAMS = ["setup", "teardown", "on_checkpoint", "on_batch_downloaded", "on_message", "log", "fit", "save"]


@pytest.mark.parametrize("name", [*NAMES_OF_PROGRAMS, "step", "reset", "train_epoch_ends", "before_lunch", "__call__"])
def test_names_of_the_programs_choice_are_not_events(name):
    assert event_meant(name, EVENTS) is None


@pytest.mark.parametrize("name", [*NAMES_OF_PROGRAMS, "forward", "predict_batch", "evaluate_all", "epoch_end"])
def test_names_of_the_programs_choice_are_not_hooks(name):
    assert hook_meant(name, EVENTS) is None


def compute_metrics_outside(trainer):
    return trainer.compute_metrics()


class Helping(Trainer):
    """Calls methods of these names itself."""

    def train_step(self, batch):
        return super().calculate_train_batch_loss(batch)

    def calculate_train_batch_loss(self, batch):
        return self.train_step(batch)

    def compute_metrics(self):
        return {}

    @property
    def train_dataloader(self):
        return None

    def train_epoch_end(self):
        self.callback_handler.call_event("on_epoch_end", self)


class Listening(TrainerCallback):
    """Gets an event of the program's own, and calls its helper."""

    def on_epoch_end(self, trainer):
        pass

    def on_train_epoch_end(self, trainer, **kwargs):
        getattr(self, "on_log")(trainer)  # noqa: B009 - by its name as a text

    def on_log(self, trainer):
        pass


def test_methods_that_the_program_calls_itself_are_not_told_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(make_trainer(cls=Helping, callbacks=[Listening]))


SCRIPT = """
from pytorch_accelerated import Trainer
class Own(Trainer):
    def {name}(self, *args):
        return super().{name}(*args)
if __name__ == "script":
    {call}
"""


@pytest.mark.parametrize(
    ("call", "is_called"), [("Own.compute_metrics", True), ("print(Own)", False), ("'compute_metrics'", False)]
)
def test_a_script_that_calls_a_method_at_its_top_level_is_not_told_of_it(tmp_path, monkeypatch, call, is_called):
    (tmp_path / "script.py").write_text(SCRIPT.format(name="compute_metrics", call=call))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "script", raising=False)
    script = importlib.import_module("script")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(cls=script.Own)
    assert len(caught) == (0 if is_called else 1)
    del sys.modules["script"]


def test_a_trainer_that_is_a_callback_too_is_not_told_of_its_events():
    class Both(Trainer, TrainerCallback):
        def on_train_epoch_end(self, trainer, **kwargs):
            raise StopTrainingError("done")

    trainer = make_trainer(cls=Both)
    trainer.callback_handler.add_callback(trainer)
    train(trainer, num_epochs=3)
    assert trainer.stop_reason == "done"


def test_a_callback_that_serves_two_libraries_is_not_told_of_the_hooks_of_the_other():
    other = type("Callback", (), {"__module__": "lightning.pytorch.callbacks", "on_fit_start": lambda *args: None})
    both = type("Both", (other, TrainerCallback), {"on_fit_end": lambda self, trainer, module: None})
    CallbackHandler([both])
