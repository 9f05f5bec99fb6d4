"""Two and three real processes on gloo: their numbers are those of one process, and they all stop together.

Each number of processes is started once. A test checks the results of the case of its name in `_numbers_cases.py`. With
``REPEAT=20`` in the environment, the cases in which one process stops all of them run 20 times.
"""

from __future__ import annotations

import functools
import math
import time
from pathlib import Path

import pytest
import torch

import _measured
import _numbers
import _predicting
from _processes import NUM_REPEATS, launch, read_results
from _support import make_dataset

pytestmark = pytest.mark.distributed

CASES = Path(__file__).with_name("_numbers_cases.py")
TIMEOUT_SECONDS = 150 + 10 * NUM_REPEATS
"""Far more than the cases need. A run that takes longer is stuck."""


@pytest.fixture(scope="module", params=[2, 3], ids="{} processes".format)
def num_processes(request):
    return request.param


def assert_identical(results):
    """Assert that all ranks returned the same, bit by bit."""
    for result in results[1:]:
        assert plain(result) == plain(results[0])


def plain(value):
    """Return a form of the value that `==` can compare, even with NaN."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return (value.dtype, repr(value.tolist())) if isinstance(value, torch.Tensor) else repr(value)


def assert_close(left, right, tolerance):
    torch.testing.assert_close(left, right, rtol=0, atol=tolerance)


# --- metrics -----------------------------------------------------------------------------------------------------


@functools.cache
def metrics_of_one_process():
    return _measured.whole_run(1)


def test_metrics_are_those_of_one_process(results):
    """Of every kind: own, functions, of the whole set in the order of the dataset, and of torchmetrics."""
    assert_identical(results)
    expected = metrics_of_one_process()
    assert results[0].keys() == expected.keys()
    for name, values in expected.items():
        assert results[0][name] == pytest.approx(values, abs=2e-6), name


def test_metrics_are_the_same_after_a_resume(results, directory, tmp_path):
    """On as many processes bit by bit, and on one process up to rounding."""
    assert_identical(results)
    expected, resumed = results[0]
    for found in resumed:
        assert plain(found) == plain(expected)
    state = _measured.states_in(directory / "metrics_are_the_same_after_a_resume" / "measured")[1]
    trainer = _measured.resumable(tmp_path)
    with pytest.warns(UserWarning, match="configured differently"):
        found = _measured.train(trainer, resume_from=state, allow_other_num_processes=True)
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, abs=2e-6), name


# --- numbers -----------------------------------------------------------------------------------------------------


def test_gradients_and_losses_match_those_of_big_batches(results, num_processes, record_property):
    for differences in results:
        assert list(differences) == _numbers.GRID
        worst = max(gradients for gradients, _ in differences.values())
        record_property("largest difference of a gradient", worst)
        bad = {point: pair for point, pair in differences.items() if not max(pair) <= 1e-6}
        assert bad == {}
    print(_numbers.table_of(results[0], num_processes))


def test_the_fast_path_gives_the_same_bits(results):
    """As on Accelerate's own path, over a part of the grid; one process tries all of it."""
    for different in results:
        assert different == []


@functools.cache
def whole_run_of_one_process(batch_size, accumulation, scheduler):
    return _numbers.whole_run(batch_size, accumulation, scheduler)


@pytest.mark.parametrize("scheduler", ["cosine", "one cycle"])
def test_runs_match_those_of_one_process(results, num_processes, scheduler):
    """Total batches of the same size, split over processes and accumulation steps, with an order that is shuffled."""
    assert_identical(results)
    for accumulation in (1, 2):
        run = results[0][scheduler, accumulation]
        total = 4 * accumulation * num_processes
        for splits in (1, num_processes * accumulation):
            expected = whole_run_of_one_process(total // splits, splits, scheduler)
            assert_close(run["history"], expected["history"], 1e-5)
            assert_close(run["weights"], expected["weights"], 1e-5)
            assert run["rates"] == pytest.approx(expected["rates"], rel=1e-12)
            assert run["num_updates"] == expected["num_updates"] == 3 * math.ceil(61 / total)
        assert [len(values) for values in run["history"].values()] == [3, 3]


def test_a_schedule_ends_with_the_last_update_of_a_run(directory, num_processes):
    for result in read_results(directory, "runs_match_those_of_one_process", num_processes):
        for accumulation in (1, 2):
            run = result["one cycle", accumulation]
            assert run["num_scheduler_steps"] == run["num_updates"] == len(run["rates"])
            assert run["rates"] == pytest.approx(_numbers.one_cycle_rates(run["num_updates"]), rel=1e-9)
            assert run["rates"][-1] == pytest.approx(0.1 / 25 / 1e4, rel=1e-9)


def test_batches_of_different_weight_by_rank_are_averaged(results):
    assert_identical(results)
    assert max(results[0]) <= 1e-6, results[0]


def test_gradients_are_clipped_once_per_update(results):
    assert_identical(results)
    for (kind, limit, accumulation), result in results[0].items():
        place = f"{kind} {limit}, accumulation {accumulation}"
        assert max(result["before"], result["after"], result["weights"]) <= 1e-6, place
        num_updates = len(result["norms"])
        assert num_updates > 1, place
        if kind == "norm":
            assert result["norms"] == pytest.approx(result["expected norms"], rel=1e-5), place
        else:
            assert result["norms"] == [None] * num_updates, place
        assert (result["num_clipped"] > 0) == (limit < 1), place  # a low bound takes effect, a high one does not


def trained_by_hand(num_processes, accumulation, limit):
    """Train on the samples of each update as one batch."""
    dataset = make_dataset(29)
    model, loss_func = torch.nn.Linear(3, 1), _numbers.LossWithParameters()
    parameters = [*model.parameters(), *loss_func.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)
    optimizer = torch.optim.SGD(parameters, lr=0.1, weight_decay=0.1)
    size = num_processes * 2 * accumulation
    for _ in range(2):
        for start in range(0, 29, size):
            inputs, targets = dataset[start : start + size]
            optimizer.zero_grad()
            loss_func(model(inputs), targets).backward()
            if limit is not None:
                torch.nn.utils.clip_grad_norm_(parameters, limit)
            optimizer.step()
    return parameters


def test_parameters_outside_the_model_get_the_gradient_of_the_update(results, num_processes):
    assert_identical(results)
    for (accumulation, limit), parameters in results[0].items():
        expected = trained_by_hand(num_processes, accumulation, limit)
        for got, by_hand in zip(parameters, expected, strict=True):
            torch.testing.assert_close(got, by_hand, rtol=1e-5, atol=1e-6)
        assert torch.equal(parameters[-1], torch.ones(2))  # a parameter without a gradient is not even decayed


def test_a_second_optimizer_that_nobody_synchronizes_is_named(results):
    for messages in results:
        assert len(messages) == 1


def test_a_bad_gradient_on_one_rank_is_applied_on_none(results):
    assert_identical(results)
    for (kind, accumulation), (name, message, num_updates) in results[0].items():
        place = f"{kind}, accumulation {accumulation}"
        assert name == "NonFiniteLossError", place
        assert num_updates == 2, place
        is_gradient = kind == "gradient"
        start = "The gradient of `" if is_gradient else "The loss is nan in training, epoch 1, step "
        assert message.startswith(start), place
        assert is_gradient or ", rank 1. " in message, place
    assert len(results[0]) == 5


# --- evaluation --------------------------------------------------------------------------------------------------


def test_evaluation_and_prediction_use_each_sample_once(results):
    """In the loss, the metrics, the predictions and what a callback gathers, where also the order is right."""
    assert_identical(results)
    for (length, _), result in results[0].items():
        assert_close(result, _numbers.expected_evaluations(length), 1e-6)


def test_each_sample_of_a_stream_is_used_once(results):
    """In training, evaluation and prediction."""
    assert_identical(results)
    for length, result in results[0].items():
        assert result.pop("seen in training") == list(range(length))
        assert result.pop("num_samples") == length
        assert result.pop("registry") == 0
        assert_close(result, _numbers.expected_evaluations(length), 1e-6)


def test_an_epoch_has_the_length_that_the_dataset_has_at_its_start(results, num_processes):
    """The processes know when the last batch comes, whose sizes differ; the loader shows the user's dataset."""
    for result in results:
        assert result["shown"] == [True, True]
        assert len(result["gradients"]) == math.ceil(80 / (2 * num_processes)) + 11
        for gradient, expected in zip(result["gradients"], result["expected"], strict=True):
            assert_close(gradient, expected, 1e-6)


def test_several_datasets_are_evaluated_during_training(results):
    assert_identical(results)
    for name, length in (("long_eval", 65), ("short_eval", 1), ("train", 7)):
        expected = _numbers.expected_evaluations(length)
        assert results[0][f"{name}_loss_epoch"] == pytest.approx([expected["loss"]] * 2, abs=1e-6)
        assert results[0][f"{name}_accuracy"] == pytest.approx([expected["accuracy"]] * 2, abs=1e-6)


def test_predictions_are_returned_on_the_requested_processes(results):
    for rank, result in enumerate(results):
        for (on_every_process, _), outputs in result["outputs"].items():
            if on_every_process or rank == 0:
                assert_close(outputs, result["expected"], 1e-6)
            else:
                assert outputs is None


def test_outputs_of_any_form_are_predicted_in_order(results):
    """By models without anything to train, which DDP would refuse."""
    assert_identical(results)
    for (name, sizes), parts in results[0].items():
        assert parts == _predicting.expected_parts(name, sizes[0]), (name, sizes)


def test_outputs_that_cannot_be_joined_are_refused_on_all_processes(results):
    assert_identical(results)
    differing, missing, without_targets = results[0]
    assert "`outputs.rows` cannot be joined over the batches: batch 1 has the shape (2, 4)" in differing
    assert "`outputs` asks for ['logits'], but the model returned a `dict` with ['rows']" in missing
    assert "no targets were found in a batch, which is a Tensor" in without_targets


def test_a_language_model_predicts_in_order(results):
    if results[0] is None:
        pytest.skip("transformers is not installed")
    for result in results:
        assert result.pop("largest difference") < 1e-5
        assert result == _predicting.EXPECTED_OF_LANGUAGE_MODEL


def test_gather_keeps_rows_and_structure(results, num_processes):
    assert_identical(results)
    ranks = range(num_processes)
    result = results[0]
    by_rank = torch.tensor([rank for rank in ranks for _ in range(rank)])
    assert_close(result["uneven"], by_rank[:, None].expand(-1, 2).float(), 0)
    assert result["none on the main process"].tolist() == [number for rank in ranks for number in range(2 * rank)]
    assert result["none on the last process"].tolist() == [0, 1] * (num_processes - 1)
    assert result["none at all"].shape == (0, 3)
    assert result["no width"].shape == (sum(rank + 1 for rank in ranks), 0)
    nearly_padding = torch.full((sum(ranks) + num_processes, num_processes), -1)
    nearly_padding[[rank * (rank + 1) // 2 for rank in ranks], 0] = 5  # the first row of each process
    assert_close(result["equal to the padding"], nearly_padding, 0)
    assert len(result["padding only"]) == 0
    assert_close(result["true"], torch.ones(sum(ranks), dtype=torch.bool), 0)
    assert result["scalar"].tolist() == list(ranks)
    nested = result["nested"]
    assert [type(nested).__name__, type(nested["a"]), type(nested["b"]).__name__] == ["OrderedDict", list, "Pair"]
    assert_close(nested["a"][0], by_rank, 0)
    assert_close(nested["b"].left, torch.arange(num_processes), 0)
    padded = nested["b"].right[0]
    widths = by_rank + 1
    assert_close(padded, torch.where(torch.arange(num_processes) < widths[:, None], 1.0, 9.0), 0)


def test_gather_refuses_different_shapes_on_every_process(results, num_processes):
    """The message lists the shapes, and the processes can continue."""
    assert_identical(results)
    first, second = results[0]["messages"]
    assert str([[2, 1 + rank] for rank in range(num_processes)]) in first
    assert "`padding_value`" in first
    assert str([[rank, 2, 1 + rank] for rank in range(num_processes)]) in second
    assert results[0]["afterwards"].tolist() == list(range(num_processes))


# --- decisions ---------------------------------------------------------------------------------------------------


def test_a_non_finite_loss_of_one_rank_stops_all_at_the_same_update(results):
    """All raise the error of rank 1, whose loss was the first to be NaN or infinite."""
    assert_identical([[{**run, "weights": None} for run in result] for result in results])
    for result in results:
        assert len(result) == 6 * NUM_REPEATS
        for run in result:
            stage, epoch, step = run["place"]
            assert f"in {stage}, epoch {epoch}, step {step}, rank 1." in run["message"]
            num_good = 3 * (epoch - 1) + step // 2 if stage == "training" else 3 * epoch
            assert num_good <= run["num_updates"] <= 3 * epoch
            assert run["is_plain"]
            assert run["last_event"] == "on_exception"
            assert run["stop_reason"].startswith("NonFiniteLossError: ")


STOPPED_AFTER = {  # updates, including the current one; an epoch has two updates of two batches each
    "on_training_run_start": 0,
    "on_train_epoch_start": 3,
    "on_train_step_start": 1,
    "on_backward_start": 3,
    "on_optimizer_step_start": 2,
    "on_optimizer_step_end": 2,
    "on_train_step_end": 2,
    "on_train_epoch_end": 2,
    "on_eval_epoch_start": 2,
    "on_eval_step_start": 2,
    "on_eval_step_end": 2,
    "on_eval_epoch_end": 2,
    "on_training_run_epoch_end": 2,
}


def test_a_stop_of_one_rank_stops_all_at_the_same_update(results):
    """Rank 1 alone requests it. All stop for its reason and fire the same events."""
    runs_of_all = list(zip(*results, strict=True))
    assert len(runs_of_all) == len(STOPPED_AFTER) * NUM_REPEATS
    for runs in runs_of_all:
        event = runs[0]["event"]
        assert_identical(runs)
        assert runs[0]["stop_reason"] == f"rank 1 in {event}"
        assert runs[0]["progress"]["num_updates"] == STOPPED_AFTER[event], event
        assert runs[0]["log"][-2:] == ["on_stop_training_error", "on_training_run_end"], event


def test_a_stop_of_one_rank_ends_an_evaluation_on_all(results):
    assert_identical(results)
    assert results[0]["reason"] == "seen enough"
    assert results[0]["afterwards"] == "2 epochs are done"


def test_a_subclass_of_the_stop_error_stops_all_ranks(results):
    assert_identical(results)
    assert results[0] == {"reason": "mine", "num_updates": 2}


def test_callbacks_decide_by_the_metric_of_the_main_process(results):
    for runs in zip(*results, strict=True):
        assert_identical(runs)
        assert runs[0]["reason"] == "mine has not improved on 3.0 for 2 epochs"
        assert runs[0]["best"] == (3.0, 3)
        assert len(runs[0]["after_epoch"]) == 5
        for name, weight in runs[0]["weights"].items():
            assert torch.equal(weight, runs[0]["after_epoch"][2][name])


def test_callbacks_decide_by_a_metric_that_only_the_main_process_records(results):
    assert_identical(results)
    assert results[0] == {
        "reason": "mine has not improved on 1.0 for 1 epoch",
        "epochs": 2,
        "best average": 2,
    }


def test_metrics_of_some_ranks_are_averaged_over_their_batches(results):
    """The mean over the batches that have the metric; the first batch consists of samples 0 and 1."""
    assert results == [{"train_last": 3.0, "train_first": 0.5}] * len(results)


def test_ctrl_c_on_one_rank_interrupts_all(results):
    """Rank 1 alone gets the signal. All end their run and then raise `KeyboardInterrupt`."""
    assert_identical(results)
    assert len(results[0]) == NUM_REPEATS
    for run in results[0]:
        assert run["reason"] == "interrupted by Ctrl-C"
        assert run["last_event"] == "on_training_run_end"
        assert run["is_interrupted"]


def test_skipped_exchanges_change_no_bit(results):
    """The results are those with an exchange at each update, even if the last batches are short."""
    assert_identical(results)
    for skipping, always in results[0]:
        assert plain(skipping["result"]) == plain(always["result"])
        assert skipping["num_updates"] == always["num_updates"] == always["num_exchanges"]
        assert skipping["num_exchanges"] <= always["num_exchanges"]
    skipping, always = results[0][0]
    assert skipping["num_exchanges"] <= always["num_exchanges"] / 2


def test_a_stop_by_a_callback_of_one_rank_stops_all_at_the_same_update(results):
    assert_identical(results)
    assert results[0]["reason"] == "enough"
    assert results[0]["num_updates"] == 15  # the request of step 13 takes effect in the next update


def test_a_bad_loss_between_exchanges_is_named_on_all_ranks(results):
    assert_identical(results)
    assert len(results[0]) == NUM_REPEATS
    for message in results[0]:
        assert "nan" in message
        assert "epoch 1, step 5, rank 1" in message


def test_a_signal_between_exchanges_interrupts_all_ranks(results):
    """All stop after the same update, long before the end of the epoch."""
    assert_identical(results)
    for is_interrupted, progress, _ in results[0]:
        assert is_interrupted
        assert progress["num_epochs_completed"] == 0
        assert 40 <= progress["num_updates"] < 500


def test_the_limit_of_updates_ends_all_ranks(results):
    assert_identical(results)
    assert {limit: num_updates for limit, (num_updates, *_) in results[0].items()} == {1: 1, 3: 3, 4: 4, 7: 7, 99: 8}
    assert results[0][3][1] == "3 updates are done (`max_num_train_steps`)"
    assert results[0][99][1] == "2 epochs are done"


# --- the order of sums -------------------------------------------------------------------------------------------


def test_a_resumed_run_adds_up_gradients_in_the_order_of_the_uninterrupted_one(results):
    """The sum of three numbers depends on their order. It differs in the last bit if DDP forms other buckets."""
    for differing in results:
        assert differing == dict.fromkeys(differing, ([0] * 3, []))


def test_a_resumed_run_says_why_gradients_may_be_added_up_in_another_order(results, num_processes):
    for rank, printed in enumerate(results):
        for reason, texts in printed.items():
            assert len(texts) == (3 if num_processes == 3 else 0), (rank, reason)
            assert all(reason in text for text in texts)


# --- a process that is lost --------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeat", range(NUM_REPEATS))
@pytest.mark.parametrize(
    ("how", "num_processes"), [("dying", 3), ("out of memory", 2), ("killed", 2), ("terminated", 2)]
)
def test_when_a_process_is_lost_the_others_exit_with_an_error(how, num_processes, repeat, tmp_path):
    """Rank 1 raises an unexpected error, or gets a signal from outside."""
    start = time.monotonic()
    ended = launch(CASES, tmp_path, num_processes, how, timeout=60)
    outputs = [(tmp_path / f"output-{rank}.txt").read_text() for rank in range(num_processes)]
    print(f"{max(process.time for process in ended) - start:.1f} s in all;", [process.returncode for process in ended])
    for rank, process in enumerate(ended):
        assert process.returncode != 0, outputs[rank]
        assert process.time - ended[1].time < 30, outputs[rank]
    assert ended[1].time - start < 45, outputs[1]  # not killed by the timeout of this test
    if how in ("dying", "out of memory"):
        assert "Error: of rank 1 alone" in outputs[1]
        for rank in {*range(num_processes)} - {1}:
            assert "on_exception: " in outputs[rank]
            assert "Error: of rank 1 alone" not in outputs[rank], "it is the error of the others"
        assert "Rank 1 has ended with " in outputs[0]
        assert ": of rank 1 alone." in outputs[0]
