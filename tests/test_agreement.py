"""What processes agree on before each update, in a group of one; two and three are in `distributed/`."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest
import torch
from torch import distributed

from pytorch_accelerated import _agreement
from pytorch_accelerated._agreement import Agreement
from pytorch_accelerated._stopping import RunInterruptedError
from pytorch_accelerated.exceptions import NonFiniteLossError, StopTrainingError


@pytest.fixture
def agreement():
    """One that talks, to itself alone, over a true group on gloo."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield Agreement(num_processes=2)
    distributed.destroy_process_group()


@pytest.mark.parametrize("num_processes", [1, 2])
def test_without_a_process_group_nothing_is_sent(num_processes):
    agreement = Agreement(num_processes)
    assert not agreement.is_needed
    agreement.settle()
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
    agreement.request_end(error("enough"))
    agreement.start_exchange(1.0, 1)
    with pytest.raises(error, match=r"^enough$"):
        finish_step(agreement)
    agreement.start_exchange(1.0, 1)
    assert finish_step(agreement) == (1.0, 1)  # it has been dealt with


def finish_step(agreement):
    numbers = agreement.finish_exchange()
    agreement.stop_if_agreed()
    return numbers


def test_an_update_with_a_bad_loss_is_not_made_but_one_before_a_stop_is(agreement):
    agreement.request_end(StopTrainingError("enough"))
    agreement.start_exchange(1.0, 1)
    assert agreement.finish_exchange() == (1.0, 1)
    with pytest.raises(StopTrainingError, match="enough"):
        agreement.stop_if_agreed()
    agreement.request_end(NonFiniteLossError("bad"))
    agreement.start_exchange(1.0, 1)
    with pytest.raises(NonFiniteLossError, match="bad"):
        agreement.finish_exchange()


def test_a_request_made_while_numbers_travel_waits_for_the_next_exchange(agreement):
    agreement.start_exchange(1.0, 1)
    agreement.request_end(StopTrainingError("late"))
    assert agreement.finish_exchange() == (1.0, 1)
    with pytest.raises(StopTrainingError, match="late"):
        agreement.settle()


def test_settling_ends_the_run_or_does_nothing(agreement):
    agreement.settle()
    agreement.request_end(StopTrainingError("enough"))
    with pytest.raises(StopTrainingError, match="enough"):
        agreement.settle()
    agreement.settle()


def test_an_error_goes_before_a_wish_and_the_first_before_the_second(agreement):
    for reason in (StopTrainingError("stop"), NonFiniteLossError("first"), NonFiniteLossError("second")):
        agreement.request_end(reason)
    with pytest.raises(NonFiniteLossError, match="first"):
        agreement.settle()


def test_of_bad_losses_the_earliest_is_raised_also_one_that_was_not_noticed_yet(agreement):
    agreement._find_bad_loss = lambda: NonFiniteLossError("of step 3", 3)
    for step in (9, 5):
        agreement.request_end(NonFiniteLossError(f"of step {step}", step))
    with pytest.raises(NonFiniteLossError, match="of step 3") as raised:
        agreement.settle()
    assert raised.value.step == 3
    agreement.request_end(StopTrainingError("enough"))  # for which nobody looks at losses
    with pytest.raises(StopTrainingError, match="enough"):
        agreement.settle()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_number_of_a_signal_travels_with_the_request(agreement, number):
    agreement.request_end(RunInterruptedError(number))
    with pytest.raises(RunInterruptedError, match=r"^interrupted by ") as raised:
        agreement.settle()
    assert raised.value.signal_number == number


def test_a_callback_goes_before_a_signal(agreement):
    """The signal can have its consequence later; the callback would not ask again in the run that is resumed."""
    agreement.request_end(RunInterruptedError(signal.SIGTERM))
    agreement.request_end(StopTrainingError("enough"))
    with pytest.raises(StopTrainingError, match=r"^enough$"):
        agreement.settle()


def test_a_request_that_is_repeated_is_sent_once(agreement, monkeypatch):
    sent = []

    def receive(reasons, own, group):
        sent.append(own)
        reasons[:] = [own]

    monkeypatch.setattr(_agreement.distributed, "all_gather_object", receive)
    for _ in range(3):
        agreement.request_end(RunInterruptedError(signal.SIGUSR1))
    with pytest.raises(RunInterruptedError):
        agreement.settle()
    assert sent == [[("RunInterruptedError", (signal.SIGUSR1,))]]


def test_of_all_processes_reasons_the_gravest_is_raised(agreement, monkeypatch):
    """What the other process sent is put in the place of the exchange; this process has asked for nothing."""

    def receive(reasons, own, group):
        assert own == []
        reasons[:] = [[("StopTrainingError", ("of rank 0",))], [("NonFiniteLossError", ("of rank 1", 4))]]

    monkeypatch.setattr(_agreement.distributed, "all_gather_object", receive)
    agreement.start_exchange(0.0, 0)
    agreement._numbers[2] = 2
    with pytest.raises(NonFiniteLossError, match="of rank 1"):
        agreement.finish_exchange()


@pytest.mark.parametrize("error", [type("MyStop", (StopTrainingError,), {}), type("MyNaN", (NonFiniteLossError,), {})])
def test_a_subclass_is_raised_as_what_it_is_derived_from(agreement, error):
    agreement.request_end(error("enough"))
    with pytest.raises(error.__base__, match="enough"):
        agreement.settle()


@pytest.mark.parametrize(("backend", "num_groups"), [("gloo", 0), ("nccl", 1)])
def test_beside_a_backend_of_devices_the_numbers_have_a_group_on_hosts(backend, num_groups, monkeypatch):
    """One for all runs, as each holds connections; over gloo the processes' own group will do."""
    groups, world = [], object()

    def new_group(**settings):
        groups.append(settings["backend"])
        return "the group"

    fake = SimpleNamespace(
        is_initialized=lambda: True,
        get_backend=lambda: backend,
        new_group=new_group,
        group=SimpleNamespace(WORLD=world),
    )
    monkeypatch.setattr(_agreement, "distributed", fake)
    agreements = [Agreement(2), Agreement(2)]
    assert groups == ["gloo"] * num_groups
    assert {agreement._group for agreement in agreements} == {"the group" if num_groups else None}
