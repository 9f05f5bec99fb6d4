"""Runs on a GPU: exact resume, no waiting for the device, transfers, memory, compiled and sharded models."""

from __future__ import annotations

import gc
import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import _runs
from _processes import launch
from _support import Probe, Samples, make_dataset
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import get_default_callbacks

pytestmark = pytest.mark.usefixtures("_fresh_accelerate_state")

SHARDED_CASES = Path(__file__).parents[1] / "distributed" / "_sharded_cases.py"


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def make_trainer(callbacks=None, width=16):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return Trainer(model, nn.MSELoss(), optimizer, get_default_callbacks() if callbacks is None else callbacks)


# --- resume ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_resumed_run_is_bit_identical(tmp_path, accumulation, num_workers):
    settings = {"gradient_accumulation_steps": accumulation, "num_workers": num_workers}
    with deterministic():
        expected = _runs.train(_runs.make_trainer(tmp_path / "uninterrupted"), **settings)
        for step in (1, 5, 6, 9, 17):
            trainer = _runs.make_trainer(tmp_path / f"from {step}")
            resumed = _runs.train(trainer, **settings, resume_from=tmp_path / "uninterrupted" / f"step_{step}")
            assert _runs.differences(expected, resumed) == []


# --- waiting for the device --------------------------------------------------------------------------------------


class SyncRecorder:
    """Records where the program waits for the device, from the second step of an epoch to its last."""

    def __init__(self):
        self.places = []

    def start(self, trainer, step, **_):
        if step == 1:  # the first step may wait, for example to create things
            torch.cuda.set_sync_debug_mode("warn")

    def end(self, trainer, **_):
        torch.cuda.set_sync_debug_mode("default")

    @contextmanager
    def listening(self):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            show, warnings.showwarning = warnings.showwarning, self._note
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")
                warnings.showwarning = show

    def _note(self, message, *_args, **_kwargs):
        if "synchronizing" in str(message):
            frames = [
                frame
                for frame in traceback.extract_stack()[:-1]
                if "site-packages" not in frame.filename and "warnings.py" not in frame.filename
            ]
            names = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames[-6:]]
            self.places.append(" < ".join(reversed(names)))


LOG_POINTS = ("progress_bar.py", "reporting.py", "_recording/loss_monitor.py", "_add_epoch_loss_to_run_history")
"""Code that reads numbers at log points and at the end of an epoch, and so has to wait."""


def test_a_run_with_the_default_callbacks_waits_for_the_device_only_where_numbers_are_shown():
    syncs = SyncRecorder()
    probe = Probe(on_train_step_start=syncs.start, on_train_epoch_end=syncs.end)
    trainer = make_trainer([*get_default_callbacks(), probe])
    with syncs.listening():
        trainer.train(Samples(make_dataset(400)), 2, make_dataset(16), per_device_batch_size=4)
    assert [place for place in syncs.places if not any(point in place for point in LOG_POINTS)] == []
    assert len(syncs.places) < 20, "of 200 steps"


def test_code_that_waits_in_every_step_is_recorded_with_its_file():
    """This shows that the test above can fail."""
    syncs = SyncRecorder()
    probe = Probe(on_train_step_start=syncs.start, on_train_epoch_end=syncs.end)
    reader = Probe(on_train_step_end=lambda trainer, batch_output, **_: batch_output["loss"].item())
    with syncs.listening():
        make_trainer([probe, reader]).train(make_dataset(40), 1, per_device_batch_size=4)
    assert len(syncs.places) >= 8
    assert any(Path(__file__).name in place for place in syncs.places)


# --- data and memory ---------------------------------------------------------------------------------------------


def test_loaders_pin_memory_and_batches_are_on_the_device():
    """The test with the default callbacks checks that the host does not wait for the copies."""
    devices = []
    look = Probe(on_train_step_end=lambda trainer, batch, **_: devices.extend(part.device.type for part in batch))
    trainer = make_trainer([look])
    trainer.train(Samples(make_dataset(16)), 1, per_device_batch_size=4)
    assert trainer.get_default_train_dl_kwargs(4)["pin_memory"]
    assert trainer.get_default_eval_dl_kwargs(4)["pin_memory"]
    assert set(devices) == {"cuda"}


def test_the_device_memory_of_a_run_is_free_after_its_end():
    """Also after an error. Nothing keeps batches, losses or gradients."""
    for ends_with_error in (False, True):
        trainer = make_trainer([], width=4096)
        trainer.train(make_dataset(8), 1, per_device_batch_size=4)
        del trainer
        gc.collect()
        before = torch.cuda.memory_allocated()

        def fail(trainer, is_wanted=ends_with_error, **_):
            if is_wanted:
                raise LookupError("mine")

        trainer = make_trainer([Probe(on_train_step_end=fail)], width=4096)
        try:
            trainer.train(make_dataset(20_000), 1, per_device_batch_size=10_000)
        except LookupError:
            assert ends_with_error
        model_bytes = sum(parameter.nbytes for parameter in trainer.model.parameters())
        trainer.optimizer.zero_grad()
        gc.collect()
        # The model and the two averages of AdamW; the activations of a batch alone are 160 MB.
        assert torch.cuda.memory_allocated() - before < 3 * model_bytes + 2**20
        del trainer
        gc.collect()
        assert torch.cuda.memory_allocated() <= before


# --- compiled and sharded models ---------------------------------------------------------------------------------


def test_a_model_is_compiled_at_most_once_more_for_short_last_batches():
    """Once for full batches, once for every other size."""
    torch._dynamo.reset()
    trainer = make_trainer([])
    compilations = []

    def backend(graph, inputs):
        compilations.append([tuple(value.shape) for value in inputs if isinstance(value, torch.Tensor)])
        return graph

    trainer.model = torch.compile(trainer.model, backend=backend)
    trainer.train(make_dataset(22), 3, per_device_batch_size=4)
    assert 1 <= len(compilations) <= 2, compilations
    weights = trainer.get_model(keep_torch_compile=False).state_dict()
    assert not any(name.startswith("_orig_mod") for name in weights)


@pytest.mark.distributed
def test_a_sharded_model_resumed_from_a_state_is_bit_identical(tmp_path):
    """On two GPUs, or on one if there is only one."""
    num_processes = min(2, torch.cuda.device_count())
    ended = launch(SHARDED_CASES, tmp_path, num_processes, "whole", ACCELERATE_USE_CPU="false", SHARDED_ON="gpu")
    outputs = "\n".join((tmp_path / f"output-{rank}.txt").read_text()[-3000:] for rank in range(num_processes))
    assert [process.returncode for process in ended] == [0] * num_processes, outputs
    for rank in range(num_processes):
        for result in torch.load(tmp_path / f"whole-{rank}.pt", weights_only=True, map_location="cpu").values():
            assert result["sharded"] == "DTensor"
            assert result["whole"]["losses"] == result["resumed"]["losses"]
            for name, value in result["whole"]["weights"].items():
                assert torch.equal(value, result["resumed"]["weights"][name]), name
