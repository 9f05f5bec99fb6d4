"""A dataloader worker that is killed, as by a system out of memory, ends the run with an error that names the worker.

PyTorch raises that error from its SIGCHLD handler, so anywhere in the program. These tests raise it at chosen places,
and assert what holds everywhere: the error names the worker, the states are valid, nothing is left behind, and a
resumed run ends with the same bits.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import re
import shutil
import signal
import threading
import time
import traceback

import coverage
import numpy as np
import pytest

import _runs
from _saved import names_in
from _support import Probe
from pytorch_accelerated._checkpoint import files as files_module
from pytorch_accelerated._checkpoint import lock as lock_module
from pytorch_accelerated._checkpoint import writer as writer_module
from pytorch_accelerated.callbacks import SaveTrainingStateCallback, saving
from pytorch_accelerated.states import list_states, verify_state

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("_not_measured"),
    pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="this system has no SIGCHLD"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    # If the error is raised in a destructor, Python only reports it. The loader then raises it at the next batch.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SECONDS_TO_END = 15
STEP = 9
"""The step, of 18, at which the worker is killed: mid-epoch in the second epoch."""


@pytest.fixture(scope="module")
def uninterrupted_run(tmp_path_factory):
    """The outcome of a run in which no worker is killed."""
    outcome = _runs.train(_runs.make_trainer(tmp_path_factory.mktemp("uninterrupted")), num_workers=2)
    assert_workers_end()
    return outcome


def test_nothing_is_measured_here():
    assert coverage.Coverage.current() is None


def assert_workers_end():
    gc.collect()
    for worker in multiprocessing.active_children():
        worker.join(SECONDS_TO_END)
        assert not worker.is_alive()


class Killer:
    """Kills a worker once, and by default waits until PyTorch has raised the error on the main thread."""

    def __init__(self, waits=True):
        self.waits = waits
        self.pid = None

    def __call__(self):
        if self.pid is not None:
            return
        self.pid = min(worker.pid for worker in multiprocessing.active_children())
        os.kill(self.pid, signal.SIGKILL)
        if self.waits:
            time.sleep(SECONDS_TO_END)

    def before(self, function):
        """Return a function that kills the worker, and then calls the given one."""

        def kill_and_call(*args, **kwargs):
            self()
            return function(*args, **kwargs)

        return kill_and_call

    def after(self, function):
        """Return a function that calls the given one, and then kills the worker."""

        def call_and_kill(*args, **kwargs):
            result = function(*args, **kwargs)
            self()
            return result

        return call_and_kill


def is_now(trainer):
    position = trainer.progress
    return position.num_epochs_completed * _runs.NUM_STEPS_PER_EPOCH + position.num_batches_in_epoch >= STEP


def assert_fails_cleanly(trainer, killer, uninterrupted_run, leftovers=()):
    """Train, and assert what holds wherever the error was raised."""
    folder = next(c.save_dir for c in trainer.callback_handler.callbacks if isinstance(c, SaveTrainingStateCallback))
    model, handlers = trainer.model, [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    generator = np.random.get_bit_generator()
    begin = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        _runs.train(trainer, num_workers=2)
    assert time.monotonic() - begin < SECONDS_TO_END
    said = " ".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert re.search(rf"DataLoader worker \(pid(\(s\))? {killer.pid}\)", said)
    assert type(caught.value) is RuntimeError, "it must not become an error about the state that was being saved"

    # What the run leaves behind.
    assert [state.problem for state in list_states(folder)] == [None] * len(list_states(folder))
    for state in list_states(folder):
        verify_state(state.path)
    assert len(list_states(folder)) >= STEP - 2
    assert [name for name in names_in(folder) if name.startswith(".")] == [*leftovers]
    assert lock_module._held == {}
    assert "training state writer" not in [thread.name for thread in threading.enumerate()]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert trainer.model is model
    assert np.random.get_bit_generator() is generator
    del caught

    # What is possible afterwards.
    resumed = _runs.make_trainer(folder)
    assert _runs.differences(uninterrupted_run, _runs.train(resumed, num_workers=2, resume_from="latest")) == []
    assert resumed.is_resumed
    assert [name for name in names_in(folder) if name.startswith(".")] == []
    _runs.train(trainer, num_epochs=1)
    del resumed
    assert_workers_end()


@pytest.mark.parametrize(
    "event",
    ["on_train_step_start", "on_backward_start", "on_optimizer_step_end", "on_train_step_end", "on_eval_step_end"],
)
def test_a_worker_killed_in_an_event_of_a_step_ends_the_run_cleanly(tmp_path, uninterrupted_run, event):
    killer = Killer()
    kill = Probe(**{event: lambda trainer, **_: killer() if is_now(trainer) else None})
    assert_fails_cleanly(_runs.make_trainer(tmp_path, callbacks=[kill]), killer, uninterrupted_run)


def test_a_worker_killed_while_the_next_batch_is_loaded_ends_the_run_cleanly(tmp_path, uninterrupted_run):
    """The connection to the worker is lost before the system reports its death."""
    killer = Killer(waits=False)
    kill = Probe(on_train_step_start=lambda trainer, **_: killer() if is_now(trainer) else None)
    assert_fails_cleanly(_runs.make_trainer(tmp_path, callbacks=[kill]), killer, uninterrupted_run)


@pytest.mark.parametrize("on_save_error", ["raise", "warn"])
@pytest.mark.parametrize(
    ("module", "name", "when"),
    [
        (writer_module, "_write_file", "before"),
        (writer_module, "_write_file", "after"),
        (writer_module, "replace_folder", "before"),
        (writer_module, "replace_folder", "after"),
    ],
)
def test_a_worker_killed_while_a_state_is_saved_ends_the_run_cleanly(
    tmp_path, uninterrupted_run, monkeypatch, module, name, when, on_save_error
):
    killer = Killer()

    def kill_from_now_on(trainer, **_):
        if is_now(trainer) and killer.pid is None:
            monkeypatch.setattr(module, name, getattr(killer, when)(getattr(module, name)))

    callbacks = [Probe(on_train_step_start=kill_from_now_on)]
    trainer = _runs.make_trainer(tmp_path, callbacks=callbacks, on_save_error=on_save_error)
    assert_fails_cleanly(trainer, killer, uninterrupted_run)


def test_a_worker_killed_while_a_checkpoint_is_saved_ends_the_run_cleanly(tmp_path, uninterrupted_run, monkeypatch):
    killer = Killer()

    def kill_from_now_on(trainer, **_):
        if is_now(trainer) and killer.pid is None:
            monkeypatch.setattr(files_module, "flush_to_disk", killer.before(files_module.flush_to_disk))

    trainer = _runs.make_trainer(tmp_path, callbacks=[Probe(on_eval_epoch_start=kill_from_now_on)])
    assert_fails_cleanly(trainer, killer, uninterrupted_run)


def test_a_worker_killed_while_an_old_state_is_deleted_ends_the_run_cleanly(tmp_path, uninterrupted_run, monkeypatch):
    """The rest of that state has been renamed, and is removed when the next run starts."""
    killer = Killer()
    rmtree = shutil.rmtree

    def delete(path, *args, **kwargs):
        if path.exists():
            killer()
        rmtree(path, *args, **kwargs)

    def kill_from_now_on(trainer, **_):
        if is_now(trainer) and killer.pid is None:
            monkeypatch.setattr(files_module.shutil, "rmtree", delete)

    callbacks = [Probe(on_train_step_start=kill_from_now_on)]
    trainer = _runs.make_trainer(tmp_path, callbacks=callbacks, max_checkpoints=STEP - 2)
    assert_fails_cleanly(trainer, killer, uninterrupted_run, leftovers=[".step_3.tmp"])


@pytest.mark.parametrize("moment", ["immediately", "during the wait"])
def test_a_worker_killed_while_a_state_is_written_in_the_background_ends_the_run_cleanly(
    tmp_path, uninterrupted_run, monkeypatch, moment
):
    """The run does not end before the state is complete, whatever the main thread is doing."""
    killer = Killer(waits=False)
    write, wait = writer_module.write_state, threading.Event.wait
    is_waited_for = threading.Event()

    def kill_and_write(*args, **kwargs):
        if killer.pid is None and len(names_in(tmp_path)) >= STEP:
            if moment == "during the wait":
                assert wait(is_waited_for, SECONDS_TO_END)
            killer()
            time.sleep(0.5)
        return write(*args, **kwargs)

    class NotifyingEvent(threading.Event):
        def wait(self, timeout=None):
            is_waited_for.set()
            return super().wait(timeout)

    monkeypatch.setattr(writer_module, "write_state", kill_and_write)
    monkeypatch.setattr(writer_module.threading, "Event", NotifyingEvent)
    assert_fails_cleanly(_runs.make_trainer(tmp_path, in_background=True), killer, uninterrupted_run)


def is_called_by_writer():
    return writer_module.__file__ in {frame.filename for frame in traceback.extract_stack(limit=9)}


@pytest.mark.parametrize("in_background", [False, True])
def test_a_worker_killed_while_a_lock_is_held_causes_no_deadlock(
    tmp_path, uninterrupted_run, monkeypatch, in_background
):
    """An error right after a lock was acquired would leave it locked, and another thread would wait for it forever."""
    killer = Killer(waits=False)
    enter, armed = threading.Condition.__enter__, threading.Event()

    def enter_and_kill(condition):
        result = enter(condition)
        is_main = threading.get_ident() == threading.main_thread().ident
        if armed.is_set() and is_main and killer.pid is None and is_called_by_writer():
            killer()
            time.sleep(0.3)  # until PyTorch knows
        return result

    monkeypatch.setattr(threading.Condition, "__enter__", enter_and_kill)
    kill = Probe(on_train_step_start=lambda trainer, **_: armed.set() if is_now(trainer) else None)
    trainer = _runs.make_trainer(tmp_path, callbacks=[kill], in_background=in_background)
    assert_fails_cleanly(trainer, killer, uninterrupted_run)


def test_a_worker_killed_during_the_teardown_of_a_failed_run_changes_nothing(tmp_path, monkeypatch):
    """The run raises its own error, and its teardown is completed."""
    killer = Killer(waits=False)

    def release(folder, owner):
        killer()
        time.sleep(0.3)
        return lock_module.unlock(folder, owner)

    def fail(trainer, **_):
        raise LookupError("of the run")

    monkeypatch.setattr(saving, "unlock", release)
    trainer = _runs.make_trainer(tmp_path, callbacks=[Probe(on_train_step_end=fail)])
    with pytest.raises(LookupError, match="of the run"):
        _runs.train(trainer, num_workers=2)
    assert killer.pid is not None
    assert lock_module._held == {}
    assert_workers_end()


@pytest.mark.filterwarnings("ignore:.* does not fit exactly. .*on_train_step_start.generator")  # of this callback
@pytest.mark.parametrize("number", range(6))
def test_a_worker_killed_at_a_random_moment_ends_the_run_cleanly(tmp_path, uninterrupted_run, number):
    """In the second epoch; half of the cases write states in the background."""
    generator = random.Random(number)
    killer = Killer(waits=False)
    timers = []

    def kill_soon(trainer, **_):
        if is_now(trainer) and not timers:
            timers.append(threading.Timer(generator.uniform(0, 0.05), killer))
            timers[0].start()
        if timers and trainer.progress.num_batches_in_epoch == _runs.NUM_STEPS_PER_EPOCH - 1:
            timers[0].join()  # the worker does not survive the last epoch

    trainer = _runs.make_trainer(
        tmp_path, callbacks=[Probe(on_train_step_start=kill_soon)], in_background=bool(number % 2)
    )
    assert_fails_cleanly(trainer, killer, uninterrupted_run)
