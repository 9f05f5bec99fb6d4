"""`WSDCheckpointCallback`: which checkpoints it saves and when, and how a run continues from one."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import TensorDataset

from pytorch_accelerated import Trainer
from pytorch_accelerated._run import Run
from pytorch_accelerated.callbacks import SaveTrainingStateCallback, TrainerCallback, WSDCheckpointCallback
from pytorch_accelerated.exceptions import SchedulerSettingsError
from pytorch_accelerated.schedulers import CosineLrScheduler, WSDLrScheduler
from pytorch_accelerated.states import verify_state

NUM_UPDATES_PER_EPOCH = 5


# --- which checkpoints are saved, update by update -----------------------------------------------------------------


class FakeTrainer:
    """Has the attributes that the callback reads, and records what it saves and loads."""

    def __init__(self, scheduler, is_resumed=False):
        self.scheduler = scheduler
        self._loop_run = Run()
        self._loop_run.is_resumed = is_resumed
        self.progress = self._loop_run.progress
        self.run_config = SimpleNamespace(max_num_train_steps=7)
        self.saved = []
        self.save_arguments = []
        self.loaded = []
        self.printed = []

    def save_checkpoint(self, save_path, checkpoint_kwargs, **arguments):
        self._save(save_path, checkpoint_kwargs, **arguments)

    def save_training_state(self, output_dir, checkpoint_kwargs):
        assert isinstance(output_dir, str)
        self._save(Path(output_dir), checkpoint_kwargs)

    def _save(self, path, checkpoint_kwargs, **arguments):
        self.saved.append((path.name, self.progress.num_updates, self.lr))
        self.save_arguments.append({"path": path, "kwargs": checkpoint_kwargs, **arguments})

    def load_checkpoint(self, checkpoint_path, **arguments):
        self.loaded.append((checkpoint_path, arguments))
        return {"step": 14, "checkpoint_type": "wsd_post_decay"}

    def print(self, text):
        self.printed.append(text)

    @property
    def lr(self):
        return self.scheduler.optimizer.param_groups[0]["lr"]


def make_scheduler(lr=0.1, **settings):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    return WSDLrScheduler(optimizer, **{"lr_min": 0.0, **settings})


def start_run(callback, is_resumed=False, **settings):
    trainer = FakeTrainer(make_scheduler(**settings), is_resumed)
    trainer.scheduler.step()
    callback.on_training_run_start(trainer)
    return trainer


def update(callback, trainer, num_updates, skipped=()):
    """Make updates in the order of the training loop. Those in `skipped` change nothing, as in mixed precision."""
    for _ in range(num_updates):
        trainer.progress.num_updates += 1
        if trainer.progress.num_updates not in skipped:
            trainer.scheduler.step()
        callback.on_train_step_end(trainer)


def names(trainer):
    return [name for name, _, _ in trainer.saved]


def test_each_decay_is_saved_before_it_at_the_stable_rate_and_after_its_last_update(tmp_path):
    callback = WSDCheckpointCallback(tmp_path)
    trainer = start_run(callback, total_steps=40, num_checkpoints=3, num_warmup_steps=3, decay_phase_ratio=0.2)
    update(callback, trainer, 40)
    callback.on_training_run_end(trainer)
    assert trainer.saved == [
        ("checkpoint_8_wsd_pre_decay", 8, 0.1),
        ("checkpoint_10_wsd_post_decay.pt", 10, 0.1),  # where the next period starts
        ("checkpoint_18_wsd_pre_decay", 18, 0.1),
        ("checkpoint_20_wsd_post_decay.pt", 20, 0.1),
        ("checkpoint_36_wsd_pre_decay", 36, 0.1),
        ("checkpoint_40_wsd_post_decay.pt", 40, 0.0),
    ]


def test_a_decay_that_starts_with_the_run_has_no_state_before_it(tmp_path):
    callback = WSDCheckpointCallback(tmp_path)
    trainer = start_run(callback, total_steps=4, decay_phase_ratio=1.0)
    callback.on_train_step_end(trainer)  # of a batch without update
    update(callback, trainer, 4)
    assert names(trainer) == ["checkpoint_4_wsd_post_decay.pt"]


def test_a_checkpoint_at_which_the_next_decay_starts_saves_both(tmp_path):
    callback = WSDCheckpointCallback(tmp_path)
    trainer = start_run(callback, total_steps=4, num_checkpoints=2, decay_phase_ratio=1.0)
    update(callback, trainer, 4)
    assert [(name, num_updates) for name, num_updates, _ in trainer.saved] == [
        ("checkpoint_2_wsd_pre_decay", 2),
        ("checkpoint_2_wsd_post_decay.pt", 2),
        ("checkpoint_4_wsd_post_decay.pt", 4),
    ]


def test_batches_without_update_save_nothing_again(tmp_path):
    callback = WSDCheckpointCallback(tmp_path)
    trainer = start_run(callback, total_steps=10)
    for _ in range(10):
        update(callback, trainer, 1)
        callback.on_train_step_end(trainer)
    assert names(trainer) == ["checkpoint_9_wsd_pre_decay", "checkpoint_10_wsd_post_decay.pt"]


def test_a_continuation_also_saves_its_state_before_the_decay(tmp_path):
    callback = WSDCheckpointCallback(tmp_path, initial_checkpoint=tmp_path / "earlier.pt")
    trainer = start_run(callback, total_steps=10, is_continuation_from_checkpoint=True)
    update(callback, trainer, 10)
    assert names(trainer) == ["checkpoint_9_wsd_pre_decay", "checkpoint_10_wsd_post_decay.pt"]


ALL_NAMES = [
    "checkpoint_7_wsd_pre_decay",
    "checkpoint_10_wsd_post_decay.pt",
    "checkpoint_17_wsd_pre_decay",
    "checkpoint_20_wsd_post_decay.pt",
]


@pytest.mark.parametrize("skipped", [{1, 2, 3}, {9, 10}, {16, 17, 18}, {20}, {19, 20}])
def test_updates_skipped_by_mixed_precision_neither_repeat_nor_lose_a_checkpoint(tmp_path, skipped):
    callback = WSDCheckpointCallback(tmp_path)
    trainer = start_run(callback, total_steps=20, num_checkpoints=2, decay_phase_ratio=0.3)
    update(callback, trainer, 20, skipped)
    callback.on_training_run_end(trainer)
    assert names(trainer) == ALL_NAMES


def test_a_run_stopped_during_a_decay_saves_no_post_decay_checkpoint(tmp_path):
    callback = WSDCheckpointCallback(tmp_path)
    trainer = start_run(callback, total_steps=20)
    update(callback, trainer, 19)
    callback.on_training_run_end(trainer)
    assert names(trainer) == ["checkpoint_18_wsd_pre_decay"]


@pytest.mark.parametrize("is_saved_by_first_version", [False, True])
@pytest.mark.parametrize("position", range(21))
def test_a_resumed_run_saves_the_missing_checkpoints_and_none_twice(tmp_path, position, is_saved_by_first_version):
    settings = {"total_steps": 20, "num_checkpoints": 2, "decay_phase_ratio": 0.3}
    callback = WSDCheckpointCallback(tmp_path)
    first = start_run(callback, **settings)
    update(callback, first, position)

    resumed_callback = WSDCheckpointCallback(tmp_path)
    state = {"last_seen_step": position} if is_saved_by_first_version else callback.state_dict()
    resumed_callback.load_state_dict(state)
    second = FakeTrainer(make_scheduler(**settings), is_resumed=True)
    second.scheduler.load_state_dict(first.scheduler.state_dict())
    second.progress.num_updates = position
    resumed_callback.on_training_run_start(second)
    update(resumed_callback, second, 20 - position)
    resumed_callback.on_training_run_end(second)
    assert names(first) + names(second) == ALL_NAMES


def test_a_checkpoint_that_was_due_when_the_state_was_saved_is_saved_after_the_resume(tmp_path):
    settings = {"total_steps": 20, "decay_phase_ratio": 0.3}
    trainer = FakeTrainer(make_scheduler(**settings), is_resumed=True)
    trainer.scheduler.num_updates = 14
    WSDCheckpointCallback(tmp_path).on_training_run_start(trainer)
    assert names(trainer) == ["checkpoint_14_wsd_pre_decay"]


def test_a_second_run_with_the_same_callback_saves_its_own_checkpoints(tmp_path):
    callback = WSDCheckpointCallback(tmp_path)
    for total_steps, ratio, expected in [(10, 0.1, [9, 10]), (10, 0.1, [9, 10]), (20, 0.5, [10, 20])]:
        trainer = start_run(callback, total_steps=total_steps, decay_phase_ratio=ratio)
        update(callback, trainer, total_steps)
        callback.on_training_run_end(trainer)
        assert [int(name.split("_")[1]) for name in names(trainer)] == expected


@pytest.mark.parametrize("save_optimizer", [True, False])
@pytest.mark.parametrize("save_scheduler", [True, False])
def test_optimizer_and_scheduler_are_in_the_file_as_requested_and_loaded_if_there(
    tmp_path, save_optimizer, save_scheduler
):
    initial = tmp_path / "earlier.pt"
    callback = WSDCheckpointCallback(str(tmp_path), save_optimizer, save_scheduler, str(initial))
    trainer = start_run(callback, total_steps=10)
    update(callback, trainer, 10)
    assert trainer.loaded == [(initial, {})]
    state, checkpoint = trainer.save_arguments
    for saved in (state, checkpoint):
        datetime.fromisoformat(saved["kwargs"].pop("timestamp"))
    extras = {"total_steps": 7, "decay_fraction": 0.1}
    assert state == {
        "path": tmp_path / "checkpoint_9_wsd_pre_decay",
        "kwargs": {"step": 9, "checkpoint_type": "wsd_pre_decay", **extras},
    }
    assert checkpoint == {
        "path": tmp_path / "checkpoint_10_wsd_post_decay.pt",
        "kwargs": {"step": 10, "checkpoint_type": "wsd_post_decay", **extras},
        "save_optimizer": save_optimizer,
        "save_scheduler": save_scheduler,
    }


def test_a_resumed_run_does_not_load_the_initial_checkpoint_again(tmp_path):
    callback = WSDCheckpointCallback(tmp_path, initial_checkpoint=tmp_path / "earlier.pt")
    assert start_run(callback, is_resumed=True, total_steps=10).loaded == []


def test_a_run_that_overwrites_its_initial_checkpoint_warns_before_it_does(tmp_path):
    initial = tmp_path / "x" / ".." / "checkpoint_20_wsd_post_decay.pt"
    callback = WSDCheckpointCallback(tmp_path, initial_checkpoint=initial)
    with pytest.warns(UserWarning, match=r"which this run overwrites .* a different `save_dir`"):
        trainer = start_run(callback, total_steps=20, num_checkpoints=2)
    update(callback, trainer, 20)
    assert names(trainer)[-1] == "checkpoint_20_wsd_post_decay.pt"


def test_the_initial_training_state_is_not_overwritten(tmp_path):
    callback = WSDCheckpointCallback(tmp_path, initial_checkpoint=tmp_path / "checkpoint_17_wsd_pre_decay")
    trainer = start_run(callback, total_steps=20, num_checkpoints=2, decay_phase_ratio=0.3)
    update(callback, trainer, 20)
    assert names(trainer) == [name for name in ALL_NAMES if "17" not in name]
    assert "which is kept" in trainer.printed[-2]


@pytest.mark.parametrize("make", [lambda optimizer: None, lambda optimizer: CosineLrScheduler(optimizer, 2, 5)])
def test_a_run_without_a_wsd_scheduler_is_rejected(tmp_path, make):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(SchedulerSettingsError, match="saves at the checkpoints of a `WSDLrScheduler`") as caught:
        WSDCheckpointCallback(tmp_path).on_training_run_start(FakeTrainer(make(optimizer)))
    assert isinstance(caught.value, ValueError)


# --- real runs -----------------------------------------------------------------------------------------------------


class Recorder(TrainerCallback):
    """Keeps the learning rate and the weights at the start of each update."""

    def __init__(self):
        self.lrs = []
        self.weights = []

    def on_optimizer_step_start(self, trainer, **kwargs):
        self.lrs.append(trainer.optimizer.param_groups[0]["lr"])
        self.weights.append(trainer.get_model().weight.detach().clone())


class StopAfter(TrainerCallback):
    def __init__(self, num_updates, error):
        self.num_updates = num_updates
        self.error = error

    is_called_last = True  # after the state of the step has been saved

    def on_train_step_end(self, trainer, **kwargs):
        if trainer.progress.num_updates == self.num_updates:
            raise self.error


def train(*callbacks, num_epochs=4, seed=0, resume_from=None, **scheduler_settings):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * NUM_UPDATES_PER_EPOCH, 3, generator=generator)
    dataset = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    trainer = Trainer(model, torch.nn.MSELoss(), optimizer, callbacks=callbacks)
    trainer.train(
        dataset,
        num_epochs=num_epochs,
        per_device_batch_size=2,
        create_scheduler_fn=WSDLrScheduler.create_scheduler_fn(decay_phase_ratio=0.3, **scheduler_settings),
        resume_from=resume_from,
    )
    return trainer


def test_a_run_writes_a_state_before_and_a_checkpoint_after_each_decay(tmp_path):
    recorder = Recorder()
    trainer = train(recorder, WSDCheckpointCallback(tmp_path), num_checkpoints=2, num_warmup_epochs=0.4)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(ALL_NAMES)
    for name, num_updates in [("checkpoint_7_wsd_pre_decay", 7), ("checkpoint_17_wsd_pre_decay", 17)]:
        saved = verify_state(tmp_path / name)
        assert saved.position.num_updates == num_updates
        weights = torch.load(tmp_path / name / "model.pt", weights_only=True)
        assert torch.equal(weights["weight"], recorder.weights[num_updates])
    checkpoint = torch.load(tmp_path / "checkpoint_10_wsd_post_decay.pt", weights_only=True)
    assert checkpoint["step"] == checkpoint["scheduler_state_dict"]["num_updates"] == 10
    assert torch.equal(checkpoint["model_state_dict"]["weight"], recorder.weights[10])
    last = torch.load(tmp_path / "checkpoint_20_wsd_post_decay.pt", weights_only=True)
    assert torch.equal(last["model_state_dict"]["weight"], trainer.model.weight)
    assert recorder.lrs[0] == 1e-6
    assert recorder.lrs[2] == recorder.lrs[7] == recorder.lrs[10] == recorder.lrs[17] == 0.1
    assert last["optimizer_state_dict"]["param_groups"][0]["lr"] == pytest.approx(1e-7)


def test_a_continuation_starts_from_the_weights_before_the_decay_at_the_stable_rate_with_a_new_schedule(tmp_path):
    train(WSDCheckpointCallback(tmp_path / "first"), num_warmup_epochs=0.4)
    initial = tmp_path / "first" / "checkpoint_14_wsd_pre_decay"
    recorder = Recorder()
    train(
        recorder,
        WSDCheckpointCallback(tmp_path / "second", initial_checkpoint=initial),
        num_epochs=2,
        seed=1,
        num_warmup_epochs=0.4,
        is_continuation_from_checkpoint=True,
    )
    weights = torch.load(initial / "model.pt", weights_only=True)
    assert torch.equal(recorder.weights[0], weights["weight"])
    assert recorder.lrs[:8] == [0.1] * 8
    assert recorder.lrs[8] < 0.1
    assert sorted(path.name for path in (tmp_path / "second").iterdir()) == [
        "checkpoint_10_wsd_post_decay.pt",
        "checkpoint_7_wsd_pre_decay",
    ]
    state = torch.load(tmp_path / "second" / "checkpoint_10_wsd_post_decay.pt", weights_only=True)
    assert state["scheduler_state_dict"]["is_continuation_from_checkpoint"]
    assert state["optimizer_state_dict"]["state"][0]["step"] == 14 + 10


def test_a_run_can_be_resumed_from_the_state_before_a_decay(tmp_path):
    whole = train(WSDCheckpointCallback(tmp_path / "whole"))
    rest = train(
        WSDCheckpointCallback(tmp_path / "rest"),
        seed=1,
        resume_from=tmp_path / "whole" / "checkpoint_14_wsd_pre_decay",
    )
    assert torch.equal(rest.model.weight, whole.model.weight)
    assert [path.name for path in (tmp_path / "rest").iterdir()] == ["checkpoint_20_wsd_post_decay.pt"]


@pytest.mark.parametrize("position", [3, 14, 16])
def test_a_resumed_run_ends_with_the_files_of_an_uninterrupted_one(tmp_path, position):
    train(WSDCheckpointCallback(tmp_path / "uninterrupted"), num_checkpoints=2)

    states = SaveTrainingStateCallback(tmp_path / "states", save_every_n_steps=1)
    with pytest.raises(InterruptedError):
        train(
            WSDCheckpointCallback(tmp_path / "parts"),
            states,
            StopAfter(position, InterruptedError()),
            num_checkpoints=2,
        )
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    train(
        WSDCheckpointCallback(tmp_path / "parts"),
        SaveTrainingStateCallback(tmp_path / "states"),
        num_checkpoints=2,
        seed=1,
        resume_from=tmp_path / "states" / f"step_{position}",
    )
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == sorted(ALL_NAMES)
    for path in (tmp_path / "uninterrupted").rglob("*.pt"):
        if path.name in ("trainer_state.pt", "process_0.pt"):
            continue  # they have times and callbacks in them
        uninterrupted = torch.load(path, weights_only=True)
        parts = torch.load(tmp_path / "parts" / path.relative_to(tmp_path / "uninterrupted"), weights_only=True)
        for name in ("checkpoint_type", "scheduler_state_dict"):
            assert parts.pop(name, None) == uninterrupted.pop(name, None)
        assert (parts.pop("timestamp", None) is None) == (uninterrupted.pop("timestamp", None) is None)
        torch.testing.assert_close(parts, uninterrupted, rtol=0, atol=0)
    assert {name: (tmp_path / "parts" / name).stat().st_mtime_ns for name in written} == written
