"""Finding the state to resume from, and the warning about a different configuration."""

from __future__ import annotations

import warnings
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, OneCycleLR, StepLR
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, WeightedRandomSampler

from _saved import make_state_trainer, make_up_state, names_in, rewrite_manifest, train
from _support import Batches, Probe, Samples, Stream, make_dataset
from pytorch_accelerated import Trainer
from pytorch_accelerated._checkpoint import resume
from pytorch_accelerated._checkpoint.lock import unlock
from pytorch_accelerated._checkpoint.manifest import read_manifest
from pytorch_accelerated._data.determinism import SeededSampler
from pytorch_accelerated._data.sharding import ShardedBatchSampler
from pytorch_accelerated.exceptions import CheckpointError

# --- the state to resume from ------------------------------------------------------------------------------------


OWNER = object()


def find(resume_from, folder=None, num_processes=1, allow_other_num_processes=False):
    """Call `find_state_to_resume` as a single process does, and return the state and what was printed."""
    printed = []
    saved = resume.find_state_to_resume(
        resume_from,
        set() if folder is None else {folder},
        OWNER,
        is_main=True,
        num_processes=num_processes,
        allow_other_num_processes=allow_other_num_processes,
        print_fn=printed.append,
    )
    if folder is not None:
        unlock(folder, OWNER)
    return saved, printed


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (set(), "there is no folder to look in.*`SaveTrainingStateCallback`. Add one"),
        ({Path("a"), Path("b")}, "there are 2 folders to look in.*`SaveTrainingStateCallback`. Keep one"),
    ],
)
def test_the_newest_state_needs_exactly_one_folder_to_look_in(folders, words):
    with pytest.raises(ValueError, match=words):
        resume.find_state_to_resume(
            "latest", folders, OWNER, is_main=True, num_processes=1, allow_other_num_processes=False, print_fn=print
        )


@pytest.mark.parametrize("resume_from", [None, False])
def test_a_run_that_is_not_resumed_looks_into_no_folder(tmp_path, resume_from):
    assert find(resume_from, tmp_path / "states") == (None, [])
    assert not (tmp_path / "states").exists()


@pytest.mark.parametrize("resume_from", ["latest", True])
def test_the_newest_valid_state_is_found_and_skipped_ones_are_printed(tmp_path, resume_from):
    for number in (1, 2, 3):
        make_up_state(tmp_path / f"step_{number}", batches=number)
    (tmp_path / "step_3" / "model.pt").unlink()
    saved, printed = find(resume_from, tmp_path)
    assert saved == read_manifest(tmp_path / "step_2")
    damaged = (
        f"The training state '{tmp_path / 'step_3'}' is damaged: model.pt is missing or altered. Use an older state."
    )
    assert printed == [f"Skipped: {damaged}"]


def test_without_a_state_the_run_starts_from_scratch_and_says_so(tmp_path):
    folder = tmp_path / "states"
    expected = f"There is no training state to resume from in '{folder}': the run starts from scratch."
    assert find("latest", folder) == (None, [expected])


def test_a_path_is_opened_without_looking_for_the_newest_state(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = make_up_state(Path("latest")).absolute()
    assert find(path) == (read_manifest(path), [])


@pytest.mark.parametrize("is_path", [True, False])
def test_a_state_of_another_number_of_processes_is_rejected_unless_that_is_allowed(tmp_path, is_path):
    path = make_up_state(tmp_path / "final", num_processes=2)
    resume_from = path if is_path else "latest"
    with pytest.raises(CheckpointError, match=r"num_processes=2, but this run has num_processes=1.*Start 2 processes"):
        find(resume_from, tmp_path)
    unlock(tmp_path, OWNER)
    assert find(resume_from, tmp_path, allow_other_num_processes=True)[0].path == path
    assert find(resume_from, tmp_path, num_processes=2)[0].path == path


def test_opening_a_state_restores_it_if_its_replacement_was_interrupted(tmp_path):
    make_up_state(tmp_path / ".final.old")
    assert resume.open_state(tmp_path / "final", True, 1, False).path == tmp_path / "final"
    assert names_in(tmp_path) == ["final"]


# --- configuration mismatch --------------------------------------------------------------------------------------


def save(path, num_updates=4, trainer=None, **kwargs):
    """Train, and save a state in the middle of the second epoch."""

    def save_once(trainer, **_):
        if trainer.progress.num_updates == num_updates and not path.exists():
            trainer.save_training_state(path)

    trainer = make_state_trainer() if trainer is None else trainer
    trainer.callback_handler.add_callback(Probe(on_train_step_end=save_once))
    train(trainer, **kwargs)
    return path


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    return save(tmp_path_factory.mktemp("mismatch") / "state")


def mismatch_of(path, trainer=None, **kwargs):
    """Resume, and return the warning, which points to the caller of `train`; ``None`` if there is none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(make_state_trainer() if trainer is None else trainer, resume_from=path, **kwargs)
    if not caught:
        return None
    assert [Path(warning.filename).name for warning in caught] == ["_saved.py"]
    return str(caught[0].message)


def test_an_unchanged_configuration_causes_no_warning(state):
    assert mismatch_of(state) is None


@pytest.mark.parametrize(
    "kwargs",
    [{"num_epochs": 5}, {"num_epochs": 2}, {"max_num_train_steps": 5}, {"eval_dataset": make_dataset(4)}],
    ids=["more epochs", "fewer epochs", "a limit", "evaluation"],
)
def test_changing_the_length_of_the_run_causes_no_warning(state, kwargs):
    assert mismatch_of(state, **kwargs) is None


@pytest.mark.parametrize(
    ("kwargs", "lines"),
    [
        ({"per_device_batch_size": 2}, ["per_device_batch_size: 4 -> 2: the batches differ"]),
        ({"gradient_accumulation_steps": 1}, ["gradient_accumulation_steps: 2 -> 1: the updates differ from here on"]),
        ({"gradient_clip_value": 0.5}, ["gradient_clip_value: None -> 0.5: the updates differ from here on."]),
        ({"gradient_clip_norm": 0.5}, ["gradient_clip_norm: None -> 0.5: the updates differ from here on."]),
        ({"dataset": make_dataset(12)}, ["dataset_length: 18 -> 12: the samples come in a different order"]),
        ({"dataset": Samples(make_dataset(18))}, ["dataset: 'TensorDataset' -> 'Samples': the samples may differ."]),
        (
            {"train_dataloader_kwargs": {"shuffle": False}},
            ["sampler: 'RandomSampler' -> 'SequentialSampler': the samples come in a different order"],
        ),
        (
            {"create_scheduler_fn": lambda optimizer: ConstantLR(optimizer, 1.0)},
            ["scheduler: None -> 'ConstantLR': the learning rates differ from here on."],
        ),
        (
            {"gradient_clip_value": 0.5, "dataset": make_dataset(12)},
            ["gradient_clip_value: None -> 0.5", "dataset_length: 18 -> 12"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.filterwarnings("ignore:.*workers")
def test_each_change_is_named_with_its_consequence(state, kwargs, lines):
    if isinstance(kwargs.get("dataset"), Samples):
        kwargs = {**kwargs, "train_dataloader_kwargs": {"num_workers": 0}}
    mismatch = mismatch_of(state, **kwargs)
    assert mismatch.startswith(
        f"The run resumed from '{state}' is configured differently from the run that saved it. Restore"
    )
    assert len(mismatch.splitlines()) == 1 + len(lines)
    for line in lines:
        assert f"\n  {line}" in mismatch


def test_the_saved_settings_of_the_optimizer_win_and_the_warning_says_so(state):
    trainer = make_state_trainer()
    trainer.optimizer.param_groups[0].update(weight_decay=0.5, betas=(0.8, 0.999))
    mismatch = mismatch_of(state, trainer)
    continues = "the run continues with the saved value; to change it, set `optimizer.param_groups`"
    assert f"optimizer.weight_decay: 0.01 -> 0.5: {continues}" in mismatch
    assert f"optimizer.betas: [0.9, 0.999] -> [0.8, 0.999]: {continues}" in mismatch
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.01


def test_settings_of_the_optimizer_can_be_changed_when_a_resumed_run_starts(state):
    def change(trainer, **kwargs):
        trainer.optimizer.param_groups[0].update(weight_decay=0.5, lr=0.003)

    seen = []
    callbacks = [
        Probe(on_training_run_start=change),
        Probe(on_train_step_start=lambda trainer, **_: seen.append(trainer.optimizer.param_groups[0]["lr"])),
    ]
    trainer = make_state_trainer(callbacks)
    train(trainer, resume_from=state, num_epochs=4)
    assert set(seen) == {0.003}
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.5


def test_another_learning_rate_causes_no_warning(state):
    """The learning rate belongs to the schedule."""
    trainer = make_state_trainer()
    trainer.optimizer.param_groups[0]["lr"] = 0.5
    assert mismatch_of(state, trainer) is None


def test_settings_that_a_schedule_changes_cause_no_warning(tmp_path):
    def one_cycle(optimizer):
        return OneCycleLR(optimizer, max_lr=0.1, total_steps=9, cycle_momentum=True)

    state = save(tmp_path / "state", create_scheduler_fn=one_cycle)
    assert mismatch_of(state, create_scheduler_fn=one_cycle) is None


def test_another_loss_function_is_named(state):
    trainer = make_state_trainer()
    trainer.loss_func = nn.L1Loss()
    assert "loss_func: 'mse_loss' -> 'L1Loss': the updates differ from here on." in mismatch_of(state, trainer)


def test_a_scheduler_that_is_left_out_is_named(tmp_path):
    state = save(tmp_path / "state", create_scheduler_fn=lambda optimizer: StepLR(optimizer, 2))
    assert "scheduler: 'StepLR' -> None: the learning rates differ from here on." in mismatch_of(state)


@pytest.mark.parametrize(
    ("saved_seed", "seed", "is_named"),
    [(4, 4, False), (4, 5, True), (4, None, False), (None, 4, False), (None, 5, True)],
)
def test_another_seed_is_named_only_if_the_resumed_run_was_given_one(tmp_path, saved_seed, seed, is_named):
    """``None`` stands for a trainer without a seed; the order of its data derives from `torch.manual_seed(4)`."""
    state = save(tmp_path / "state", trainer=with_seed(saved_seed))
    mismatch = mismatch_of(state, with_seed(seed))
    assert (mismatch is not None) == is_named
    if is_named:
        assert "seed: 4 -> 5: the run continues with the saved seed." in mismatch


def with_seed(seed):
    trainer = make_state_trainer()
    return Trainer(trainer.model, trainer.loss_func, trainer.optimizer, callbacks=(), seed=seed)


def test_changed_versions_are_named(tmp_path):
    state = save(tmp_path / "state")
    versions = {"torch": "1.0", "python": "2.7", "accelerate": None, "pytorch-accelerated": None}
    rewrite_manifest(state, versions=versions)
    mismatch = mismatch_of(state)
    assert f"torch: '1.0' -> '{version('torch')}': results may differ in their last bits." in mismatch
    assert "python: '2.7' -> " in mismatch
    assert len(mismatch.splitlines()) == 3


def test_an_unknown_version_is_not_compared(state):
    with mock.patch.object(resume, "installed_versions", return_value={"torch": None}):
        assert mismatch_of(state) is None


# --- the settings of a run ---------------------------------------------------------------------------------------


@pytest.fixture
def settings_of(tmp_path):
    """A function that trains, and returns the settings in the manifest of a state."""

    def train_and_save(trainer, **kwargs):
        train(trainer, **{"num_epochs": 1, "gradient_accumulation_steps": 1, **kwargs})
        trainer.save_training_state(tmp_path / "state")
        return read_manifest(tmp_path / "state").settings

    return train_and_save


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
def test_the_innermost_sampler_is_recorded(settings_of, kwargs, expected):
    assert settings_of(make_state_trainer(), train_dataloader_kwargs=kwargs)["sampler"] == expected


def test_the_sampler_is_found_inside_what_shards_it():
    loader = DataLoader(range(18), batch_sampler=BatchSampler(SeededSampler(RandomSampler(range(18))), 4, False))
    shared = DataLoader(range(18), batch_sampler=ShardedBatchSampler(loader.batch_sampler, 2, 0))
    assert resume._name_of_sampler(shared) == "RandomSampler"
    assert resume._name_of_sampler(mock.MagicMock()) == "MagicMock"  # it has every attribute, at any depth


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (make_dataset(18), ("TensorDataset", 18, 5)),
        (Stream(make_dataset(18)), ("Stream", None, None)),
        (Batches(make_dataset(18), 4), ("Batches", None, None)),
    ],
    ids=["dataset", "stream", "batches"],
)
def test_the_settings_describe_data_of_any_kind(settings_of, dataset, expected):
    settings = settings_of(make_state_trainer(), dataset=dataset)
    assert tuple(settings[name] for name in ("dataset", "dataset_length", "num_batches_per_epoch")) == expected


def test_only_plain_hyperparameters_are_recorded():
    trainer = make_state_trainer()
    train(trainer, num_epochs=1)
    group = trainer.optimizer.param_groups[0]
    group.update(mine=float("inf"), tensor=torch.ones(1), nested=(1, (2.0, "a")), mixed=[1, object], max_lr=1.0)
    settings = resume.run_settings(trainer.run_config, None, None, trainer.optimizer, None, None)
    recorded = {name.removeprefix("optimizer."): value for name, value in settings.items() if "optimizer." in name}
    assert {name: recorded.get(name) for name in ("mine", "nested", "weight_decay")} == {
        "mine": "inf",
        "nested": [1, [2.0, "a"]],
        "weight_decay": 0.01,
    }
    assert recorded.keys() & {"params", "lr", "max_lr", "tensor", "mixed"} == set()


def test_a_state_saved_before_the_first_run_has_few_settings(tmp_path):
    trainer = make_state_trainer()
    trainer.save_training_state(tmp_path / "state")
    assert set(read_manifest(tmp_path / "state").settings) == {"scheduler", "seed"}


# --- infinite and other numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_clip_norm": float("inf")},
        {"gradient_clip_value": float("inf")},
        {"gradient_clip_norm": np.float32(2.5), "gradient_accumulation_steps": np.int64(2)},
        {"gradient_clip_value": torch.tensor(0.5)},
    ],
    ids=str,
)
def test_numbers_of_any_kind_are_settings_that_are_equal_to_themselves(tmp_path, settings):
    state = save(tmp_path / "state", **settings)
    assert mismatch_of(state, **settings) is None
    settings = dict.fromkeys(settings, 1)
    assert mismatch_of(state, **settings) is not None


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_infinite_settings_of_an_optimizer_and_metrics_are_equal_to_themselves(tmp_path, value):
    def make():
        trainer = make_state_trainer()
        trainer.optimizer.param_groups[0].update(mine=value, pair=(value, [1, value]))
        trainer.run_history.update_metric("metric", value)
        return trainer

    state = save(tmp_path / "state", trainer=make())
    assert read_manifest(state).settings["optimizer.pair"] == [str(value), [1, str(value)]]
    assert mismatch_of(state, make()) is None
