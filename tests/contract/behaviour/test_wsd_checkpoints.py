"""What programs written for 0.1.61 observe of `WSDCheckpointCallback`: files, entries, moments, and continuations."""

from __future__ import annotations

import warnings
from datetime import datetime
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import TensorDataset

from _support import Probe, recorder_of
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import (
    EarlyStoppingCallback,
    ModelEmaCallback,
    SaveTrainingStateCallback,
    TrainerCallback,
    WSDCheckpointCallback,
)
from pytorch_accelerated.exceptions import CheckpointError
from pytorch_accelerated.schedulers import StatefulSchedulerBase, WSDLrScheduler

NUM_BATCHES = 5
PRE_DECAY, POST_DECAY = "checkpoint_16_wsd_pre_decay", "checkpoint_20_wsd_post_decay.pt"


def make_trainer(*callbacks, seed=0, cls=Trainer):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.2), torch.nn.Linear(4, 1))
    parameters = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.2}]
    optimizer = torch.optim.SGD(parameters, momentum=0.9)
    return cls(model, torch.nn.functional.mse_loss, optimizer, callbacks=callbacks)


def train(trainer, num_epochs=4, create=None, num_accumulated=1, **settings):
    generator = torch.Generator().manual_seed(1)
    inputs = 0.1 * torch.randn(NUM_BATCHES * 2 * num_accumulated, 3, generator=generator)
    kwargs = {name: settings.pop(name) for name in ("resume_from", "max_num_train_steps") if name in settings}
    trainer.train(
        TensorDataset(inputs, inputs.sum(1, keepdim=True)),
        num_epochs=num_epochs,
        per_device_batch_size=2,
        gradient_accumulation_steps=num_accumulated,
        create_scheduler_fn=create or WSDLrScheduler.create_scheduler_fn(**{"decay_phase_ratio": 0.2, **settings}),
        **kwargs,
    )
    return trainer


def rates_recorder():
    return recorder_of(lambda trainer: trainer.optimizer.param_groups[0]["lr"], "on_optimizer_step_start")


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """The folder of a run of 20 updates with a decay over the last four, and its weights."""
    folder = tmp_path_factory.mktemp("first")
    trainer = train(make_trainer(WSDCheckpointCallback(folder)))
    return folder, {name: value.clone() for name, value in trainer.model.state_dict().items()}


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_accumulated", [1, 2])
def test_a_decay_leaves_a_training_state_before_and_a_checkpoint_after_it(tmp_path, num_accumulated):
    """Row 10.11."""
    train(make_trainer(WSDCheckpointCallback(tmp_path)), num_accumulated=num_accumulated)
    assert names_in(tmp_path) == [PRE_DECAY, POST_DECAY]
    assert (tmp_path / PRE_DECAY).is_dir()
    assert (tmp_path / POST_DECAY).is_file()


def test_each_of_several_decays_leaves_both(tmp_path):
    """Row 10.11: the names that 0.1.61 leaves."""
    train(make_trainer(WSDCheckpointCallback(tmp_path)), num_checkpoints=3)
    expected = ["4_wsd_pre", "5_wsd_post", "9_wsd_pre", "10_wsd_post", "18_wsd_pre", "20_wsd_post"]
    assert names_in(tmp_path) == sorted(f"checkpoint_{name}_decay{'.pt' * ('post' in name)}" for name in expected)


def test_without_a_decay_there_is_no_state_before_it(tmp_path):
    """Rows 1.14, 10.11."""
    train(make_trainer(WSDCheckpointCallback(tmp_path)), decay_phase_ratio=0)
    assert names_in(tmp_path) == [POST_DECAY]


@pytest.mark.parametrize("has_optimizer", [True, False])
@pytest.mark.parametrize("has_scheduler", [True, False])
def test_what_is_saved_concerns_the_file_only(tmp_path, has_optimizer, has_scheduler):
    """Row 10.11: the state has everything."""
    train(make_trainer(WSDCheckpointCallback(tmp_path, has_optimizer, has_scheduler)))
    checkpoint = torch.load(tmp_path / POST_DECAY, weights_only=True)
    assert ("optimizer_state_dict" in checkpoint) is has_optimizer
    assert ("scheduler_state_dict" in checkpoint) is has_scheduler
    recorder, rates = rates_recorder()
    callback = WSDCheckpointCallback(
        tmp_path / "next", has_optimizer, has_scheduler, initial_checkpoint=tmp_path / PRE_DECAY
    )
    trainer = make_trainer(
        callback,
        recorder,
        Probe(on_training_run_start=lambda trainer, **kwargs: momenta.append(trainer.optimizer.state_dict()["state"])),
    )
    momenta = []
    train(trainer, is_continuation_from_checkpoint=True)
    assert momenta[0][0]["momentum_buffer"].abs().sum() > 0
    assert rates[:17] == [0.1] * 17


def test_both_have_the_entries_of_0_1_61(first_run):
    """Row 10.12."""
    folder, _ = first_run
    checkpoint = torch.load(folder / POST_DECAY, weights_only=True)
    state = make_trainer().load_training_state(folder / PRE_DECAY)
    for entries, step, kind in [(checkpoint, 20, "wsd_post_decay"), (state, 16, "wsd_pre_decay")]:
        datetime.fromisoformat(entries["timestamp"])
        names = ("step", "checkpoint_type", "total_steps", "decay_fraction")
        assert [entries[name] for name in names] == [step, kind, 20, 0.2]


# --- continuations ---------------------------------------------------------------------------------------------------


class Loading(Trainer):
    """A subclass as written for 0.1.61: its method takes the path only."""

    def load_training_state(self, path):
        self.loaded = path
        return super().load_training_state(path)


def test_a_run_continues_from_a_folder_and_counts_from_zero(first_run, tmp_path):
    """Row 10.13: position, history and seed of the old run are not taken over; the next 16 updates are at the base."""
    folder, _ = first_run
    recorder, rates = rates_recorder()
    positions = []
    callback = WSDCheckpointCallback(tmp_path, initial_checkpoint=folder / PRE_DECAY)
    watcher = Probe(
        on_training_run_start=lambda trainer, **kwargs: positions.append(
            (
                trainer.progress.num_updates,
                trainer.progress.num_epochs_completed,
                trainer.run_history.current_epoch,
                len(trainer.run_history.get_metric_names()),
                callback.last_checkpoint_step,
                {name: value.clone() for name, value in trainer.get_model().state_dict().items()},
            )
        )
    )
    trainer = make_trainer(callback, watcher, recorder, seed=8, cls=Loading)
    train(trainer, is_continuation_from_checkpoint=True)
    *numbers, weights = positions[0]
    assert numbers == [0, 0, 1, 0, 16]
    saved = torch.load(folder / PRE_DECAY / "model.pt", weights_only=True)
    for name, value in saved.items():
        assert torch.equal(weights[name], value)
    assert trainer.loaded == str(folder / PRE_DECAY)
    assert trainer.progress.num_updates == len(rates) == 20
    assert rates[:17] == [0.1] * 17
    assert rates[17:] == pytest.approx([0.1 * (1e-6 + (1 - 1e-6) * (1 - (t / 4) ** 0.5)) for t in (1, 2, 3)])
    assert len(trainer.run_history.get_metric_values("train_loss_epoch")) == trainer.run_history.current_epoch - 1 == 4


def test_a_continuation_in_another_folder_has_the_files_that_0_1_61_leaves(first_run, tmp_path):
    """Rows 10.13, 10.17: after the step of the initial checkpoint nothing is saved again."""
    folder, _ = first_run
    for name, num_epochs, expected in [
        ("same length", 4, [POST_DECAY]),
        ("longer", 8, ["checkpoint_32_wsd_pre_decay", "checkpoint_40_wsd_post_decay.pt"]),
    ]:
        callback = WSDCheckpointCallback(tmp_path / name, initial_checkpoint=folder / PRE_DECAY)
        train(make_trainer(callback), num_epochs, is_continuation_from_checkpoint=True)
        assert names_in(tmp_path / name) == expected


def test_a_continuation_in_the_same_folder_keeps_the_state_that_it_started_from(tmp_path):
    """Row 10.13."""
    train(make_trainer(WSDCheckpointCallback(tmp_path)))
    before = (tmp_path / PRE_DECAY / "manifest.json").read_bytes()
    callback = WSDCheckpointCallback(tmp_path, initial_checkpoint=tmp_path / PRE_DECAY)
    train(make_trainer(callback, seed=4), is_continuation_from_checkpoint=True)
    assert (tmp_path / PRE_DECAY / "manifest.json").read_bytes() == before
    assert names_in(tmp_path) == [PRE_DECAY, POST_DECAY]


def test_a_run_continues_from_a_file(first_run, tmp_path):
    """Row 10.13: the rate of the end of the old decay does not come back."""
    folder, _ = first_run
    recorder, rates = rates_recorder()
    callback = WSDCheckpointCallback(tmp_path, initial_checkpoint=folder / POST_DECAY)
    train(make_trainer(callback, recorder), is_continuation_from_checkpoint=True)
    assert rates[:17] == [0.1] * 17
    assert names_in(tmp_path) == [PRE_DECAY, POST_DECAY]


def test_a_run_that_is_no_continuation_counts_from_zero_too(first_run, tmp_path):
    """Row 10.13."""
    folder, _ = first_run
    recorder, rates = rates_recorder()
    callback = WSDCheckpointCallback(tmp_path, initial_checkpoint=folder / PRE_DECAY)
    train(make_trainer(callback, recorder), num_warmup_epochs=1)
    assert rates[:6] == pytest.approx([1e-6 + (0.1 - 1e-6) * k / 5 for k in range(5)] + [0.1])
    assert rates[16] == 0.1 > rates[17]


def test_the_callbacks_of_a_continuation_start_afresh(first_run, tmp_path):
    """Row 10.13: they belong to the new run, whatever was saved of them."""
    torch.manual_seed(0)
    states = SaveTrainingStateCallback(tmp_path / "states", save_every_n_steps=7, save_at_end=False)
    stopping = EarlyStoppingCallback(early_stopping_patience=3, watch_metric="train_loss_epoch")
    train(make_trainer(states, stopping, WSDCheckpointCallback(tmp_path / "a")))
    callback = WSDCheckpointCallback(tmp_path / "b", initial_checkpoint=tmp_path / "a" / PRE_DECAY)
    states = SaveTrainingStateCallback(tmp_path / "states_of_b", save_every_n_steps=7, save_at_end=False)
    average = ModelEmaCallback(0.5, evaluate_during_training=False, save_path=tmp_path / "average.pt")
    train(make_trainer(callback, states, average), num_epochs=2, is_continuation_from_checkpoint=True)
    assert [name for name in names_in(tmp_path / "states_of_b") if name[0] != "."] == ["step_7"]


def test_a_continuation_can_be_resumed_exactly(first_run, tmp_path):
    """Row 10.13: the initial checkpoint is not loaded a second time."""
    folder, _ = first_run
    for name, resume_from in [("whole", None), ("rest", tmp_path / "whole_states" / "step_9")]:
        callback = WSDCheckpointCallback(tmp_path / name, initial_checkpoint=folder / PRE_DECAY)
        states = SaveTrainingStateCallback(tmp_path / f"{name}_states", save_every_n_steps=9)
        trainer = make_trainer(callback, states, seed=len(name))
        train(trainer, is_continuation_from_checkpoint=True, resume_from=resume_from)
        if name == "whole":
            expected, losses = trainer.model.state_dict(), trainer.run_history.get_metric_values("train_loss_epoch")
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(value, expected[key])
    assert trainer.run_history.get_metric_values("train_loss_epoch") == losses


def test_a_continuation_goes_on_with_the_gradients_of_none(tmp_path):
    """Row 10.13: a state saved amid an update does not lend its gradients to the first update of the next run."""
    states = SaveTrainingStateCallback(tmp_path / "states", save_every_n_steps=3, save_at_end=False)
    train(make_trainer(states), num_accumulated=2)
    gradients = []
    watcher = Probe(
        on_training_run_start=lambda trainer, **kwargs: gradients.extend(
            parameter.grad for parameter in trainer.get_model().parameters()
        )
    )
    callback = WSDCheckpointCallback(tmp_path / "next", initial_checkpoint=tmp_path / "states" / "step_3")
    train(make_trainer(callback, watcher), num_accumulated=2, is_continuation_from_checkpoint=True)
    assert gradients == [None] * 4
    assert callback.last_checkpoint_step == 20


def test_a_checkpoint_of_another_origin_will_do(first_run, tmp_path):
    """Row 10.13: it has no step."""
    other = train(make_trainer(), num_epochs=1)
    other.save_checkpoint(tmp_path / "other.pt")
    callback = WSDCheckpointCallback(tmp_path / "next", initial_checkpoint=tmp_path / "other.pt")
    recorder, rates = rates_recorder()
    train(make_trainer(callback, recorder), is_continuation_from_checkpoint=True)
    assert rates[:17] == [0.1] * 17
    assert names_in(tmp_path / "next") == [PRE_DECAY, POST_DECAY]


@pytest.mark.parametrize("name", ["none.pt", "none"])
def test_a_checkpoint_that_does_not_exist_is_an_error(tmp_path, name):
    """Row 10.14: ours; 0.1.61 trains from scratch."""
    trainer = make_trainer(WSDCheckpointCallback(tmp_path, initial_checkpoint=tmp_path / name))
    with pytest.raises(FileNotFoundError):
        train(trainer)


def test_a_folder_that_is_no_training_state_is_an_error(tmp_path):
    """Row 10.14: ours."""
    trainer = make_trainer(WSDCheckpointCallback(tmp_path / "a", initial_checkpoint=tmp_path))
    with pytest.raises(CheckpointError):
        train(trainer)


# --- schedulers of one's own -----------------------------------------------------------------------------------------


class Own:
    """A scheduler that nobody steps before the first update, over 8 updates."""

    decay_phase_ratio = 0.25
    period = {"period_start": 0, "period_end": 8, "decay_steps": 2, "pre_decay_step": 6}  # noqa: RUF012 - of 0.1.61

    def __init__(self, optimizer=None):
        self.step_number = -1

    def get_checkpoint_steps(self):
        return [8]

    def get_decay_info(self):
        return [self.period]

    def get_phase_info(self, num_updates):
        return self.period

    def get_current_step(self):
        return self.step_number

    def step(self):
        self.step_number += 1

    def state_dict(self):
        return {"step_number": self.step_number}

    def load_state_dict(self, state_dict):
        self.step_number = state_dict["step_number"]


class OwnStateful(StatefulSchedulerBase):
    """One that the trainer steps when it creates it."""

    decay_phase_ratio = 0.25
    period = Own.period
    get_checkpoint_steps, get_decay_info, get_phase_info = (
        Own.get_checkpoint_steps,
        Own.get_decay_info,
        Own.get_phase_info,
    )

    def get_updated_values(self, num_updates):
        return self.base_lr_values

    def get_current_step(self):
        return self._num_updates


@pytest.mark.parametrize("scheduler_class", [Own, OwnStateful])
def test_any_scheduler_with_the_methods_will_do(tmp_path, scheduler_class):
    """Row 10.15: both are written after the updates that it names."""
    callback = WSDCheckpointCallback(tmp_path)
    written = []
    watcher = Probe(
        on_train_step_end=lambda trainer, **kwargs: written.append(
            (trainer.progress.num_updates, len(list(tmp_path.iterdir())))
        )
    )
    train(make_trainer(callback, watcher), num_epochs=2, create=scheduler_class, max_num_train_steps=8)
    assert names_in(tmp_path) == ["checkpoint_6_wsd_pre_decay", "checkpoint_8_wsd_post_decay.pt"]
    assert written == [*((n, 0) for n in range(1, 6)), (6, 1), (7, 1), (8, 2)]


def test_a_scheduler_without_checkpoints_is_a_value_error(tmp_path):
    """Row 10.15."""
    with pytest.raises(ValueError, match="get_checkpoint_steps"):
        train(make_trainer(WSDCheckpointCallback(tmp_path)), create=lambda o: torch.optim.lr_scheduler.StepLR(o, 3))


class StandIn:
    """Whatever a program puts in the place of the trainer."""

    def __init__(self):
        self.scheduler, self.run_config, self.calls = Own(), SimpleNamespace(max_num_train_steps=9), []

    def print(self, *args):
        self.calls.append("print")

    def save_training_state(self, path, checkpoint_kwargs):
        self.calls.append((path, checkpoint_kwargs["step"]))

    def save_checkpoint(self, path, save_optimizer, save_scheduler, checkpoint_kwargs):
        self.calls.append((str(path), checkpoint_kwargs["step"]))

    def load_training_state(self, path):
        self.calls.append(path)
        return {"step": 6, "checkpoint_type": "wsd_pre_decay"}


def test_events_may_come_without_batch_and_from_a_stand_in(tmp_path):
    """Rows 10.15, 10.16, 10.18: what is done is told."""
    trainer, callback = StandIn(), WSDCheckpointCallback(tmp_path)
    callback.on_training_run_start(trainer)
    for step in range(8):
        trainer.scheduler.step()
        callback.on_train_step_end(trainer, step=step)
    callback.on_training_run_end(trainer)
    saved = [call for call in trainer.calls if call != "print"]
    assert saved == [
        (str(tmp_path / "checkpoint_6_wsd_pre_decay"), 6),
        (str(tmp_path / "checkpoint_8_wsd_post_decay.pt"), 8),
    ]
    assert trainer.calls.count("print") >= 3
    callback = WSDCheckpointCallback(tmp_path, initial_checkpoint=tmp_path)
    trainer = StandIn()
    callback.on_training_run_start(trainer)
    assert str(tmp_path) in trainer.calls
    assert callback.last_checkpoint_step == 6


def test_the_last_checkpoint_is_saved_at_the_end_if_it_is_missing(tmp_path):
    """Row 10.16."""
    trainer, callback = StandIn(), WSDCheckpointCallback(tmp_path)
    callback.on_training_run_start(trainer)
    for _ in range(8):
        trainer.scheduler.step()
    callback.on_training_run_end(trainer)
    assert (str(tmp_path / "checkpoint_8_wsd_post_decay.pt"), 8) in trainer.calls


def test_it_saves_when_the_step_has_ended(tmp_path):
    """Row 10.16: not within the step; a callback before it in the list has seen the event, one behind it has not."""
    log = []

    class Logged(WSDCheckpointCallback):
        def on_train_step_end(self, trainer, **kwargs):
            super().on_train_step_end(trainer, step=kwargs["step"])
            log.append(("saved", names_in(tmp_path)))

    events = Probe(on_optimizer_step_end=lambda trainer, **kwargs: log.append(("update", names_in(tmp_path))))
    train(make_trainer(Logged(tmp_path), events), num_epochs=1)
    assert log[-1] == ("saved", ["checkpoint_4_wsd_pre_decay", "checkpoint_5_wsd_post_decay.pt"])
    assert log[-2] == ("update", ["checkpoint_4_wsd_pre_decay"])


def test_the_callback_has_the_attributes_of_0_1_61(tmp_path):
    """Row 10.17."""
    callback = WSDCheckpointCallback(tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder").is_dir()
    names = ("last_checkpoint_step", "checkpoint_steps", "decay_fraction", "decay_info")
    assert [getattr(callback, name) for name in names] == [None] * 4
    trainer = train(make_trainer(callback))
    assert [getattr(callback, name) for name in names] == [20, {20}, 0.2, trainer.scheduler.get_decay_info()]


def test_a_step_that_counts_as_saved_is_not_saved_again(tmp_path):
    """Row 10.17."""
    callback = WSDCheckpointCallback(tmp_path)
    callback.last_checkpoint_step = 16
    train(make_trainer(callback))
    assert names_in(tmp_path) == [POST_DECAY]


def test_what_happens_is_told_once(first_run, tmp_path, capsys):
    """Row 10.18."""
    folder, _ = first_run
    callback = WSDCheckpointCallback(tmp_path, initial_checkpoint=folder / PRE_DECAY)
    train(make_trainer(callback), num_epochs=8, is_continuation_from_checkpoint=True)
    output = capsys.readouterr().out
    for fact in (
        f"Starting from the training state {str(folder / PRE_DECAY)!r}.",
        "Loaded the training state (wsd_pre_decay) of update 16.",
        "The learning rate decays from update 32 on.",
        f"at update 32: {str(tmp_path / 'checkpoint_32_wsd_pre_decay')!r}",
        f"at update 40: {str(tmp_path / 'checkpoint_40_wsd_post_decay.pt')!r}",
    ):
        assert output.count(fact) == 1


def test_a_state_of_the_first_versions_of_this_library_can_be_loaded(tmp_path):
    """The callback's own state."""
    callback = WSDCheckpointCallback(tmp_path)
    callback.load_state_dict({"last_seen_step": 12})
    assert callback.last_checkpoint_step == 12


def test_a_trainer_without_the_callback_is_not_affected(first_run):
    """Loading the state by hand, before a run, starts a continuation at the beginning."""
    folder, _ = first_run
    recorder, rates = rates_recorder()
    trainer = make_trainer(recorder, TrainerCallback)
    trainer.load_training_state(folder / PRE_DECAY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(trainer, is_continuation_from_checkpoint=True)
    assert rates[:17] == [0.1] * 17
