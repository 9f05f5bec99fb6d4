"""States that earlier versions of the library saved, one of each format from the second on, can be resumed from.

Bits may differ between machines and versions of PyTorch, so values are compared with a tolerance.
"""

from __future__ import annotations

import json
import warnings

import pytest
import torch

import _golden
from _saved import names_in
from _support import Samples, make_dataset
from pytorch_accelerated._checkpoint.manifest import FORMAT_VERSION, read_manifest
from pytorch_accelerated.states import verify_state

FORMATS = range(2, FORMAT_VERSION + 1)


@pytest.fixture(params=FORMATS, ids="format {}".format)
def golden(request, tmp_path):
    """The format, the folder with the state, and the final results of the run that saved it."""
    name = f"training_state_format_{request.param}"
    _golden.unpack(_golden.DATA / f"{name}.tar.xz", tmp_path)
    return request.param, tmp_path, json.loads((_golden.DATA / f"{name}.json").read_text())


def assert_nearly_equal(left, right, place=""):
    if isinstance(left, dict):
        assert left.keys() == right.keys(), place
        for name in left:
            assert_nearly_equal(left[name], right[name], f"{place}/{name}")
    else:
        left, right = (torch.as_tensor(value, dtype=torch.float64) for value in (left, right))
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5, msg=lambda text: f"{place}: {text}")


def test_a_resumed_run_ends_like_the_run_that_saved_the_state(golden):
    _, folder, expected = golden
    trainer = _golden.make_trainer(folder, seed=9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # older versions saved it
        result = _golden.train(trainer, resume_from="latest")
    assert trainer.is_resumed
    assert trainer.callback_handler.callbacks[3].state_dict() == {"num_steps": 15}
    if not _golden.draws_same_numbers():
        pytest.skip("the rest of the run draws other numbers with this PyTorch")
    assert_nearly_equal(result, expected)


@pytest.mark.parametrize("wrap", [lambda dataset: dataset, Samples], ids=["in memory", "samples"])
def test_it_is_said_if_a_former_version_has_seeded_the_samples_otherwise(golden, wrap, capsys, monkeypatch):
    """Samples that are loaded may draw; tensors in memory do not."""
    format_version, folder, _ = golden
    monkeypatch.setattr(_golden, "make_dataset", lambda *args, **kwargs: wrap(make_dataset(*args, **kwargs)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        _golden.train(
            _golden.make_trainer(folder, seed=9),
            resume_from="latest",
            train_dataloader_kwargs={"num_workers": 0},
            eval_dataloader_kwargs={"num_workers": 0},
        )
    is_former = format_version <= 2
    assert ("what is drawn while samples are loaded differs" in capsys.readouterr().out) is (
        is_former and wrap is Samples
    )


def test_the_state_is_valid_and_has_its_position_and_metrics(golden):
    format_version, folder, expected = golden
    assert names_in(folder) == ["best.pt", "step_8"]
    saved = verify_state(folder / "step_8")
    assert json.loads((saved.path / "manifest.json").read_text())["format_version"] == format_version
    assert saved == read_manifest(saved.path)
    assert (saved.position.num_epochs_completed, saved.position.num_batches_in_epoch) == (1, 3)
    assert (saved.position.num_updates, saved.position.num_samples) == (4, 26)
    for name in ("train_loss_epoch", "eval_loss_epoch", "ema_model_eval_loss_epoch"):
        assert saved.metrics[name] == pytest.approx(expected["history"][name][0])
