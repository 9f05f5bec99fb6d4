"""The configuration of a run, and how it is derived."""

from __future__ import annotations

import dataclasses

import pytest

from pytorch_accelerated.run_config import TrainerRunConfig, count_updates, derive_run_config

FIELDS_OF_0_1_61 = {
    "num_epochs": 3,
    "train_per_device_batch_size": 4,
    "train_dl_kwargs": {"batch_size": 4},
    "eval_per_device_batch_size": 8,
    "eval_dl_kwargs": None,
    "gradient_accumulation_steps": 2,
    "gradient_clip_value": None,
    "train_total_batch_size": 8,
    "eval_total_batch_size": 8,
    "num_update_steps_per_epoch": 5,
    "num_local_update_steps_per_epoch": 5,
    "max_num_train_steps": 15,
    "is_local_process_zero": True,
    "is_world_process_zero": True,
    "is_distributed": False,
    "mixed_precision": "no",
    "num_processes": 1,
}


@pytest.mark.parametrize(
    ("num_epochs", "num_batches", "num_steps", "limit", "expected"),
    [
        (3, 10, 1, None, (10, 30)),
        (3, 10, 4, None, (3, 9)),
        (3, 8, 4, None, (2, 6)),
        (3, 1, 4, None, (1, 3)),
        (3, 10, 4, 5, (3, 5)),
        (3, 10, 4, 50, (3, 9)),
        (3, None, 4, 5, (None, 5)),
        (3, None, 4, None, (None, None)),
        (3, 0, 1, None, (0, 0)),
    ],
)
def test_count_updates_includes_a_short_last_accumulation_window(num_epochs, num_batches, num_steps, limit, expected):
    assert count_updates(num_epochs, num_batches, num_steps, limit) == expected


def test_the_run_config_is_a_frozen_dataclass_with_the_fields_of_0_1_61():
    config = TrainerRunConfig(**FIELDS_OF_0_1_61)
    assert config.seed is None
    assert {**config.to_dict(), **FIELDS_OF_0_1_61} == config.to_dict() == vars(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_epochs = 4


def test_to_dict_returns_a_new_dictionary_with_copies_of_containers_and_the_same_other_values():
    kwargs = {"sampler": object(), "sizes": [1, (2, {3})]}
    config = TrainerRunConfig(**{**FIELDS_OF_0_1_61, "train_dl_kwargs": kwargs})
    exported = config.to_dict()
    assert exported["train_dl_kwargs"] == kwargs
    assert exported["train_dl_kwargs"] is not kwargs
    assert exported["train_dl_kwargs"]["sizes"] is not kwargs["sizes"]
    exported["num_epochs"] = 99
    assert config.num_epochs == 3


@pytest.mark.parametrize(
    ("train_size", "eval_size", "totals"), [(4, 8, (16, 16)), (None, None, (None, None)), (4, None, (16, None))]
)
def test_total_batch_sizes_and_updates_are_derived_for_all_processes(train_size, eval_size, totals):
    names = ("train_dl_kwargs", "eval_dl_kwargs", "gradient_clip_value", "mixed_precision")
    names += ("is_local_process_zero", "is_world_process_zero")
    config = derive_run_config(
        num_epochs=3,
        num_batches_per_epoch=9,
        gradient_accumulation_steps=2,
        max_num_train_steps=None,
        num_processes=2,
        train_per_device_batch_size=train_size,
        eval_per_device_batch_size=eval_size,
        seed=7,
        **{name: FIELDS_OF_0_1_61[name] for name in names},
    )
    assert (config.train_total_batch_size, config.eval_total_batch_size) == totals
    assert config.num_update_steps_per_epoch == config.num_local_update_steps_per_epoch == 5
    assert (config.max_num_train_steps, config.is_distributed, config.seed) == (15, True, 7)
