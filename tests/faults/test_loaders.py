"""Errors while data is loaded end the run soon, name the cause, and leave nothing behind."""

from __future__ import annotations

import re
import time

import pytest
import torch
from torch.utils.data import Dataset

from _support import EventRecorder, Samples, make_dataset, make_trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

SECONDS_TO_END = 15


class Faulty(Dataset):
    """Calls a function when its sample 6 is loaded."""

    def __init__(self, on_sample_6):
        self.samples = Samples(make_dataset(16))
        self.on_sample_6 = on_sample_6

    def __len__(self):
        return 16

    def __getitem__(self, index):
        if index == 6:
            self.on_sample_6()
        return self.samples[index]


def fail():
    raise LookupError("sample 6 is not there")


def hang():
    time.sleep(600)


@pytest.mark.parametrize(
    ("on_sample_6", "message", "settings"),
    [
        (fail, "sample 6 is not there", {}),
        (hang, "timed out after 2 seconds", {"timeout": 2}),
    ],
)
@pytest.mark.parametrize("is_persistent", [False, True])
def test_an_error_in_a_worker_names_the_cause_and_the_trainer_stays_usable(
    monkeypatch, on_sample_6, message, settings, is_persistent
):
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)  # seconds to wait for a worker's end
    trainer = make_trainer(callbacks=[recorder := EventRecorder()])
    model = trainer.model
    workers = {"num_workers": 1, "persistent_workers": is_persistent, "shuffle": False, **settings}
    start = time.monotonic()
    with pytest.raises((RuntimeError, LookupError), match=message):
        trainer.train(Faulty(on_sample_6), 1, per_device_batch_size=2, train_dataloader_kwargs=workers)
    assert time.monotonic() - start < SECONDS_TO_END
    assert recorder.log[-1] == "on_exception"
    assert re.search(message, trainer.stop_reason)
    assert trainer.model is model
    trainer.train(make_dataset(8), 1, per_device_batch_size=2)
    assert trainer.progress.num_updates == 4


def test_two_runs_with_default_settings_end_with_the_same_bits():
    """Including workers and random augmentation."""

    class Noisy(Dataset):
        def __len__(self):
            return 16

        def __getitem__(self, index):
            return torch.rand(3) + index, torch.rand(1)

    def weights():
        torch.manual_seed(5)
        trainer = make_trainer()
        assert trainer.get_default_train_dl_kwargs(8)["shuffle"]
        trainer.train(Noisy(), num_epochs=2, eval_dataset=Noisy())
        history = trainer.run_history
        metrics = [history.get_metric_values(name) for name in sorted(history.get_metric_names())]
        return [*trainer.model.state_dict().values(), torch.tensor(metrics, dtype=torch.float64)]

    assert all(map(torch.equal, weights(), weights()))
