"""The state of a scheduler fits and is given to it once, and a schedule follows a new length of the run."""

from __future__ import annotations

import itertools
import warnings
from functools import partial

import pytest
import torch
from torch.optim import lr_scheduler

from _saved import assert_equal, everything_in, make_state_trainer, train
from _support import Probe, make_dataset, make_model, make_optimizer, make_trainer, recorder_of
from pytorch_accelerated import Trainer, TrainerPlaceholderValues
from pytorch_accelerated._checkpoint import scheduler_state
from pytorch_accelerated.exceptions import CheckpointError
from pytorch_accelerated.schedulers import CosineLrScheduler

N = TrainerPlaceholderValues.NUM_EPOCHS * TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH


def sequential(optimizer, schedulers=(lr_scheduler.LinearLR, lr_scheduler.ExponentialLR), milestone=2):
    inner = [cls(optimizer, **({"gamma": 0.9} if cls is lr_scheduler.ExponentialLR else {})) for cls in schedulers]
    return lr_scheduler.SequentialLR(optimizer, inner, [milestone])


def chained(optimizer):
    inner = [lr_scheduler.ConstantLR(optimizer, total_iters=4), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.ChainedScheduler(inner, optimizer=optimizer)


class Wrapping:
    """A scheduler that is not one of PyTorch, and has another one in it."""

    def __init__(self, optimizer, inner):
        self.optimizer, self.after, self.num_steps = optimizer, inner(optimizer), 0

    def step(self):
        self.num_steps += 1
        self.after.step()

    def state_dict(self):
        return {"num_steps": self.num_steps, "after": self.after.state_dict()}

    def load_state_dict(self, state):
        self.num_steps = state.pop("num_steps")  # consumes what it is given
        self.after.load_state_dict(state.pop("after"))


SCHEDULERS = {
    "StepLR": partial(lr_scheduler.StepLR, step_size=2),
    "ExponentialLR": partial(lr_scheduler.ExponentialLR, gamma=0.9),
    "CosineLrScheduler": lambda optimizer: CosineLrScheduler(optimizer, 3, 3),
    "CyclicLR": partial(lr_scheduler.CyclicLR, base_lr=0.001, max_lr=0.1, step_size_up=3, cycle_momentum=False),
    "MultiStepLR": partial(lr_scheduler.MultiStepLR, milestones=[2, 5]),
    "LambdaLR": partial(lr_scheduler.LambdaLR, lr_lambda=lambda epoch: 0.9**epoch),
    "CosineAnnealingWarmRestarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=3),
    "SequentialLR(LinearLR, ExponentialLR)": sequential,
    "ChainedScheduler(ConstantLR, ExponentialLR)": chained,
    "Wrapping(ExponentialLR)": partial(Wrapping, inner=partial(lr_scheduler.ExponentialLR, gamma=0.9)),
}


# --- the class ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_is_described_with_those_in_it(name):
    assert scheduler_state.describe_scheduler(SCHEDULERS[name](make_optimizer(0.1))) == name


def save(folder, name, num_epochs=1):
    trainer = make_state_trainer()
    train(trainer, num_epochs=num_epochs, create_scheduler_fn=SCHEDULERS[name])
    trainer.save_training_state(folder / "state")
    trainer.save_checkpoint(folder / "model.pt")
    return trainer


def assert_refused(act, trainer, message):
    trainer.run_history.update_metric("mine", 1.0)
    before, scheduler = everything_in(trainer), trainer.scheduler
    state = None if scheduler is None else scheduler.state_dict()
    with pytest.raises(CheckpointError, match=message):
        act()
    assert_equal(everything_in(trainer), before)
    assert trainer.scheduler is scheduler
    assert (None if scheduler is None else scheduler.state_dict()) == state


@pytest.mark.parametrize(
    ("saved", "present"),
    [
        *itertools.permutations(["StepLR", "ExponentialLR", "LambdaLR", "CosineLrScheduler"], 2),
        ("SequentialLR(LinearLR, ExponentialLR)", "ChainedScheduler(ConstantLR, ExponentialLR)"),
        ("Wrapping(ExponentialLR)", "ExponentialLR"),
    ],
)
def test_the_state_of_another_class_is_refused_and_changes_nothing(tmp_path, saved, present):
    save(tmp_path, saved)
    message = rf"different scheduler: its class is '{saved}' instead of '{present}'".replace("(", r"\(")
    message = message.replace(")", r"\)")
    kwargs = {"num_epochs": 3, "create_scheduler_fn": SCHEDULERS[present]}
    fresh = make_state_trainer(seed=8)
    assert_refused(lambda: train(fresh, resume_from=tmp_path / "state", **kwargs), fresh, message)
    used = make_state_trainer(seed=8)
    train(used, **kwargs)
    assert_refused(lambda: train(used, resume_from=tmp_path / "state", **kwargs), used, message)
    assert_refused(lambda: used.load_training_state(tmp_path / "state"), used, message)
    assert_refused(lambda: used.load_checkpoint(tmp_path / "model.pt"), used, message)
    used.load_checkpoint(tmp_path / "model.pt", load_scheduler=False)


def test_a_state_that_was_loaded_before_the_run_is_refused_when_the_scheduler_is_created(tmp_path):
    save(tmp_path, "StepLR")
    trainer = make_state_trainer(seed=8)
    trainer.load_checkpoint(tmp_path / "model.pt")
    message = "The scheduler state that was loaded before the run belongs to a different scheduler"
    for _ in range(2):  # it is not forgotten
        act = partial(train, trainer, create_scheduler_fn=SCHEDULERS["ExponentialLR"])
        assert_refused(act, trainer, message)
    train(trainer, num_epochs=1, create_scheduler_fn=SCHEDULERS["StepLR"])
    assert trainer.scheduler.last_epoch == 6


def test_a_state_that_was_loaded_before_a_resumed_run_is_not_used(tmp_path):
    save(tmp_path, "StepLR")
    trainer, other = make_state_trainer(seed=8), make_state_trainer(seed=9)
    trainer.load_checkpoint(tmp_path / "model.pt")
    save(tmp_path, "ExponentialLR")
    for one in (trainer, other):
        train(one, create_scheduler_fn=SCHEDULERS["ExponentialLR"], resume_from=tmp_path / "state")
    assert_equal(everything_in(trainer), everything_in(other))


def test_the_state_of_a_scheduler_that_a_resumed_run_leaves_out_is_not_used_later(tmp_path):
    save(tmp_path, "StepLR")
    trainer = make_state_trainer(seed=8)
    with pytest.warns(UserWarning, match="scheduler: 'StepLR' -> None"):
        train(trainer, resume_from=tmp_path / "state")
    train(trainer, num_epochs=1, create_scheduler_fn=SCHEDULERS["ExponentialLR"])
    assert trainer.scheduler.last_epoch == 3


def test_the_same_schedulers_in_another_order_are_refused(tmp_path):
    save(tmp_path, "SequentialLR(LinearLR, ExponentialLR)")
    trainer = make_state_trainer(seed=8)
    other = partial(sequential, schedulers=(lr_scheduler.ExponentialLR, lr_scheduler.LinearLR))
    message = r"its class is 'SequentialLR\(Linear.*' instead of 'SequentialLR\(Exponential"
    assert_refused(lambda: train(trainer, resume_from=tmp_path / "state", create_scheduler_fn=other), trainer, message)


def test_of_a_state_without_its_class_the_settings_of_the_run_have_it():
    """States that were saved by earlier versions."""
    scheduler = sequential(make_optimizer(0.1))
    scheduler_state.check_scheduler_state(scheduler, {}, "The state", "SequentialLR")
    scheduler_state.check_scheduler_state(scheduler, {}, "The state", None)
    with pytest.raises(CheckpointError, match="its class is 'StepLR' instead of 'SequentialLR"):
        scheduler_state.check_scheduler_state(scheduler, {}, "The state", "StepLR")


class Strict(lr_scheduler.ExponentialLR):
    """Refuses states, after it has changed something."""

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.optimizer.param_groups[0]["lr"] = 7.0
        self.seen = [state]
        raise LookupError("not with me")


def test_a_scheduler_that_refuses_a_state_of_its_class_leaves_everything_as_it_was(tmp_path):
    trainer = make_state_trainer()
    train(trainer, num_epochs=1, create_scheduler_fn=partial(Strict, gamma=0.9))
    trainer.save_training_state(tmp_path / "state")
    trainer.save_checkpoint(tmp_path / "model.pt")
    message = "different scheduler: not with me Nothing was loaded"
    other = make_state_trainer(seed=8)
    train(other, num_epochs=1, create_scheduler_fn=partial(Strict, gamma=0.5))
    assert_refused(lambda: other.load_training_state(tmp_path / "state"), other, message)
    assert_refused(lambda: other.load_checkpoint(tmp_path / "model.pt"), other, message)
    fresh, kwargs = make_state_trainer(seed=8), {"create_scheduler_fn": partial(Strict, gamma=0.5)}
    assert_refused(lambda: train(fresh, resume_from=tmp_path / "state", **kwargs), fresh, message)


# --- loading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_is_resumed_exactly(tmp_path, name):
    whole = make_state_trainer()
    train(whole, create_scheduler_fn=SCHEDULERS[name])
    save(tmp_path, name)
    for _ in range(2):  # the state on disk is not used up either
        resumed = make_state_trainer(seed=8)
        train(resumed, create_scheduler_fn=SCHEDULERS[name], resume_from=tmp_path / "state")
        assert_equal(everything_in(resumed), everything_in(whole))
        assert resumed.scheduler.state_dict() == whole.scheduler.state_dict()


@pytest.mark.parametrize("way", ["resume", "load_training_state", "load_checkpoint", "before the run"])
def test_a_scheduler_is_given_its_state_once_as_it_saved_it(tmp_path, way):
    given = []

    class Recording(Wrapping):
        def load_state_dict(self, state):
            given.append(dict(state))
            super().load_state_dict(state)

    create = partial(Recording, inner=SCHEDULERS["ExponentialLR"])
    trainer = make_state_trainer()
    train(trainer, num_epochs=1, create_scheduler_fn=create)
    saved = trainer.scheduler.state_dict()
    trainer.save_training_state(tmp_path / "state")
    trainer.save_checkpoint(tmp_path / "model.pt")
    if way == "resume":
        train(make_state_trainer(), num_epochs=1, create_scheduler_fn=create, resume_from=tmp_path / "state")
    elif way == "load_training_state":
        trainer.load_training_state(tmp_path / "state")
    elif way == "load_checkpoint":
        trainer.load_checkpoint(tmp_path / "model.pt")
    else:
        other = make_state_trainer()
        loaded = other.load_checkpoint(tmp_path / "model.pt")
        train(other, num_epochs=1, create_scheduler_fn=create)
        assert loaded["scheduler_state_dict"] == saved
    assert given == [saved]


# --- another length ----------------------------------------------------------------------------------------------


def of_the_run(trainer, optimizer):
    """A schedule that asks the trainer for the length of the run."""
    return lr_scheduler.PolynomialLR(optimizer, total_iters=trainer.run_config.max_num_train_steps)


def warm_up_and_cosine(optimizer, num_steps):
    warm_up = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=num_steps - 2)
    return lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], [2])


def chain_of(optimizer, num_steps):
    inner = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3), lr_scheduler.PolynomialLR(optimizer, num_steps)]
    return lr_scheduler.ChainedScheduler(inner, optimizer=optimizer)


SIZED = {
    "OneCycleLR": partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=N),
    "OneCycleLR without momentum": partial(
        lr_scheduler.OneCycleLR,
        max_lr=0.1,
        epochs=TrainerPlaceholderValues.NUM_EPOCHS,
        steps_per_epoch=3,
        cycle_momentum=False,
    ),
    "CosineAnnealingLR": partial(lr_scheduler.CosineAnnealingLR, T_max=N),
    "PolynomialLR": partial(lr_scheduler.PolynomialLR, total_iters=N, power=2),
    "LinearLR": partial(lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.1, total_iters=N),
    "LambdaLR": partial(lambda optimizer, n: lr_scheduler.LambdaLR(optimizer, lambda k: 1 - k / n), n=N),
    "SequentialLR": partial(warm_up_and_cosine, num_steps=N),
    "ChainedScheduler": partial(chain_of, num_steps=N),
    "CosineLrScheduler": CosineLrScheduler.create_scheduler_fn(num_warmup_epochs=1),
    "StepLR": partial(lr_scheduler.StepLR, step_size=2, gamma=0.5),
    "in a hook": None,
}


def settings_of_groups(trainer):
    return [{key: value for key, value in group.items() if key != "params"} for group in trainer.optimizer.param_groups]


class WithSchedule(Trainer):
    def create_scheduler(self):
        create = super().create_scheduler()
        return of_the_run(self, self.optimizer) if create is None else create


def run(name, num_epochs=4, batch_size=4, save_at=None, **kwargs):
    """Train, and return what the groups had at each update, with the trainer; save a state after an update."""

    def save_state(trainer, **_):
        if save_at is not None and trainer.progress.num_updates == save_at[0]:
            trainer.save_training_state(save_at[1])

    torch.manual_seed(1)
    model = make_model()
    optimizer = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias], "lr": 0.02}], 0.05, momentum=0.9)
    recorder, seen = recorder_of(settings_of_groups, "on_optimizer_step_start")
    cls = WithSchedule if name == "in a hook" else Trainer
    trainer = cls(
        model,
        torch.nn.functional.mse_loss,
        optimizer,
        callbacks=[recorder, Probe(on_train_step_end=save_state)],
        seed=0,
    )
    trainer.train(
        make_dataset(12), num_epochs, per_device_batch_size=batch_size, create_scheduler_fn=SIZED[name], **kwargs
    )
    return seen, trainer


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize("num_epochs_before", [1, 2])
def test_a_schedule_of_the_length_of_the_run_follows_more_epochs(tmp_path, name, num_epochs_before, capsys):
    """Its rates, and momentum, are those of a run that had that length from the start."""
    expected, whole = run(name)
    run(name, num_epochs_before)[1].save_training_state(tmp_path / "state")
    capsys.readouterr()
    seen, resumed = run(name, resume_from=tmp_path / "state")
    assert len(seen) == 12 - 3 * num_epochs_before
    for then, now in zip(expected[-len(seen) :], seen, strict=True):
        for group, other in zip(then, now, strict=True):
            assert group == pytest.approx(other, abs=1e-12)
    assert resumed.scheduler.state_dict() == whole.scheduler.state_dict()
    is_told = f"The schedule follows the new length of the run: num_epochs {num_epochs_before} -> 4" in (
        capsys.readouterr().out
    )
    assert is_told == (name not in ("CosineLrScheduler", "StepLR"))  # those need not be told


@pytest.mark.parametrize("name", ["OneCycleLR", "CosineAnnealingLR", "LambdaLR"])
def test_a_schedule_follows_fewer_epochs_and_another_limit_of_updates(tmp_path, name):
    run(name, 4, max_num_train_steps=3)[1].save_training_state(tmp_path / "limited")
    run(name, 6, max_num_train_steps=3)[1].save_training_state(tmp_path / "longer")
    expected, _ = run(name, 2)
    for path in ("limited", "longer"):
        seen, _ = run(name, 2, resume_from=tmp_path / path)
        assert [groups[0]["lr"] for groups in seen] == pytest.approx([groups[0]["lr"] for groups in expected[3:]])


@pytest.mark.parametrize("name", ["OneCycleLR", "CosineAnnealingLR", "LambdaLR"])
@pytest.mark.parametrize("step", [5, 6])
def test_a_schedule_follows_epochs_of_another_length(tmp_path, name, step):
    """In one of six updates instead of three, and in the middle of it, it is where such a run is at that sample."""
    expected, _ = run(name, batch_size=2)
    run(name, save_at=(step, tmp_path / "state"))
    with pytest.warns(UserWarning, match="per_device_batch_size: 4 -> 2"):
        seen, _ = run(name, batch_size=2, resume_from=tmp_path / "state")
    assert [groups[0]["lr"] for groups in seen] == pytest.approx([groups[0]["lr"] for groups in expected[2 * step :]])


def test_a_schedule_follows_before_its_rates_depend_on_the_length(tmp_path):
    """In the warm-up, which is the same in both runs."""
    expected, _ = run("SequentialLR", 4)
    run("SequentialLR", 2, save_at=(1, tmp_path / "state"))
    seen, _ = run("SequentialLR", 4, resume_from=tmp_path / "state")
    assert [groups[0]["lr"] for groups in seen] == pytest.approx([groups[0]["lr"] for groups in expected[1:]])


def test_a_schedule_that_is_stepped_once_an_epoch_follows(tmp_path):
    class OncePerEpoch(Trainer):
        def scheduler_step(self):
            pass

        def training_run_epoch_end(self):
            self.scheduler.step()

    create = partial(lr_scheduler.CosineAnnealingLR, T_max=TrainerPlaceholderValues.NUM_EPOCHS)
    whole, first, resumed = (make_trainer(cls=OncePerEpoch) for _ in range(3))
    train(whole, num_epochs=4, create_scheduler_fn=create)
    train(first, num_epochs=2, create_scheduler_fn=create)
    first.save_training_state(tmp_path / "state")
    train(resumed, num_epochs=4, create_scheduler_fn=create, resume_from=tmp_path / "state")
    assert resumed.scheduler.state_dict() == whole.scheduler.state_dict()
    assert settings_of_groups(resumed) == settings_of_groups(whole)


@pytest.mark.filterwarnings(r"ignore:[\s\S]*optimizer.momentum")  # that of the end of the former schedule
@pytest.mark.parametrize("name", SIZED)
def test_a_trainer_that_has_trained_before_follows_too(tmp_path, name):
    """Its optimizer has the rates of the end of the former schedule; and the program may give it other ones."""
    expected, whole = run(name)
    recorder, seen = recorder_of(settings_of_groups, "on_optimizer_step_start")
    _, trainer = run(name, 2)
    trainer.save_training_state(tmp_path / "state")
    trainer.callback_handler.add_callback(recorder)
    for lr in (None, 0.7):
        seen.clear()
        if lr is not None:
            trainer.optimizer.param_groups[0].update(lr=lr, initial_lr=lr)
        kwargs = {"create_scheduler_fn": SIZED[name], "resume_from": tmp_path / "state"}
        trainer.train(make_dataset(12), 4, per_device_batch_size=4, **kwargs)
        assert [groups[0]["lr"] for groups in seen] == pytest.approx([groups[0]["lr"] for groups in expected[6:]])
        assert trainer.scheduler.state_dict() == whole.scheduler.state_dict()


def test_a_schedule_that_ends_before_the_position_of_the_state_is_left_as_it_was(tmp_path):
    """The run has no updates left."""
    _, saved = run("OneCycleLR", 3)
    saved.save_training_state(tmp_path / "state")
    seen, resumed = run("OneCycleLR", 2, resume_from=tmp_path / "state")
    assert seen == []
    assert resumed.scheduler.state_dict() == saved.scheduler.state_dict()


def test_a_run_of_the_same_length_loads_the_state_whatever_the_program_did_to_the_schedule(tmp_path):
    def halve(trainer, **_):
        trainer.scheduler.base_lrs = [rate / 2 for rate in trainer.scheduler.base_lrs]

    trainer = make_trainer(callbacks=[Probe(on_training_run_epoch_end=halve)])
    train(trainer, num_epochs=1, create_scheduler_fn=SIZED["LinearLR"], max_num_train_steps=9)
    trainer.save_training_state(tmp_path / "state")
    resumed = make_trainer()
    train(
        resumed,
        num_epochs=1,
        create_scheduler_fn=SIZED["LinearLR"],
        max_num_train_steps=9,
        resume_from=tmp_path / "state",
    )
    assert resumed.scheduler.base_lrs == [0.05]


def test_a_schedule_follows_in_a_tensor_that_a_compiled_step_reads(tmp_path):
    def make():
        model = make_model()
        optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.1))
        return make_trainer(model), optimizer

    rates = []
    for kwargs in ({"num_epochs": 1}, {"num_epochs": 3, "resume_from": tmp_path / "state"}, {"num_epochs": 3}):
        trainer, trainer.optimizer = make()
        train(trainer, create_scheduler_fn=SIZED["PolynomialLR"], **kwargs)
        assert isinstance(trainer.optimizer.param_groups[0]["lr"], torch.Tensor)
        rates.append(trainer.optimizer.param_groups[0]["lr"].item())
        if "resume_from" not in kwargs:
            trainer.save_training_state(tmp_path / "state")
    assert rates[1] == rates[2]


def test_a_scheduler_that_is_stepped_with_a_metric_loads_its_state(tmp_path):
    class Plateau(Trainer):
        def scheduler_step(self):
            self.scheduler.step(1.0)

    def make():
        model = make_model()
        return make_trainer(model, cls=Plateau)

    create = partial(lr_scheduler.ReduceLROnPlateau, patience=1)
    saved = make()
    train(saved, num_epochs=1, create_scheduler_fn=create)
    saved.save_training_state(tmp_path / "state")
    resumed, whole = make(), make()
    train(resumed, num_epochs=3, create_scheduler_fn=create, resume_from=tmp_path / "state")
    train(whole, num_epochs=3, create_scheduler_fn=create)
    assert resumed.scheduler.state_dict() == whole.scheduler.state_dict()


def test_a_scheduler_of_the_users_loads_its_state_whatever_the_length(tmp_path):
    """It may depend on more than the number of steps."""

    class Mine(lr_scheduler.ExponentialLR):
        def __init__(self, optimizer):
            super().__init__(optimizer, 0.9)
            self.num_restarts = 0

    trainer = make_trainer()
    train(trainer, num_epochs=1, create_scheduler_fn=Mine)
    trainer.scheduler.num_restarts = trainer.scheduler.gamma = 0.5
    trainer.save_training_state(tmp_path / "state")
    resumed = make_trainer()
    train(resumed, num_epochs=2, create_scheduler_fn=Mine, resume_from=tmp_path / "state")
    assert (resumed.scheduler.num_restarts, resumed.scheduler.gamma) == (0.5, 0.5)


def test_pytorch_does_not_complain_about_the_steps_of_the_schedule(tmp_path):
    run("OneCycleLR", 1)[1].save_training_state(tmp_path / "state")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run("OneCycleLR", 2, resume_from=tmp_path / "state")
