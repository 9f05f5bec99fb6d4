"""Two true processes on gloo, started once; each test looks at what one case of `_cases.py` left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from _processes import launch, read_results

pytestmark = pytest.mark.distributed

CASES = Path(__file__).with_name("_cases.py")
TIMEOUT_SECONDS = 150
"""Far more than the cases need; what takes longer hangs."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Run all cases and return the folder with their results."""
    folder = tmp_path_factory.mktemp("results")
    launch(CASES, folder, num_processes=2, timeout=TIMEOUT_SECONDS)
    return folder


@pytest.fixture
def results(request, directory):
    """What the case of this test returned on each rank."""
    return read_results(directory, request.node.originalname.removeprefix("test_"), num_processes=2)


def assert_alike(left, right, **tolerance):
    torch.testing.assert_close(left, right, **(tolerance or {"rtol": 0, "atol": 0}))


# --- numbers -----------------------------------------------------------------------------------------------------


def test_means(results):
    """Losses 1 and 2 of weights 1 and 3, metrics 0 and 1: weighted means over the processes, alike on both."""
    expected = {"train_loss_epoch": 1.75, "eval_loss_epoch": 1.75, "a_evaluation_loss": 1.75}
    expected |= {"train_rank": 0.75, "eval_rank": 0.75, "a_evaluation_rank": 0.75}
    for metrics in results:
        assert metrics == {name: [value] for name, value in expected.items()}


def test_weights(results):
    """The gradient is the mean over all processes; the model is the plain one afterwards, and can train again."""
    for result in results:
        assert_alike(result["runs"], result["expected"], rtol=0, atol=1e-6)
        assert result["wrapped"] == ["DistributedDataParallel"] * 2
        assert result["synced"] == [False, True] * 4  # gradients travel once per update
        assert result["is_plain"]
        assert result["attributes"] == []
        assert result["registries"] == [0, 0]
    assert_alike(results[0]["runs"], results[1]["runs"])
    assert_alike(results[0]["output"], results[1]["output"])


def test_updates(results):
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


def test_evaluation(results):
    for result in results:
        for name, loss in result["expected"].items():
            assert result["metrics"][f"{name}_eval_loss_epoch"] == [pytest.approx(loss, rel=1e-6)]
            assert result["metrics"][f"{name}_intermediate_eval_loss_epoch"] == [pytest.approx(loss, rel=1e-6)] * 2
    assert results[0] == results[1]


def test_early_stopping(results):
    assert results[0] == results[1]
    assert results[0]["epoch"] == 3


# --- exchange ----------------------------------------------------------------------------------------------------


def test_gather(results):
    """Rows are never padding; values that equal it stay; structures are kept."""
    rows = torch.tensor([[1.0, -1.0], [-1.0, -1.0], [-1.0, 2.0]])
    for result in results:
        assert_alike(result["rows"], rows)
        assert_alike(result["vector"], torch.tensor([0, 0, 1]))
        assert_alike(result["none"], torch.ones(2, 3))
        assert_alike(result["wide"], torch.tensor([[1.0, 1.0, -5.0], [2.0, 2.0, 2.0]]))
        assert_alike(result["scalar"], torch.tensor([0.0, 1.0]))
        assert_alike(result["mask"], torch.tensor([True] * 3))
        assert_alike(result["even"], torch.tensor([0, 1]))
        nested = result["nested"]
        assert type(nested["a"]) is list
        assert type(nested["a"][1]) is tuple
        assert_alike(nested["a"][0], rows)
        assert_alike(nested["a"][1][0], torch.tensor([0, 1, 1]))


def test_decorators(results):
    assert [result["world"] for result in results] == [0, None]
    assert [result["local"] for result in results] == [0, None]
    assert [result["was_there"] for result in results] == [False, True]


def test_broadcast(results):
    """What a process does not have, it adds nothing to."""
    sums = {"both": [1.0, 4.0], "of 0": [7.0, 1.0], "of 1": [7.0, 1.0]}
    assert results == [{"value": {"rank": 0}, "sums": sums}] * 2


def test_print(results):
    assert results == ["hello\n", ""]


# --- randomness and data -----------------------------------------------------------------------------------------


def test_order(results):
    """Together the processes see each sample once per epoch, in an order that follows the seed and the epoch."""
    for name in results[0]:
        for epoch in range(2):
            together = [*results[0][name][epoch], *results[1][name][epoch]]
            assert sorted(together) == list(range(16)), name
    for result in results:
        assert result["whole batches"] == result["again"] == result["samples"]
        assert result["whole batches"][0] != result["whole batches"][1]
        assert result["own sampler"][0] != result["own sampler"][1]
        assert result["seeded"] != result["other seed"]


def test_seeds(results):
    """Dropout and augmentation differ between the processes, the order of the data does not."""
    for name in ("own", "given"):
        assert results[0][name][0] != results[1][name][0]
        assert results[0][name][2] == results[1][name][2]
    assert results[0]["given"][1] != results[1]["given"][1]
    assert (results[0]["own"][2], results[0]["given"][2]) == (5, 7)
    for result in results:
        assert result["different"] == result["expected"]


def test_batches(results):
    assert_alike(results[0]["weights"], results[1]["weights"])
    assert [result["samples"] for result in results] == [16, 16]


# --- files -------------------------------------------------------------------------------------------------------


def test_checkpoint(results):
    """Written by the main process alone, under the names of the plain model."""
    assert [Path(path).name for path in results[0]["written"]] == ["during.pt", "after.pt"]
    assert results[1]["written"] == []
    for result in results:
        assert result["names"] == ["bias", "weight"]
        assert_alike(result["weights"], result["loaded"])


def test_resume(results):
    """In the midst of an epoch and after one, with dropout, to the very weights and history on both processes."""
    for result in results:
        for resumed in result["resumed"].values():
            assert_alike(resumed["weights"], result["whole"]["weights"])
            assert resumed["metrics"] == result["whole"]["metrics"]
        assert {"manifest.json", "model.pt", "process_0.pt", "process_1.pt"} <= set(result["files"])
        assert result["left"] == []


def test_exception(results):
    assert results == [{"is_plain": True, "num_losses": 1}] * 2


def test_metric_of_one_process(results):
    """A metric that only one process has is the mean over that process's batches."""
    for metrics in results:
        assert metrics["train_rare"] == [3.0]
    assert results[0] == results[1]
