"""Where a run resumes if its samples are batched differently than before."""

from __future__ import annotations

import pytest
import torch

from _saved import make_state_trainer, rewrite_manifest, train
from _support import Probe, make_indexed_dataset, make_model, make_trainer
from pytorch_accelerated._checkpoint.files import load_file
from pytorch_accelerated._checkpoint.layout import BatchLayout, sum_epoch_means, translate_position
from pytorch_accelerated._checkpoint.manifest import read_manifest
from pytorch_accelerated._data.sharding import ShardedBatchSampler
from pytorch_accelerated._means import EpochMeans
from pytorch_accelerated.progress import TrainingProgress


def at(num_batches, phase="training"):
    return TrainingProgress(num_epochs_completed=2, num_batches_in_epoch=num_batches, num_updates=50, phase=phase)


@pytest.mark.parametrize(
    ("num_batches", "then", "now", "length", "expected"),
    [
        pytest.param(6, BatchLayout(2, 4), BatchLayout(1, 4), 100, 12, id="fewer processes"),
        pytest.param(6, BatchLayout(1, 4), BatchLayout(2, 4), 100, 3, id="more processes"),
        pytest.param(5, BatchLayout(1, 4), BatchLayout(2, 4), 100, 2, id="a batch is repeated"),
        pytest.param(5, BatchLayout(2, 4), BatchLayout(3, 4), 100, 3, id="a batch is repeated, three processes"),
        pytest.param(6, BatchLayout(1, 4), BatchLayout(1, 8), 100, 3, id="larger batches"),
        pytest.param(6, BatchLayout(1, 4), BatchLayout(1, 3), 100, 8, id="smaller batches"),
        pytest.param(6, BatchLayout(2, 4), BatchLayout(1, 8), 100, 6, id="the same total batch size"),
        pytest.param(7, BatchLayout(1, 4, 2), BatchLayout(2, 4, 2), 100, 2, id="the open window is repeated"),
        pytest.param(8, BatchLayout(1, 4, 4), BatchLayout(1, 8, 3), 100, 3, id="rounded down to a complete update"),
        pytest.param(7, BatchLayout(2, 4, 1), BatchLayout(1, 4, 4), 100, 12, id="another accumulation"),
        pytest.param(5, BatchLayout(1, None), BatchLayout(2, None), 100, 2, id="batches of varying size"),
        pytest.param(6, BatchLayout(1, None), BatchLayout(2, 4), 100, 3, id="batches that used to vary in size"),
        pytest.param(0, BatchLayout(1, 4), BatchLayout(2, 4), 100, 0, id="at the start of the epoch"),
        pytest.param(5, BatchLayout(1, 4, 2), BatchLayout(2, 4, 2), 18, 3, id="after the last batch"),
        pytest.param(5, BatchLayout(1, 4, 2), BatchLayout(2, 4, 2), None, 2, id="after the last batch, unknown length"),
    ],
)
def test_a_run_resumes_before_the_first_update_with_an_unused_sample(num_batches, then, now, length, expected):
    new = translate_position(at(num_batches), then, now, length)
    assert new == at(expected)


@pytest.mark.parametrize("phase", ["evaluation", "end"])
def test_the_position_after_the_batches_of_an_epoch_does_not_change(phase):
    assert translate_position(at(5, phase), BatchLayout(1, 4), BatchLayout(2, 4), 18) == at(5, phase)


@pytest.mark.parametrize("size_now", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("processes_now", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_no_sample_is_missed_and_at_most_one_update_is_repeated(size_now, processes_now, accumulation):
    """Compares the indices that the sampler yields, for every position of the earlier run."""

    def samples_from(step, num_processes, batch_size):
        batches = [list(range(start, min(start + batch_size, 46))) for start in range(0, 46, batch_size)]
        shards = (list(ShardedBatchSampler(batches, num_processes, rank))[step:] for rank in range(num_processes))
        return [index for shard in shards for batch in shard for index in batch]

    then, now = BatchLayout(2, 3, 2), BatchLayout(processes_now, size_now, accumulation)
    for step in range(8):
        position = translate_position(at(step), then, now, 46).num_batches_in_epoch
        new = set(samples_from(step - step % 2, 2, 3))
        following = set(samples_from(position, processes_now, size_now))
        assert new <= following
        assert len(following - new) < processes_now * size_now * accumulation


def test_a_layout_is_built_from_settings():
    settings = {"per_device_batch_size": 4, "gradient_accumulation_steps": 2, "num_processes": 9, "sampler": "x"}
    assert BatchLayout.from_settings(settings, 3) == BatchLayout(3, 4, 2)
    assert BatchLayout.from_settings({}, 3) == BatchLayout(3, None, 1)


def test_epoch_means_of_several_processes_are_summed():
    def means_of(loss, **metrics):
        means = EpochMeans()
        means.loss.update(loss, 2)
        means.update_metrics({"metrics": metrics}, 2)
        return means.state_dict()

    total = EpochMeans()
    total.load_state_dict(sum_epoch_means([means_of(1.0, a=3.0), means_of(torch.tensor(2.0), a=4.0, b=5.0)]))
    expected = {"train_loss": (6.0, 4.0), "train_a": (14.0, 4.0), "train_b": (10.0, 2.0)}
    assert total.sums("train_loss") == expected
    nothing = EpochMeans()
    nothing.load_state_dict(sum_epoch_means([]))
    assert nothing.sums("train_loss") == EpochMeans().sums("train_loss")


# --- real runs ---------------------------------------------------------------------------------------------------


def samples_seen(path=None, resume_from=None, stop_at=None, **kwargs):
    """Train in order on samples that are their own index, and return those of each update of the second epoch."""
    updates = [[]]

    def look(trainer, batch, **_):
        if trainer.run_history.current_epoch == 2:
            updates[-1].extend(batch[0].flatten().int().tolist())

    def end_update(trainer, **_):
        if updates[-1]:
            updates.append([])

    def save(trainer, step, **_):
        if path is not None and trainer.run_history.current_epoch == 2 and step == stop_at:
            trainer.save_training_state(path)

    probe = Probe(on_train_step_start=look, on_optimizer_step_end=end_update, on_train_step_end=save)
    trainer = make_trainer(make_model(1), lr=0.0, callbacks=[probe])
    loader = {"shuffle": False}
    train(
        trainer,
        make_indexed_dataset(22),
        num_epochs=2,
        resume_from=resume_from,
        train_dataloader_kwargs=loader,
        **kwargs,
    )
    return [update for update in updates if update]


@pytest.mark.filterwarnings("ignore:The run resumed from:UserWarning")
@pytest.mark.parametrize(
    ("stop_at", "kwargs", "first"),
    [
        (1, {"per_device_batch_size": 2}, 8),
        (2, {"per_device_batch_size": 2}, 8),
        (3, {"per_device_batch_size": 8, "gradient_accumulation_steps": 1}, 16),
        (3, {"per_device_batch_size": 5, "gradient_accumulation_steps": 1}, 15),
        (5, {"per_device_batch_size": 5}, 22),
    ],
)
def test_an_epoch_continues_at_the_same_sample_with_another_batch_size(tmp_path, stop_at, kwargs, first):
    samples_seen(tmp_path / "state", stop_at=stop_at)
    updates = samples_seen(resume_from=tmp_path / "state", **kwargs)
    assert [index for update in updates for index in update] == list(range(first, 22))


@pytest.mark.filterwarnings("ignore:The run resumed from:UserWarning")
def test_an_epoch_ends_if_the_dataset_has_become_shorter_than_the_position(tmp_path):
    samples_seen(tmp_path / "state", stop_at=4)
    trainer = make_trainer(make_model(1), lr=0.0)
    train(trainer, make_indexed_dataset(8), num_epochs=3, resume_from=tmp_path / "state")
    assert trainer.progress.num_epochs_completed == 3


def test_an_epoch_continues_at_the_same_sample_with_another_number_of_processes(tmp_path, capsys):
    """The state of one process is disguised as one of two; tests/distributed has real ones."""
    path = tmp_path / "state"
    samples_seen(path, stop_at=1)
    (path / "process_1.pt").write_bytes((path / "process_0.pt").read_bytes())
    saved = read_manifest(path)
    rewrite_manifest(path, num_processes=2, settings={**saved.settings, "num_processes": 2})
    updates = samples_seen(resume_from=path, allow_other_num_processes=True)
    assert updates == [[*range(16, 22)]]
    line = f"'{path}' was saved by 2 processes and is resumed by 1: random numbers and the last bits differ"
    assert capsys.readouterr().out.startswith(line)


def test_nothing_is_printed_if_the_number_of_processes_is_the_same(tmp_path, capsys):
    samples_seen(tmp_path / "state", stop_at=1)
    samples_seen(resume_from=tmp_path / "state", allow_other_num_processes=True)
    assert "processes" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:The run resumed from:UserWarning")
def test_the_gradients_of_an_abandoned_window_are_discarded(tmp_path):
    gradients = []

    def save(trainer, step, **_):
        if step == 2:
            trainer.save_training_state(tmp_path / "state")

    def save_again(trainer, **_):
        trainer.save_training_state(tmp_path / "resumed")
        gradients.extend(parameter.grad for parameter in trainer.model.parameters())

    train(make_state_trainer([Probe(on_train_step_end=save)]), num_epochs=1)
    resumed = make_state_trainer([Probe(on_train_epoch_start=save_again)])
    train(resumed, num_epochs=1, resume_from=tmp_path / "state", per_device_batch_size=2)
    windows = [load_file(tmp_path / name / "process_0.pt")["window"] for name in ("state", "resumed")]
    assert [window["total"] for window in windows] == [4, 0]
    assert gradients == [None] * 4
