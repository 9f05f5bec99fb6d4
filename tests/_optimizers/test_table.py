"""Every optimizer of PyTorch, several together, closures, modes: as by hand, and resumed bit by bit.

``PYTHONPATH=src python tests/tools/_optimizing.py`` prints all of it as a table, with more places to resume at.
"""

from __future__ import annotations

import pytest
import torch

from _optimizing import CASES, DATASET, NUM_EPOCHS, optimizers_of_pytorch, outcome_of, resume, run, train_by_hand
from _runs import differences
from _support import assert_same_weights


@pytest.mark.parametrize("name", CASES)
def test_an_optimizer_trains_as_in_a_loop_by_hand_and_resumes_within_a_window(name, tmp_path):
    whole = run(CASES[name], tmp_path, num_batches=2, eval_dataset=DATASET)
    assert_same_weights(train_by_hand(CASES[name], num_batches=2), whole.model.state_dict())
    resumed = resume(CASES[name], tmp_path, num_steps=8, num_batches=2, eval_dataset=DATASET)
    assert resumed.is_resumed
    assert resumed.progress.num_updates == 3 * NUM_EPOCHS
    assert differences(outcome_of(whole), outcome_of(resumed)) == []


def test_the_table_has_every_optimizer_of_pytorch():
    assert set(optimizers_of_pytorch()) <= set(CASES)
    assert ("Muon with AdamW" in CASES) == hasattr(torch.optim, "Muon")
