"""`Trainer.predict` and `evaluate` on one process; `distributed/test_numbers.py` has them on two and three."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from _numbers import EVALUATED_LENGTHS, evaluations, expected_evaluations
from _predicting import (
    EXPECTED_OF_LANGUAGE_MODEL,
    LanguageOutput,
    Predicting,
    Scores,
    indices_of,
    language_model_predictions,
)
from _screens import use_terminal
from _support import Batches, Probe, Samples, make_dataset, make_indexed_dataset, make_model, make_trainer
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import LimitBatchesCallback, ProgressBarCallback


@pytest.mark.parametrize("is_in_memory", [True, False])
@pytest.mark.parametrize("num_samples", EVALUATED_LENGTHS)
def test_each_sample_is_evaluated_and_predicted_once_and_in_order(num_samples, is_in_memory):
    torch.testing.assert_close(
        evaluations(num_samples, is_in_memory), expected_evaluations(num_samples), rtol=0, atol=1e-6, check_device=False
    )


@pytest.mark.parametrize("optimizer", [None, "sgd"])
def test_predict_works_before_training_with_and_without_an_optimizer(optimizer):
    dataset, model = make_dataset(11), make_model()
    trainer = make_trainer(model) if optimizer else Trainer(model, None, None, callbacks=())
    outputs = trainer.predict(dataset, per_device_batch_size=4)
    torch.testing.assert_close(outputs, model.cpu()(dataset.tensors[0]), rtol=0, atol=1e-6)
    assert not outputs.requires_grad
    assert trainer.model is model


def test_predict_puts_the_model_into_evaluation_mode():
    model = nn.Sequential(nn.Dropout(0.5))
    dataset = make_indexed_dataset(9)
    trainer = Trainer(model, None, None, callbacks=())
    assert trainer.predict(dataset, per_device_batch_size=4).flatten().tolist() == list(range(9))


@pytest.mark.parametrize("dataset", [make_indexed_dataset(9), Samples(make_indexed_dataset(9))])
def test_predict_uses_the_dataloader_kwargs_and_the_collate_function(dataset):
    seen = []

    class Recorder(Trainer):
        def calculate_predictions(self, batch):
            seen.append(len(batch))
            return batch

    trainer = Recorder(nn.Identity(), None, None, callbacks=())
    outputs = trainer.predict(
        dataset,
        dataloader_kwargs={"batch_size": 5, "num_workers": 0},
        collate_fn=lambda samples: torch.cat([inputs for inputs, _ in samples]),
    )
    assert outputs.tolist() == list(range(9))
    assert seen == [5, 4]


def test_predict_accepts_an_iterable_of_batches():
    outputs = Trainer(nn.Identity(), None, None, callbacks=()).predict(Batches(make_indexed_dataset(9), 4))
    assert outputs.flatten().tolist() == list(range(9))


def test_predict_leaves_evaluation_dataset_progress_history_and_random_state_unchanged():
    trainer = make_trainer()
    trainer.train(make_dataset(8), num_epochs=1, eval_dataset=make_dataset(4))
    before = (trainer.eval_dataset, trainer.progress.num_updates, sorted(trainer.run_history.get_metric_names()))
    state = torch.get_rng_state()
    trainer.predict(make_dataset(5), move_to_host=False)
    assert (
        trainer.eval_dataset,
        trainer.progress.num_updates,
        sorted(trainer.run_history.get_metric_names()),
    ) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_failed_predict_leaves_the_evaluation_dataset_unchanged():
    trainer = make_trainer()
    trainer.eval_dataset = dataset = make_dataset(4)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        trainer.predict(make_indexed_dataset(4))
    assert trainer.eval_dataset is dataset


@pytest.mark.parametrize("on_every_process", [True, False])
def test_a_single_process_gets_the_outputs_as_the_main_process(on_every_process):
    outputs = make_trainer().predict(make_dataset(3), on_every_process=on_every_process)
    assert outputs.shape == (3, 1)


# --- what is kept ------------------------------------------------------------------------------------------------


def predict(form, data, **settings):
    return Trainer(Predicting(form), None, None, callbacks=()).predict(data, 2, **settings)


def several(x):
    return {"a": x, "b": 2 * x, "count": len(x)}


@pytest.mark.parametrize(
    ("form", "choice", "expected"),
    [
        (several, "b", [2, 4, 6]),
        (several, ["b", "a"], {"b": [2, 4, 6], "a": [1, 2, 3]}),
        (several, ("a",), {"a": [1, 2, 3]}),
        (several, lambda outputs: outputs["b"] + 1, [3, 5, 7]),
        (lambda x: (x, 2 * x, 3 * x), 1, [2, 4, 6]),
        (lambda x: (x, 2 * x, 3 * x), [2, 0], [[3, 6, 9], [1, 2, 3]]),
        (lambda x: Scores(x, 2 * x), "notes", [2, 4, 6]),
        (lambda x: LanguageOutput(x.mean(), 2 * x), "logits", [2, 4, 6]),
        (lambda x: {"a": x, "past_key_values": 3 * x}, "past_key_values", [3, 6, 9]),
    ],
)
def test_outputs_chooses_what_is_kept(form, choice, expected):
    assert flat(predict(form, indices_of(3), outputs=choice)) == expected


def flat(outputs):
    if isinstance(outputs, dict):
        return {name: flat(item) for name, item in outputs.items()}
    return [flat(item) for item in outputs] if isinstance(outputs, tuple) else outputs.flatten().tolist()


def test_a_choice_of_a_dataclass_leaves_the_others_empty_without_a_warning(recwarn):
    outputs = predict(lambda x: LanguageOutput(x.mean(), 2 * x, x), indices_of(3), outputs=["logits"])
    assert type(outputs) is LanguageOutput
    assert (outputs.loss, flat(outputs.logits), outputs.past_key_values) == (None, [2, 4, 6], None)
    assert not recwarn


@pytest.mark.parametrize(
    ("form", "choice", "message"),
    [
        (several, "logit", r"asks for \['logit'\], but the model returned a `dict` with \['a', 'b', 'count'\]"),
        (lambda x: (x, x), [0, 2], r"asks for \[2\], but the model returned a `tuple` with \[0, 1\]"),
        (lambda x: x, "a", r"asks for \['a'\], but the model returned a `Tensor` without names or parts"),
    ],
)
def test_a_choice_that_the_model_does_not_return_is_refused(form, choice, message):
    with pytest.raises(ValueError, match=message):
        predict(form, indices_of(3), outputs=choice)


Labelled = namedtuple("Labelled", ["x", "label"])
PAIRS = [(torch.tensor([float(k)]), torch.tensor(k)) for k in range(5)]


@pytest.mark.parametrize(
    ("data", "collate_fn"),
    [
        (PAIRS, None),
        ([{"inputs": x, "labels": y} for x, y in PAIRS], None),
        ([{"inputs": x, "y": y} for x, y in PAIRS], None),
        (PAIRS, lambda samples: Labelled(*map(torch.stack, zip(*samples, strict=True)))),
    ],
)
def test_targets_are_returned_beside_the_outputs(data, collate_fn):
    class OfInputs(Trainer):
        def calculate_predictions(self, batch):
            return next(iter(batch.values() if isinstance(batch, dict) else batch)) * 2

    trainer = OfInputs(nn.Identity(), None, None, callbacks=())
    outputs, targets = trainer.predict(data, 2, collate_fn=collate_fn, return_targets=True)
    assert flat(outputs) == [0, 2, 4, 6, 8]
    assert targets.tolist() == [0, 1, 2, 3, 4]


def test_targets_of_other_numbers_in_each_sample_are_returned_as_lists():
    """As detectors get them: images and targets are tuples."""
    data = [(torch.ones(1) * k, {"boxes": torch.full((k % 3, 4), k)}) for k in range(5)]

    class Detector(Trainer):
        def calculate_predictions(self, batch):
            return [{"boxes": target["boxes"] * 2} for target in batch[1]]

    trainer = Detector(nn.Identity(), None, None, callbacks=())
    outputs, targets = trainer.predict(
        data, 2, collate_fn=lambda samples: tuple(zip(*samples, strict=True)), return_targets=True
    )
    assert [target["boxes"].tolist() for target in targets] == [target["boxes"].tolist() for _, target in data]
    assert [output["boxes"].tolist() for output in outputs] == [(2 * target["boxes"]).tolist() for _, target in data]


def test_data_without_targets_are_refused_if_these_are_wanted():
    with pytest.raises(ValueError, match=r"`return_targets` is set, but no targets were found in a batch.*a Tensor"):
        predict(lambda x: x, indices_of(3), return_targets=True)


def test_several_datasets_are_predicted_by_name_with_loaders_of_their_own():
    data = {"a": indices_of(3), "b": DataLoader(indices_of(7), batch_size=5), "c": TensorDataset(torch.ones(1, 1))}
    outputs = predict(lambda x: x, data)
    assert flat(outputs) == {"a": [1, 2, 3], "b": [1, 2, 3, 4, 5, 6, 7], "c": [1]}


def test_a_limit_of_batches_holds_for_predictions(monkeypatch):
    assert len(Trainer(nn.Identity(), None, None, callbacks=[LimitBatchesCallback(2)]).predict(indices_of(9), 3)) == 6
    monkeypatch.setenv("PT_ACC_LIMIT_BATCHES", "1")
    assert len(Trainer(nn.Identity(), None, None, callbacks=()).predict(indices_of(9), 3)) == 3


def test_predictions_have_no_gradients_whatever_calculates_them():
    class WithGradients(Trainer):
        def calculate_predictions(self, batch):
            with torch.enable_grad():
                outputs = self.model(batch[0])
            return {"rows": outputs, "each": [{"row": row} for row in outputs], "mean": outputs.mean()}

    outputs = WithGradients(make_model(), None, None, callbacks=()).predict(make_dataset(5), 2)
    tensors = [outputs["rows"], outputs["mean"], *(each["row"] for each in outputs["each"])]
    assert not any(tensor.requires_grad for tensor in tensors)


# --- the progress bar --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("callbacks", "verbose", "is_shown"),
    [([ProgressBarCallback], True, True), ([ProgressBarCallback], False, False), ([], True, False)],
)
def test_a_progress_bar_shows_the_batches_if_the_trainer_has_progress_bars(monkeypatch, callbacks, verbose, is_shown):
    terminal = use_terminal(monkeypatch)
    Trainer(nn.Identity(), None, None, callbacks, verbose=verbose).predict(indices_of(5), 2)
    assert ("predictions   0% |" in terminal.getvalue() and " 0/3" in terminal.getvalue()) == is_shown
    assert terminal.screen() == [], "the bar is wiped at the end"


def test_predictions_within_a_run_have_no_bar_of_their_own(monkeypatch):
    terminal = use_terminal(monkeypatch)
    probe = Probe(on_train_epoch_end=lambda trainer: trainer.predict(make_dataset(4)))
    trainer = make_trainer(callbacks=[ProgressBarCallback(), probe])
    trainer.train(make_dataset(4), num_epochs=1)
    assert "epoch 1/1" in terminal.getvalue()
    assert "predictions" not in terminal.getvalue()


# --- a language model --------------------------------------------------------------------------------------------


def test_a_causal_language_model_of_transformers_predicts_ragged_batches_in_order():
    pytest.importorskip("transformers", reason="the models of transformers are not needed otherwise")
    predicted = language_model_predictions()
    assert predicted.pop("largest difference") < 1e-5
    assert predicted == EXPECTED_OF_LANGUAGE_MODEL
