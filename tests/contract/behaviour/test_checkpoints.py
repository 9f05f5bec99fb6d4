"""What programs written for 0.1.61 observe of checkpoints and training states: section 5 of the table."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.optim.lr_scheduler import StepLR

from _support import (
    Probe,
    Samples,
    assert_same_weights,
    make_dataset,
    make_model,
    make_trainer,
    train,
    weights_of,
)
from pytorch_accelerated.callbacks import SaveBestModelCallback, SaveTrainingStateCallback
from pytorch_accelerated.exceptions import CheckpointError
from pytorch_accelerated.schedulers import CosineLrScheduler
from pytorch_accelerated.states import list_states


class StepOnly:
    """A scheduler that has nothing but `step`."""

    def __init__(self, optimizer):
        self.num_steps = 0

    def step(self):
        self.num_steps += 1


halving = partial(StepLR, step_size=2, gamma=0.5)


# --- checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loads", [True, False])
def test_load_checkpoint_returns_all_entries_of_the_file(tmp_path, loads):
    """Row 5.1: also those that were not asked for."""
    trainer = train(make_trainer(), create_scheduler_fn=halving)
    trainer.save_checkpoint(tmp_path / "all.pt", checkpoint_kwargs={"accuracy": 0.5})
    file = torch.load(tmp_path / "all.pt", weights_only=True)
    returned = make_trainer().load_checkpoint(tmp_path / "all.pt", load_optimizer=loads, load_scheduler=loads)
    assert set(returned) == {"model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "accuracy"}
    assert_same_weights(returned["model_state_dict"], file["model_state_dict"])
    assert returned["optimizer_state_dict"]["param_groups"] == file["optimizer_state_dict"]["param_groups"]
    assert returned["scheduler_state_dict"]["last_epoch"] == 4
    assert returned["accuracy"] == 0.5


def test_load_checkpoint_returns_no_entries_that_were_not_saved(tmp_path):
    """Row 5.1: "if present"."""
    make_trainer().save_checkpoint(tmp_path / "model.pt", save_optimizer=False)
    assert set(make_trainer().load_checkpoint(tmp_path / "model.pt")) == {"model_state_dict"}


def test_the_model_does_not_share_memory_with_what_load_checkpoint_returned(tmp_path):
    """Row 5.1: a program may keep it while training goes on."""
    make_trainer().save_checkpoint(tmp_path / "model.pt")
    trainer = make_trainer(make_model(seed=8))
    returned = trainer.load_checkpoint(tmp_path / "model.pt")
    train(trainer)
    assert_same_weights(returned["model_state_dict"], weights_of(make_model()))


def test_a_scheduler_without_state_dict_is_left_out_with_a_warning(tmp_path):
    """Row 5.2: the file is written."""
    trainer = train(make_trainer(), create_scheduler_fn=StepOnly)
    with pytest.warns(
        UserWarning,
        match=r"Could not save the scheduler state dict\. Please ensure the scheduler has a state_dict method\.",
    ) as caught:
        trainer.save_checkpoint(tmp_path / "model.pt")
    assert [Path(warning.filename) for warning in caught] == [Path(__file__)]
    assert set(make_trainer().load_checkpoint(tmp_path / "model.pt")) == {"model_state_dict", "optimizer_state_dict"}


def test_a_scheduler_without_state_dict_causes_no_warning_if_it_is_not_to_be_saved(tmp_path):
    """Row 5.2: nor if there is no scheduler."""
    trainer = train(make_trainer(), create_scheduler_fn=StepOnly)
    trainer.save_checkpoint(tmp_path / "model.pt", save_scheduler=False)
    make_trainer().save_checkpoint(tmp_path / "model.pt")


def test_the_best_model_is_saved_and_loaded_with_a_scheduler_without_state_dict(tmp_path):
    """Row 5.2: the run goes on to its end."""
    trainer = make_trainer(callbacks=[SaveBestModelCallback(tmp_path / "best.pt", watch_metric="train_loss_epoch")])
    with pytest.warns(UserWarning, match="Could not save the scheduler state dict"):
        train(trainer, num_epochs=3, create_scheduler_fn=StepOnly)
    assert trainer.scheduler.num_steps == 12
    assert torch.load(tmp_path / "best.pt", weights_only=True)["epoch"] == 3


def test_a_training_state_is_saved_and_resumed_with_a_scheduler_without_state_dict(tmp_path):
    """Row 5.2: the same kind, for states."""
    train(make_trainer(callbacks=[SaveTrainingStateCallback(tmp_path)]), create_scheduler_fn=StepOnly)
    resumed = make_trainer()
    train(resumed, num_epochs=2, resume_from=tmp_path / "final", create_scheduler_fn=StepOnly)
    assert resumed.progress.num_updates == 8


class Settings:
    """An object of a program."""

    def __init__(self):
        self.rate = 0.5


@pytest.mark.parametrize("value", [Path("x"), Settings(), {"deep": [Settings()]}], ids=["path", "object", "nested"])
def test_a_checkpoint_may_hold_anything_that_can_be_pickled(tmp_path, value):
    """Row 5.3: it is written with a warning, and `load_checkpoint` refuses it."""
    path = tmp_path / "model.pt"
    trainer = make_trainer()
    with pytest.warns(UserWarning, match=r"`load_checkpoint` will refuse .*model.pt'.*\(at \['mine'\]") as caught:
        trainer.save_checkpoint(path, checkpoint_kwargs={"mine": value, "epoch": 3})
    assert [Path(warning.filename) for warning in caught] == [Path(__file__)]
    written = torch.load(path, weights_only=False)
    assert type(written["mine"]) is type(value)
    assert written["epoch"] == 3
    assert_same_weights(written["model_state_dict"], weights_of(trainer.model))
    with pytest.raises(CheckpointError, match="could not be read"):
        make_trainer().load_checkpoint(path)


def test_what_cannot_be_pickled_is_an_error_and_keeps_the_old_file(tmp_path):
    """Row 5.3: "anything that can be pickled"."""
    path = tmp_path / "model.pt"
    trainer = make_trainer()
    trainer.save_checkpoint(path, checkpoint_kwargs={"epoch": 3})
    with pytest.raises(CheckpointError, match=r"could not be written.*unchanged.*Leave out what cannot be pickled"):
        trainer.save_checkpoint(path, checkpoint_kwargs={"mine": lambda: 0})
    assert trainer.load_checkpoint(path)["epoch"] == 3
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]


def test_a_training_state_holds_only_what_can_be_read_without_running_code(tmp_path):
    """Row 5.3: states stay strict."""
    with pytest.raises(CheckpointError, match=r"`PosixPath`|`WindowsPath`"):
        make_trainer().save_training_state(tmp_path / "state", checkpoint_kwargs={"p": Path("x")})
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_plain_values_causes_no_warning(tmp_path):
    """Row 5.3."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_trainer().save_checkpoint(tmp_path / "model.pt", checkpoint_kwargs={"accuracy": 0.5, "names": ["a"]})


# --- training states ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_background", [False, True])
def test_states_tell_the_number_of_steps_so_far(tmp_path, in_background):
    """Row 5.4: as `global_step`, beside `current_epoch`; also with accumulation."""
    saving = SaveTrainingStateCallback(
        tmp_path, save_every_n_steps=3, save_every_n_epochs=2, in_background=in_background
    )
    train(make_trainer(callbacks=[saving]), num_epochs=2, gradient_accumulation_steps=2)
    returned = {
        name: make_trainer().load_training_state(tmp_path / name) for name in ("step_3", "step_6", "epoch_2", "final")
    }
    assert {name: entries["global_step"] for name, entries in returned.items()} == {
        "step_3": 3,
        "step_6": 6,
        "epoch_2": 8,
        "final": 8,
    }
    assert returned["step_6"]["current_epoch"] == 2


def test_the_number_of_steps_goes_on_after_a_resume(tmp_path):
    """Row 5.4."""
    train(make_trainer(callbacks=[SaveTrainingStateCallback(tmp_path)]), num_epochs=1)
    saving = SaveTrainingStateCallback(tmp_path, save_every_n_steps=3)
    train(make_trainer(callbacks=[saving]), num_epochs=2, resume_from=tmp_path / "final")
    assert make_trainer().load_training_state(tmp_path / "step_6")["global_step"] == 6


def test_a_method_that_saves_states_gets_path_and_metadata_as_in_0_1_61(tmp_path):
    """Row 5.4: a subclass may override `save_training_state(self, output_dir, checkpoint_kwargs=None)`."""
    calls = []
    trainer = make_trainer(callbacks=[SaveTrainingStateCallback(tmp_path, save_every_n_steps=3, save_at_end=False)])
    trainer.save_training_state = lambda output_dir, checkpoint_kwargs=None: calls.append(
        (output_dir, checkpoint_kwargs)
    )
    train(trainer)
    assert calls == [(str(tmp_path / "step_3"), {"global_step": 3})]


def test_the_epoch_of_a_state_is_that_in_which_training_goes_on(tmp_path):
    """Row 5.5: that of the evaluation that is left, as in 0.1.61; with `keep_best`, which waits for it, the next."""
    for kwargs, expected in (({}, 1), ({"keep_best": 1, "max_checkpoints": 9, "watch_metric": "train_loss_epoch"}, 2)):
        folder = tmp_path / str(expected)
        save = SaveTrainingStateCallback(folder, save_every_n_epochs=1, **kwargs)
        train(make_trainer(callbacks=[save]), num_epochs=2)
        assert make_trainer().load_training_state(folder / "epoch_1")["current_epoch"] == expected


def test_the_files_of_a_state_are_ours(tmp_path):
    """Row 5.6: ours (C1, C2)."""
    train(make_trainer()).save_training_state(tmp_path / "state")
    assert {path.name for path in (tmp_path / "state").iterdir()} == {
        "manifest.json",
        "model.pt",
        "optimizer.pt",
        "process_0.pt",
        "trainer_state.pt",
    }


@pytest.fixture
def state_of_0_1_61(tmp_path):
    """A folder with a state as version 0.1.61 wrote it."""
    state = tmp_path / "states" / "epoch_2"
    state.mkdir(parents=True)
    save_file(make_model(seed=8).state_dict(), state / "model.safetensors")
    torch.save({"current_epoch": 2, "global_step": 8}, state / "trainer_metadata.pt")
    for name in ("optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl"):
        torch.save({}, state / name)
    return state


def test_a_state_of_0_1_61_is_refused_with_the_way_to_load_its_model(state_of_0_1_61):
    """Row 5.7: ours (C1). The code in the message works."""
    trainer = make_trainer()
    with pytest.raises(CheckpointError, match=r"comes from version 0\.1\.61") as caught:
        train(trainer, resume_from=state_of_0_1_61)
    code = str(caught.value).split("`")[1]
    assert code == f"safetensors.torch.load_model(model, {str(state_of_0_1_61 / 'model.safetensors')!r})"
    exec(f"import safetensors.torch; {code}", {"model": trainer.model})
    assert_same_weights(weights_of(trainer.model), weights_of(make_model(seed=8)))


def test_a_state_of_0_1_61_with_its_model_in_other_files_is_named_too(state_of_0_1_61):
    """Row 5.7."""
    (state_of_0_1_61 / "model.safetensors").rename(state_of_0_1_61 / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"comes from version 0\.1\.61.*so no run can be resumed from it\.$"):
        make_trainer().load_training_state(state_of_0_1_61)


def test_states_of_0_1_61_in_the_folder_of_a_run_are_skipped_and_named(state_of_0_1_61, capsys):
    """Row 5.7: by `resume_from="latest"`, and in the list of states."""
    folder = state_of_0_1_61.parent
    train(make_trainer(callbacks=[SaveTrainingStateCallback(folder)]), resume_from="latest")
    output = capsys.readouterr().out
    assert "comes from version 0.1.61" in output
    assert "the run starts from scratch" in output
    assert [(state.path.name, state.problem is None) for state in list_states(folder)] == [
        ("epoch_2", False),
        ("final", True),
    ]


def test_a_damaged_state_of_ours_is_not_taken_for_one_of_0_1_61(tmp_path):
    """Row 5.7."""
    train(make_trainer()).save_training_state(tmp_path / "state")
    (tmp_path / "state" / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not a complete training state"):
        make_trainer().load_training_state(tmp_path / "state")


# --- files of 0.1.61 ---------------------------------------------------------------------------------------------

SCHEDULERS_OF_0_1_61 = {
    # As saved after 8 updates of a run of 2 epochs of 4 updates, with a rate of 0.1.
    "cosine": {
        "total_iterations": 8,
        "lr_min_ratio": None,
        "lr_min": 1e-06,
        "warmup_iterations": 4,
        "warmup_lr_init": 1e-06,
        "warmup_lr_ratio": None,
        "k_decay": 1.0,
        "num_cooldown_iterations": 0,
        "num_updates": 7,
    },
    "step": {
        "step_size": 3,
        "gamma": 0.5,
        "base_lrs": [0.1],
        "last_epoch": 8,
        "_step_count": 9,
        "_is_initial": False,
        "_get_lr_called_within_step": False,
        "_last_lr": [0.025],
    },
}


@pytest.fixture(params=SCHEDULERS_OF_0_1_61)
def checkpoint_of_0_1_61(request, tmp_path):
    """The kind of scheduler, and a file as version 0.1.61 wrote it."""
    model = make_model(seed=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["initial_lr"] = 0.1
    contents = {
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": SCHEDULERS_OF_0_1_61[request.param],
        "epoch": 2,
    }
    torch.save(contents, tmp_path / "old.pt")
    return request.param, tmp_path / "old.pt"


def test_files_of_0_1_61_can_be_loaded_and_the_schedule_goes_on_from_there(checkpoint_of_0_1_61):
    """Row 5.8: the position of a scheduler after n updates is n - 1 in both."""
    kind, path = checkpoint_of_0_1_61
    create = {
        "cosine": CosineLrScheduler.create_scheduler_fn(num_warmup_epochs=1),
        "step": partial(StepLR, step_size=3, gamma=0.5),
    }[kind]
    found = []
    probe = Probe(
        on_training_run_start=lambda trainer, **_: found.append(
            getattr(trainer.scheduler, "num_updates", trainer.scheduler.last_epoch if kind == "step" else None)
        )
    )
    trainer = make_trainer(callbacks=[probe])
    assert trainer.load_checkpoint(path)["epoch"] == 2
    assert_same_weights(weights_of(trainer.model), weights_of(make_model(seed=8)))
    train(trainer, num_epochs=2, create_scheduler_fn=create)
    assert found == [{"cosine": 7, "step": 8}[kind]]


def test_a_schedule_of_ours_has_the_position_of_0_1_61(tmp_path):
    """Row 5.8: n - 1 after n updates, in the file. Under the trainer, ours is one ahead (row 1.17 and contract L1)."""
    scheduler = CosineLrScheduler(torch.optim.SGD(make_model().parameters(), lr=0.1), 2, 4)
    for _ in range(8):
        scheduler.step()
    assert scheduler.state_dict()["num_updates"] == 7


def test_states_for_which_the_trainer_has_no_use_are_left_out(tmp_path):
    """Row 5.9: ours; 0.1.61 raises."""
    train(make_trainer(), create_scheduler_fn=halving).save_checkpoint(tmp_path / "model.pt")
    trainer = make_trainer()
    trainer.optimizer = None
    trainer.load_checkpoint(tmp_path / "model.pt")
    assert_same_weights(weights_of(trainer.model), torch.load(tmp_path / "model.pt")["model_state_dict"])


def test_a_file_without_a_model_is_refused(tmp_path):
    """Row 5.10: ours; a `KeyError` in 0.1.61."""
    torch.save({"epoch": 3}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="has no `model_state_dict`"):
        make_trainer().load_checkpoint(tmp_path / "model.pt")


def test_a_run_resumed_from_states_with_metadata_ends_with_the_same_bits(tmp_path):
    """Row 5.4 changes nothing else in a state."""
    dataset = Samples(make_dataset(18))
    kwargs = {"num_epochs": 2, "train_dataloader_kwargs": {"num_workers": 0}}
    whole = train(make_trainer(seed=3), dataset, **kwargs)
    train(
        make_trainer(callbacks=[SaveTrainingStateCallback(tmp_path, save_every_n_steps=3)], seed=3), dataset, **kwargs
    )
    resumed = train(make_trainer(seed=3), dataset, resume_from=tmp_path / "step_3", **kwargs)
    assert_same_weights(weights_of(resumed.model), weights_of(whole.model))
