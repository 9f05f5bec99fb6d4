"""What ranks agree on before each update, in a group of one; two and three processes are in `tests/distributed/`."""

from __future__ import annotations

import inspect
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import distributed
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import Sampler, Subset, default_collate

from _support import EventRecorder, Probe, Samples, Stream, make_dataset, make_trainer, train
from pytorch_accelerated import Trainer
from pytorch_accelerated._distributed import collectives as collectives_module
from pytorch_accelerated._distributed import consensus as consensus_module
from pytorch_accelerated._distributed.consensus import StopConsensus, can_skip_exchange, overrides_any
from pytorch_accelerated._distributed.reasons import RunInterruptedError
from pytorch_accelerated._loop import STEP_EVENTS, STEP_METHODS
from pytorch_accelerated.callbacks import get_default_callbacks
from pytorch_accelerated.exceptions import NonFiniteLossError, StopTrainingError
from pytorch_accelerated.trainer import TrainerWithTimmScheduler


@pytest.fixture
def consensus():
    """One that exchanges with itself alone, over a real group on gloo."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield StopConsensus(num_processes=2)
    distributed.destroy_process_group()


def finish_step(consensus):
    numbers = consensus.finish_exchange()
    consensus.raise_if_stopped()
    return numbers


@pytest.mark.parametrize("num_processes", [1, 2])
def test_without_a_process_group_nothing_is_sent(num_processes):
    consensus = StopConsensus(num_processes)
    assert not consensus.is_needed
    consensus.sync()
    assert not distributed.is_initialized()


@pytest.mark.parametrize("weight", [3, 2.5, torch.tensor(3), torch.tensor(2.5)])
def test_an_exchange_returns_the_sums_of_its_own_update_only(consensus, weight):
    assert consensus.is_needed
    for _ in range(2):
        consensus.start_exchange(weight, num_samples=8)
        total, num_samples = consensus.finish_exchange()
        assert (total, num_samples) == (float(weight), 8)
        assert type(num_samples) is int


def test_large_numbers_of_samples_are_exact(consensus):
    many = 2**40 + 1
    consensus.start_exchange(0.0, many)
    assert consensus.finish_exchange() == (0.0, many)


# --- requests to stop --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [StopTrainingError, NonFiniteLossError])
def test_a_request_is_raised_once_after_the_next_exchange(consensus, error):
    consensus.request_stop(error("enough"))
    consensus.start_exchange(1.0, 1)
    with pytest.raises(error, match=r"^enough$"):
        finish_step(consensus)
    consensus.start_exchange(1.0, 1)
    assert finish_step(consensus) == (1.0, 1)


def test_the_update_is_made_before_a_stop_but_not_with_a_bad_loss(consensus):
    consensus.request_stop(StopTrainingError("enough"))
    consensus.start_exchange(1.0, 1)
    assert consensus.finish_exchange() == (1.0, 1)
    with pytest.raises(StopTrainingError, match="enough"):
        consensus.raise_if_stopped()
    consensus.request_stop(NonFiniteLossError("bad"))
    consensus.start_exchange(1.0, 1)
    with pytest.raises(NonFiniteLossError, match="bad"):
        consensus.finish_exchange()


def test_a_request_during_an_exchange_waits_for_the_next_one(consensus):
    consensus.start_exchange(1.0, 1)
    consensus.request_stop(StopTrainingError("late"))
    assert consensus.finish_exchange() == (1.0, 1)
    with pytest.raises(StopTrainingError, match="late"):
        consensus.sync()


def test_sync_raises_a_request_or_does_nothing(consensus):
    consensus.sync()
    consensus.request_stop(StopTrainingError("enough"))
    with pytest.raises(StopTrainingError, match="enough"):
        consensus.sync()
    consensus.sync()


def test_a_bad_loss_precedes_a_stop_and_the_first_request_precedes_the_second(consensus):
    for reason in (StopTrainingError("stop"), NonFiniteLossError("first"), NonFiniteLossError("second")):
        consensus.request_stop(reason)
    with pytest.raises(NonFiniteLossError, match="first"):
        consensus.sync()


def test_the_earliest_bad_loss_is_raised_even_if_it_was_not_noticed(consensus):
    consensus._find_bad_loss = lambda: NonFiniteLossError("of step 3", 3)
    for step in (9, 5):
        consensus.request_stop(NonFiniteLossError(f"of step {step}", step))
    with pytest.raises(NonFiniteLossError, match="of step 3") as raised:
        consensus.sync()
    assert raised.value.step == 3
    consensus.request_stop(StopTrainingError("enough"))  # a stop does not make ranks check their losses
    with pytest.raises(StopTrainingError, match="enough"):
        consensus.sync()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_by_a_signal_keeps_its_number(consensus, number):
    consensus.request_stop(RunInterruptedError(number))
    with pytest.raises(RunInterruptedError, match=r"^interrupted by ") as raised:
        consensus.sync()
    assert raised.value.signal_number == number


def test_a_callback_precedes_a_signal(consensus):
    """The signal can take effect later, but the callback would not ask again in the run that is resumed."""
    consensus.request_stop(RunInterruptedError(signal.SIGTERM))
    consensus.request_stop(StopTrainingError("enough"))
    with pytest.raises(StopTrainingError, match=r"^enough$"):
        consensus.sync()


@pytest.mark.parametrize("error", [type("MyStop", (StopTrainingError,), {}), type("MyNaN", (NonFiniteLossError,), {})])
def test_a_subclass_of_a_reason_is_raised_as_its_base_class(consensus, error):
    consensus.request_stop(error("enough"))
    with pytest.raises(error.__base__, match="enough"):
        consensus.sync()


def test_a_repeated_request_is_sent_once(consensus, monkeypatch):
    sent = []

    def receive(requests_by_rank, local_requests, group):
        sent.append(local_requests)
        requests_by_rank[:] = [local_requests]

    monkeypatch.setattr(consensus_module.distributed, "all_gather_object", receive)
    for _ in range(3):
        consensus.request_stop(RunInterruptedError(signal.SIGUSR1))
    with pytest.raises(RunInterruptedError):
        consensus.sync()
    assert sent == [[("RunInterruptedError", (signal.SIGUSR1,))]]


def test_a_bad_loss_of_another_rank_precedes_a_stop_of_the_main_process(consensus, monkeypatch):
    """The requests of the other ranks are inserted into the exchange; this rank has made none."""

    def receive(requests_by_rank, local_requests, group):
        assert local_requests == []
        requests_by_rank[:] = [[("StopTrainingError", ("of rank 0",))], [("NonFiniteLossError", ("of rank 1", 4))]]

    monkeypatch.setattr(consensus_module.distributed, "all_gather_object", receive)
    consensus.start_exchange(0.0, 0)
    consensus._numbers[2] = 2
    with pytest.raises(NonFiniteLossError, match="of rank 1"):
        consensus.finish_exchange()


@pytest.mark.parametrize(("backend", "num_groups"), [("gloo", 0), ("nccl", 1)])
def test_all_runs_share_one_group_on_hosts_next_to_a_backend_of_devices(backend, num_groups, monkeypatch):
    groups = []

    def new_host_group():
        groups.append("gloo")
        return f"group {len(groups)}"

    fake = SimpleNamespace(
        is_initialized=lambda: True,
        get_backend=lambda: backend,
        group=SimpleNamespace(WORLD=object()),
    )
    monkeypatch.setattr(collectives_module, "new_host_group", new_host_group)
    for module in (consensus_module, collectives_module):
        monkeypatch.setattr(module, "distributed", fake)
    first_two = [StopConsensus(2), StopConsensus(2)]
    assert groups == ["gloo"] * num_groups
    assert {consensus._group for consensus in first_two} == {"group 1" if num_groups else None}
    fake.group.WORLD = object()  # the process group has been initialized again
    assert StopConsensus(2)._group == ("group 2" if num_groups else None)


# --- skipped exchanges -------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """Seconds that only the test changes."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(consensus_module.time, "monotonic", lambda: now.seconds)
    return now


@pytest.fixture
def skipping_consensus(consensus, clock):
    """One that may skip exchanges. Its world is a single process, so its sums are those of this process."""
    skipping = StopConsensus(num_processes=1, can_skip_exchange=lambda: True)
    skipping.is_needed, skipping._group = True, None
    return skipping


def make_updates(consensus, clock, num_updates, seconds, expected_weight=8.0):
    """Make updates that take this long each, and return the indices of those with an exchange."""
    exchanged = []
    for update in range(num_updates):
        consensus.start_exchange(8.0, 8, expected_weight)
        if consensus._skipped is None:
            exchanged.append(update)
        assert finish_step(consensus) == (8.0, 8)
        clock.seconds += seconds
    return exchanged


def test_fast_updates_exchange_ten_times_a_second(skipping_consensus, clock):
    assert make_updates(skipping_consensus, clock, 100, seconds=2**-10) == [0, 1, 3, 7, 15, 31, 63]
    assert make_updates(skipping_consensus, clock, 1000, seconds=2**-10) == list(range(27, 1000, 102))


@pytest.mark.parametrize("seconds", [0.06, 0.1, 5.0])
def test_slow_updates_exchange_each_time(skipping_consensus, clock, seconds):
    assert make_updates(skipping_consensus, clock, 10, seconds) == list(range(10))


def test_updates_without_an_expected_weight_exchange_each_time(skipping_consensus, clock):
    make_updates(skipping_consensus, clock, 100, seconds=0.001)
    assert make_updates(skipping_consensus, clock, 5, seconds=0.001, expected_weight=None) == list(range(5))


def test_updates_exchange_each_time_once_a_rank_forbids_to_skip(skipping_consensus, clock):
    make_updates(skipping_consensus, clock, 100, seconds=0.001)
    skipping_consensus._can_skip_exchange = lambda: False
    make_updates(skipping_consensus, clock, 100, seconds=0.001)
    assert make_updates(skipping_consensus, clock, 5, seconds=0.001) == list(range(5))


def test_a_request_waits_until_an_exchange_is_not_skipped(skipping_consensus, clock):
    make_updates(skipping_consensus, clock, 32, seconds=0.001)
    skipping_consensus.request_stop(StopTrainingError("enough"))
    for _ in range(31):  # skipped
        skipping_consensus.start_exchange(8.0, 8, 8.0)
        finish_step(skipping_consensus)
    skipping_consensus.start_exchange(8.0, 8, 8.0)
    skipping_consensus.finish_exchange()
    with pytest.raises(StopTrainingError, match="enough"):
        skipping_consensus.raise_if_stopped()


def test_a_skipped_exchange_returns_the_numbers_of_all_processes(skipping_consensus, clock):
    make_updates(skipping_consensus, clock, 32, seconds=0.001)
    skipping_consensus._num_processes = 3
    skipping_consensus.start_exchange(8.0, 8, 8.0)
    assert skipping_consensus.finish_exchange() == (24.0, 24)


def test_an_unexpected_weight_in_a_skipped_exchange_is_an_error(skipping_consensus, clock):
    make_updates(skipping_consensus, clock, 32, seconds=0.001)
    with pytest.raises(RuntimeError, match=r"hold 7 samples\. Expected 8 samples.*return the actual `batch_size`"):
        skipping_consensus.start_exchange(7, 7, 8.0)


# --- which runs may skip exchanges -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"events_without_listeners": {"a"}}, False),
        ({"yields_full_batches": False}, False),
        ({"is_step_overridden": True}, False),
    ],
)
def test_exchanges_are_skipped_only_if_weights_are_known_and_nothing_in_a_step_requests_a_stop(change, expected):
    facts = {"events_without_listeners": {"a", "b", "c"}, "step_events": {"a", "b"}}
    facts |= {"yields_full_batches": True, "is_step_overridden": False}
    assert can_skip_exchange(**{**facts, **change}) is expected


def test_a_method_is_overridden_by_a_subclass_or_on_the_instance():
    methods = ("optimizer_step", "scheduler_step")
    overriding = type("Overriding", (Trainer,), {"scheduler_step": lambda self: None})
    assert not overrides_any(make_trainer(), methods)
    assert not overrides_any(make_trainer(cls=TrainerWithTimmScheduler), methods)  # the library's own
    assert overrides_any(make_trainer(cls=overriding), methods)
    assert not overrides_any(make_trainer(cls=overriding), methods[:1])
    trainer = make_trainer()
    trainer.optimizer_step = trainer.optimizer_step
    assert overrides_any(trainer, methods)


@pytest.fixture
def created(monkeypatch):
    """Every `StopConsensus` that is created during the test; that of a run is the last."""
    created, initialize = [], StopConsensus.__init__

    def record(self, *args, **kwargs):
        initialize(self, *args, **kwargs)
        created.append(self)

    monkeypatch.setattr(StopConsensus, "__init__", record)
    return created


@pytest.fixture
def allows_skipping(created):
    """Returns whether a run lets exchanges be skipped, as of the end of its epoch."""

    def run(trainer, dataset=16, **kwargs):
        answers = []
        probe = Probe(on_train_epoch_end=lambda trainer: answers.append(created[-1]._can_skip_exchange()))
        trainer.callback_handler.add_callback(probe)
        train(trainer, dataset, **kwargs)
        return answers[-1]

    return run


@pytest.mark.parametrize(
    "dataset", [make_dataset(8), Samples(make_dataset(8)), Subset(Samples(make_dataset(9)), range(8))]
)
def test_runs_with_the_librarys_own_steps_skip_exchanges(allows_skipping, dataset):
    assert allows_skipping(make_trainer(callbacks=get_default_callbacks()), dataset)
    assert allows_skipping(make_trainer(cls=TrainerWithTimmScheduler), dataset)


class TwiceEach(Samples):
    def __getitems__(self, indices):
        return [self[index] for index in indices for _ in range(2)]


class Backwards(Sampler):
    def __len__(self):
        return 8

    def __iter__(self):
        return iter(range(7, -1, -1))


@pytest.mark.parametrize(
    ("dataset", "kwargs"),
    [
        (TwiceEach(make_dataset(8)), {}),
        (Subset(TwiceEach(make_dataset(8)), range(8)), {}),
        (Stream(make_dataset(8)), {}),
        (Samples(make_dataset(8)), {"collate_fn": lambda samples: default_collate(samples[:1])}),
        (make_dataset(8), {"train_dataloader_kwargs": {"sampler": Backwards(), "shuffle": False}}),
    ],
    ids=["two samples per index", "a subset of those", "a stream", "a collate function", "a custom sampler"],
)
def test_runs_with_batches_of_unknown_size_exchange_each_time(allows_skipping, dataset, kwargs):
    assert not allows_skipping(make_trainer(), dataset, **kwargs)


# The lists of events and methods of a step are not taken from the source, but from what a run does.


def events_of_a_step():
    """Return the events that a run fires from the start of a training step to its end, log points aside."""
    recorder = EventRecorder()
    train(make_trainer(callbacks=[recorder]), num_epochs=2, eval_dataset=make_dataset(8))
    events, is_in_step = set(), False
    for event in recorder.log:
        is_in_step = is_in_step or event == "on_train_step_start"
        if is_in_step:
            events.add(event)
        is_in_step = is_in_step and event != "on_train_step_end"
    return events


def methods_of_a_step():
    """Return the methods of the trainer that a training step consists of, and those that a subclass may override.

    A step consists of the methods that `_run_train_epoch` calls once per batch. In them, a subclass may override any
    method whose name does not begin with ``_loop_``.
    """
    trainer, num_steps = make_trainer(), 4
    functions = {name: inspect.getattr_static(Trainer, name) for name in dir(Trainer)}
    names = {function.__code__: name for name, function in functions.items() if inspect.isfunction(function)}
    calls = []  # each call as the names of the methods that are active, the innermost first

    def record(frame, event, _):
        if event == "call" and frame.f_code in names:
            active = []
            while frame is not None:
                active.append(names.get(frame.f_code))
                frame = frame.f_back
            calls.append(active)

    profiler = sys.getprofile()
    sys.setprofile(record)
    try:
        kwargs = {"gradient_clip_norm": 1.0, "create_scheduler_fn": lambda optimizer: StepLR(optimizer, 1)}
        train(trainer, make_dataset(4 * num_steps), **kwargs)
    finally:
        sys.setprofile(profiler)
    direct = [active[0] for active in calls if active[1] == "_run_train_epoch"]
    parts = {name for name in direct if direct.count(name) == num_steps}
    inner = {active[0] for active in calls if parts.intersection(active[1:])}
    return parts | {name for name in inner if not name.startswith(("_loop_", "__"))}


def test_the_listed_step_events_are_those_that_a_step_fires():
    assert set(STEP_EVENTS) == events_of_a_step()


def test_the_listed_step_methods_are_those_that_a_step_calls():
    assert set(STEP_METHODS) == methods_of_a_step()


def test_a_listener_to_any_event_of_a_step_makes_ranks_exchange_each_time(allows_skipping):
    events = events_of_a_step()
    assert len(events) >= 5
    for event in events:
        probe = Probe(**{event: lambda trainer, **_: None})
        assert not allows_skipping(make_trainer(callbacks=[probe])), event


def test_overriding_any_method_of_a_step_makes_ranks_exchange_each_time(allows_skipping):
    methods = methods_of_a_step()
    assert len(methods) >= 10
    for name in methods:
        method = getattr(Trainer, name)

        def call(self, *args, method=method, **kwargs):
            return method(self, *args, **kwargs)

        assert not allows_skipping(make_trainer(cls=type("Overriding", (Trainer,), {name: call}))), name
        trainer = make_trainer()
        setattr(trainer, name, getattr(trainer, name))
        assert not allows_skipping(trainer), name
