"""`check_invariance`: what passes, what fails and for which cause, what it does not change, and what it rejects."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from _support import Stream, make_dataset
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import TrainerCallback
from pytorch_accelerated.tracking import InMemoryRunHistory
from pytorch_accelerated.verification import SPLIT_DEPENDENT_MODULES, check_invariance

EPSILON = torch.finfo(torch.float32).eps
DATASET = make_dataset(num_samples=48)


# --- models and steps --------------------------------------------------------------------------------------------


def make_mlp(*extra_layers):
    return nn.Sequential(nn.Linear(3, 16), *extra_layers, nn.GELU(), nn.Linear(16, 1))


def trainer_of(trainer_class=Trainer, make_model=make_mlp, loss_func=None, optimizer_class=torch.optim.AdamW, **kwargs):
    """Return a function that creates a new trainer on each call."""

    def make_trainer():
        model = make_model()
        optimizer = optimizer_class(model.parameters(), lr=0.01)
        return trainer_class(model, loss_func or nn.MSELoss(), optimizer, **kwargs)

    return make_trainer


class SumTrainer(Trainer):
    """Its loss is the sum over the batch."""

    def calculate_train_batch_loss(self, batch):
        output = super().calculate_train_batch_loss(batch)
        return {**output, "loss": output["loss"] * output["batch_size"]}


class DividingTrainer(Trainer):
    """Divides its loss by the number of accumulated batches, as hand-written loops do."""

    def calculate_train_batch_loss(self, batch):
        output = super().calculate_train_batch_loss(batch)
        return {**output, "loss": output["loss"] / self.run_config.gradient_accumulation_steps}


class WrongBatchSizeTrainer(Trainer):
    """Returns a batch size of 1 for every batch, which is harmless while all batches have the same size."""

    def calculate_train_batch_loss(self, batch):
        return {**super().calculate_train_batch_loss(batch), "batch_size": 1}


class SplitDependentLossTrainer(Trainer):
    """Its loss depends on the split, but the gradient does not."""

    def calculate_train_batch_loss(self, batch):
        output = super().calculate_train_batch_loss(batch)
        return {**output, "loss": output["loss"] + 1 / output["batch_size"]}


class NanTrainer(Trainer):
    """Its loss is NaN."""

    def calculate_train_batch_loss(self, batch):
        output = super().calculate_train_batch_loss(batch)
        return {**output, "loss": output["loss"] * float("nan")}


class FunctionalDropout(nn.Module):
    def forward(self, inputs):
        return F.dropout(inputs, 0.5, self.training)


class TinyGpt(nn.Module):
    """One block of a causal transformer over characters."""

    def __init__(self, num_tokens=11, width=16, length=8):
        super().__init__()
        self.token = nn.Embedding(num_tokens, width)
        self.position = nn.Parameter(torch.randn(length, width) * 0.02)
        self.block = nn.TransformerEncoderLayer(width, 2, 32, batch_first=True, norm_first=True)
        self.head = nn.Linear(width, num_tokens)

    def forward(self, tokens):
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        hidden = self.block(self.token(tokens) + self.position[:length], src_mask=mask, is_causal=True)
        return self.head(hidden)


class TokenMeanTrainer(Trainer):
    """Its loss is the mean over the tokens without padding, but it does not return their number."""

    def calculate_train_batch_loss(self, batch):
        inputs, targets = batch
        logits = self.model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        return {"loss": loss, "batch_size": len(inputs)}


class TokenCountTrainer(TokenMeanTrainer):
    """Returns the number of tokens without padding."""

    def calculate_train_batch_loss(self, batch):
        return {**super().calculate_train_batch_loss(batch), "num_items_in_batch": (batch[1] != -100).sum()}


def make_text(num_texts=48, length=8):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(11, (num_texts, length + 1), generator=generator)
    lengths = torch.randint(1, length + 1, (num_texts, 1), generator=generator)
    targets = tokens[:, 1:].masked_fill(torch.arange(length) >= lengths, -100)
    return TensorDataset(tokens[:, :-1], targets)


# --- what passes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_the_mean_over_a_batch_differs_by_rounding_errors_only(optimizer_class):
    report = check_invariance(trainer_of(optimizer_class=optimizer_class), DATASET)
    assert report.is_invariant
    assert report.worst.largest < 50 * EPSILON
    assert report.likely_cause == ""
    assert [(split.per_device_batch_size, split.gradient_accumulation_steps) for split in report.splits] == [
        (8, 2),
        (6, 3),
        (4, 4),
    ]
    assert all(split.factor == pytest.approx(1) for split in report.splits)
    report.raise_if_different()


def test_a_network_with_batch_norm_and_dropout_passes_and_the_report_lists_them():
    def make_network():
        norm = nn.BatchNorm2d(4)
        return nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 1))

    images = TensorDataset(torch.randn(48, 1, 6, 6), torch.randn(48, 1))
    report = check_invariance(trainer_of(make_model=make_network), images)
    assert report.worst.largest < 100 * EPSILON
    assert report.modules_in_eval_mode == ("`1` (BatchNorm2d)", "`4` (Dropout)")
    assert "Kept in evaluation mode: `1` (BatchNorm2d), `4` (Dropout)." in str(report)


def test_a_language_model_that_returns_its_number_of_tokens_passes():
    report = check_invariance(trainer_of(TokenCountTrainer, TinyGpt), make_text())
    report.raise_if_different()
    assert report.worst.largest < 100 * EPSILON
    assert "`block.self_attn` (MultiheadAttention)" in report.modules_in_eval_mode  # its dropout is not a module


def test_all_batch_norm_and_dropout_classes_are_kept_in_evaluation_mode():
    """A lazy batch norm becomes one of these classes on its first call, without which its model cannot be compared."""
    bases = nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd
    classes = {cls for cls in vars(nn).values() if isinstance(cls, type) and issubclass(cls, bases)}
    classes = {cls for cls in classes if not cls.__name__.startswith("Lazy")}
    assert len(classes) >= 10
    assert {cls.__name__ for cls in classes if not issubclass(cls, SPLIT_DEPENDENT_MODULES)} == set()


def test_unused_and_empty_parameters_are_allowed():
    class WithSpare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(3, 1), nn.Linear(1, 1)
            self.empty = nn.Parameter(torch.zeros(0))

        def forward(self, inputs):
            return self.used(inputs) + self.empty.sum()

    report = check_invariance(trainer_of(make_model=WithSpare), DATASET)
    assert report.is_invariant
    assert report.worst.parameter.startswith("used.")


def test_samples_of_any_type_are_batched_by_the_collate_function():
    class Sample:
        def __init__(self, inputs, targets):
            self.inputs, self.targets = inputs, targets

    def collate(samples):
        return torch.stack([sample.inputs for sample in samples]), torch.stack([sample.targets for sample in samples])

    assert check_invariance(trainer_of(), [Sample(*pair) for pair in DATASET], collate_fn=collate).is_invariant


def test_a_gradient_that_is_zero_up_to_rounding_is_compared_with_the_largest_of_all_parameters():
    class ShiftedLogits(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 5)
            self.shift = nn.Parameter(torch.zeros(1))  # cancels in the softmax

        def forward(self, inputs):
            return self.linear(inputs) + self.shift

    labels = TensorDataset(DATASET.tensors[0], torch.arange(48) % 5)
    report = check_invariance(trainer_of(make_model=ShiftedLogits, loss_func=nn.CrossEntropyLoss()), labels)
    assert report.is_invariant
    strict = check_invariance(
        trainer_of(make_model=ShiftedLogits, loss_func=nn.CrossEntropyLoss()), labels, tolerance=1e-12
    )
    assert strict.worst.parameter == "shift"
    assert strict.worst.gradient > report.tolerance


def test_an_optimizer_that_magnifies_rounding_errors_causes_no_difference():
    class Magnifying(torch.optim.SGD):
        """Adds to each weight the rounding error of its gradient."""

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_((parameter.grad * 2**30).frac())

    report = check_invariance(trainer_of(optimizer_class=Magnifying), DATASET)
    assert report.worst.largest < 100 * EPSILON


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.float64, 2.0**-26), (torch.float32, 2.0**-11.5), (torch.bfloat16, 2.0**-3.5)]
)
def test_the_default_tolerance_is_the_square_root_of_the_machine_epsilon(dtype, expected):
    dataset = TensorDataset(*(tensor.to(dtype) for tensor in DATASET.tensors))
    report = check_invariance(trainer_of(make_model=lambda: make_mlp().to(dtype)), dataset)
    assert report.tolerance == pytest.approx(expected)
    assert report.is_invariant


@pytest.mark.usefixtures("_fresh_accelerate_state")
def test_the_default_tolerance_follows_mixed_precision():
    report = check_invariance(trainer_of(mixed_precision="bf16"), DATASET)
    assert report.tolerance == pytest.approx(2.0**-3.5)
    assert report.is_invariant
    report = check_invariance(trainer_of(SumTrainer, mixed_precision="bf16"), DATASET)
    assert "returns a sum as its loss" in report.likely_cause


# --- what fails, and the likely cause ----------------------------------------------------------------------------


@pytest.mark.parametrize("trainer_class", [SumTrainer, DividingTrainer])
def test_a_loss_that_is_a_sum_is_reported(trainer_class):
    report = check_invariance(trainer_of(trainer_class), DATASET)
    assert not report.is_invariant
    assert report.likely_cause.startswith(
        "the gradient is proportional to the batch size, so the step returns a sum as its loss"
    )
    assert "Return the mean over `batch_size` items (or over `num_items_in_batch`)." in report.likely_cause
    assert report.worst.per_device_batch_size == 4
    assert report.worst.largest == pytest.approx(0.75, abs=0.05)
    assert report.worst.factor == pytest.approx(0.25, abs=0.01)


def test_a_mean_over_tokens_that_is_weighted_by_samples_is_reported():
    report = check_invariance(trainer_of(TokenMeanTrainer, TinyGpt), make_text())
    assert not report.is_invariant
    assert report.likely_cause.startswith("the loss is not a mean over the number of items that the step returns")
    assert "return their number as `num_items_in_batch`" in report.likely_cause


def test_a_wrong_batch_size_is_reported_for_splits_with_a_short_last_batch():
    report = check_invariance(trainer_of(WrongBatchSizeTrainer), DATASET)
    assert [split.largest <= report.tolerance for split in report.splits] == [True, False, True]
    assert "Return the number of samples as `batch_size`" in report.likely_cause


def test_a_loss_that_differs_without_its_gradient_is_reported():
    report = check_invariance(trainer_of(SplitDependentLossTrainer), DATASET)
    assert not report.is_invariant
    assert report.worst.gradient < report.tolerance < report.worst.loss


def test_batch_norm_in_training_mode_is_reported():
    make_trainer = trainer_of(make_model=lambda: make_mlp(nn.BatchNorm1d(16)))
    report = check_invariance(make_trainer, DATASET, modules_in_eval_mode=())
    assert not report.is_invariant
    assert report.modules_in_eval_mode == ()
    assert "Kept in evaluation mode" not in str(report)
    assert "batch norm uses the mean and variance of each batch (`1` (BatchNorm1d))." in report.likely_cause
    assert "random" not in report.likely_cause


def test_batch_norm_without_running_statistics_is_reported_even_in_evaluation_mode():
    make_trainer = trainer_of(make_model=lambda: make_mlp(nn.BatchNorm1d(16, track_running_stats=False)))
    report = check_invariance(make_trainer, DATASET)
    assert "`1` (BatchNorm1d)" in report.likely_cause


def test_dropout_in_training_mode_is_reported_together_with_batch_norm():
    make_trainer = trainer_of(make_model=lambda: make_mlp(nn.Dropout(0.5), nn.BatchNorm1d(16), nn.Dropout(0.5)))
    report = check_invariance(make_trainer, DATASET, modules_in_eval_mode=(nn.BatchNorm1d,))
    assert report.likely_cause.startswith("the step draws random numbers")
    assert "`1` (Dropout), `3` (Dropout)" in report.likely_cause
    assert "batch norm" not in report.likely_cause
    report = check_invariance(make_trainer, DATASET, modules_in_eval_mode=())
    assert "`1` (Dropout), `3` (Dropout)" in report.likely_cause
    assert "Also: batch norm" in report.likely_cause


def test_functional_dropout_is_reported_unless_its_module_is_kept_in_evaluation_mode():
    make_trainer = trainer_of(make_model=lambda: make_mlp(FunctionalDropout(), FunctionalDropout()))
    report = check_invariance(make_trainer, DATASET)
    assert "functional dropout or augmentation" in report.likely_cause
    assert check_invariance(make_trainer, DATASET, modules_in_eval_mode=(FunctionalDropout,)).is_invariant


def test_losses_that_are_nan_do_not_count_as_equal():
    report = check_invariance(trainer_of(NanTrainer), DATASET)
    assert not report.is_invariant
    assert report.worst.gradient == report.worst.absolute_gradient == report.worst.loss == float("inf")
    assert report.likely_cause.startswith("a loss or a gradient is NaN or infinite")


def test_the_report_names_the_parameter_and_the_update_that_differ():
    class LateTrainer(Trainer):
        """From the second update on, the gradient of the last bias is a sum."""

        def calculate_train_batch_loss(self, batch):
            output = super().calculate_train_batch_loss(batch)
            is_late = self.run_history.current_epoch > 1
            extra = self.model[2].bias.sum() * output["batch_size"] if is_late else 0
            return {**output, "loss": output["loss"] + extra - (extra.detach() if is_late else 0)}

    report = check_invariance(trainer_of(LateTrainer), DATASET, num_updates=2)
    assert {(split.parameter, split.update) for split in report.splits} == {("2.bias", 2)}


# --- the report --------------------------------------------------------------------------------------------------


def test_the_report_has_a_table_and_a_cause_and_is_the_message_of_the_error():
    report = check_invariance(trainer_of(SumTrainer), DATASET, splits=[8], num_updates=1)
    lines = str(report).splitlines()
    assert lines[:4] == [
        "Gradients and losses depend on how a batch is split.",
        "1 update of 16 samples on 1 process; relative differences may be up to 3.5e-04.",
        "",
        "batch x accumulated      loss  gradient  absolute  parameter (update)",
    ]
    assert lines[4].startswith("    8 x 2             5.0e-01   5.")
    assert lines[4].endswith(" (1)")
    assert lines[6].startswith("Likely cause: the gradient is proportional to the batch size")
    with pytest.raises(AssertionError) as caught:
        report.raise_if_different()
    assert str(caught.value) == str(report)


def test_the_report_lists_three_modules_and_counts_the_others():
    make_trainer = trainer_of(make_model=lambda: make_mlp(*(nn.Dropout(0.1) for _ in range(5))))
    report = check_invariance(make_trainer, DATASET)
    assert str(report).endswith("`1` (Dropout), `2` (Dropout), `3` (Dropout), and 2 more.")


def test_the_given_splits_and_tolerance_are_used():
    report = check_invariance(trainer_of(), DATASET, splits=(5, 1), samples_per_update=7, tolerance=1e-12)
    assert [(split.per_device_batch_size, split.gradient_accumulation_steps) for split in report.splits] == [
        (5, 2),
        (1, 7),
    ]
    assert report.tolerance == 1e-12
    assert not report.is_invariant


# --- what it does not change -------------------------------------------------------------------------------------


def test_callbacks_are_not_called_and_the_rng_state_is_restored():
    events = []

    class Listener(TrainerCallback):
        def on_training_run_start(self, trainer, **kwargs):
            events.append("start")

    def states():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    before = states()
    check_invariance(trainer_of(callbacks=[Listener()]), DATASET)
    assert events == []
    assert states() == before


def test_the_run_history_of_the_user_stays_empty():
    history = InMemoryRunHistory()
    check_invariance(trainer_of(run_history=history), DATASET)
    assert list(history.get_metric_names()) == []


def test_nothing_is_printed_and_no_file_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    check_invariance(trainer_of(), DATASET)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_every_split_starts_from_the_same_weights_even_if_make_trainer_changes_them():
    template = make_mlp()

    def make_trainer():
        with torch.no_grad():
            template[0].weight.add_(1)
        model = copy.deepcopy(template)
        return Trainer(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1))

    assert check_invariance(make_trainer, DATASET).is_invariant


def test_every_split_uses_the_same_samples_in_the_same_order():
    orders = []

    class Recording(Trainer):
        def calculate_train_batch_loss(self, batch):
            orders[-1] += batch[1].flatten().tolist()
            return super().calculate_train_batch_loss(batch)

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            orders.append([])

    check_invariance(trainer_of(Recording), DATASET)
    assert orders == [DATASET.tensors[1].flatten().tolist()] * 4


# --- what it rejects ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_updates": 0}, ValueError, "`num_updates` is 0"),
        ({"num_updates": 1.5}, TypeError, "`num_updates` is 1.5"),
        ({"samples_per_update": 1}, ValueError, "`samples_per_update` is 1, and `splits` is None. Expected at least 2"),
        ({"samples_per_update": 0}, ValueError, "`samples_per_update` is 0"),
        ({"samples_per_update": 17}, ValueError, "`dataset` has 48 samples, but 3 updates of 17 samples need 51"),
        ({"splits": []}, ValueError, "`splits` is empty"),
        ({"splits": [0]}, ValueError, "`splits` is 0"),
        ({"splits": [(8, 2)]}, TypeError, "Expected a whole number of samples in a batch"),
        ({"splits": [16]}, ValueError, "Expected at least 2 samples, and more than the largest batch has"),
        ({"tolerance": 0}, ValueError, "`tolerance` is 0"),
        ({"dataset": Stream(DATASET)}, TypeError, "`dataset` is of type Stream"),
        ({"dataset": iter(())}, TypeError, "Expected a dataset with a length"),
    ],
)
def test_impossible_arguments_are_rejected_before_a_trainer_is_created(arguments, error, message):
    def make_trainer():
        pytest.fail("a trainer was created")

    with pytest.raises(error) as caught:
        check_invariance(make_trainer, **{"dataset": DATASET, **arguments})
    assert message in str(caught.value)


def test_a_trainer_with_the_model_of_an_earlier_one_is_rejected():
    model = make_mlp()
    with pytest.raises(ValueError, match="returned a trainer with the model of an earlier call"):
        check_invariance(trainer_of(make_model=lambda: model), DATASET)


def test_a_sharded_model_is_rejected(monkeypatch):
    monkeypatch.setattr("pytorch_accelerated.trainer.is_sharded", lambda accelerator: True)
    with pytest.raises(ValueError, match="shards its model"):
        check_invariance(trainer_of(), DATASET)
