"""A loader's worker that is killed, as by a system out of memory, ends the run with an error that names it.

PyTorch raises that error from its handler of SIGCHLD, so at any place of the program. These tests let it strike at
chosen places, and assert what holds for any: the error names the worker, the states are whole, nothing is left behind,
and a run that goes on ends with the same bits.
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
from pathlib import Path

import coverage
import numpy as np
import pytest

import _runs
from _saved import names_in
from _support import Probe
from pytorch_accelerated._checkpoint import files as files_module
from pytorch_accelerated._checkpoint import folder as folder_module
from pytorch_accelerated._checkpoint import writer as writer_module
from pytorch_accelerated.callbacks import SaveTrainingStateCallback, saving
from pytorch_accelerated.states import list_states, verify_state

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="this system does not tell of the end of a process"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    # The error may strike in a destructor, where Python only reports it; the loader then raises it at the next batch.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SECONDS_TO_END = 15
STEP = 9
"""At which step of 18 the worker is killed, within the second epoch."""


@pytest.fixture(autouse=True)
def _not_measured():
    """The error would strike within coverage's own lock too, which is then held for ever."""
    measurement = coverage.Coverage.current()
    if measurement is not None:
        measurement.stop()
    yield
    if measurement is not None:
        measurement.start()


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """How a run ends that nothing happens to."""
    outcome = _runs.train(_runs.make_trainer(tmp_path_factory.mktemp("whole")), num_workers=2)
    assert_workers_end()
    return outcome


def assert_workers_end():
    gc.collect()
    for worker in multiprocessing.active_children():
        worker.join(SECONDS_TO_END)
        assert not worker.is_alive()


class Killer:
    """Kills a worker, once, and by default waits until it is known; PyTorch raises meanwhile, on the main thread."""

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
        """Return the function, before which the worker is killed."""

        def kill_and_call(*args, **kwargs):
            self()
            return function(*args, **kwargs)

        return kill_and_call

    def after(self, function):
        """Return the function, after which the worker is killed."""

        def call_and_kill(*args, **kwargs):
            result = function(*args, **kwargs)
            self()
            return result

        return call_and_kill


def is_now(trainer):
    position = trainer.progress
    return position.num_epochs_completed * _runs.NUM_STEPS_PER_EPOCH + position.num_batches_in_epoch >= STEP


def assert_ends_well(trainer, killer, whole_run, litter=()):
    """Train, and assert what holds wherever the error came up."""
    folder = next(c.save_dir for c in trainer.callback_handler.callbacks if isinstance(c, SaveTrainingStateCallback))
    model, handlers = trainer.model, [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    generator = np.random.get_bit_generator()
    begin = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        _runs.train(trainer, num_workers=2)
    assert time.monotonic() - begin < SECONDS_TO_END
    said = " ".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert re.search(rf"DataLoader worker \(pid(\(s\))? {killer.pid}\)", said)
    assert type(caught.value) is RuntimeError, "it is no error of the state that was being saved"

    # What it leaves.
    assert [state.problem for state in list_states(folder)] == [None] * len(list_states(folder))
    for state in list_states(folder):
        verify_state(state.path)
    assert len(list_states(folder)) >= STEP - 2
    assert [name for name in names_in(folder) if name.startswith(".")] == [*litter]
    assert folder_module._held_locks == {}
    assert "training state writer" not in [thread.name for thread in threading.enumerate()]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert trainer.model is model
    assert np.random.get_bit_generator() is generator
    del caught

    # What can be done afterwards.
    resumed = _runs.make_trainer(folder)
    assert _runs.differences(whole_run, _runs.train(resumed, num_workers=2, resume_from="latest")) == []
    assert resumed.is_resumed
    assert [name for name in names_in(folder) if name.startswith(".")] == []
    _runs.train(trainer, num_epochs=1)
    del resumed
    assert_workers_end()


@pytest.mark.parametrize(
    "event",
    ["on_train_step_start", "on_backward_start", "on_optimizer_step_end", "on_train_step_end", "on_eval_step_end"],
)
def test_in_a_step(tmp_path, whole_run, event):
    killer = Killer()
    kill = Probe(**{event: lambda trainer, **_: killer() if is_now(trainer) else None})
    assert_ends_well(_runs.make_trainer(tmp_path, callbacks=[kill]), killer, whole_run)


def test_while_the_next_batch_is_waited_for(tmp_path, whole_run):
    """The connection to the worker is lost before the system tells that it has died."""
    killer = Killer(waits=False)
    kill = Probe(on_train_step_start=lambda trainer, **_: killer() if is_now(trainer) else None)
    assert_ends_well(_runs.make_trainer(tmp_path, callbacks=[kill]), killer, whole_run)


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
def test_while_a_state_is_saved(tmp_path, whole_run, monkeypatch, module, name, when, on_save_error):
    killer = Killer()

    def kill_from_now_on(trainer, **_):
        if is_now(trainer) and killer.pid is None:
            monkeypatch.setattr(module, name, getattr(killer, when)(getattr(module, name)))

    callbacks = [Probe(on_train_step_start=kill_from_now_on)]
    trainer = _runs.make_trainer(tmp_path, callbacks=callbacks, on_save_error=on_save_error)
    assert_ends_well(trainer, killer, whole_run)


def test_while_a_checkpoint_is_saved(tmp_path, whole_run, monkeypatch):
    killer = Killer()

    def kill_from_now_on(trainer, **_):
        if is_now(trainer) and killer.pid is None:
            monkeypatch.setattr(files_module, "flush_to_disk", killer.before(files_module.flush_to_disk))

    trainer = _runs.make_trainer(tmp_path, callbacks=[Probe(on_eval_epoch_start=kill_from_now_on)])
    assert_ends_well(trainer, killer, whole_run)


def test_while_an_old_state_is_deleted(tmp_path, whole_run, monkeypatch):
    """What is left of it has another name, and goes when the next run begins."""
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
    assert_ends_well(trainer, killer, whole_run, litter=[".step_3.tmp"])


@pytest.mark.parametrize("strikes", ["at once", "in the waiting"])
def test_while_a_state_is_written_in_the_background(tmp_path, whole_run, monkeypatch, strikes):
    """The run does not end before the state is complete, wherever the main thread is."""
    killer = Killer(waits=False)
    write, wait = writer_module.write_state, threading.Event.wait
    is_waited_for = threading.Event()

    def kill_and_write(*args, **kwargs):
        if killer.pid is None and len(names_in(tmp_path)) >= STEP:
            if strikes == "in the waiting":
                assert wait(is_waited_for, SECONDS_TO_END)
            killer()
            time.sleep(0.5)
        return write(*args, **kwargs)

    class Told(threading.Event):
        def wait(self, timeout=None):
            is_waited_for.set()
            return super().wait(timeout)

    monkeypatch.setattr(writer_module, "write_state", kill_and_write)
    monkeypatch.setattr(writer_module.threading, "Event", Told)
    assert_ends_well(_runs.make_trainer(tmp_path, in_background=True), killer, whole_run)


@pytest.mark.parametrize("in_background", [False, True])
def test_while_a_lock_is_held_that_another_thread_waits_for(tmp_path, whole_run, monkeypatch, in_background):
    """The lock would never be given back, and the run never end."""
    killer = Killer(waits=False)
    enter, armed = threading.Condition.__enter__, threading.Event()

    def enter_and_kill(condition):
        result = enter(condition)
        is_main = threading.get_ident() == threading.main_thread().ident
        if armed.is_set() and is_main and killer.pid is None:
            files = {Path(frame.filename).name for frame in traceback.extract_stack(limit=8)}
            if files & {"_background.py", "_state_writing.py"}:
                killer()
                time.sleep(0.3)  # until it is known
        return result

    monkeypatch.setattr(threading.Condition, "__enter__", enter_and_kill)
    kill = Probe(on_train_step_start=lambda trainer, **_: armed.set() if is_now(trainer) else None)
    trainer = _runs.make_trainer(tmp_path, callbacks=[kill], in_background=in_background)
    assert_ends_well(trainer, killer, whole_run)


def test_while_a_run_that_has_failed_ends(tmp_path, monkeypatch):
    """The run keeps its own error, and nothing of its end is left out."""
    killer = Killer(waits=False)

    def release(folder):
        killer()
        time.sleep(0.3)
        return folder_module.release_folder(folder)

    def fail(trainer, **_):
        raise LookupError("of the run")

    monkeypatch.setattr(saving, "release_folder", release)
    trainer = _runs.make_trainer(tmp_path, callbacks=[Probe(on_train_step_end=fail)])
    with pytest.raises(LookupError, match="of the run"):
        _runs.train(trainer, num_workers=2)
    assert killer.pid is not None
    assert folder_module._held_locks == {}
    assert_workers_end()


@pytest.mark.parametrize("number", range(6))
def test_at_a_random_moment(tmp_path, whole_run, number):
    """In the second epoch; half of them while states are written in the background."""
    generator = random.Random(number)
    killer = Killer(waits=False)
    timers = []

    def kill_soon(trainer, **_):
        if is_now(trainer) and not timers:
            timers.append(threading.Timer(generator.uniform(0, 0.05), killer))
            timers[0].start()
        if timers and trainer.progress.num_batches_in_epoch == _runs.NUM_STEPS_PER_EPOCH - 1:
            timers[0].join()  # the last epoch needs the worker

    trainer = _runs.make_trainer(
        tmp_path, callbacks=[Probe(on_train_step_start=kill_soon)], in_background=bool(number % 2)
    )
    assert_ends_well(trainer, killer, whole_run)
