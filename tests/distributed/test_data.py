"""The data of two and three real processes on gloo: each sample is used once, wherever it comes from and in any form.

Each number of processes is started once. A test checks the results of the case of its name in `_data_cases.py`.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed

CASES = Path(__file__).with_name("_data_cases.py")
TIMEOUT_SECONDS = 240
"""Far more than the cases need. A run that takes longer is stuck."""

OWN = "The processes have different data"


@pytest.fixture(scope="module", params=[2, 3], ids="{} processes".format)
def num_processes(request):
    return request.param


def by_rank(results):
    """Return the results of each part of a case, by rank."""
    return {name: [result[name] for result in results] for name in results[0]}


def rows_seen(runs, num_epochs=1):
    """Return what all ranks saw in each epoch, sorted; they made equally many steps."""
    steps = {len(run["seen"]) for run in runs}
    assert len(steps) == 1, "the ranks made different numbers of steps"
    num_steps = steps.pop() // num_epochs
    return [
        sorted(row for run in runs for batch in run["seen"][first : first + num_steps] for row in batch)
        for first in range(0, num_steps * num_epochs, num_steps)
    ]


def assert_told_of_own_data(runs, is_told=True):
    for run in runs:
        assert any(text.startswith(OWN) for text in run["told"]) is is_told, run["told"]


def assert_resumed(results):
    """Assert that each rank saw in the resumed runs what it saw in the rest of the complete one."""
    for result in results:
        assert len(result) > 0
        for complete, rest in result:
            assert rest == complete


# --- data of its own for each process ------------------------------------------------------------------------------


def test_data_of_its_own_for_each_process_are_all_used(results, num_processes):
    for (sizes, kind, evaluated), runs in by_rank(results).items():
        total = sum(sizes[:num_processes])
        rows = sorted(itertools.chain(*(run["seen"] for run in runs)))
        assert rows == list(range(total)), f"{kind} of {sizes}, evaluated: {evaluated}"
        if not evaluated:
            assert [run["samples"] for run in runs] == [total] * num_processes
            most = math.ceil(max(sizes[:num_processes]) / 2)
            assert {(run["updates"], run["planned"]) for run in runs} == {(most, most)}
        name = "evaluation_loss" if evaluated else "train_loss_epoch"
        assert {run["losses"][name] for run in runs} == {(total - 1) / 2}
        assert_told_of_own_data(runs)


def test_data_of_its_own_are_resumed_exactly(results):
    for num_workers in results[0]:
        assert_resumed([result[num_workers] for result in results])


def test_no_two_draws_are_alike_although_each_process_has_its_own_data(results, num_processes):
    drawn = [value for result in results for value in result]
    assert len(drawn) == len(set(drawn)) == 2 * sum((6, 4, 4)[:num_processes])


def test_a_process_without_data_is_an_error_on_all(results, num_processes):
    assert results == [results[0]] * num_processes
    assert f"{num_processes - 1} of the {num_processes} processes have no batch at all" in results[0]


def test_the_same_data_are_not_taken_for_different_ones(results):
    for kind, runs in by_rank(results).items():
        rows = sorted(itertools.chain(*(run["seen"] for run in runs)))
        assert rows == list(range(12)), kind
        assert_told_of_own_data(runs, is_told=False)


# --- divided by a sampler ------------------------------------------------------------------------------------------


def test_samples_that_a_sampler_has_divided_are_not_divided_again(results, num_processes):
    for (num_samples, name, as_loader), runs in by_rank(results).items():
        first, second = rows_seen(runs, num_epochs=2)
        place = f"{num_samples} samples, {name}, as loader: {as_loader}"
        if name == "distributed":  # it repeats samples so that all ranks have equally many
            assert set(first) == set(second) == set(range(num_samples)), place
            assert len(first) == num_processes * math.ceil(num_samples / num_processes), place
            assert runs[0]["seen"][: len(runs[0]["seen"]) // 2] != runs[0]["seen"][len(runs[0]["seen"]) // 2 :]
        else:
            assert first == second == list(range(num_samples)), place
        assert_told_of_own_data(runs, is_told=False)


def test_a_sampler_that_divides_without_saying_so_is_an_error_on_all(results, num_processes):
    assert results == [results[0]] * num_processes
    assert len(results[0]) == 2
    for text in results[0]:
        assert "draw different samples from the same data" in text
        assert "`num_replicas` and `rank`" in text


def test_a_divided_order_is_resumed_exactly(results):
    assert_resumed(results)


# --- streams -------------------------------------------------------------------------------------------------------


def test_a_stream_may_hold_anything(results, num_processes):
    for (form, num_samples, num_workers, evaluated), runs in by_rank(results).items():
        assert rows_seen(runs) == [list(range(num_samples))], (form, num_samples, num_workers, evaluated)
        name = "evaluation_loss" if evaluated else "train_loss_epoch"
        for run in runs:
            assert run["losses"][name] == pytest.approx((num_samples - 1) / 2)
        if not evaluated:
            assert {run["samples"] for run in runs} == {num_samples}


def test_a_stream_leaves_out_what_drop_last_demands(results, num_processes):
    num_steps = 4 // num_processes
    assert sorted(row for result in results for batch in result for row in batch) == list(
        range(2 * num_steps * num_processes)
    )


def test_a_stream_of_ready_batches_is_divided_by_batches(results):
    rows = Counter(row for result in results for batch in result for row in batch)
    assert rows == {float(number): 1 + number for number in range(5)}


def test_an_error_of_a_stream_is_raised_on_all(results, num_processes):
    for result in results:
        assert len(result) == 2
        assert all("sample 5" in text for _, text in result)
        assert result[0][0] == "KeyError"


def test_streams_are_resumed_exactly(results):
    for name in results[0]:
        assert_resumed([result[name] for result in results])


def test_a_stream_that_divides_itself_is_read_by_each_process(results, num_processes):
    for name, sizes in (("attributes", (12, 13)), ("files", (13,)), ("file", (sum((6, 4, 3)[:num_processes]),))):
        for number, size in enumerate(sizes):
            runs = [result[name][number] for result in results]
            assert rows_seen(runs) == [list(range(size))], (name, size)
            assert_told_of_own_data(runs, is_told=name != "attributes")
    assert_resumed([result["resumed"] for result in results])


# --- iterables of batches, and subclasses of DataLoader -------------------------------------------------------------


def test_iterables_of_batches_may_have_other_lengths_on_each_process(results, num_processes):
    for (sizes, cls, evaluated), runs in by_rank(results).items():
        expected = sorted([*range(sum(sizes[:num_processes]))] * 2)
        num_epochs = 1 if evaluated else 2
        assert rows_seen(runs, num_epochs) == [expected] * num_epochs, (sizes, cls, evaluated)
        if not evaluated and cls == "SizedBatches":
            assert {run["planned"] for run in runs} == {max(sizes[:num_processes])}


def test_a_loader_with_its_own_iteration_is_divided_by_batches(results):
    parts = by_rank(results)
    for num_workers in (0, 1):
        assert rows_seen(parts["Short", num_workers], 2) == [list(range(10))] * 2
        assert rows_seen(parts["WithState", num_workers], 2) == [list(range(10))] * 2
        assert rows_seen(parts["Negating", num_workers], 2) == [sorted(-row for row in range(12))] * 2
    assert {-row for row in rows_seen(parts["divided"])[0]} == set(range(13))
    for name in ("Short", "Negating", "WithState"):
        assert_resumed(parts[name, "resumed"])


# --- orders and draws of map-style data ----------------------------------------------------------------------------


def test_a_batch_sampler_may_estimate_its_length_and_yield_iterators(results, num_processes):
    num_steps = math.ceil(7 / num_processes)
    for (length, accumulation, evaluated), runs in by_rank(results).items():
        num_epochs = 1 if evaluated else 2
        assert rows_seen(runs, num_epochs) == [list(range(14))] * num_epochs, (length, accumulation, evaluated)
        if not evaluated:
            assert {run["updates"] for run in runs} == {2 * math.ceil(num_steps / accumulation)}


def test_an_index_drawn_again_gets_new_numbers(results):
    for (num_workers, batch_size), seen in by_rank(results).items():
        drawn = [value for batches in seen for batch in batches for value in batch]
        assert len(drawn) == len(set(drawn)) == 2 * 26, (num_workers, batch_size)


def test_ready_batches_of_a_map_style_dataset_are_divided(results):
    parts = by_rank(results)
    assert_resumed(parts.pop("resumed"))
    for (num_workers, num_batches, evaluated), runs in parts.items():
        num_epochs = 1 if evaluated else 2
        expected = [sorted([*range(num_batches)] * 2)] * num_epochs
        assert rows_seen(runs, num_epochs) == expected, (num_workers, num_batches, evaluated)
