"""`GradualUnfreezingCallback` in tiny real trainings."""

import copy
import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import _support
from _processes import launch
from _support import IMPOSSIBLE_COUNTS, run_python
from pytorch_accelerated.callbacks import SaveTrainingStateCallback, TrainerCallback
from pytorch_accelerated.callbacks.finetuning import GradualUnfreezingCallback
from pytorch_accelerated.finetuning import ModelFreezer
from pytorch_accelerated.schedulers import CosineLrScheduler
from pytorch_accelerated.trainer import Trainer, TrainerPlaceholderValues


class Net(nn.Module):
    """Four layer groups, one of them without parameters, and a parameter on the root."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.stem = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.body = nn.Linear(4, 4)
        self.activation = nn.Tanh()
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.activation(self.body(self.stem(x * self.scale))))


NORM = {"stem.1.weight", "stem.1.bias"}
HEAD = {"head.weight", "head.bias"}
BODY = {"body.weight", "body.bias"}
STEM = {"scale", "stem.0.weight", "stem.0.bias"}


def make_trainer(callbacks, get_parameters=nn.Module.parameters, trainer_class=Trainer):
    torch.manual_seed(1)
    model = Net()
    optimizer = torch.optim.AdamW(get_parameters(model), lr=0.01)
    return trainer_class(model, nn.MSELoss(), optimizer, callbacks)


def head_only(model):
    return model.head.parameters()


train = partial(_support.train, num_epochs=3, per_device_batch_size=8)  # two updates per epoch


def names_that_differ(state, other):
    return {name for name, value in state.items() if not torch.equal(value, other[name])}


class NoteChanges(TrainerCallback):
    """Lists for each epoch which parameters and buffers training has changed."""

    def __init__(self):
        self.changes = []

    def on_train_epoch_start(self, trainer, **kwargs):
        self.before = copy.deepcopy(trainer.model.state_dict())

    def on_train_epoch_end(self, trainer, **kwargs):
        self.changes.append(names_that_differ(trainer.model.state_dict(), self.before))


def changes_of(callback, num_epochs, get_parameters=nn.Module.parameters):
    noted = NoteChanges()
    train(make_trainer([callback, noted], get_parameters), num_epochs=num_epochs)
    statistics = {"stem.1.running_mean", "stem.1.running_var", "stem.1.num_batches_tracked"}
    return [changes - statistics for changes in noted.changes]


# --- the schedule ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("get_parameters", [nn.Module.parameters, head_only], ids=["all", "head only"])
def test_one_more_layer_group_is_trained_every_n_epochs(get_parameters):
    callback = GradualUnfreezingCallback(schedule=2, freeze_batch_norms=True)
    changes = changes_of(callback, num_epochs=7, get_parameters=get_parameters)
    everything = STEM | NORM | BODY | HEAD
    assert changes == [HEAD, HEAD, BODY | HEAD, BODY | HEAD, everything, everything, everything]


@pytest.mark.parametrize("schedule", [{3: 1, 4: 0}, {3: -3, 4: -4}, {4: 0, 3: 1}])
def test_the_schedule_can_map_epochs_to_layer_groups(schedule):
    changes = changes_of(GradualUnfreezingCallback(schedule, freeze_batch_norms=True), num_epochs=4)
    assert changes == [HEAD, HEAD, BODY | HEAD, STEM | NORM | BODY | HEAD]


def test_a_schedule_can_start_with_several_groups_and_end_before_the_first():
    changes = changes_of(GradualUnfreezingCallback({1: 1}, freeze_batch_norms=True), num_epochs=3)
    assert changes == [BODY | HEAD] * 3


def test_batch_norms_adapt_by_default_and_stay_fixed_in_evaluation_mode_until_unfrozen():
    adapting, fixed = NoteChanges(), NoteChanges()
    train(make_trainer([GradualUnfreezingCallback(), adapting]), num_epochs=1)
    train(make_trainer([GradualUnfreezingCallback(set_modules_as_eval=True), fixed]), num_epochs=3)
    assert adapting.changes[0] >= NORM | {"stem.1.running_mean"}
    assert ["stem.1.running_mean" in changes for changes in fixed.changes] == [False, False, True]


def test_a_model_with_a_single_layer_group_is_trained():
    model = nn.Linear(3, 1)
    callback = GradualUnfreezingCallback()
    trainer = Trainer(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1), [callback])
    before = copy.deepcopy(model.state_dict())
    train(trainer)
    assert names_that_differ(model.state_dict(), before) == {"weight", "bias"}


def test_parameters_frozen_by_the_user_are_unfrozen_when_due():
    noted = NoteChanges()
    trainer = make_trainer([GradualUnfreezingCallback({1: 1, 2: 0}), noted])
    ModelFreezer(trainer.model).freeze()
    train(trainer, num_epochs=2)
    assert noted.changes[0] >= BODY
    assert noted.changes[1] >= STEM


def test_each_run_restarts_the_schedule():
    callback, noted = GradualUnfreezingCallback(freeze_batch_norms=True), NoteChanges()
    trainer = make_trainer([callback, noted])
    train(trainer)
    train(trainer, num_epochs=1)
    assert noted.changes[-1] == HEAD


@pytest.mark.parametrize(("epoch", "error"), IMPOSSIBLE_COUNTS)
def test_a_schedule_with_an_impossible_epoch_is_rejected(epoch, error):
    with pytest.raises(error, match=f"`schedule` is {epoch}.* Expected a whole number of epochs, at least 1"):
        GradualUnfreezingCallback(epoch)
    with pytest.raises(error, match=f"`epoch in schedule` is {epoch}.* Expected a whole number of epochs, at least 1"):
        GradualUnfreezingCallback({3: 1, epoch: 0})


def test_a_layer_group_that_does_not_exist_is_rejected_before_the_first_epoch():
    noted = NoteChanges()
    trainer = make_trainer([GradualUnfreezingCallback({7: 4}), noted])
    with pytest.raises(IndexError, match="layer group 4, but the model has 4 groups, with indices from -4 to 3"):
        train(trainer)
    assert noted.changes == []


# --- the optimizer and the scheduler ---------------------------------------------------------------------------


def rates_of(trainer):
    rates = {}
    for group in trainer.optimizer.param_groups:
        rates.update(dict.fromkeys(group["params"], group["lr"]))
    return {name: rates[parameter] for name, parameter in trainer.model.named_parameters()}


def test_parameters_missing_from_the_optimizer_are_added_with_lower_rates_towards_the_input():
    trainer = make_trainer([GradualUnfreezingCallback(lr_decay_factor=0.1)], head_only)
    expected = {**dict.fromkeys(HEAD, 0.01), **dict.fromkeys(BODY, 0.001), **dict.fromkeys(STEM | NORM, 0.0001)}
    assert rates_of(trainer) == pytest.approx(expected)


def test_an_optimizer_that_holds_all_parameters_is_not_changed():
    trainer = make_trainer([GradualUnfreezingCallback(lr_decay_factor=0.1)])
    assert set(rates_of(trainer).values()) == {0.01}
    assert len(trainer.optimizer.param_groups) == 1


class NoteRates(TrainerCallback):
    """Keeps the learning rates of the first and the last layer after each update."""

    def __init__(self):
        self.stem = []
        self.head = []

    def on_optimizer_step_end(self, trainer, **kwargs):
        rates = rates_of(trainer)
        self.stem.append(rates["stem.0.weight"])
        self.head.append(rates["head.weight"])


@pytest.mark.parametrize(
    "create_scheduler_fn",
    [
        partial(LambdaLR, lr_lambda=lambda num_updates: 1 / (1 + num_updates)),
        CosineLrScheduler.create_scheduler_fn(
            total_num_epochs=TrainerPlaceholderValues.NUM_EPOCHS,
            num_update_steps_per_epoch=TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH,
            lr_min=0.0,
        ),
    ],
    ids=["torch", "cosine"],
)
def test_schedulers_cover_all_parameter_groups_from_the_start(create_scheduler_fn):
    noted = NoteRates()
    trainer = make_trainer([GradualUnfreezingCallback(lr_decay_factor=0.1), noted], head_only)
    train(trainer, create_scheduler_fn=create_scheduler_fn)
    assert len(set(noted.head)) == len(noted.head) == 6
    assert noted.stem == pytest.approx([0.01 * rate for rate in noted.head])


def test_a_callback_added_later_completes_the_optimizer_unless_there_is_a_scheduler():
    def make():
        trainer = make_trainer([], head_only)
        trainer.callback_handler.add_callback(GradualUnfreezingCallback())
        return trainer

    trainer = train(make())
    assert rates_of(trainer).keys() == STEM | NORM | BODY | HEAD
    with pytest.raises(RuntimeError, match=r"its scheduler exists already.* Pass the callback to `Trainer"):
        train(make(), create_scheduler_fn=partial(LambdaLR, lr_lambda=lambda num_updates: 1.0))


# --- resuming --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["epoch_1", "step_3", "epoch_2"])
@pytest.mark.parametrize("get_parameters", [nn.Module.parameters, head_only], ids=["all", "head only"])
def test_a_resumed_run_ends_with_the_same_weights_as_an_uninterrupted_one(state, get_parameters, tmp_path):
    def run(folder, **kwargs):
        saving = SaveTrainingStateCallback(folder, save_every_n_epochs=1, save_every_n_steps=3)
        trainer = make_trainer([GradualUnfreezingCallback(lr_decay_factor=0.5), saving], get_parameters)
        create_scheduler_fn = partial(LambdaLR, lr_lambda=lambda num_updates: 0.9**num_updates)
        return train(trainer, num_epochs=4, create_scheduler_fn=create_scheduler_fn, **kwargs)

    uninterrupted = run(tmp_path / "uninterrupted")
    resumed = run(tmp_path / "resumed", resume_from=str(tmp_path / "uninterrupted" / state))
    assert not names_that_differ(resumed.model.state_dict(), uninterrupted.model.state_dict())


def test_trained_layer_groups_stay_trainable_in_a_run_resumed_with_a_slower_schedule(tmp_path):
    saving = SaveTrainingStateCallback(tmp_path)
    train(make_trainer([GradualUnfreezingCallback(freeze_batch_norms=True), saving]), num_epochs=2)

    noted = NoteChanges()
    slower = GradualUnfreezingCallback(schedule=10, freeze_batch_norms=True)
    train(make_trainer([slower, noted]), num_epochs=3, resume_from=str(tmp_path / "final"))

    assert noted.changes == [BODY | HEAD]


# --- several processes -----------------------------------------------------------------------------------------


def test_a_distributed_model_without_ddp_is_rejected():
    class OtherParallelism(Trainer):
        def _create_run_config(self, *args, **kwargs):
            return dataclasses.replace(super()._create_run_config(*args, **kwargs), is_distributed=True)

    trainer = make_trainer([GradualUnfreezingCallback()], trainer_class=OtherParallelism)
    with pytest.raises(RuntimeError, match=r"is a Net, but .* needs it to be wrapped in `DistributedDataParallel`"):
        train(trainer)


DISTRIBUTED_RUN = """
import os

import torch
from torch import nn
from torch.utils.data import TensorDataset
from pytorch_accelerated.callbacks.finetuning import GradualUnfreezingCallback
from pytorch_accelerated.finetuning import ModelFreezer
from pytorch_accelerated.trainer import Trainer

num_processes = int(os.environ.get("WORLD_SIZE", 1))

def run(is_frozen_before):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 1))
    data = TensorDataset(torch.randn(8, 3), torch.randn(8, 1))
    if is_frozen_before:
        ModelFreezer(model).freeze()
    optimizer = torch.optim.AdamW(model[-1].parameters(), lr=0.1)
    trainer = Trainer(model, nn.MSELoss(), optimizer, [GradualUnfreezingCallback({2: 2})])
    size = 8 // num_processes
    states = [{name: value.clone() for name, value in model.state_dict().items()}]
    trainer.train(data, 3, per_device_batch_size=size)
    states.append(model.state_dict())
    return trainer, states

trainer, states = run(is_frozen_before=False)
message = ""
if trainer.run_config.is_distributed:
    try:
        run(is_frozen_before=True)
    except RuntimeError as error:
        message = str(error)
torch.save((states, message), f"{num_processes}_{trainer.process_index}.pt")
"""


@pytest.mark.distributed
def test_two_processes_train_like_one_and_reject_parameters_frozen_before_wrapping(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.py").write_text(DISTRIBUTED_RUN)
    run_python(DISTRIBUTED_RUN, cwd=tmp_path)
    launch(Path("run.py").resolve(), tmp_path, num_processes=2)

    ((before, alone), _), ((_, main), message), ((_, other), _) = map(torch.load, ("1_0.pt", "2_0.pt", "2_1.pt"))
    assert not names_that_differ(main, other)
    assert names_that_differ(main, before) == {"2.weight", "2.bias", "3.weight", "3.bias"}
    for name, value in alone.items():
        torch.testing.assert_close(main[name], value, msg=name)
    assert "2 parameters that `schedule` unfreezes were frozen when the model was wrapped" in message
    assert "leave the freezing to `GradualUnfreezingCallback`" in message
