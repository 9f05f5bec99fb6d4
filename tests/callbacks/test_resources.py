"""Callbacks that look at the machine: memory and profiles."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch

from _support import Probe, make_trainer, raiser, train
from pytorch_accelerated.callbacks import MemoryCallback, ProfilerCallback, StopTrainingError


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux reports")
def test_memory_that_a_run_takes_up_shows():
    kept = []
    take = Probe(on_train_epoch_start=lambda trainer, **_: kept.append(torch.ones(2**25)))  # 128 MiB
    trainer = train(make_trainer(callbacks=[take, MemoryCallback()]), num_epochs=2)
    now, peak = (trainer.run_history.get_metric_values(name) for name in ("host_memory_mib", "peak_host_memory_mib"))
    assert 100 < now[1] - now[0] < 156
    assert all(most >= 0.9 * taken for most, taken in zip(peak, now, strict=True))
    assert "device_memory_mib" not in trainer.run_history.get_metric_names()


def traces_in(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank0.*.pt.trace.json"))]


def steps_in(trace):
    return {event["name"] for event in trace["traceEvents"] if event.get("name", "").startswith("ProfilerStep#")}


def test_a_trace_that_opens_has_the_steps_of_the_schedule(tmp_path):
    folder = tmp_path / "new" / "traces"
    callback = ProfilerCallback(folder, wait=1, warmup=1, active=2, repeat=2, record_shapes=True)
    trainer = train(make_trainer(callbacks=[callback]), 24, num_epochs=2)  # 12 steps, of which 8 are of the schedule
    traces = traces_in(folder)
    assert [steps_in(trace) for trace in traces] == [
        {"ProfilerStep#2", "ProfilerStep#3"},
        {"ProfilerStep#6", "ProfilerStep#7"},
    ]
    names = {event.get("name") for event in traces[0]["traceEvents"]}
    assert {"aten::addmm", "aten::mse_loss"} <= names
    copy.deepcopy(trainer)
    train(trainer, 20)
    assert len(traces_in(folder)) == 3  # a second run of five steps makes another


@pytest.mark.parametrize("error", [RuntimeError("broken"), StopTrainingError("enough")])
def test_the_profiler_is_stopped_by_an_error_and_another_can_run(tmp_path, error):
    callback = ProfilerCallback(tmp_path, wait=0, warmup=1, active=100)
    trainer = make_trainer(callbacks=[callback, Probe(on_train_epoch_end=raiser(error))])
    if isinstance(error, StopTrainingError):
        train(trainer)
    else:
        with pytest.raises(RuntimeError, match="broken"):
            train(trainer)
    assert len(traces_in(tmp_path)) == 1
    with torch.profiler.profile() as profile:
        torch.ones(2).sum()
    assert profile.key_averages()


def test_an_impossible_schedule_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`active` is 0"):
        ProfilerCallback(tmp_path, active=0)
    with pytest.raises(ValueError, match="`wait` is -1"):
        ProfilerCallback(tmp_path, wait=-1)


def test_what_is_no_argument_of_the_profiler_is_refused(tmp_path):
    with pytest.raises(TypeError, match="`ProfilerCallback` has no argument `nonsense`"):
        ProfilerCallback(tmp_path, nonsense=1)
    assert ProfilerCallback(tmp_path, record_shapes=True).options == {"record_shapes": True}
