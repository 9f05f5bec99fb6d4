"""Where the time of a run goes: the parts, their sum, and the warning of what takes too much.

Most of these tests have a clock of their own, which moves only when something says that it takes time.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
import time

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from _support import Probe, make_dataset, make_model, make_trainer, raiser, train
from pytorch_accelerated import Trainer, time_ledger
from pytorch_accelerated._recording import loss_monitor
from pytorch_accelerated.callbacks import (
    ModelEmaCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
    StopTrainingError,
    TimeLedgerCallback,
    TrainerCallback,
    get_default_callbacks,
)
from pytorch_accelerated.time_ledger import PARTS, TimeLedger

is_strict = pytest.mark.filterwarnings("error")


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now

    def take(self, seconds: float) -> None:
        self.now += round(seconds * 1e9)

    def __deepcopy__(self, memo):
        return self


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time_ledger, "_clock", clock)
    return clock


class SlowData(Dataset):
    """Samples that take time to load."""

    def __init__(self, take, num_samples=16):
        self.take, self.samples = take, make_dataset(num_samples)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        self.take(1)
        return self.samples[index]


class SlowStream(SlowData, IterableDataset):
    __len__ = None

    def __iter__(self):
        for index in range(len(self.samples)):
            yield self[index]


class SlowModel(nn.Linear):
    """Its forward pass takes 10 seconds, and its backward pass 20."""

    def __init__(self, take):
        super().__init__(3, 1)
        self.take = take

    def forward(self, inputs):
        self.take(10)
        outputs = super().forward(inputs)
        if outputs.requires_grad:
            outputs.register_hook(lambda gradient: self.take(20))
        return outputs


class SlowSGD(torch.optim.SGD):
    """Each step takes 40 seconds."""

    def step(self, closure=None):
        super().step()
        self.take(40)


def slow_trainer(clock, callbacks=(), cls=Trainer, **kwargs):
    model = SlowModel(clock.take)
    optimizer = SlowSGD(model.parameters(), lr=0.01)
    optimizer.take = clock.take
    return cls(model, nn.functional.mse_loss, optimizer, callbacks=callbacks, **kwargs)


class Slow(TrainerCallback):
    def __init__(self, take, seconds=100):
        self.take, self.seconds = take, seconds

    def on_train_step_end(self, trainer, **kwargs):
        self.take(self.seconds)


class Slower(Slow):
    def on_eval_step_start(self, trainer, **kwargs):
        self.take(1000)


NO_WORKERS = {"train_dataloader_kwargs": {"num_workers": 0}, "eval_dataloader_kwargs": {"num_workers": 0}}


def parts_of(trainer):
    """Return the seconds of the parts that took any time."""
    return {part: seconds for part, seconds in trainer.time_ledger.seconds.items() if seconds}


# --- the parts ---------------------------------------------------------------------------------------------------


def test_each_second_of_a_run_belongs_to_the_part_in_which_it_passed(clock):
    trainer = slow_trainer(clock, [Slow(clock.take), Slower(clock.take), Slow(clock.take, 3)])
    train(trainer, SlowData(clock.take), eval_dataset=SlowData(clock.take, 8), num_epochs=2, **NO_WORKERS)
    assert parts_of(trainer) == {
        "data": 2 * 16,
        "forward": 8 * 10,
        "backward": 8 * 20,
        "optimizer": 8 * 40,
        "evaluation": 4 * 10,
        "evaluation_data": 2 * 8,
        "callback_Slow": 8 * 100,
        "callback_Slow_2": 8 * 3,
        "callback_Slower": 8 * 100 + 4 * 1000,
    }
    assert trainer.time_ledger.total == clock.now / 1e9
    assert trainer.time_ledger.share("forward") == 80 * 1e9 / clock.now


@is_strict
def test_accumulation_clipping_schedules_and_limits_change_nothing_about_it(clock):
    trainer = slow_trainer(clock)
    schedule = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1)  # noqa: E731
    settings = {"gradient_accumulation_steps": 2, "gradient_clip_norm": 1.0, "max_num_train_steps": 3}
    train(trainer, SlowData(clock.take, 24), num_epochs=2, create_scheduler_fn=schedule, **settings, **NO_WORKERS)
    # Six batches make three updates; no batch more is fetched.
    assert parts_of(trainer) == {"data": 24, "forward": 60, "backward": 120, "optimizer": 120}


def test_a_stream_whose_end_is_not_known_counts_its_reading_ahead_as_waiting(clock):
    trainer = train(slow_trainer(clock), SlowStream(clock.take), **NO_WORKERS)
    assert parts_of(trainer) == {"data": 16, "forward": 40, "backward": 80, "optimizer": 160}


def test_an_evaluation_that_a_callback_calls_for_is_evaluation_and_not_the_callback(clock):
    callbacks = [StepBasedEvaluationCallback(eval_every_n_steps=2), Slower(clock.take)]
    train(
        trainer := slow_trainer(clock, callbacks),
        SlowData(clock.take),
        eval_dataset=SlowData(clock.take, 4),
        **NO_WORKERS,
    )
    parts = parts_of(trainer)
    assert parts["evaluation"] == 3 * 10
    assert parts["evaluation_data"] == 3 * 4
    assert parts["callback_Slower"] == 4 * 100 + 3 * 1000
    assert "callback_StepBasedEvaluationCallback" not in parts
    assert sum(parts.values()) == clock.now / 1e9


def test_runs_within_a_run_belong_to_it_as_evaluation(clock):
    probe = Probe(
        on_train_epoch_end=lambda trainer, **_: (
            trainer.evaluate(SlowData(clock.take, 4), dataloader_kwargs={"num_workers": 0}),
            trainer.predict(SlowData(clock.take, 4), dataloader_kwargs={"num_workers": 0}),
            clock.take(5),
        )
    )
    trainer = slow_trainer(clock, [probe])
    train(trainer, SlowData(clock.take), **NO_WORKERS)
    parts = parts_of(trainer)
    assert parts["callback_Probe"] == 5
    assert parts["evaluation"] + parts["evaluation_data"] == 2 * 10 + 2 * 4
    assert parts["data"] == 16
    assert not run_is_kept(trainer)


def run_is_kept(trainer):
    return trainer.time_ledger.is_running


def test_evaluate_and_predict_have_a_ledger_of_their_own(clock):
    trainer = train(slow_trainer(clock), SlowData(clock.take), **NO_WORKERS)
    of_training = trainer.time_ledger
    trainer.evaluate(SlowData(clock.take, 4), dataloader_kwargs={"num_workers": 0})
    assert parts_of(trainer) == {"evaluation": 10, "evaluation_data": 4}
    trainer.predict(SlowData(clock.take, 4), dataloader_kwargs={"num_workers": 0})
    assert parts_of(trainer) == {"evaluation": 14}
    assert of_training.seconds["forward"] == 40


def test_saving_is_a_part_of_its_own_wherever_it_is_called_from(clock, tmp_path, monkeypatch):
    from pytorch_accelerated._checkpoint import portable
    from pytorch_accelerated._checkpoint.writer import StateWriter

    def slowed(function, seconds):
        def call(*args, **kwargs):
            clock.take(seconds)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(StateWriter, "write", slowed(StateWriter.write, 7))
    monkeypatch.setattr(StateWriter, "wait", slowed(StateWriter.wait, 0.5))
    monkeypatch.setattr(portable, "save_checkpoint", slowed(portable.save_checkpoint, 3))
    probe = Probe(on_train_step_end=lambda trainer, **_: trainer.save_checkpoint(tmp_path / "model.pt"))
    trainer = slow_trainer(clock, [SaveTrainingStateCallback(tmp_path / "states", save_every_n_epochs=1), probe])
    train(trainer, num_epochs=2)
    parts = parts_of(trainer)
    assert parts["saving"] % 0.5 == 0
    assert parts["saving"] >= 2 * 7 + 8 * 3 + 0.5
    assert not {"callback_Probe", "callback_SaveTrainingStateCallback"} & set(parts)
    trainer.save_checkpoint(tmp_path / "model.pt")  # after the run, whose ledger stays as it is
    assert parts_of(trainer) == parts


def test_the_average_of_the_weights_is_evaluated_as_evaluation(clock, tmp_path):
    trainer = slow_trainer(clock, [ModelEmaCallback(save_path=tmp_path / "ema.pt")])
    train(trainer, SlowData(clock.take), eval_dataset=SlowData(clock.take, 4), **NO_WORKERS)
    parts = parts_of(trainer)
    assert parts["evaluation"] == 10 * 2
    assert parts["evaluation_data"] == 4 * 2


def test_what_an_optimizer_with_a_closure_computes_again_is_forward_and_backward(clock):
    model = SlowModel(clock.take)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    trainer = Trainer(model, nn.functional.mse_loss, optimizer, callbacks=[])
    train(trainer)
    parts = parts_of(trainer)
    assert set(parts) == {"forward", "backward"}
    assert parts["backward"] == 2 * parts["forward"] > 2 * 40


# --- any end of a run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "event", ["on_train_step_end", "on_backward_start", "on_eval_step_end", "on_optimizer_step_end"]
)
@pytest.mark.parametrize("error", [StopTrainingError, RuntimeError, KeyboardInterrupt])
def test_a_run_that_ends_in_the_middle_keeps_what_it_took(clock, event, error):
    late = Probe(**dict.fromkeys(("on_exception", "on_training_run_end"), lambda trainer, **_: clock.take(6)))
    reason = error()
    trainer = slow_trainer(clock, [late, Probe(**{event: raiser(reason)})])
    with contextlib.suppress(error):
        train(trainer, SlowData(clock.take), eval_dataset=make_dataset(4), **NO_WORKERS)
    parts = parts_of(trainer)
    assert not trainer.time_ledger.is_running
    assert sum(parts.values()) == clock.now / 1e9
    assert parts["data"] >= 4
    assert sum(parts.get(part, 0) for part in ("callback_Probe", "other")) == 6  # an error tells all at once
    clock.take(1000)
    assert parts_of(trainer) == parts
    assert pickle.dumps(make_trainer())  # although `reason` knows the frames of the run, no loader is left open


def test_an_error_of_the_dataset_leaves_the_ledger_readable(clock):
    class Broken(SlowData):
        def __getitem__(self, index):
            if index == 9:
                raise OSError("disk")
            return super().__getitem__(index)

    trainer = slow_trainer(clock)
    with pytest.raises(OSError, match="disk"):
        train(trainer, Broken(clock.take), train_dataloader_kwargs={"num_workers": 0, "shuffle": False})
    assert parts_of(trainer)["data"] == 9
    assert trainer.time_ledger.total == clock.now / 1e9


def test_each_run_of_a_trainer_starts_a_ledger(clock):
    trainer = slow_trainer(clock)
    train(trainer, SlowData(clock.take), **NO_WORKERS)
    first = parts_of(trainer)
    clock.take(500)
    train(trainer, SlowData(clock.take), **NO_WORKERS)
    assert parts_of(trainer) == first


def test_a_resumed_run_counts_from_its_own_start(clock, tmp_path):
    def run(**kwargs):
        states = SaveTrainingStateCallback(tmp_path, save_every_n_steps=2, save_at_end=False)
        return train(slow_trainer(clock, [states]), SlowData(clock.take), **NO_WORKERS, **kwargs)

    run()
    clock.take(500)
    start = clock.now
    trainer = run(resume_from=tmp_path / "step_2")
    assert parts_of(trainer) == {"data": 8, "forward": 20, "backward": 40, "optimizer": 80}
    assert trainer.time_ledger.total == (clock.now - start) / 1e9


def test_the_seconds_can_be_read_while_the_run_is_under_way(clock):
    seen = []
    probe = Probe(
        on_train_step_end=lambda trainer, **_: (
            clock.take(3),
            seen.append(trainer.time_ledger.seconds["callback_Probe"]),
        )
    )
    train(slow_trainer(clock, [probe]), 8)
    assert seen == [3, 6]


def test_events_outside_a_run_and_other_threads_do_not_enter_the_ledger(clock, tmp_path):
    trainer = train(make_trainer(callbacks=[Probe(on_train_epoch_end=lambda trainer, **_: clock.take(2))]))
    before = parts_of(trainer)
    trainer.callback_handler.call_event("on_train_epoch_end", trainer)
    assert parts_of(trainer) == before

    def save_elsewhere(trainer, **kwargs):
        thread = threading.Thread(target=trainer.save_checkpoint, args=(tmp_path / "model.pt",))
        thread.start()
        thread.join()
        clock.take(1)

    trainer = train(make_trainer(callbacks=[Probe(on_train_epoch_end=save_elsewhere)]))
    assert parts_of(trainer) == {"callback_Probe": 1}


def test_copies_of_a_trainer_have_a_ledger_too(clock):
    trainer = train(slow_trainer(clock), 8)
    for copied in (copy.deepcopy(trainer), pickle.loads(pickle.dumps(make_trainer()))):
        train(copied, 8)
        assert copied.time_ledger is not trainer.time_ledger
    assert parts_of(trainer)["forward"] == 20


# --- its table and its warnings ----------------------------------------------------------------------------------


def test_the_table_shows_the_parts_that_took_time_and_adds_up(clock):
    trainer = train(slow_trainer(clock, [Slow(clock.take, 5)]), SlowData(clock.take), **NO_WORKERS)
    assert str(trainer.time_ledger).splitlines() == [
        "waiting for training data           16.000 s    5.1%",
        "forward pass and loss               40.000 s   12.7%",
        "backward pass                       80.000 s   25.3%",
        "clipping, optimizer, scheduler     160.000 s   50.6%",
        "callback Slow                       20.000 s    6.3%",
        "total                              316.000 s  100.0%",
    ]
    assert str(TimeLedger()) == "total       0.000 s  100.0%"


def slow_run(clock, seconds_of_sample, seconds_of_callback, num_workers=0, callbacks=(), **kwargs):
    data = SlowData(lambda seconds: clock.take(seconds_of_sample))
    trainer = slow_trainer(clock, [Slow(clock.take, seconds_of_callback), *callbacks])
    return train(trainer, data, train_dataloader_kwargs={"num_workers": num_workers}, **kwargs)


def test_a_warning_tells_of_data_that_are_slow_and_what_to_change(clock):
    with pytest.warns(UserWarning, match="data") as caught:
        slow_run(clock, 100, 0, num_epochs=3)
    (message,) = [str(warning.message) for warning in caught]
    assert message.startswith("Waiting for training data has taken ")
    assert "The main process loads the samples" in message
    assert 'pass `train_dataloader_kwargs={"num_workers": ' in message
    assert caught[0].filename.endswith("_support.py")  # where the program called `train`


def test_a_warning_names_the_callback_that_is_slow(clock):
    with pytest.warns(UserWarning, match="The callback `Slow` has taken .*once in n steps") as caught:
        slow_run(clock, 0, 1000)
    assert len(caught) == 1


def test_a_warning_tells_of_slow_evaluation_data_and_slow_saving(clock, tmp_path, monkeypatch):
    from pytorch_accelerated._checkpoint.writer import StateWriter

    data = SlowData(lambda seconds: clock.take(100))
    with pytest.warns(UserWarning, match=r'Waiting for evaluation data.*eval_dataloader_kwargs=\{"num_workers"'):
        train(slow_trainer(clock), eval_dataset=data, **NO_WORKERS)
    with pytest.warns(UserWarning, match=r'Waiting for evaluation data.*`dataloader_kwargs=\{"num_workers"'):
        slow_trainer(clock).evaluate(data, dataloader_kwargs={"num_workers": 0})
    monkeypatch.setattr(StateWriter, "write", lambda *args, **kwargs: clock.take(5000))
    with pytest.warns(UserWarning, match="Saving has taken .*in_background=True"):
        train(slow_trainer(clock, [SaveTrainingStateCallback(tmp_path, save_every_n_epochs=1)]))


@is_strict
def test_the_share_can_be_set_and_the_warning_switched_off(clock):
    with pytest.warns(UserWarning, match="Waiting for training data"):  # some 6 %
        slow_run(clock, 1, 0, callbacks=[TimeLedgerCallback(max_share=0.02, print_table=False)])
    slow_run(clock, 1000, 1000, callbacks=[TimeLedgerCallback(max_share=None, print_table=False)])
    slow_run(clock, 1, 1)  # takes its share, but a small one
    with pytest.raises(ValueError, match="`max_share` is 40"):
        TimeLedgerCallback(max_share=40)


@is_strict
def test_the_start_of_a_short_run_and_very_short_runs_are_not_told_of(clock):
    class FirstIsSlow(SlowData):
        def __getitem__(self, index):
            self.take(25 if index == 0 else 0)
            return self.samples[index]

    trainer = make_trainer()
    train(trainer, FirstIsSlow(clock.take), train_dataloader_kwargs={"num_workers": 0, "shuffle": False})
    assert trainer.time_ledger.share("data") == 1
    train(make_trainer(), SlowData(lambda seconds: clock.take(0.02)), **NO_WORKERS)
    opens_slowly = Probe(on_training_run_start=lambda trainer, **_: clock.take(25))
    trainer = train(make_trainer(callbacks=[opens_slowly]))
    assert trainer.time_ledger.share("callback_Probe") == 1


@is_strict
def test_saving_in_a_short_run_is_not_told_of(clock, tmp_path, monkeypatch):
    from pytorch_accelerated._checkpoint.writer import StateWriter

    monkeypatch.setattr(StateWriter, "write", lambda *args, **kwargs: clock.take(10))
    trainer = train(make_trainer(callbacks=[SaveTrainingStateCallback(tmp_path, save_every_n_epochs=1)]))
    assert parts_of(trainer) == {"saving": 20}  # after the epoch, and at the end


def test_in_a_long_run_the_warning_does_not_wait_for_the_end(clock, monkeypatch):

    monkeypatch.setattr(loss_monitor, "SECONDS_BETWEEN_LOG_POINTS", 0)
    updates = []
    probe = Probe(on_train_step_end=lambda trainer, **_: updates.append(len(caught)))
    with pytest.warns(UserWarning, match="Waiting for training data") as caught:
        slow_run(clock, 100, 0, callbacks=[probe], num_epochs=2)
    assert len(caught) == 1
    assert updates[0] == 0
    assert updates[1:] == [1] * 7


@pytest.mark.parametrize(
    ("num_workers", "remedy"), [(None, "prepare its batches ahead"), (0, "main process"), (3, "by 3 worker processes")]
)
def test_what_to_do_about_data_depends_on_who_loads_them(num_workers, remedy):
    assert remedy in TimeLedger().describe_excess("data", num_workers, "train_dataloader_kwargs")


# --- the real clock ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_parts_add_up_to_the_wall_time_within_two_percent(num_workers):
    data = SlowData(lambda seconds: time.sleep(0.005))
    trainer = make_trainer(make_model(), callbacks=[*get_default_callbacks(), Slow(lambda seconds: time.sleep(0.02))])
    start = time.perf_counter()
    train(trainer, data, eval_dataset=data, num_epochs=2, train_dataloader_kwargs={"num_workers": num_workers})
    wall = time.perf_counter() - start
    seconds = trainer.time_ledger.seconds
    assert sum(seconds.values()) == pytest.approx(wall, rel=0.02)
    assert seconds["callback_Slow"] >= 8 * 0.02
    assert seconds["evaluation_data"] >= 0.005 * 4
    if num_workers == 0:
        assert seconds["data"] >= 32 * 0.005


def test_every_part_has_a_row_even_if_it_took_no_time():
    assert list(TimeLedger().seconds) == list(PARTS)
