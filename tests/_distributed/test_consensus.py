"""What processes agree on before each update, in a group of one; two and three are in `distributed/`."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest
import torch
from torch import distributed
from torch.utils.data import Sampler, Subset, default_collate

from _support import Probe, Samples, Stream, make_dataset, make_trainer, train
from pytorch_accelerated import Trainer
from pytorch_accelerated._distributed import consensus
from pytorch_accelerated._distributed.consensus import StopConsensus, can_skip_exchange
from pytorch_accelerated._signals import RunInterruptedError
from pytorch_accelerated.callbacks import get_default_callbacks
from pytorch_accelerated.exceptions import NonFiniteLossError, StopTrainingError
from pytorch_accelerated.trainer import TrainerWithTimmScheduler


@pytest.fixture
def agreement():
    """One that talks, to itself alone, over a true group on gloo."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield StopConsensus(num_processes=2)
    distributed.destroy_process_group()


@pytest.mark.parametrize("num_processes", [1, 2])
def test_without_a_process_group_nothing_is_sent(num_processes):
    agreement = StopConsensus(num_processes)
    assert not agreement.is_needed
    agreement.sync()
    assert not distributed.is_initialized()


@pytest.mark.parametrize("weight", [3, 2.5, torch.tensor(3), torch.tensor(2.5)])
def test_the_sums_of_an_update(agreement, weight):
    assert agreement.is_needed
    for _ in range(2):  # an exchange leaves nothing for the next
        agreement.start_exchange(weight, num_samples=8)
        total, num_samples = agreement.finish_exchange()
        assert (total, num_samples) == (float(weight), 8)
        assert type(num_samples) is int


def test_numbers_of_samples_are_exact(agreement):
    many = 2**40 + 1
    agreement.start_exchange(0.0, many)
    assert agreement.finish_exchange() == (0.0, many)


@pytest.mark.parametrize("error", [StopTrainingError, NonFiniteLossError])
def test_a_request_is_raised_when_all_have_heard_of_it(agreement, error):
    agreement.request_stop(error("enough"))
    agreement.start_exchange(1.0, 1)
    with pytest.raises(error, match=r"^enough$"):
        finish_step(agreement)
    agreement.start_exchange(1.0, 1)
    assert finish_step(agreement) == (1.0, 1)  # it has been dealt with


def finish_step(agreement):
    numbers = agreement.finish_exchange()
    agreement.raise_if_stopped()
    return numbers


def test_an_update_with_a_bad_loss_is_not_made_but_one_before_a_stop_is(agreement):
    agreement.request_stop(StopTrainingError("enough"))
    agreement.start_exchange(1.0, 1)
    assert agreement.finish_exchange() == (1.0, 1)
    with pytest.raises(StopTrainingError, match="enough"):
        agreement.raise_if_stopped()
    agreement.request_stop(NonFiniteLossError("bad"))
    agreement.start_exchange(1.0, 1)
    with pytest.raises(NonFiniteLossError, match="bad"):
        agreement.finish_exchange()


def test_a_request_made_while_numbers_travel_waits_for_the_next_exchange(agreement):
    agreement.start_exchange(1.0, 1)
    agreement.request_stop(StopTrainingError("late"))
    assert agreement.finish_exchange() == (1.0, 1)
    with pytest.raises(StopTrainingError, match="late"):
        agreement.sync()


def test_settling_ends_the_run_or_does_nothing(agreement):
    agreement.sync()
    agreement.request_stop(StopTrainingError("enough"))
    with pytest.raises(StopTrainingError, match="enough"):
        agreement.sync()
    agreement.sync()


def test_an_error_goes_before_a_wish_and_the_first_before_the_second(agreement):
    for reason in (StopTrainingError("stop"), NonFiniteLossError("first"), NonFiniteLossError("second")):
        agreement.request_stop(reason)
    with pytest.raises(NonFiniteLossError, match="first"):
        agreement.sync()


def test_of_bad_losses_the_earliest_is_raised_also_one_that_was_not_noticed_yet(agreement):
    agreement._find_bad_loss = lambda: NonFiniteLossError("of step 3", 3)
    for step in (9, 5):
        agreement.request_stop(NonFiniteLossError(f"of step {step}", step))
    with pytest.raises(NonFiniteLossError, match="of step 3") as raised:
        agreement.sync()
    assert raised.value.step == 3
    agreement.request_stop(StopTrainingError("enough"))  # for which nobody looks at losses
    with pytest.raises(StopTrainingError, match="enough"):
        agreement.sync()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_number_of_a_signal_travels_with_the_request(agreement, number):
    agreement.request_stop(RunInterruptedError(number))
    with pytest.raises(RunInterruptedError, match=r"^interrupted by ") as raised:
        agreement.sync()
    assert raised.value.signal_number == number


def test_a_callback_goes_before_a_signal(agreement):
    """The signal can have its consequence later; the callback would not ask again in the run that is resumed."""
    agreement.request_stop(RunInterruptedError(signal.SIGTERM))
    agreement.request_stop(StopTrainingError("enough"))
    with pytest.raises(StopTrainingError, match=r"^enough$"):
        agreement.sync()


def test_a_request_that_is_repeated_is_sent_once(agreement, monkeypatch):
    sent = []

    def receive(reasons, own, group):
        sent.append(own)
        reasons[:] = [own]

    monkeypatch.setattr(consensus.distributed, "all_gather_object", receive)
    for _ in range(3):
        agreement.request_stop(RunInterruptedError(signal.SIGUSR1))
    with pytest.raises(RunInterruptedError):
        agreement.sync()
    assert sent == [[("RunInterruptedError", (signal.SIGUSR1,))]]


def test_of_all_processes_reasons_the_gravest_is_raised(agreement, monkeypatch):
    """What the other process sent is put in the place of the exchange; this process has asked for nothing."""

    def receive(reasons, own, group):
        assert own == []
        reasons[:] = [[("StopTrainingError", ("of rank 0",))], [("NonFiniteLossError", ("of rank 1", 4))]]

    monkeypatch.setattr(consensus.distributed, "all_gather_object", receive)
    agreement.start_exchange(0.0, 0)
    agreement._numbers[2] = 2
    with pytest.raises(NonFiniteLossError, match="of rank 1"):
        agreement.finish_exchange()


# --- exchanges that are left out ---------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """Seconds that only the test changes."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(consensus.time, "monotonic", lambda: now.seconds)
    return now


@pytest.fixture
def foreseeable(agreement, clock):
    """One that may leave exchanges out; its world is one process, so that it thinks of only that one."""
    return StopConsensus(num_processes=1, can_skip_exchange=lambda: True), clock


def exchanged(agreement, clock, num_updates, seconds, foreseen_weight=8.0):
    """Make updates that take so long, and return the numbers of those with an exchange."""
    exchanged = []
    for update in range(num_updates):
        agreement.start_exchange(8.0, 8, foreseen_weight)
        if agreement._left_out is None:
            exchanged.append(update)
        assert agreement.finish_exchange() == (8.0, 8)
        agreement.raise_if_stopped()
        clock.seconds += seconds
    return exchanged


@pytest.fixture
def pair(foreseeable):
    agreement, clock = foreseeable
    agreement.is_needed, agreement._group = True, None
    return agreement, clock


def test_fast_updates_exchange_some_times_a_second(pair):
    assert exchanged(*pair, 100, seconds=2**-10) == [0, 1, 3, 7, 15, 31, 63]
    assert exchanged(*pair, 1000, seconds=2**-10) == list(range(27, 1000, 102))


@pytest.mark.parametrize("seconds", [0.06, 0.1, 5.0])
def test_slow_updates_exchange_each_time(pair, seconds):
    assert exchanged(*pair, 10, seconds) == list(range(10))


def test_updates_that_are_not_foreseen_exchange_each_time(pair):
    agreement, clock = pair
    exchanged(agreement, clock, 100, seconds=0.001)
    assert exchanged(agreement, clock, 5, seconds=0.001, foreseen_weight=None) == list(range(5))
    agreement._can_skip_exchange = lambda: False
    exchanged(agreement, clock, 100, seconds=0.001)
    assert exchanged(agreement, clock, 5, seconds=0.001) == list(range(5))


def test_a_request_waits_for_the_next_exchange(pair):
    agreement, clock = pair
    exchanged(agreement, clock, 32, seconds=0.001)
    agreement.request_stop(StopTrainingError("enough"))
    for _ in range(31):  # that are left out
        agreement.start_exchange(8.0, 8, 8.0)
        agreement.finish_exchange()
        agreement.raise_if_stopped()
    agreement.start_exchange(8.0, 8, 8.0)
    agreement.finish_exchange()
    with pytest.raises(StopTrainingError, match="enough"):
        agreement.raise_if_stopped()


def test_the_numbers_of_an_exchange_that_is_left_out_are_those_of_all_processes(pair):
    agreement, clock = pair
    exchanged(agreement, clock, 32, seconds=0.001)
    agreement._num_processes = 3
    agreement.start_exchange(8.0, 8, 8.0)
    assert agreement.finish_exchange() == (24.0, 24)


def test_a_weight_that_nobody_foresaw_is_an_error(pair):
    agreement, clock = pair
    exchanged(agreement, clock, 32, seconds=0.001)
    with pytest.raises(RuntimeError, match="hold 7 samples, but the loader promised 8"):
        agreement.start_exchange(7, 7, 8.0)


def foreseeable_after(trainer, dataset=None, **kwargs):
    """Whether exchanges could be left out, as of the last step of a run."""
    answers = []
    trainer.callback_handler.add_callback(Probe(on_train_epoch_end=lambda t: answers.append(can_skip_exchange(t))))
    train(trainer, dataset, **kwargs)
    return answers[-1]


@pytest.mark.parametrize(
    "dataset", [make_dataset(8), Samples(make_dataset(8)), Subset(Samples(make_dataset(9)), range(8))]
)
def test_a_run_of_the_librarys_own_steps_is_foreseeable(dataset):
    assert foreseeable_after(make_trainer(callbacks=get_default_callbacks()), dataset)
    assert foreseeable_after(make_trainer(cls=TrainerWithTimmScheduler), dataset)


def test_what_may_end_a_run_in_a_step_or_weigh_it_otherwise_is_not(monkeypatch):
    for event in consensus._EVENTS_OF_A_STEP:
        assert not foreseeable_after(make_trainer(callbacks=[Probe(**{event: lambda trainer, **_: None})]))
    for name in consensus._METHODS_OF_A_STEP:
        method = getattr(Trainer, name)
        own = type("Own", (Trainer,), {name: lambda self, *args, m=method, **kwargs: m(self, *args, **kwargs)})
        assert not foreseeable_after(make_trainer(cls=own))
        trainer = make_trainer()
        setattr(trainer, name, getattr(trainer, name))
        assert not foreseeable_after(trainer)


class InPairs(Samples):
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
        (InPairs(make_dataset(8)), {}),
        (Subset(InPairs(make_dataset(8)), range(8)), {}),
        (Stream(make_dataset(8)), {}),
        (Samples(make_dataset(8)), {"collate_fn": lambda samples: default_collate(samples[:1])}),
        (make_dataset(8), {"train_dataloader_kwargs": {"sampler": Backwards(), "shuffle": False}}),
    ],
)
def test_batches_of_which_the_sizes_are_not_known_are_not(dataset, kwargs):
    assert not foreseeable_after(make_trainer(), dataset, **kwargs)


@pytest.mark.parametrize("error", [type("MyStop", (StopTrainingError,), {}), type("MyNaN", (NonFiniteLossError,), {})])
def test_a_subclass_is_raised_as_what_it_is_derived_from(agreement, error):
    agreement.request_stop(error("enough"))
    with pytest.raises(error.__base__, match="enough"):
        agreement.sync()


@pytest.mark.parametrize(("backend", "num_groups"), [("gloo", 0), ("nccl", 1)])
def test_beside_a_backend_of_devices_the_numbers_have_a_group_on_hosts(backend, num_groups, monkeypatch):
    """One for all runs, as each holds connections; over gloo the processes' own group will do."""
    groups = []

    def new_group(**settings):
        groups.append(settings["backend"])
        return f"group {len(groups)}"

    fake = SimpleNamespace(
        is_initialized=lambda: True,
        get_backend=lambda: backend,
        new_group=new_group,
        group=SimpleNamespace(WORLD=object()),
    )
    monkeypatch.setattr(consensus, "distributed", fake)
    agreements = [StopConsensus(2), StopConsensus(2)]
    assert groups == ["gloo"] * num_groups
    assert {agreement._group for agreement in agreements} == {"group 1" if num_groups else None}
    fake.group.WORLD = object()  # the processes have been connected anew
    assert StopConsensus(2)._group == ("group 2" if num_groups else None)
