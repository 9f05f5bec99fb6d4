"""Two real processes on gloo, started once. Each test checks the results of the case of its name in `_cases.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from _saved import assert_equal as assert_all_equal
from _support import IN_ORDER, make_dataset, make_model, make_trainer, recorder_of, train, weights_of
from pytorch_accelerated.callbacks import (
    GradientNormCallback,
    LayerStatisticsCallback,
    LearningRateCallback,
    UpdateRatioCallback,
    WSDCheckpointCallback,
)
from pytorch_accelerated.schedulers import WSDLrScheduler

pytestmark = pytest.mark.distributed

CASES = Path(__file__).with_name("_cases.py")
TIMEOUT_SECONDS = 150
"""Far more than the cases need. A run that takes longer is stuck."""


def assert_equal(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=0)


# --- numbers -----------------------------------------------------------------------------------------------------


def test_losses_and_metrics_are_weighted_means_over_processes(results):
    """The losses are 1 and 2, with weights 1 and 3; the metrics are 0 and 1. Both ranks report the same means."""
    expected = {"train_loss_epoch": 1.75, "eval_loss_epoch": 1.75, "a_evaluation_loss": 1.75}
    expected |= {"train_rank": 0.75, "eval_rank": 0.75, "a_evaluation_rank": 0.75}
    for metrics in results:
        assert metrics == {name: [value] for name, value in expected.items()}


def test_the_file_of_an_average_holds_the_batch_statistics_of_the_main_process(results):
    """On every process, so that the files of all nodes are equal, whether the average is evaluated or not."""
    for is_evaluated in (True, False):
        assert_equal(results[0][is_evaluated], results[1][is_evaluated])
        average, file = results[0][is_evaluated]
        assert_equal(average, file)


def test_training_matches_the_combined_batch_of_one_process(results):
    """The gradient is the mean over both processes. Afterwards the model is unwrapped and can train again."""
    for result in results:
        torch.testing.assert_close(result["runs"], result["expected"], rtol=0, atol=1e-6)
        assert result["wrapped"] == ["DistributedDataParallel"] * 2
        assert result["synced"] == [False, True] * 4  # gradients travel once per update
        assert result["is_plain"]
        assert result["attributes"] == []
        assert result["registries"] == [0, 0]
    assert_equal(results[0]["runs"], results[1]["runs"])
    assert_equal(results[0]["output"], results[1]["output"])


def test_all_processes_together_make_one_update(results):
    for rank, result in enumerate(results):
        assert result["config"] == {
            "num_update_steps_per_epoch": 3,  # 40 samples in 5 batches per process, two of them per update
            "num_local_update_steps_per_epoch": 3,
            "max_num_train_steps": 6,
            "is_distributed": True,
            "train_total_batch_size": 16,
            "num_processes": 2,
            "is_world_process_zero": rank == 0,
            "is_local_process_zero": rank == 0,
        }
        assert result["num_updates"] == result["scheduler"] == len(result["rates"]) == 6
        assert result["num_samples"] == 80
        assert result["limited"] == 7
        cosine = (1 + torch.cos(torch.pi * torch.arange(6, dtype=torch.float64) / 6)) / 20
        assert result["rates"] == pytest.approx(cosine.tolist())


def test_evaluation_losses_are_means_over_processes(results):
    for result in results:
        for name, loss in result["expected"].items():
            assert result["metrics"][f"{name}_eval_loss_epoch"] == [pytest.approx(loss, rel=1e-6)]
            assert result["metrics"][f"{name}_intermediate_eval_loss_epoch"] == [pytest.approx(loss, rel=1e-6)] * 2
    assert results[0] == results[1]


def test_early_stopping_ends_all_processes_in_the_same_epoch(results):
    assert results[0] == results[1]
    assert results[0]["epoch"] == 3


# --- requests ----------------------------------------------------------------------------------------------------


def test_requests_of_one_rank_are_followed_by_all_at_the_same_update(results):
    """What is asked for during a step is done after its update; after the step, after the next update."""
    assert_all_equal(*results)
    for (request, event, accumulation), outcome in results[0].items():
        num_batches = 3 if accumulation == 3 or event == "on_train_step_end" else 2
        if request == "stop":
            assert (outcome["epochs"], outcome["batches"]) == (1, num_batches)
            assert outcome["reason"] == "`stop` was called"
        else:
            assert (outcome["epochs"], outcome["batches"]) == (2, num_batches + 8)
            assert outcome["metrics"]["train_num_batches"] == [num_batches]
            assert outcome["samples"] == 8 * outcome["batches"]


def test_an_end_of_an_epoch_that_one_rank_asked_for_is_the_same_after_a_resume(results):
    assert_all_equal(*results)
    whole = results[0][None]
    assert whole["batches"] == 4 + 8
    for outcome in results[0].values():
        assert_all_equal(outcome, whole)


def test_a_batch_that_one_rank_skips_leaves_the_others_of_the_update(results):
    assert_all_equal(*results)
    for (_, accumulation, num_ranks), outcome in results[0].items():
        skipped = [(1, 1)] if num_ranks == 1 else [(0, 1), (1, 1)]
        model, dataset = make_model(), make_dataset(32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        num_updates = 0
        for first in range(0, 4, accumulation):
            window = [(rank, step) for step in range(first, first + accumulation) for rank in (0, 1)]
            kept = [8 * step + 4 * rank for rank, step in window if (rank, step) not in skipped]
            if kept:
                parts = zip(*(dataset[start : start + 4] for start in kept), strict=True)
                inputs, targets = (torch.cat(part) for part in parts)
                torch.nn.functional.mse_loss(model(inputs), targets).backward()
                optimizer.step()
                optimizer.zero_grad()
                num_updates += 1
        torch.testing.assert_close(outcome["weights"], dict(model.state_dict()))
        assert (outcome["updates"], outcome["batches"]) == (num_updates, 4)
        assert outcome["samples"] == 32 - 4 * num_ranks
        assert outcome["metrics"]["train_num_skipped_batches"] == [num_ranks]


def test_the_main_process_decides_when_the_time_is_over_and_when_something_is_due(results):
    assert_all_equal(*results)
    assert results[0]["reason"] == "5 min are over (`max_time`)"
    assert results[0]["updates"] == 6  # the one after the request of the main process
    assert results[0]["moments"] == [2, 4, 6, 6]


# --- programs written for 0.1.61 ---------------------------------------------------------------------------------


def test_an_own_epoch_loop_trains_like_that_of_the_library(results):
    """Row 4.6 of the behaviour of 0.1.61: the same order, losses, weights, events and counts."""
    for result in results:
        own, library = result["OwnEpochs"], result["Trainer"]
        torch.testing.assert_close(own["weights"], library["weights"])
        assert own["metrics"].keys() == library["metrics"].keys()
        for name, values in library["metrics"].items():
            assert own["metrics"][name] == pytest.approx(values)
        assert own["steps"] == library["steps"] == [0, 1, 2, 3] * 3
        assert own["progress"] == library["progress"]
    assert_equal(results[0]["OwnEpochs"]["weights"], results[1]["OwnEpochs"]["weights"])


def test_batches_whose_targets_are_longer_than_the_number_of_samples_train(results):
    """Row 4.3 of the behaviour of 0.1.61: all batches weigh the same, so training is that without the time."""
    for result in results:
        torch.testing.assert_close(result["weights"], result["expected"])


def test_an_own_method_resumes_on_every_process(results):
    """Row 4.10 of the behaviour of 0.1.61."""
    for result in results:
        assert result["calls"]
        assert result["metrics"]
        assert_equal(result["weights"], result["expected"])


# --- collectives -------------------------------------------------------------------------------------------------


def test_gather_concatenates_uneven_rows_without_padding(results):
    """No padding rows remain, values that equal the padding are kept, and so is the structure."""
    rows = torch.tensor([[1.0, -1.0], [-1.0, -1.0], [-1.0, 2.0]])
    for result in results:
        assert_equal(result["rows"], rows)
        assert_equal(result["vector"], torch.tensor([0, 0, 1]))
        assert_equal(result["none"], torch.ones(2, 3))
        assert_equal(result["wide"], torch.tensor([[1.0, 1.0, -5.0], [2.0, 2.0, 2.0]]))
        assert_equal(result["scalar"], torch.tensor([0.0, 1.0]))
        assert_equal(result["mask"], torch.tensor([True] * 3))
        assert_equal(result["even"], torch.tensor([0, 1]))
        nested = result["nested"]
        assert type(nested["a"]) is list
        assert type(nested["a"][1]) is tuple
        assert_equal(nested["a"][0], rows)
        assert_equal(nested["a"][1][0], torch.tensor([0, 1, 1]))


def test_a_process_with_nothing_to_gather_passes_padding(results):
    """Row 4.4 of the behaviour of 0.1.61: it adds no rows, whatever the dimensions and the type of its padding."""
    rows = torch.tensor([[1.5, -1.0], [-1.0, -1.0]])
    for result in results:
        for name in ("row", "vector", "wider"):
            assert_equal(result[name][:, :2], rows)
            assert len(result[name]) == 2
        assert_equal(result["nested"][0]["a"], rows)
        assert len(result["none"]) == 0
        assert "differ in their number of dimensions or their type" in result["refused"]


def test_decorators_choose_the_processes_that_call(results):
    assert [result["world"] for result in results] == [0, None]
    assert [result["local"] for result in results] == [0, None]
    assert [result["was_there"] for result in results] == [False, True]


def test_broadcasts_and_sums_cover_all_processes(results):
    """A pair that a process does not have counts as zero there."""
    sums = {"both": [1.0, 4.0], "of 0": [7.0, 1.0], "of 1": [7.0, 1.0]}
    assert results == [{"value": {"rank": 0}, "sums": sums}] * 2


def test_one_process_shows_one_bar_and_one_line_per_epoch(results):
    """The numbers of the table are those of both processes."""
    shown, of_other = results
    assert of_other["written"] == ""
    assert shown["written"].count("epoch 1/2   0% |") == 1
    assert shown["written"].count("predictions   0% |") == 1
    _, start, header, *rows, end = shown["screen"]
    assert (start, header.split()[0], end) == ("Starting training run", "epoch", "Finishing training run")
    assert [row.split()[0] for row in rows] == ["1/2", "2/2"]
    losses = [float(row.split()[-1].rstrip("*")) for row in rows]
    assert losses == pytest.approx(of_other["metrics"]["eval_loss_epoch"], rel=1e-3)


def test_print_writes_on_the_main_process_only(results):
    assert results == ["hello\n", ""]


# --- randomness and data -----------------------------------------------------------------------------------------


def test_each_sample_is_seen_once_per_epoch_in_a_seeded_order(results):
    """The order depends on the seed and the epoch, and the same seed gives the same order again."""
    for name in results[0]:
        for epoch in range(2):
            together = [*results[0][name][epoch], *results[1][name][epoch]]
            assert sorted(together) == list(range(16)), name
    for result in results:
        assert result["whole batches"] == result["again"] == result["samples"]
        assert result["whole batches"][0] != result["whole batches"][1]
        assert result["custom sampler"][0] != result["custom sampler"][1]
        assert result["seeded"] != result["other seed"]


def test_random_numbers_differ_by_rank_but_the_data_order_does_not(results):
    """Dropout and augmentation should differ between ranks; the order of the data must not."""
    for name in ("program", "trainer"):
        assert results[0][name][0] != results[1][name][0]
        assert results[0][name][2] == results[1][name][2]
    assert results[0]["trainer"][1] != results[1]["trainer"][1]
    assert (results[0]["program"][2], results[0]["trainer"][2]) == (5, 7)
    for result in results:
        assert result["different"] == result["expected"]


def test_each_process_trains_on_its_local_iterable_of_batches(results):
    assert_equal(results[0]["weights"], results[1]["weights"])
    assert [result["samples"] for result in results] == [16, 16]


# --- files -------------------------------------------------------------------------------------------------------


def test_only_the_main_process_writes_checkpoints(results):
    """The file holds the parameter names of the unwrapped model."""
    assert [Path(path).name for path in results[0]["written"]] == ["during.pt", "after.pt"]
    assert results[1]["written"] == []
    for result in results:
        assert result["names"] == ["bias", "weight"]
        assert_equal(result["weights"], result["loaded"])


def test_weights_in_other_forms_are_saved_and_loaded_on_all(results):
    """From a wrapped model without its frozen parameters, as safetensors. Damage is noticed on both processes."""
    for result in results:
        assert_equal(result["weights"], result["loaded"])
        assert result["rest"] == ""
        assert "do not match the checksum" in result["refusal"]


def test_a_resumed_run_ends_with_the_same_weights_and_history(results):
    """From a state in the middle of an epoch and one at its end, with dropout; bit-identical on both processes."""
    for result in results:
        for resumed in result["resumed"].values():
            assert_equal(resumed["weights"], result["whole"]["weights"])
            assert resumed["metrics"] == result["whole"]["metrics"]
        assert {"manifest.json", "model.pt", "process_0.pt", "process_1.pt"} <= set(result["files"])
        assert result["left"] == []


def test_a_run_continues_from_before_the_decay_of_another(results, directory):
    """Of two processes; and one process can continue from the state that they saved."""
    decay = [0.1 * (0.1 + 0.9 * (1 - (t / 3) ** 0.5)) for t in (1, 2)]
    for first, second in results:
        for run in (first, second):
            assert run["rates"] == pytest.approx([0.1] * 10 + decay)
            assert run["step"] == 12
    assert_equal(results[0], results[1])
    files = {"wsd": ["checkpoint_12_wsd_post_decay.pt", "checkpoint_9_wsd_pre_decay"]}
    files["wsd_next"] = files["wsd"][:1]  # what is at the step of the initial checkpoint is not saved again
    folder = directory / "a_run_continues_from_before_the_decay_of_another"
    for name, expected in files.items():
        assert sorted(path.name for path in (folder / name).iterdir()) == expected
    state = folder / "wsd" / "checkpoint_9_wsd_pre_decay"
    recorder, weights = recorder_of(lambda trainer: weights_of(trainer.model), "on_train_epoch_start")
    callback = WSDCheckpointCallback(folder / "wsd_alone", initial_checkpoint=state)
    train(make_trainer(callbacks=[callback, recorder]), create_scheduler_fn=WSDLrScheduler.create_scheduler_fn())
    assert_equal(weights[0], torch.load(state / "model.pt", weights_only=True))


def test_the_trainer_trains_again_after_an_exception(results):
    assert results == [{"is_plain": True, "num_losses": 1}] * 2


def test_a_copied_trainer_trains_on_as_the_original(results):
    for copied, original in [*results[0], *results[1]]:
        assert_equal(copied, original)
    assert_equal(results[0], results[1])


def test_a_metric_of_one_process_is_averaged_over_its_batches(results):
    for metrics in results:
        assert metrics["train_rare"] == [3.0]
    assert results[0] == results[1]


# --- logs --------------------------------------------------------------------------------------------------------


def test_only_the_main_process_writes_logs_and_they_have_the_means_over_all(results):
    first, second = results
    assert (first.pop("has_writer"), second.pop("has_writer")) == (True, False)
    assert first == second
    assert first["files"] == ["events", "history.jsonl", "log.csv"]
    assert (first["num_event_files"], first["num_lines"], first["num_rows"]) == (1, 18, 3)
    assert [step for step, _ in first["steps"]] == [2, 4, 6, 8, 10, 12]
    means = [sum(value for _, value in part) / 3 for part in (first["steps"][:3], first["steps"][3:])]
    assert [value for _, value in first["steps"]] == pytest.approx(first["steps_in_history"], rel=1e-6)
    assert means == pytest.approx(first["losses"], rel=1e-6)  # as one process has them, which other tests compare
    assert first["metrics"].keys() == {"loss"}


def test_what_looks_on_sees_all_processes_and_changes_nothing(results):
    """Statistics, norms and rates are those of one process with the same updates; a resumed run has the same."""
    statistics = LayerStatisticsCallback(1)
    callbacks = [statistics, GradientNormCallback(per_layer=True), UpdateRatioCallback(every_n_updates=1)]
    trainer = make_trainer(callbacks=[*callbacks, LearningRateCallback()])
    settings = {"num_epochs": 2, "per_device_batch_size": 4, "gradient_accumulation_steps": 2}
    train(trainer, make_dataset(14), train_dataloader_kwargs=IN_ORDER, **settings)
    expected = [
        look(name) for look in (statistics.activations, statistics.gradients) for name in ("mean", "std", "zeros")
    ]
    of_one_process = {
        name: trainer.run_history.get_metric_values(name) for name in trainer.run_history.get_metric_names()
    }
    for without, (weights, metrics, looks, has_time), resumed, ranks in results:
        assert_equal(weights, without)
        assert_equal(resumed[0], without)
        for look, look_of_one in zip(looks, expected, strict=True):
            np.testing.assert_allclose(look, look_of_one, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(looks, resumed[2], rtol=1e-12)
        assert metrics.pop("tokens of a sample") == pytest.approx([10, 10])
        assert resumed[1].pop("tokens of a sample") == pytest.approx([10, 10])
        assert metrics == resumed[1]
        assert metrics == {name: pytest.approx(values, rel=1e-4) for name, values in of_one_process.items()}
        assert has_time
        assert set(ranks) == {"rank0", "rank1"}
