"""A trainer is an ordinary object: outside a run it can be pickled and copied, and the copy trains on its own."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.optim import lr_scheduler

from _support import Samples, assert_same_weights, make_dataset, run_python, weights_of
from pytorch_accelerated import Trainer, TrainerPlaceholderValues, callbacks
from pytorch_accelerated._distributed.reasons import RunInterruptedError
from pytorch_accelerated.schedulers import CosineLrScheduler, WSDLrScheduler

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

DUPLICATES = {"pickle": lambda item: pickle.loads(pickle.dumps(item)), "deepcopy": copy.deepcopy}
duplicates = pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)


class OtherAccelerator(Accelerator):
    """An accelerator whose calls are not known, so that no run is on the fast path."""


def make_trainer(callbacks=(), **kwargs):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Trainer(model, nn.MSELoss(), optimizer, callbacks, seed=0, **kwargs)


def train(trainer, **kwargs):
    data = make_dataset()
    settings = {"num_epochs": 2, "per_device_batch_size": 4, "eval_dataset": data, "gradient_clip_norm": 1.0}
    trainer.train(data, **{**settings, **kwargs})
    return trainer


def assert_copy_is_independent(trainer, duplicate, **kwargs):
    """The copy trains its own model as the original would, and leaves the original as it is."""
    other, before = duplicate(trainer), copy.deepcopy(trainer.model.state_dict())
    train(other, **kwargs)
    assert_same_weights(trainer.model.state_dict(), before)
    assert set(other.model.parameters()) == {p for group in other.optimizer.param_groups for p in group["params"]}
    train(trainer, **kwargs)
    assert_same_weights(trainer.model.state_dict(), other.model.state_dict())
    for name in ("train_loss_epoch", "eval_loss_epoch"):
        assert trainer.run_history.get_metric_values(name) == other.run_history.get_metric_values(name)


# --- at any time -------------------------------------------------------------------------------------------------


def trained(trainer):
    return train(trainer)


def evaluated(trainer):
    trainer.evaluate(make_dataset())
    return trainer


def predicted(trainer):
    trainer.predict(make_dataset())
    return trainer


def trained_with_workers(trainer):
    loading = {"num_workers": 1, "persistent_workers": True}
    train(trainer, train_dataloader_kwargs=loading, eval_dataloader_kwargs=loading)
    return trainer


def trained_on_samples(trainer):
    trainer.train(Samples(make_dataset()), 1, eval_dataset={"a": make_dataset(), "b": Samples(make_dataset())})
    return trainer


def failed(trainer):
    with pytest.raises(TypeError):
        trainer.train([1.0, 2.0], 1)
    return trainer


@duplicates
@pytest.mark.parametrize(
    "use", [lambda trainer: trainer, trained, evaluated, predicted, trained_with_workers, trained_on_samples, failed]
)
def test_a_copy_made_outside_a_run_trains_as_the_original(use, duplicate):
    assert_copy_is_independent(use(make_trainer()), duplicate)


@duplicates
def test_a_copy_of_a_copy_trains_as_the_original(duplicate):
    assert_copy_is_independent(train(duplicate(train(make_trainer()))), duplicate)


@duplicates
def test_a_trainer_can_be_copied_after_an_interrupted_run(duplicate):
    trainer = train(make_trainer())
    trainer._loop_run.interruption = RunInterruptedError(2)
    other = duplicate(trainer)
    assert other.is_interrupted
    assert str(other._loop_run.interruption) == "interrupted by Ctrl-C"
    assert_copy_is_independent(trainer, duplicate)


def test_a_shallow_copy_shares_the_model_and_can_be_used():
    trainer = train(make_trainer())
    other = copy.copy(trainer)
    assert other.model is trainer.model
    assert other._accelerator is trainer._accelerator
    train(train(other), num_epochs=1)
    assert trainer.run_history is other.run_history


# --- with callbacks, schedulers and states -----------------------------------------------------------------------


def make_callbacks():
    made = {
        "CSVLogCallback": partial(callbacks.CSVLogCallback, "log.csv"),
        "SaveTrainingStateCallback": partial(callbacks.SaveTrainingStateCallback, "states", save_every_n_epochs=1),
        "GradualUnfreezingCallback": partial(callbacks.GradualUnfreezingCallback, freeze_batch_norms=True),
        "LimitBatchesCallback": partial(callbacks.LimitBatchesCallback, 3),
        "LimitEvalStepsCallback": partial(callbacks.LimitEvalStepsCallback, 2),
        "StepBasedEvaluationCallback": partial(callbacks.StepBasedEvaluationCallback, 3),
        "LearningCurveCallback": partial(callbacks.LearningCurveCallback, "curves.png"),
        "TrackerCallback": partial(callbacks.TrackerCallback, "tensorboard", every_n_updates=2),
        "ProfilerCallback": partial(callbacks.ProfilerCallback, "traces"),
        "ThroughputCallback": partial(callbacks.ThroughputCallback, len, peak_flops=1e12),
    }
    own = {name: getattr(callbacks, name) for name in callbacks.__all__ if name.endswith("Callback")}
    own.pop("TrainerCallback")
    own.pop("WSDCheckpointCallback")  # which needs a scheduler
    for name in ("MLflowCallback", "WandbCallback"):  # which need packages of their own
        own.pop(name)
    return {name: made.get(name, cls) for name, cls in own.items()}


@duplicates
@pytest.mark.parametrize("name", make_callbacks())
@pytest.mark.parametrize("is_used", [False, True], ids=["before", "after"])
def test_a_trainer_with_any_callback_of_the_library_can_be_copied(name, is_used, duplicate, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer([make_callbacks()[name]()])
    if is_used:
        train(trainer)
    other = duplicate(trainer)
    own, copied = trainer.callback_handler.callbacks, other.callback_handler.callbacks
    assert [type(callback) for callback in copied] == [type(callback) for callback in own]
    assert not {id(callback) for callback in copied} & {id(callback) for callback in own}
    assert_copy_is_independent(trainer, duplicate)


def slower(num_updates):
    return 0.9**num_updates


SCHEDULERS = {
    "step": partial(lr_scheduler.StepLR, step_size=2, gamma=0.5),
    "lambda": partial(lr_scheduler.LambdaLR, lr_lambda=slower),
    "one cycle": partial(
        lr_scheduler.OneCycleLR, max_lr=0.2, total_steps=TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH * 2 + 1
    ),
    "cosine": CosineLrScheduler.create_scheduler_fn(num_warmup_epochs=1),
    "wsd": WSDLrScheduler.create_scheduler_fn(),
}


@duplicates
@pytest.mark.parametrize("create_scheduler_fn", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("accelerator_class", [Accelerator, OtherAccelerator])
def test_a_trainer_with_a_scheduler_can_be_copied(create_scheduler_fn, accelerator_class, duplicate):
    """A scheduler replaces `step` of the optimizer, and that function updates the parameters of the original."""
    trainer = make_trainer(accelerator=accelerator_class())
    train(trainer, create_scheduler_fn=create_scheduler_fn)
    other = duplicate(trainer)
    assert other.scheduler is not trainer.scheduler
    assert other.scheduler.optimizer is other.optimizer
    before = weights_of(trainer.model)
    other.model(torch.ones(2, 3)).sum().backward()
    other.optimizer.step()
    assert_same_weights(trainer.model.state_dict(), before)
    assert_copy_is_independent(trainer, duplicate, create_scheduler_fn=create_scheduler_fn)


@duplicates
def test_a_trainer_with_checkpoints_of_a_wsd_schedule_can_be_copied(duplicate, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer([callbacks.WSDCheckpointCallback()])
    train(trainer, create_scheduler_fn=SCHEDULERS["wsd"])
    assert_copy_is_independent(trainer, duplicate, create_scheduler_fn=SCHEDULERS["wsd"])


@duplicates
@pytest.mark.parametrize("in_background", [False, True])
def test_a_copy_resumes_from_a_state_of_the_original_and_saves_its_own(in_background, duplicate, tmp_path):
    trainer = train(make_trainer())
    trainer.save_training_state(tmp_path / "state", in_background=in_background)
    other = duplicate(trainer)
    trainer.wait_for_training_state()
    other.save_training_state(tmp_path / "other", in_background=in_background)
    other.wait_for_training_state()
    train(other, num_epochs=3, resume_from=tmp_path / "state")
    train(trainer, num_epochs=3, resume_from=tmp_path / "other")
    assert_same_weights(trainer.model.state_dict(), other.model.state_dict())


@duplicates
def test_a_trainer_that_a_callback_holds_is_copied_with_it(duplicate):
    saving = callbacks.PrintProgressCallback()
    trainer = make_trainer([saving])
    saving.owner = trainer
    other = duplicate(trainer)
    assert other.callback_handler.callbacks[0].owner is other


# --- with any optimizer ------------------------------------------------------------------------------------------


class Lookahead(torch.optim.Optimizer):
    """Wraps an optimizer, whose groups and state are its own, and keeps slow weights in attributes."""

    def __init__(self, inner, every=2):
        super().__init__(inner.param_groups, inner.defaults)
        self.inner, self.every, self.num_steps = inner, every, 0
        self.inner.param_groups = self.param_groups
        self.slow = [(value, value.detach().clone()) for group in self.param_groups for value in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step()
        self.num_steps += 1
        if self.num_steps % self.every == 0:
            for value, slow in self.slow:
                slow.lerp_(value, 0.5)
                value.copy_(slow)


@duplicates
@pytest.mark.parametrize("use", [lambda trainer: trainer, trained])
@pytest.mark.parametrize("accelerator_class", [Accelerator, OtherAccelerator])
def test_attributes_of_an_optimizers_own_class_are_copied(use, accelerator_class, duplicate):
    """PyTorch copies an optimizer without them."""
    trainer = make_trainer(accelerator=accelerator_class())
    trainer.optimizer = Lookahead(trainer.optimizer)
    use(trainer)
    other = duplicate(trainer)
    inner = getattr(other.optimizer, "optimizer", other.optimizer)
    assert [value for value, _ in inner.slow] == list(other.model.parameters())
    assert_copy_is_independent(trainer, duplicate)


@duplicates
def test_optimizers_of_a_subclass_are_copied_with_their_attributes(duplicate):
    trainer = make_trainer()
    trainer.critic = nn.Linear(2, 1)
    trainer.optimizers = {"critic": [torch.optim.LBFGS(trainer.critic.parameters())]}
    other = duplicate(trainer)
    (optimizer,) = other.optimizers["critic"]
    loss = lambda: other.critic(torch.ones(1, 2)).square().sum()  # noqa: E731

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    before = weights_of(trainer.critic)
    optimizer.step(closure)
    assert loss() < 1e-6
    assert_same_weights(trainer.critic.state_dict(), before)


# --- the process -------------------------------------------------------------------------------------------------


@duplicates
@pytest.mark.parametrize("accelerator_class", [Accelerator, OtherAccelerator])
def test_a_copy_uses_the_state_that_accelerate_keeps_for_the_process(accelerator_class, duplicate):
    trainer = train(make_trainer(accelerator=accelerator_class()))
    other = duplicate(trainer)
    accelerator = other._accelerator
    assert accelerator is not trainer._accelerator
    assert type(accelerator) is accelerator_class
    assert vars(accelerator.state) is vars(AcceleratorState())
    assert vars(accelerator.gradient_state) is vars(GradientState())
    assert isinstance(other.optimizer, AcceleratedOptimizer)
    assert vars(other.optimizer.gradient_state) is vars(GradientState())


@duplicates
def test_the_scale_of_the_loss_is_copied(duplicate):
    trainer = make_trainer(accelerator=OtherAccelerator())
    trainer._accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    train(trainer)
    assert trainer._accelerator.scaler.get_scale() == 64.0
    assert_copy_is_independent(trainer, duplicate)


@duplicates
def test_what_the_user_registered_at_the_accelerator_is_copied(duplicate):
    trainer = make_trainer()
    trainer.metric = nn.Linear(1, 1)
    trainer._accelerator.register_for_checkpointing(trainer.metric)
    other = duplicate(trainer)
    assert other._accelerator._custom_objects == [other.metric]
    assert other.metric is not trainer.metric


IN_ANOTHER_PROCESS = """
import pickle
from pathlib import Path
import torch
from torch.utils.data import TensorDataset
trainer = pickle.loads(Path("trainer.pkl").read_bytes())
data = TensorDataset(*torch.load("data.pt"))
trainer.train(data, 2, per_device_batch_size=4, eval_dataset=data, gradient_clip_norm=1.0)
from accelerate.state import AcceleratorState
assert vars(trainer._accelerator.state) is vars(AcceleratorState())
torch.save(trainer.model.state_dict(), "weights.pt")
"""


def test_a_trainer_pickled_here_trains_on_in_another_process(tmp_path):
    trainer = train(make_trainer(callbacks.get_default_callbacks()))
    (tmp_path / "trainer.pkl").write_bytes(pickle.dumps(trainer))
    torch.save(make_dataset().tensors, tmp_path / "data.pt")
    run_python(IN_ANOTHER_PROCESS, cwd=tmp_path)
    assert_same_weights(torch.load(Path(tmp_path, "weights.pt")), train(trainer).model.state_dict())
