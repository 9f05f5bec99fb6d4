"""What is said about a run that is resumed with other settings than it was saved with."""

from __future__ import annotations

import re
import warnings
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, OneCycleLR, StepLR
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, WeightedRandomSampler

from _saved import make_state_trainer, rewrite_manifest, train
from _support import Batches, Probe, Samples, Stream, make_dataset
from pytorch_accelerated._checkpoint import resume
from pytorch_accelerated._checkpoint.manifest import read_manifest
from pytorch_accelerated._data.determinism import SeededSampler
from pytorch_accelerated._data.sharding import ShardedBatchSampler


def save(path, num_updates=4, trainer=None, **kwargs):
    """Train, and save a state within the second epoch."""

    def save_once(trainer, **_):
        if trainer.progress.num_updates == num_updates and not path.exists():
            trainer.save_training_state(path)

    trainer = make_state_trainer() if trainer is None else trainer
    trainer.callback_handler.add_callback(Probe(on_train_step_end=save_once))
    train(trainer, **kwargs)
    return path


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    return save(tmp_path_factory.mktemp("drift") / "state")


def drift_of(path, trainer=None, **kwargs):
    """Resume, and return what is warned of, if anything is, in one warning that points to the caller of `train`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(make_state_trainer() if trainer is None else trainer, resume_from=path, **kwargs)
    if not caught:
        return None
    assert [Path(warning.filename).name for warning in caught] == ["_saved.py"]
    return str(caught[0].message)


def test_nothing_is_said_if_nothing_has_changed(state):
    assert drift_of(state) is None


@pytest.mark.parametrize(
    "kwargs",
    [{"num_epochs": 5}, {"num_epochs": 2}, {"max_num_train_steps": 5}, {"eval_dataset": make_dataset(4)}],
    ids=str,
)
def test_the_length_of_the_run_may_change(state, kwargs):
    assert drift_of(state, **kwargs) is None


@pytest.mark.parametrize(
    ("kwargs", "lines"),
    [
        ({"per_device_batch_size": 2}, ["per_device_batch_size: 4 -> 2: the batches are others"]),
        ({"gradient_accumulation_steps": 1}, ["gradient_accumulation_steps: 2 -> 1: the updates from here on"]),
        ({"gradient_clip_value": 0.5}, ["gradient_clip_value: None -> 0.5: the updates from here on are others."]),
        ({"gradient_clip_norm": 0.5}, ["gradient_clip_norm: None -> 0.5: the updates from here on are others."]),
        ({"dataset": make_dataset(12)}, ["dataset_length: 18 -> 12: the order of the samples is another one"]),
        ({"dataset": Samples(make_dataset(18))}, ["dataset: 'TensorDataset' -> 'Samples': the samples may be others."]),
        (
            {"train_dataloader_kwargs": {"shuffle": False}},
            ["sampler: 'RandomSampler' -> 'SequentialSampler': the order of the samples is another one"],
        ),
        (
            {"create_scheduler_fn": lambda optimizer: ConstantLR(optimizer, 1.0)},
            ["scheduler: None -> 'ConstantLR': the learning rates from here on are others."],
        ),
        (
            {"gradient_clip_value": 0.5, "dataset": make_dataset(12)},
            ["gradient_clip_value: None -> 0.5", "dataset_length: 18 -> 12"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.filterwarnings("ignore:.*workers")
def test_what_has_changed_is_named_with_what_follows(state, kwargs, lines):
    if isinstance(kwargs.get("dataset"), Samples):
        kwargs = {**kwargs, "train_dataloader_kwargs": {"num_workers": 0}}
    drift = drift_of(state, **kwargs)
    assert drift.startswith(f"The run that goes on from '{state}' is not quite the one that was saved:\n  ")
    assert len(drift.splitlines()) == 1 + len(lines)
    for line in lines:
        assert f"\n  {line}" in drift


def test_settings_of_the_optimizer_are_those_that_were_saved_and_the_warning_says_so(state):
    trainer = make_state_trainer()
    trainer.optimizer.param_groups[0].update(weight_decay=0.5, betas=(0.8, 0.999))
    drift = drift_of(state, trainer)
    assert "optimizer.weight_decay: 0.01 -> 0.5: the run goes on with the saved value; set `optimizer.param" in drift
    assert "optimizer.betas: [0.9, 0.999] -> [0.8, 0.999]: the run goes on with the saved value" in drift
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.01


def test_another_learning_rate_is_none_of_them(state):
    """It belongs to the schedule."""
    trainer = make_state_trainer()
    trainer.optimizer.param_groups[0]["lr"] = 0.5
    assert drift_of(state, trainer) is None


def test_settings_that_a_schedule_changes_have_not_changed(tmp_path):
    def one_cycle(optimizer):
        return OneCycleLR(optimizer, max_lr=0.1, total_steps=9, cycle_momentum=True)

    state = save(tmp_path / "state", create_scheduler_fn=one_cycle)
    assert drift_of(state, create_scheduler_fn=one_cycle) is None


def test_another_optimizer_and_loss_function_are_named(state):
    trainer = make_state_trainer()
    trainer.optimizer = torch.optim.Adam(trainer.model.parameters(), lr=0.01)
    trainer.loss_func = nn.L1Loss()
    drift = drift_of(state, trainer)
    assert "optimizer: 'AdamW' -> 'Adam': it takes over the state of the other, which may not fit." in drift
    assert "loss_func: 'mse_loss' -> 'L1Loss': the updates from here on are others." in drift


def test_another_scheduler_is_named(tmp_path):
    state = save(tmp_path / "state", create_scheduler_fn=lambda optimizer: StepLR(optimizer, 2))
    drift = drift_of(state, create_scheduler_fn=lambda optimizer: ConstantLR(optimizer, 1.0))
    assert "scheduler: 'StepLR' -> 'ConstantLR': the learning rates from here on are others." in drift


@pytest.mark.parametrize(
    ("saved_seed", "seed", "is_named"),
    [(4, 4, False), (4, 5, True), (4, None, False), (None, 4, False), (None, 5, True)],
)
def test_another_seed_is_named_if_the_user_asked_for_one(tmp_path, saved_seed, seed, is_named):
    """The seed of the run was 4 in any case."""
    state = save(tmp_path / "state", trainer=make_state_trainer(seed=4) if saved_seed is None else seeded(saved_seed))
    drift = drift_of(state, make_state_trainer() if seed is None else seeded(seed))
    assert (drift is not None) == is_named
    if is_named:
        assert "seed: 4 -> 5: the run goes on with the saved one." in drift


def seeded(seed):
    trainer = make_state_trainer()
    trainer._seed = seed
    return trainer


def test_other_versions_are_named(tmp_path):
    state = save(tmp_path / "state")
    versions = {"torch": "1.0", "python": "2.7", "accelerate": None, "pytorch-accelerated": None}
    rewrite_manifest(state, versions=versions)
    drift = drift_of(state)
    assert f"torch: '1.0' -> '{version('torch')}': results may differ in their last bits." in drift
    assert "python: '2.7' -> " in drift
    assert len(drift.splitlines()) == 3


def test_a_version_that_is_not_known_now_is_not_compared(state):
    with mock.patch.object(resume, "installed_versions", return_value={"torch": None}):
        assert drift_of(state) is None


# --- what is looked at -------------------------------------------------------------------------------------------


def settings_of(trainer, **kwargs):
    """What a training run with these arguments is described by."""
    train(trainer, **{"num_epochs": 1, "gradient_accumulation_steps": 1, **kwargs})
    return trainer._settings


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, "RandomSampler"),
        ({"shuffle": False}, "SequentialSampler"),
        ({"sampler": WeightedRandomSampler([1.0] * 18, 18)}, "WeightedRandomSampler"),
        ({"batch_sampler": BatchSampler(SequentialSampler(range(18)), 4, False)}, "SequentialSampler"),
        ({"batch_sampler": [[0, 1], [2, 3]]}, "list"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else value,
)
def test_the_sampler_is_the_innermost(kwargs, expected):
    assert settings_of(make_state_trainer(), train_dataloader_kwargs=kwargs)["sampler"] == expected


def test_the_sampler_is_found_inside_what_shares_it_among_processes():
    loader = DataLoader(range(18), batch_sampler=BatchSampler(SeededSampler(RandomSampler(range(18))), 4, False))
    shared = DataLoader(range(18), batch_sampler=ShardedBatchSampler(loader.batch_sampler, 2, 0))
    assert resume._name_of_sampler(shared) == "RandomSampler"
    assert resume._name_of_sampler(mock.MagicMock()) == "MagicMock"  # which has everything, for ever


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (make_dataset(18), ("TensorDataset", 18, 5)),
        (Stream(make_dataset(18)), ("Stream", None, None)),
        (Batches(make_dataset(18), 4), ("Batches", None, None)),
    ],
    ids=["dataset", "stream", "batches"],
)
def test_data_of_any_kind_is_described(dataset, expected):
    settings = settings_of(make_state_trainer(), dataset=dataset)
    assert tuple(settings[name] for name in ("dataset", "dataset_length", "num_batches_per_epoch")) == expected


def test_only_plain_settings_of_the_optimizer_are_kept(tmp_path):
    trainer = make_state_trainer()
    group = trainer.optimizer.param_groups[0]
    group.update(mine=float("inf"), tensor=torch.ones(1), nested=(1, (2.0, "a")), mixed=[1, object], max_lr=1.0)
    settings = settings_of(trainer)
    own = {name.removeprefix("optimizer."): value for name, value in settings.items() if re.match(r"optimizer\.", name)}
    assert {name: own.get(name) for name in ("mine", "nested", "weight_decay")} == {
        "mine": "inf",
        "nested": [1, [2.0, "a"]],
        "weight_decay": 0.01,
    }
    assert own.keys() & {"params", "lr", "max_lr", "tensor", "mixed"} == set()


def test_a_state_before_the_first_run_has_hardly_any_settings(tmp_path):
    trainer = make_state_trainer()
    trainer.save_training_state(tmp_path / "state")
    assert set(read_manifest(tmp_path / "state").settings) == {"scheduler", "seed"}
