"""What programs written for 0.1.61 observe of the average of the weights, and of evaluations during an epoch."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from _processes import launch
from _support import (
    EventRecorder,
    Probe,
    assert_same_weights,
    losses,
    make_dataset,
    make_trainer,
    recorder_of,
    train,
    weights_of,
)
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import (
    LimitEvalStepsCallback,
    ModelEmaCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
    StopTrainingError,
    TrainerCallback,
)
from pytorch_accelerated.utils import ModelEma

pytestmark = pytest.mark.usefixtures("_in_an_empty_folder")


def train_with_evaluation(trainer, **kwargs):
    return train(trainer, **{"num_epochs": 2, "eval_dataset": make_dataset(8), **kwargs})


# --- the average -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eval_dataset", [None, make_dataset(8)])
def test_without_evaluation_the_average_is_saved_at_the_end_of_each_epoch(eval_dataset):
    """Row 10.1."""
    saved = []

    def look(trainer, **_):
        checkpoint = torch.load("ema_model.pt")
        saved.append(checkpoint["epoch"])
        assert_same_weights(checkpoint["model_state_dict"], ema.ema_model.module.state_dict())

    ema = ModelEmaCallback(decay=0.5, evaluate_during_training=False)
    probe = Probe(on_training_run_epoch_end=look, on_training_run_end=look)
    train(make_trainer(callbacks=[ema, probe]), num_epochs=3, eval_dataset=eval_dataset)
    assert saved == [1, 2, 3, 3]


def test_a_run_that_stops_within_an_epoch_saves_its_last_average():
    """Row 10.1: what was trained since the last epoch is not lost."""

    def stop(trainer, step, **_):
        if trainer.progress.num_updates == 6:
            raise StopTrainingError("enough")

    ema = ModelEmaCallback(decay=0.5, evaluate_during_training=False)
    train(make_trainer(callbacks=[ema, Probe(on_train_step_end=stop)]), num_epochs=3)
    assert_same_weights(torch.load("ema_model.pt")["model_state_dict"], ema.ema_model.module.state_dict())


def test_a_worse_second_run_leaves_the_file_of_the_first():
    """Row 10.2."""
    ema = ModelEmaCallback(decay=0.5)
    trainer = train_with_evaluation(make_trainer(callbacks=[ema]))
    before, best = Path("ema_model.pt").read_bytes(), ema.best_metric
    with torch.no_grad():
        trainer.model.weight.fill_(1000.0)
    train_with_evaluation(trainer)
    train_with_evaluation(trainer, eval_dataset=None)
    assert Path("ema_model.pt").read_bytes() == before
    assert ema.best_metric == best


def test_the_best_value_is_forgotten_if_that_is_asked_for():
    """Row 10.2."""
    ema = ModelEmaCallback(decay=0.5)
    ema.reset_on_train = True
    trainer = train_with_evaluation(make_trainer(callbacks=[ema]))
    best = ema.best_metric
    with torch.no_grad():
        trainer.model.weight.fill_(1000.0)
    train_with_evaluation(trainer)
    assert ema.best_metric > best
    assert torch.load("ema_model.pt")["ema_model_eval_loss_epoch"] == ema.best_metric


def test_the_callback_is_one_that_saves_the_best_model():
    """Row 10.3."""
    ema = ModelEmaCallback()
    assert isinstance(ema, SaveBestModelCallback)
    assert ema.model_ema_cls is ModelEma
    assert ema._track_prefix == "ema_model_"
    assert (ema.reset_on_train, ema.save_optimizer, ema.save_scheduler) == (False, False, True)


def test_the_attributes_of_the_callback_can_be_set_before_a_run():
    """Row 10.3."""
    ema = ModelEmaCallback(decay=0.5, watch_metric="mean_eval_loss_epoch")
    ema._track_prefix = "mean_"
    ema.save_optimizer = True
    ema.model_ema_cls = CopyingEma
    trainer = train_with_evaluation(make_trainer(callbacks=[ema]))
    assert len(losses(trainer, "mean_eval_loss_epoch")) == 2
    assert torch.load("ema_model.pt").keys() > {"model_state_dict", "optimizer_state_dict", "mean_eval_loss_epoch"}
    assert_same_weights(ema.ema_model.module.state_dict(), trainer.model.state_dict())


class CopyingEma(ModelEma):
    """Takes the decay by keyword only."""

    def __init__(self, model, *, decay):
        super().__init__(model, decay)

    def update_fn(self, ema_model_weights, updated_model_weights):
        return updated_model_weights


def test_the_average_is_created_with_the_decay_by_keyword():
    """Row 10.4."""
    ema = ModelEmaCallback(decay=0.25, model_ema=CopyingEma)
    train_with_evaluation(make_trainer(callbacks=[ema]))
    assert ema.ema_model.decay == 0.25


def test_the_average_is_updated_after_each_update():
    """Row 10.5, which stays ours."""
    ema = ModelEmaCallback(decay=0.5)
    trainer = make_trainer(callbacks=[ema])
    average = weights_of(trainer.model)["weight"]
    recorder, weights = recorder_of(lambda trainer: trainer.model.weight.detach().clone(), "on_optimizer_step_end")
    trainer.callback_handler.add_callback(recorder)
    train(trainer)
    for weight in weights:
        average = 0.5 * average + 0.5 * weight
    assert len(weights) == 4
    torch.testing.assert_close(ema.ema_model.module.weight.data, average)


# --- callbacks nested in it --------------------------------------------------------------------------------------


def test_nested_callbacks_receive_the_events_of_runs_and_those_of_the_evaluations_of_the_average():
    """Row 10.3: as in 0.1.61 nothing of the training, so that no metric is recorded twice."""
    log = []
    ema = ModelEmaCallback(callbacks=[EventRecorder(log, name="first "), EventRecorder(log, name="second ")])
    trainer = make_trainer(callbacks=[EventRecorder(log, name="before "), ema, EventRecorder(log, name="after ")])
    train(trainer, dataset=4, eval_dataset=make_dataset(4))
    trainer.evaluate(make_dataset(4))
    by_event = {}
    for entry in log:
        name, event = entry.split()
        by_event.setdefault(event, []).append(name)
    everyone = ["before", "first", "second", "after"]
    for event, names in by_event.items():
        if event.startswith("on_eval_"):
            # The pass of the average takes place within `on_eval_epoch_end` of its owner, in `evaluate` too.
            assert sorted(names) == sorted([*everyone, *everyone]), event
        elif "run_start" in event or "run_end" in event or event == "on_init_end":
            assert names == everyone, event
        else:
            assert set(names) == {"before", "after"}, event
    assert set(by_event) > {"on_init_end", "on_training_run_start", "on_optimizer_step_end", "on_evaluation_run_end"}
    ends = [entry for entry in log if entry.endswith("on_eval_epoch_end")]
    assert ends[:4] == [f"{name} on_eval_epoch_end" for name in ("before", "first", "second", "after")]


@pytest.mark.parametrize("added", [EventRecorder, EventRecorder()])
def test_callbacks_can_be_added_to_the_average_later(added):
    """Row 10.3."""
    ema = ModelEmaCallback()
    trainer = make_trainer(callbacks=[ema])
    ema.callback_handler.add_callback(added)
    train_with_evaluation(trainer)
    (recorder,) = ema.callback_handler.callbacks
    assert recorder.log.count("on_eval_epoch_end") == 2
    assert "on_training_run_start" in recorder.log


def test_a_nested_callback_can_stop_the_run_and_hears_of_errors():
    """Row 10.3."""

    def stop(trainer, **_):
        raise StopTrainingError("enough")

    recorder = EventRecorder(reactions={"on_eval_epoch_end": stop})
    trainer = make_trainer(callbacks=[ModelEmaCallback(callbacks=[recorder])])
    train_with_evaluation(trainer)
    assert "enough" in trainer.stop_reason
    assert recorder.log[-2:] == ["on_stop_training_error", "on_training_run_end"]

    recorder.reactions = {}

    def fail(trainer, **_):
        raise RuntimeError("broken")

    trainer.callback_handler.add_callback(Probe(on_train_step_start=fail))
    with pytest.raises(RuntimeError, match="broken"):
        train_with_evaluation(trainer)
    assert recorder.log[-1] == "on_exception"


class MeanWeight(TrainerCallback):
    """Has memory of two kinds: a number with a state, and a module that is in no state of its own."""

    def __init__(self):
        self.total = 0.0

    def on_optimizer_step_end(self, trainer, **kwargs):
        self.total += trainer.get_model()[0].weight.mean().item()

    def on_eval_step_end(self, trainer, batch_output, **kwargs):
        self.total += batch_output["loss"].item()

    def state_dict(self):
        return {"total": self.total}

    def load_state_dict(self, state_dict):
        self.total = state_dict["total"]


class WithMetric(TrainerCallback):
    """Its running mean is a module, and the callback itself has no state."""

    def __init__(self):
        self.norm = nn.BatchNorm1d(1)

    def on_backward_start(self, trainer, batch_output, **kwargs):
        self.norm(batch_output["model_outputs"].detach())


def make_noisy_trainer(folder, *more, first=()):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    torch.manual_seed(2)
    nested = MeanWeight(), WithMetric()
    ema = ModelEmaCallback(decay=0.9, save_path=folder / "ema.pt", callbacks=nested)
    evaluation = StepBasedEvaluationCallback(3)
    trainer = make_trainer(model, callbacks=[*first, ema, evaluation, *more])
    return trainer, ema, nested


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("is_saved_first", [True, False])
def test_a_resumed_run_is_bit_identical_in_the_average_its_callbacks_and_the_moments_of_evaluation(
    tmp_path, accumulation, is_saved_first
):
    """Rows 10.3 and 10.6: from every step, in an open accumulation window too, with the saver before or after."""
    settings = {"num_epochs": 3, "eval_dataset": make_dataset(8), "dataset": 20}
    settings |= {"gradient_accumulation_steps": accumulation}
    num_saved = 0

    def save(trainer, **_):
        nonlocal num_saved
        num_saved += 1
        trainer.save_training_state(tmp_path / f"at_{num_saved}")

    probe = Probe(on_train_step_end=save)
    more = {"first": [probe]} if is_saved_first else {}
    trainer, ema, nested = make_noisy_trainer(tmp_path, *([] if is_saved_first else [probe]), **more)
    train(trainer, **settings)
    assert num_saved == 15
    for number in (4, 5, 9, 14):
        resumed, other, others = make_noisy_trainer(tmp_path)
        train(resumed, **settings, resume_from=tmp_path / f"at_{number}")
        assert_same_weights(resumed.model.state_dict(), trainer.model.state_dict())
        assert_same_weights(other.ema_model.state_dict(), ema.ema_model.state_dict())
        assert others[0].total == nested[0].total
        assert_same_weights(others[1].norm.state_dict(), nested[1].norm.state_dict())
        assert (other.best_metric, other.best_metric_epoch) == (ema.best_metric, ema.best_metric_epoch)
        names = resumed.run_history.get_metric_names()
        # A state that is saved before the evaluation of its step lacks it.
        due = {"intermediate_update", "intermediate_eval_loss_epoch"} if is_saved_first and number % 3 == 0 else set()
        assert names == trainer.run_history.get_metric_names()
        for name in names - due:
            assert losses(resumed, name) == losses(trainer, name), (name, number)


def test_latest_finds_the_states_of_a_nested_callback(tmp_path):
    """Row 10.3."""

    def make():
        return make_trainer(callbacks=[ModelEmaCallback(callbacks=[SaveTrainingStateCallback(tmp_path / "states")])])

    train_with_evaluation(make())
    resumed = train_with_evaluation(make(), num_epochs=3, resume_from="latest")
    assert losses(resumed) == losses(train_with_evaluation(make_trainer(), num_epochs=3))


# --- evaluation during an epoch ----------------------------------------------------------------------------------


def evaluated_after(trainer, **kwargs):
    """Train, and return the number of batches of the run before each intermediate evaluation."""
    num_batches, found = 0, []

    def count(trainer, **_):
        nonlocal num_batches
        num_batches += 1

    def note(trainer, is_intermediate, **_):
        if is_intermediate:
            found.append(num_batches)

    trainer.callback_handler.add_callback(Probe(on_train_step_start=count, on_eval_epoch_start=note))
    train(trainer, **{"eval_dataset": make_dataset(8), **kwargs})
    return found


@pytest.mark.parametrize(
    ("numbers", "num_epochs", "expected"),
    [
        ({"eval_every_n_steps": 3}, 1, [3, 6, 9, 12]),
        ({"eval_every_n_steps": 5}, 2, [5, 10, 15, 20]),
        ({"eval_every_n_steps": 12}, 2, [12, 24]),
        ({"eval_every_n_updates": 3}, 1, [6, 12]),
        ({"eval_every_n_updates": 5}, 2, [10, 20]),
    ],
)
def test_batches_of_the_run_or_its_updates_are_counted(numbers, num_epochs, expected):
    """Row 10.6: twelve batches per epoch, two of them per update."""
    trainer = make_trainer(callbacks=[StepBasedEvaluationCallback(**numbers)])
    found = evaluated_after(trainer, dataset=48, num_epochs=num_epochs, gradient_accumulation_steps=2)
    assert found == expected
    assert losses(trainer, "intermediate_update") == [number // 2 for number in expected]


def test_each_run_counts_its_batches_anew():
    """Row 10.6: also if the history goes on."""
    trainer = make_trainer(callbacks=[StepBasedEvaluationCallback(3)])
    assert evaluated_after(trainer, dataset=16) == [3]
    assert evaluated_after(trainer, dataset=16, reset_run_history=False) == [3]


def test_evaluation_within_an_accumulation_window_changes_nothing():
    """Row 10.6."""

    def make(*callbacks):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 1))
        trainer = make_trainer(model, callbacks=callbacks)
        return train_with_evaluation(trainer, dataset=40, gradient_accumulation_steps=4)

    plain, evaluated = make(), make(StepBasedEvaluationCallback(3))
    assert_same_weights(plain.model.state_dict(), evaluated.model.state_dict())
    assert losses(plain) == losses(evaluated)


def test_an_epoch_loop_of_the_users_counts_its_batches():
    """Row 10.6: the event is what counts, not who fires it."""

    class OwnLoop(Trainer):
        def _run_train_epoch(self, train_dl):
            self.train_epoch_start()
            for step, batch in enumerate(train_dl):
                output = self.calculate_train_batch_loss(batch)
                self.callback_handler.call_event("on_train_step_end", self, batch=batch, batch_output=output, step=step)
            return True

    steps = []
    probe = Probe(on_eval_epoch_start=lambda trainer, **_: steps.append(trainer.is_intermediate_evaluation))
    train(make_trainer(cls=OwnLoop, callbacks=[StepBasedEvaluationCallback(2), probe]), eval_dataset=make_dataset(8))
    assert steps.count(True) == 2


def test_a_subclass_may_pass_on_the_step_only():
    """Row 7.3 for this callback."""

    class Own(StepBasedEvaluationCallback):
        def on_train_step_end(self, trainer, step, **kwargs):
            super().on_train_step_end(trainer, step=step)

    trainer = make_trainer(callbacks=[Own(2)])
    train(trainer, eval_dataset=make_dataset(8))
    assert losses(trainer, "intermediate_update") == [2, 4]


class Record(TrainerCallback):
    """Records the number of the pass as ``acc``."""

    num_passes = 0

    def on_eval_epoch_end(self, trainer, **kwargs):
        self.num_passes += 1
        trainer.run_history.update_metric("acc", self.num_passes)


def test_within_a_pass_a_name_means_the_metric_of_that_pass():
    """Row 10.7: with intermediate evaluations, an average, and several datasets."""
    recorder, seen = recorder_of(lambda trainer: trainer.run_history.get_latest_metric("acc"), "on_eval_epoch_end")
    nested, seen_of_average = recorder_of(
        lambda trainer: trainer.run_history.get_latest_metric("acc"), "on_eval_epoch_end"
    )
    average_record = Record()
    average_record.num_passes = 100
    ema = ModelEmaCallback(callbacks=[average_record, nested], watch_metric="b_ema_model_acc", greater_is_better=True)
    trainer = make_trainer(callbacks=[StepBasedEvaluationCallback(2), Record(), recorder, ema])
    train(trainer, num_epochs=2, eval_dataset={"a": make_dataset(8), "b": make_dataset(4)})
    assert seen == list(range(1, 13))  # two intermediate evaluations and one at the end per epoch, of two datasets
    assert seen_of_average == [101, 102, 103, 104]
    assert losses(trainer, "a_acc") == [5, 11]
    assert losses(trainer, "b_intermediate_acc") == [2, 4, 8, 10]
    assert losses(trainer, "b_ema_model_acc") == [102, 104]
    with pytest.raises(ValueError, match="'acc'"):
        trainer.run_history.get_latest_metric("acc")


def test_after_the_pass_the_plain_name_means_the_plain_metric():
    """Row 10.7."""
    trainer = make_trainer(callbacks=[StepBasedEvaluationCallback(1), Record()])
    found = []
    probe = Probe(on_train_step_end=lambda trainer, **_: found.append("acc" in trainer.run_history.get_metric_names()))
    trainer.callback_handler.add_callback(probe)
    train(trainer, num_epochs=2, eval_dataset=make_dataset(8))
    assert found == [False] * 4 + [True] * 4
    assert trainer.run_history.get_latest_metric("acc") == 10
    assert trainer.run_history.get_latest_metric("intermediate_acc") == 9


def test_the_values_of_intermediate_evaluations_are_kept():
    """Row 10.8, which stays ours."""
    trainer = make_trainer(callbacks=[StepBasedEvaluationCallback(2)])
    train(trainer, eval_dataset=make_dataset(8))
    assert len(losses(trainer, "intermediate_eval_loss_epoch")) == len(losses(trainer, "intermediate_update")) == 2


@pytest.mark.parametrize("name", ["", "far_"])
def test_the_best_of_all_intermediate_evaluations_is_saved_and_loaded(name):
    """The learning rate is too large, so the first of them is the best, within the first epoch."""
    metric = f"{name}intermediate_eval_loss_epoch"
    seen = []

    def note(trainer, is_intermediate, **_):
        if is_intermediate and trainer.run_history.metric_name_prefix == f"{name}intermediate_":
            seen.append((trainer.run_history.get_latest_metric("eval_loss_epoch"), weights_of(trainer.model)))

    best = SaveBestModelCallback("best.pt", metric)
    trainer = make_trainer(lr=2.0, callbacks=[StepBasedEvaluationCallback(3), best, Probe(on_eval_epoch_end=note)])
    data = {"near": make_dataset(4), "far": make_dataset(8)} if name else make_dataset(8)
    train(trainer, num_epochs=2, eval_dataset=data)
    value, weights = min(seen, key=lambda pair: pair[0])
    assert [loss for loss, _ in seen] == losses(trainer, metric)
    assert value < seen[-1][0]
    assert best.best_metric == value
    assert_same_weights(torch.load("best.pt")["model_state_dict"], weights)
    assert_same_weights(trainer.model.state_dict(), weights)


def test_a_run_without_evaluation_data_is_refused_even_if_no_evaluation_would_come():
    """Row 10.9, which stays ours."""
    with pytest.raises(ValueError, match="has nothing to evaluate on"):
        train(make_trainer(callbacks=[StepBasedEvaluationCallback(1000)]))


# --- limited evaluations -----------------------------------------------------------------------------------------

ON_TWO_PROCESSES = """
from _support import Probe, make_dataset, make_trainer, train
from pytorch_accelerated.callbacks import LimitEvalStepsCallback, StepBasedEvaluationCallback

for limit, expected in ((1, 1), (2, 1), (3, 1), (4, 2), (100, 3)):
    counts = []
    probe = Probe(
        on_eval_epoch_start=lambda trainer, **_: counts.append(0),
        on_eval_step_end=lambda trainer, **_: counts.append(counts.pop() + 1),
    )
    trainer = make_trainer(callbacks=[StepBasedEvaluationCallback(1), LimitEvalStepsCallback(limit, False), probe])
    train(trainer, dataset=24, eval_dataset=make_dataset(24), gradient_accumulation_steps=2)
    assert trainer.run_config.num_processes == 2
    assert counts == [expected] * 4, (limit, counts)
    assert trainer.run_history.get_metric_values("intermediate_update") == [0, 1, 2]
"""


@pytest.mark.distributed
def test_the_limit_of_evaluation_steps_counts_those_of_all_processes(tmp_path):
    """Row 10.10: also evaluations within an accumulation window, on two processes."""
    script = tmp_path / "limited.py"
    script.write_text(ON_TWO_PROCESSES)
    for rank, ended in enumerate(launch(script, tmp_path, num_processes=2)):
        assert ended.returncode == 0, (tmp_path / f"output-{rank}.txt").read_text()


@pytest.mark.parametrize(("limit", "expected"), [(1, 1), (2, 2), (9, 3)])
def test_on_one_process_the_limit_is_the_number_given(limit, expected):
    """Row 10.10."""
    recorder = EventRecorder()
    trainer = make_trainer(callbacks=[LimitEvalStepsCallback(limit, limit_intermediate_only=False), recorder])
    train(trainer, eval_dataset=make_dataset(12))
    assert recorder.log.count("on_eval_step_end") == expected


def test_the_events_of_the_trainer_itself_are_unchanged_by_an_average():
    """Row 10.3."""
    logs = []
    for average in ([], [ModelEmaCallback(callbacks=[EventRecorder()])]):
        recorder = EventRecorder()
        train_with_evaluation(make_trainer(callbacks=[copy.copy(recorder), *average, recorder]))
        logs.append(recorder.log)
    assert logs[0] == logs[1]
