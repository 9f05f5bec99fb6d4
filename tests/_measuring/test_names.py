"""Under which names metrics are recorded: each name belongs to one pass."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from pytorch_accelerated._measuring.names import MetricNames, named_numbers, stems_of_run

DATASETS = [[""], ["test"], ["train", "x"], ["x", "x_eval_y"], ["a", "a_intermediate"], ["eval", "train_eval"]]


@pytest.mark.parametrize("datasets", DATASETS, ids=str)
@pytest.mark.parametrize("is_training_run", [True, False])
def test_no_two_passes_record_under_the_same_name(datasets, is_training_run):
    words = ["acc", "eval_acc", "train_acc", "y_eval_acc", "intermediate_eval_acc", "eval_eval_acc", "evaluation_acc"]
    stems = stems_of_run(datasets, is_training_run)
    recorded: dict[str, str] = {}
    for stem, word in product(sorted(stems), words):
        try:
            MetricNames(stem, stems).check(word)
        except ValueError:
            continue
        assert recorded.setdefault(stem + word, stem) == stem
    assert {stem + "acc" for stem in stems} <= set(recorded)


def test_numbers_of_any_kind_are_named():
    results = {
        "number": (0.5, {"m": 0.5}),
        "boolean": (True, {"m": 1.0}),
        "scalar of NumPy": (np.float32(0.5), {"m": 0.5}),
        "tensor": (torch.tensor(0.5), {"m": 0.5}),
        "array": (np.array([[1, 2]]), {"m_0": 1.0, "m_1": 2.0}),
        "nothing": (None, {}),
        "tuple": ((torch.tensor([1.0, 2.0]), 3.0), {"m_0_0": 1.0, "m_0_1": 2.0, "m_1": 3.0}),
    }
    for kind, (result, names) in results.items():
        expected = {"m_0_0": 1.0, "m_0_1": 2.0} if kind == "array" else names
        assert dict(named_numbers("m", result)) in (names, expected), kind
    assert dict(named_numbers("", {"a": 1.0})) == {"a": 1.0}
