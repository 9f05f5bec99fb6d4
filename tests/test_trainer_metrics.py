"""``Trainer(metrics=...)``: what is computed, over which samples, under which names, and after a resume."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics import MaxMetric, MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score
from torchmetrics.wrappers import ClasswiseWrapper, MinMaxMetric

import _measured
from _measured import NUM_CLASSES, history_of, make_classes, make_metrics, make_trainer, resumable, states_in, train
from _support import Probe, Samples, Stream, recorder_of
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import EarlyStoppingCallback, ModelEmaCallback, StepBasedEvaluationCallback
from pytorch_accelerated.exceptions import CheckpointError
from pytorch_accelerated.metrics import Accuracy, Perplexity, WholeSet

DATA = make_classes()
ERROR = {"error": lambda outputs, targets: (outputs.argmax(1) != targets).float().mean()}


def by_hand(trainer, dataset):
    """Return the outputs of the trained model, and the targets, of all samples at once."""
    with torch.no_grad():
        return trainer.model.eval()(dataset.tensors[0]), dataset.tensors[1]


# --- numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 13, 64])
def test_an_evaluation_gives_the_numbers_of_all_samples_at_once(batch_size):
    """Also where the last batch is shorter."""
    trainer, data = make_trainer(), make_classes(13)
    trainer.evaluate(data, per_device_batch_size=batch_size)
    outputs, targets = by_hand(trainer, data)
    right = (outputs.argmax(1) == targets).double()
    loss = nn.functional.cross_entropy(outputs, targets).item()
    expected = {
        "accuracy": right.mean(),
        "top2": (outputs.topk(2).indices == targets[:, None]).any(1).double().mean(),
        "perplexity": math.exp(loss),
        "half": loss / 2,
        "error": 1 - right.mean(),
        **{f"mean_output_{i}": outputs[:, i].mean() for i in range(NUM_CLASSES)},
        "named_first": outputs[:, 0].mean(),
        "named_second": outputs[:, 1].mean(),
        "largest": outputs.max(),
        "micro": right.mean(),
        **{f"f1_{i}": value for i, value in enumerate(MulticlassF1Score(NUM_CLASSES, average=None)(outputs, targets))},
        "both_MulticlassAccuracy": MulticlassAccuracy(NUM_CLASSES)(outputs, targets),
        "both_MulticlassF1Score": MulticlassF1Score(NUM_CLASSES)(outputs, targets),
    }
    history = history_of(trainer)
    for name, value in expected.items():
        assert history[f"evaluation_{name}"] == [pytest.approx(float(value), abs=1e-6)], name
    assert all(isinstance(value, float) for values in history.values() for value in values)


def test_the_numbers_of_training_are_those_of_the_steps_as_they_were():
    """With a learning rate of 0 they equal those of an evaluation on the same data."""
    trainer = make_trainer(lr=0.0)
    history = train(trainer, eval_dataset=DATA)
    names = [name.removeprefix("train_") for name in history if name.startswith("train_")]
    assert len(names) > len(make_metrics())
    for name in names:
        assert history[f"train_{name}"] == pytest.approx(history[f"eval_{name}"], abs=1e-6), name


def test_each_pass_starts_anew():
    trainer = make_trainer({"samples": WholeSet(lambda outputs, targets: len(outputs))})
    history = train(trainer, num_epochs=3)
    assert history["train_samples"] == [22.0] * 3
    assert history["eval_samples"] == [13.0] * 3


def test_a_weight_may_differ_by_metric():
    """The mean of class 1 counts where there are samples of class 1, and a step that returns None does not count."""
    trainer, data = make_trainer({"of_class_1": _measured.output_of_class_1}), make_classes(13)
    trainer.evaluate(data, per_device_batch_size=2)
    outputs, targets = by_hand(trainer, data)
    assert history_of(trainer)["evaluation_of_class_1"] == [pytest.approx(outputs[targets == 1, 1].mean().item())]


@pytest.mark.parametrize("result", [None, (1.0, 0), {"a": None}, {}])
def test_what_was_never_measured_is_not_recorded_but_told(result):
    """A function that lacks its `return`, for example."""
    with pytest.warns(UserWarning, match="The metric 'nothing' has measured nothing"):
        history = train(make_trainer({"nothing": lambda outputs, targets: result}))
    assert set(history) == {"train_loss_epoch", "eval_loss_epoch"}


def test_an_evaluation_of_skipped_batches_is_not_told_of():
    class SkipAll(Trainer):
        def calculate_train_batch_loss(self, batch):
            self.skip_batch()
            return super().calculate_train_batch_loss(batch)

    model = nn.Linear(4, NUM_CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = SkipAll(model, nn.CrossEntropyLoss(), optimizer, callbacks=[], metrics={"a": lambda o, t: None})
    trainer.train(DATA, num_epochs=1, per_device_batch_size=5)


@pytest.mark.parametrize("batch_size", [1, 2, 13])
@pytest.mark.parametrize(
    "as_result",
    [
        lambda values: (values.mean(), len(values)),
        lambda values: (values.mean(), torch.tensor(len(values))),
        lambda values: (values.mean().item(), float(len(values))),
        lambda values: (values.mean(dim=0, keepdim=True).expand(2), len(values)),
        lambda values: ({"of": values.mean()}, len(values)),
        lambda values: ({"of": values.mean() if len(values) else None, "one": 1.0}, max(len(values), 1e-9)),
    ],
)
def test_the_mean_of_nothing_does_not_count(batch_size, as_result):
    """In a batch without a sample of the class it is NaN, and its weight is 0."""
    data = make_classes(13)
    trainer = make_trainer({"m": lambda outputs, targets: as_result(outputs[targets == 1, 1])})
    trainer.evaluate(data, per_device_batch_size=batch_size)
    outputs, targets = by_hand(trainer, data)
    expected = pytest.approx(outputs[targets == 1, 1].mean().item())
    history = history_of(trainer)
    values = [history[name] for name in ("evaluation_m", "evaluation_m_0", "evaluation_m_1", "evaluation_m_of")
              if name in history]  # fmt: skip
    assert values
    assert all(value == [expected] for value in values)


def test_metrics_can_be_left_out_of_training():
    history = train(make_trainer(ERROR, compute_train_metrics=False))
    assert set(history) == {"train_loss_epoch", "eval_loss_epoch", "eval_error"}


def test_the_gradients_do_not_depend_on_metrics():
    histories = [train(make_trainer(metrics)) for metrics in (None, {})]
    assert histories[0]["train_loss_epoch"] == histories[1]["train_loss_epoch"]


def test_nothing_of_a_step_keeps_its_graph_alive():
    seen = []
    trainer = make_trainer({"seen": lambda outputs, targets: seen.append(outputs) or 0.0})
    train(trainer, num_epochs=1)
    assert not any(outputs.requires_grad for outputs in seen)


def test_a_metric_that_is_a_module_may_have_buffers():
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
    trainer, data = make_trainer({"weighted": weighted}), make_classes(13)
    trainer.evaluate(data, per_device_batch_size=13)
    outputs, targets = by_hand(trainer, data)
    assert history_of(trainer)["evaluation_weighted"] == [pytest.approx(weighted(outputs, targets).item())]


@pytest.mark.parametrize("data", [Samples(DATA), Stream(DATA)], ids=["samples", "stream"])
def test_any_data_can_be_measured(data):
    trainer = make_trainer({"samples": WholeSet(lambda outputs, targets: len(outputs))})
    trainer.train(data, num_epochs=1, per_device_batch_size=4)
    assert history_of(trainer)["train_samples"] == [22.0]


def test_the_metrics_of_the_program_stay_as_they_are():
    """The Trainer has copies: what the program updates itself does not count, nor is it reset."""
    metric = MulticlassAccuracy(NUM_CLASSES, average="micro")
    metric.update(torch.eye(NUM_CLASSES), torch.zeros(NUM_CLASSES, dtype=torch.long))
    history = train(make_trainer({"accuracy": metric, "error": ERROR["error"]}))
    assert metric.update_count == 1
    assert history["eval_accuracy"] == pytest.approx([1 - error for error in history["eval_error"]], abs=1e-6)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda trainer: pickle.loads(pickle.dumps(trainer))])
def test_a_copy_of_the_trainer_has_the_metrics(copied):
    trainer = make_trainer({"accuracy": Accuracy(), "micro": MulticlassAccuracy(NUM_CLASSES, average="micro")})
    train(trainer)
    assert train(copied(make_trainer({"accuracy": Accuracy()}))).keys() >= {"eval_accuracy"}
    assert train(copied(trainer)).keys() >= {"eval_accuracy", "eval_micro"}


# --- what goes in ------------------------------------------------------------------------------------------------


class Texts(Trainer):
    """Batches are mappings, and the model returns a mapping with its loss, as in transformers."""


class TextModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, NUM_CLASSES)

    def forward(self, inputs, labels):
        logits = self.layer(inputs)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_of_mappings_the_logits_and_the_labels_go_in():
    data = [{"inputs": inputs, "labels": target} for inputs, target in DATA]
    model = TextModel()
    trainer = Trainer(model, None, torch.optim.SGD(model.parameters(), lr=0.1), (), metrics=ERROR)
    trainer.train(data, 1, data, per_device_batch_size=4)
    right = (model.layer(DATA.tensors[0]).argmax(1) == DATA.tensors[1]).float().mean().item()
    assert history_of(trainer)["eval_error"] == [pytest.approx(1 - right)]


def test_a_step_of_ones_own_returns_its_outputs():
    class Own(Trainer):
        def calculate_train_batch_loss(self, batch):
            outputs = self.model(batch[0])
            return {"loss": self.loss_func(outputs, batch[1]), "batch_size": 4, "model_outputs": -outputs}

        calculate_eval_batch_loss = calculate_train_batch_loss

    model = make_trainer().model
    trainer = Own(model, nn.CrossEntropyLoss(), None, (), metrics={"mean": lambda outputs, targets: outputs.mean()})
    trainer.evaluate(make_classes(8), per_device_batch_size=4)
    assert history_of(trainer)["evaluation_mean"] == [pytest.approx(-model(make_classes(8).tensors[0]).mean().item())]


def test_the_hook_chooses_what_goes_in():
    """By position or by name, and for torchmetrics too."""

    class ByName(Trainer):
        def get_metric_inputs(self, batch, batch_output):
            return {"value": batch_output["loss"]}

    model = make_trainer().model
    metrics = {"mean": MeanMetric(), "twice": lambda value: 2 * value, "all": MetricCollection([MaxMetric()])}
    trainer = ByName(model, nn.CrossEntropyLoss(), None, (), metrics=metrics)
    trainer.evaluate(make_classes(8), per_device_batch_size=4)
    history = history_of(trainer)
    assert history["evaluation_mean"] == pytest.approx(history["evaluation_loss"])
    assert history["evaluation_twice"][0] == pytest.approx(2 * history["evaluation_loss"][0])
    assert "evaluation_all_MaxMetric" in history


def test_without_outputs_or_targets_the_error_says_what_to_do():
    class NoOutputs(Trainer):
        def calculate_eval_batch_loss(self, batch):
            return {"loss": torch.tensor(1.0), "batch_size": 4}

    trainer = NoOutputs(nn.Linear(4, 3), nn.CrossEntropyLoss(), None, (), metrics=ERROR)
    with pytest.raises(ValueError, match=r"returned no `model_outputs`.*override `get_metric_inputs`"):
        trainer.evaluate(DATA)
    trainer = NoOutputs(nn.Linear(4, 3), nn.CrossEntropyLoss(), None, (), metrics={"perplexity": Perplexity()})
    trainer.evaluate(DATA)
    assert history_of(trainer)["evaluation_perplexity"] == [pytest.approx(math.e)]

    class NoTargets(Trainer):
        def calculate_eval_batch_loss(self, batch):
            return {"loss": torch.tensor(1.0), "batch_size": 4, "model_outputs": batch["x"]}

    trainer = NoTargets(nn.Linear(4, 3), nn.CrossEntropyLoss(), None, (), metrics=ERROR)
    with pytest.raises(ValueError, match=r"has `metrics`, but no targets were found in a batch, .* with \['x'\]"):
        trainer.evaluate([{"x": torch.zeros(2)}])


def test_an_error_in_a_metric_names_it():
    trainer = make_trainer({"mine": lambda outputs, targets: 1 / 0})
    with pytest.raises(ZeroDivisionError) as caught:
        trainer.evaluate(DATA)
    assert any("in the metric 'mine'" in note for note in getattr(caught.value, "__notes__", [str(caught.value)]))


# --- names -------------------------------------------------------------------------------------------------------


def test_the_table_of_names(tmp_path):
    """Each row of the table in `docs/metrics.md`."""
    average = ModelEmaCallback(save_path=tmp_path / "average.pt")
    callbacks = [average, StepBasedEvaluationCallback(eval_every_n_steps=3)]
    metrics = {"accuracy": Accuracy()}
    trainer = make_trainer(metrics, callbacks=callbacks)
    names = {name for name in train(trainer) if "accuracy" in name}
    assert names == {"train_accuracy", "eval_accuracy", "intermediate_eval_accuracy", "ema_model_eval_accuracy"}

    trainer.evaluate(DATA)
    trainer.evaluate({"test": DATA})
    new = {name for name in history_of(trainer) if "accuracy" in name} - names
    assert new == {
        "evaluation_accuracy",
        "test_evaluation_accuracy",
        "ema_model_evaluation_eval_accuracy",
        "test_ema_model_evaluation_eval_accuracy",
    }

    average.watch_metric = "a_ema_model_eval_loss_epoch"
    trainer = make_trainer(metrics, callbacks=callbacks)
    names = {name for name in train(trainer, eval_dataset={"a": DATA, "b": DATA}) if "accuracy" in name}
    fronts = [f"{name}_{kind}" for name in "ab" for kind in ("", "intermediate_", "ema_model_")]
    assert names == {"train_accuracy", *(f"{front}eval_accuracy" for front in fronts)}


RESULTS = {
    "a vector": (lambda o, t: o.mean(0), {"m_0", "m_1", "m_2"}),
    "a list": (lambda o, t: [1.0, 2.0], {"m_0", "m_1"}),
    "a mapping": (lambda o, t: {"a": 1.0, "b": torch.zeros(2)}, {"m_a", "m_b_0", "m_b_1"}),
    "one entry": (lambda o, t: torch.zeros(1), {"m"}),
    "a matrix": (MulticlassConfusionMatrix(NUM_CLASSES), {f"m_{i}_{j}" for i in range(3) for j in range(3)}),
    "classes": (
        ClasswiseWrapper(MulticlassF1Score(NUM_CLASSES, average=None), labels=["cat", "dog", "cow"]),
        {f"m_multiclassf1score_{name}" for name in ("cat", "dog", "cow")},
    ),
    "a metric around another": (MinMaxMetric(MulticlassAccuracy(NUM_CLASSES)), {"m_raw", "m_min", "m_max"}),
    "of the whole set": (WholeSet(lambda o, t: {"n": len(o), "missing": None}), {"m_n"}),
}


@pytest.mark.parametrize("kind", RESULTS)
def test_each_entry_of_a_result_has_a_name(kind):
    metric, names = RESULTS[kind]
    trainer = make_trainer({"m": metric})
    trainer.evaluate(DATA, per_device_batch_size=4)
    assert set(history_of(trainer)) == {"evaluation_loss", *(f"evaluation_{name}" for name in names)}


NAMED = {
    "a collection": (MetricCollection([MulticlassAccuracy(NUM_CLASSES)], prefix="my_"), {"my_MulticlassAccuracy"}),
    "a function": (_measured.scores_and_positions, {"scores_and_positions"}),
    "an instance": (Accuracy(), {"accuracy"}),
    "a list": ([Accuracy(), MulticlassF1Score(NUM_CLASSES)], {"accuracy", "multiclass_f1_score"}),
    "nothing": ({}, set()),
}


@pytest.mark.parametrize("kind", NAMED)
def test_metrics_may_have_names_of_their_own(kind):
    metrics, names = NAMED[kind]
    trainer = make_trainer(metrics)
    trainer.evaluate(DATA, per_device_batch_size=4)
    assert set(history_of(trainer)) == {"evaluation_loss", *(f"evaluation_{name}" for name in names)}


EVENTS_OF_PASSES = {
    "on_train_epoch_end": "train_",
    "on_eval_epoch_end": "eval_",
}


@pytest.mark.parametrize("event", EVENTS_OF_PASSES)
def test_in_an_event_a_plain_name_means_the_pass_under_way(event):
    recorder, values = recorder_of(lambda t: t.run_history.get_latest_metric("error"), event)
    history = train(make_trainer(ERROR, callbacks=[recorder]))
    assert values == history[f"{EVENTS_OF_PASSES[event]}error"]


def test_in_each_kind_of_evaluation_a_plain_name_means_that_one(tmp_path):
    values = []

    def note(trainer, **kwargs):
        history = trainer.run_history
        values.append((history.metric_name_prefix, history.get_latest_metric("error")))

    average = ModelEmaCallback(
        save_path=tmp_path / "average.pt",
        watch_metric="a_ema_model_eval_error",
        callbacks=[Probe(on_eval_epoch_end=note)],
    )
    callbacks = [Probe(on_eval_epoch_end=note), average, StepBasedEvaluationCallback(eval_every_n_steps=3)]
    trainer = make_trainer(ERROR, callbacks=callbacks)
    history = train(trainer, eval_dataset={"a": DATA, "b": make_classes(13)})
    assert {prefix for prefix, _ in values} >= {"a_", "b_intermediate_", "b_ema_model_"}
    for prefix in {prefix for prefix, _ in values}:
        assert [value for of, value in values if of == prefix] == history[f"{prefix}eval_error"]
    values.clear()
    trainer.evaluate(DATA)
    assert values[0][1] == history_of(trainer)["evaluation_error"][0]
    with pytest.raises(ValueError, match="'error'"):
        trainer.run_history.get_latest_metric("error")


def step_with(**metrics):
    return lambda self, batch: {**Trainer.calculate_train_batch_loss(self, batch), "metrics": metrics}


def test_a_name_that_would_overwrite_another_record_is_refused():
    """In the metrics of steps, at the first step."""
    cases = [
        ({"calculate_train_batch_loss": step_with(eval_acc=0.1)}, {"train": DATA}, "'train_eval_acc'"),
        ({"calculate_train_batch_loss": step_with(intermediate_eval_acc=0.1)}, {"train": DATA}, "intermediate_eval"),
        ({"calculate_eval_batch_loss": step_with(b_eval_acc=0.1)}, {"x": DATA, "x_eval": DATA}, None),
        (
            {"calculate_eval_batch_loss": step_with(y_eval_acc=0.1)},
            {"x": DATA, "x_eval_y": DATA},
            "'x_eval_y_eval_acc'",
        ),
        ({"calculate_train_batch_loss": step_with(eval_acc=0.1)}, {"test": DATA}, None),
        ({"calculate_train_batch_loss": step_with(error=0.1)}, {"test": DATA}, "`metrics` of the Trainer"),
    ]
    for methods, datasets, message in cases:
        model = make_trainer().model
        cls = type("Own", (Trainer,), methods)
        trainer = cls(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1), (), metrics=ERROR)
        if message is None:
            train(trainer, eval_dataset=datasets)
            assert all(len(values) == 2 for values in history_of(trainer).values())
        else:
            with pytest.raises(ValueError, match=message):
                train(trainer, eval_dataset=datasets)


def test_a_metric_with_the_name_of_another_record_is_refused_before_training():
    trainer = make_trainer({"eval_error": ERROR["error"]})
    recorder, steps = recorder_of(lambda t: 1, "on_train_step_start")
    trainer.callback_handler.add_callback(recorder)
    with pytest.raises(ValueError, match="`metrics` has a metric with the name 'eval_error', which would be recorded"):
        train(trainer, eval_dataset={"train": DATA})
    assert not steps
    train(trainer, eval_dataset={"test": DATA})


@pytest.mark.parametrize(
    ("metrics", "error", "message"),
    [
        ({"loss": ERROR["error"]}, ValueError, "under which the library records the loss"),
        ({"loss_epoch": ERROR["error"]}, ValueError, "under which the library records the loss"),
        ({"": ERROR["error"]}, ValueError, "empty name"),
        ({3: ERROR["error"]}, TypeError, "Expected a text"),
        (
            {"accuracy": MulticlassAccuracy},
            TypeError,
            r"It is a class: create an instance, such as `MulticlassAccuracy",
        ),
        ({"accuracy": "accuracy"}, TypeError, "Expected a metric of torchmetrics or of"),
        (["accuracy"], TypeError, "Expected a metric of torchmetrics or of"),
        ("accuracy", TypeError, "Expected a metric of torchmetrics or of"),
        (lambda outputs, targets: 0.0, ValueError, "has no name. Expected a dictionary"),
        ([Accuracy(), Accuracy()], ValueError, "several of the same name"),
        (0.5, TypeError, "Expected a metric of torchmetrics or of"),
    ],
)
def test_what_is_no_metric_is_refused_when_the_trainer_is_created(metrics, error, message):
    with pytest.raises(error, match=message):
        make_trainer(metrics)


@pytest.mark.parametrize(
    ("metrics", "error", "message"),
    [
        ({"m": lambda o, t: "good"}, TypeError, "The metric 'm' returned 'good'"),
        ({"m": lambda o, t: {"a": 1.0, "b": "good"}}, TypeError, "The metric 'm' returned 'good'"),
        ({"m": lambda o, t: 1j}, TypeError, "The metric 'm' returned complex numbers"),
        ({"m": lambda o, t: o.to(torch.complex64)}, TypeError, "The metric 'm' returned complex numbers"),
        ({"m": lambda o, t: (0.5, -1.0)}, ValueError, "the weight of the value, is -1. Expected a finite number"),
        ({"m": lambda o, t: (0.5, -1)}, ValueError, "the weight of the value, is -1. Expected a finite number"),
        ({"m": lambda o, t: (0.5, torch.tensor(math.nan))}, ValueError, "the weight of the value, is nan"),
        ({"m": lambda o, t: (0.5, "weight")}, TypeError, "the weight of the value, is 'weight'"),
        ({"m": lambda o, t: (o.argmax(1) == t).float()}, ValueError, "Expected the mean over the batch"),
        ({"m": WholeSet(lambda o, t: "good")}, TypeError, "The metric 'm' is 'good'"),
        ({"m": WholeSet(lambda o, t: torch.zeros(2000))}, ValueError, "Expected at most 1000 numbers"),
        ({"m": lambda o, t: [0.0], "m_0": lambda o, t: 0.0, "n": lambda o, t: [0.0, 1.0]}, None, ""),
        ({"m": lambda o, t: [0.0, 1.0], "m_0": lambda o, t: 0.0}, ValueError, r"results with the names \['m_0'\]"),
    ],
)
def test_a_result_that_is_none_is_refused(metrics, error, message):
    trainer = make_trainer(metrics)
    if error is None:
        trainer.evaluate(DATA, per_device_batch_size=5)
        return
    with pytest.raises(error, match=message):
        trainer.evaluate(DATA, per_device_batch_size=5)


@pytest.mark.parametrize(
    "metrics",
    [
        {"m": lambda o, t: [0.0, 1.0], "m_0": lambda o, t: 0.0},
        {"m": lambda o, t: {"a": 0.0}, "m_a": Accuracy()},
        {"m": lambda o, t: o.mean(dim=0), "m_2": Perplexity()},
    ],
)
def test_results_of_the_same_name_are_refused_before_the_first_update(metrics):
    trainer = make_trainer(metrics)
    with pytest.raises(ValueError, match="results with the names"):
        trainer.train(DATA, num_epochs=1, per_device_batch_size=5)
    assert trainer.progress.num_updates == 0


def test_the_error_of_a_metric_tells_what_it_was_called_with():
    with pytest.raises(TypeError) as caught:
        make_trainer({"m": lambda outputs: 0.0}).evaluate(DATA, per_device_batch_size=5)
    notes = getattr(caught.value, "__notes__", [])
    assert notes == ["in the metric 'm' of the Trainer", "The metric was called with float32 (5, 3), int64 (5,)"]


def test_callbacks_know_the_metrics_that_a_run_records():
    for name in ("eval_error", "train_error", "eval_error_2"):
        train(make_trainer(ERROR, callbacks=[EarlyStoppingCallback(watch_metric="eval_error")]))
        trainer = make_trainer({"error": lambda o, t: o.mean(0)} if name[-1] == "2" else ERROR)
        trainer.callback_handler.add_callback(EarlyStoppingCallback(watch_metric=name))
        train(trainer)
    with pytest.raises(ValueError, match="Watch 'eval_error'"):
        train(make_trainer(ERROR, callbacks=[EarlyStoppingCallback(watch_metric="val_error")]))
    watching = [EarlyStoppingCallback(watch_metric="train_error")]
    without_training = make_trainer(ERROR, callbacks=watching, compute_train_metrics=False)
    with pytest.raises(ValueError, match="which nothing in this run records"):
        train(without_training)


# --- resume ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """Save a state after every step of a run with intermediate evaluations; return the folder and the history."""
    folder = tmp_path_factory.mktemp("states")
    return folder, train(resumable(folder), gradient_accumulation_steps=2)


def test_a_run_that_is_resumed_anywhere_records_the_same_bits(states, tmp_path):
    folder, expected = states
    paths = states_in(folder)
    assert len(paths) >= 8
    for path in paths[::2]:
        trainer = resumable(tmp_path / path.name)
        found = train(trainer, gradient_accumulation_steps=2, resume_from=path)
        assert {name: repr(values) for name, values in found.items()} == {
            name: repr(values) for name, values in expected.items()
        }, path


def test_metrics_that_the_state_lacks_cover_the_rest_of_the_epoch(states, tmp_path):
    folder, _ = states
    metrics = {"accuracy": Accuracy(), "rest": WholeSet(lambda outputs, targets: len(outputs))}
    with pytest.warns(UserWarning, match="has nothing of `accuracy`, `rest` in `metrics`"):
        history = train(resumable(tmp_path, metrics), gradient_accumulation_steps=2, resume_from=states_in(folder)[1])
    assert history["train_rest"][0] < 22
    assert history["train_rest"][1] == 22


def test_the_state_of_another_metric_is_refused(states, tmp_path):
    folder, _ = states
    metrics = {"micro": MulticlassConfusionMatrix(NUM_CLASSES)}
    trainer = resumable(tmp_path, metrics)
    with pytest.raises(CheckpointError, match="the metric 'micro' is another one"):
        train(trainer, gradient_accumulation_steps=2, resume_from=states_in(folder)[1])


def test_an_accumulation_window_or_a_failure_leaves_no_trace():
    """A run that fails in the middle of an epoch does not count in the next one."""

    def fail(trainer, step, **kwargs):
        if step == 3:
            raise RuntimeError("stop")

    trainer = make_trainer({"samples": WholeSet(lambda outputs, targets: len(outputs)), **ERROR})
    probe = Probe(on_train_step_end=fail)
    trainer.callback_handler.add_callback(probe)
    with pytest.raises(RuntimeError, match="stop"):
        train(trainer)
    trainer.callback_handler.callbacks.remove(probe)
    assert train(trainer)["train_samples"] == [22.0, 22.0]


def test_no_warning_comes_from_torchmetrics():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(make_trainer())


def test_an_evaluation_within_an_evaluation_has_metrics_of_its_own():
    """Also when those of the outer one have been used before."""
    data, sizes = make_classes(5), [1]

    def nest(trainer, step, **kwargs):
        if step == 1 and sizes and trainer.run_history.get_metric_values("eval_samples"):
            trainer.evaluate(data, per_device_batch_size=sizes.pop())

    trainer = make_trainer({"samples": WholeSet(lambda outputs, targets: len(outputs))})
    trainer.callback_handler.add_callback(Probe(on_eval_step_end=nest))
    history = train(trainer, num_epochs=3)
    assert history["evaluation_samples"] == [5.0]
    assert history["eval_samples"] == [13.0] * 3


def test_one_sample_is_enough():
    trainer = make_trainer({"accuracy": Accuracy(), "micro": MulticlassAccuracy(NUM_CLASSES, average="micro")})
    trainer.evaluate(TensorDataset(torch.zeros(1, 4), torch.zeros(1, dtype=torch.long)))
    assert history_of(trainer)["evaluation_accuracy"][0] in (0.0, 1.0)


class Longest(MeanMetric):
    """Remembers the number of the pass in which its mean was largest, in numbers that `reset` leaves alone."""

    def __init__(self):
        super().__init__()
        self.num_passes, self.largest, self.pass_of_largest = 0, -math.inf, 0

    def update(self, outputs, targets):
        super().update(outputs)

    def compute(self):
        self.num_passes += 1
        if super().compute() > self.largest:
            self.largest, self.pass_of_largest = super().compute().item(), self.num_passes
        return {"of": self.pass_of_largest, "all": self.num_passes}


@pytest.mark.parametrize(
    "make", [lambda: MinMaxMetric(MulticlassAccuracy(NUM_CLASSES)), Longest, lambda: MetricCollection([Longest()])]
)
def test_what_a_metric_remembers_of_earlier_passes_is_resumed(tmp_path, make):
    """The smallest and largest value so far, for example, also of each evaluation dataset."""
    data = {"a": make_classes(13, seed=2), "b": make_classes(7, seed=3)}
    whole = train(resumable(tmp_path, {"m": make()}), num_epochs=3, eval_dataset=data)
    for state in states_in(tmp_path)[1::3]:
        trainer = resumable(tmp_path / "again", {"m": make()})
        assert train(trainer, num_epochs=3, eval_dataset=data, resume_from=state) == whole, state.name
