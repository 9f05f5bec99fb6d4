"""A training state with any kind of damage is rejected, the file is named, and nothing is changed or run."""

from __future__ import annotations

import io
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from _saved import assert_equal, everything_in, make_state_trainer, rewrite_manifest, train
from _support import Probe, make_dataset
from pytorch_accelerated.exceptions import CheckpointError

FILES = [
    "manifest.json",
    "model.pt",
    "optimizer.pt",
    "process_0.pt",
    "trainer_state.pt",
]

NAMES_ACCELERATE_LOOKS_FOR = [
    "pytorch_model.bin",
    "model_1.safetensors",
    "optimizer_1.bin",
    "scheduler.bin",
    "sampler.bin",
    "dl_state_dict.bin",
    "scaler.pt",
    "random_states_0.pkl",
    "custom_checkpoint_0.pkl",
]


@pytest.fixture(scope="module")
def valid_state(tmp_path_factory):
    """A state saved mid-epoch and mid-window."""
    path = tmp_path_factory.mktemp("valid") / "state"

    def save(trainer, step, **_):
        if step == 2:
            trainer.save_training_state(path)

    train(make_state_trainer([Probe(on_train_step_end=save)]), num_epochs=1, eval_dataset=make_dataset(8))
    return path


@pytest.fixture
def state(valid_state, tmp_path):
    return shutil.copytree(valid_state, tmp_path / "state")


@pytest.fixture(scope="module")
def trainer():
    """A trainer with results that a rejected state must not change."""
    trainer = make_state_trainer(seed=9)
    train(trainer, num_epochs=1)
    return trainer


def assert_rejected(trainer, state, name):
    before = everything_in(trainer)
    for use in (lambda: trainer.load_training_state(state), lambda: train(trainer, resume_from=state)):
        with pytest.raises(CheckpointError) as caught:
            use()
        assert name in str(caught.value)
        assert str(state) in str(caught.value)
        assert_equal(everything_in(trainer), before)


def test_the_list_of_files_is_complete(valid_state):
    assert sorted(path.name for path in valid_state.iterdir()) == FILES


def test_a_valid_state_is_not_rejected(valid_state):
    make_state_trainer(seed=9).load_training_state(valid_state)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: None, id="missing"),
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content[: len(content) // 2], id="truncated"),
        pytest.param(lambda content: content[:-1], id="a byte short"),
        pytest.param(lambda content: content + b"\0", id="a byte longer"),
        pytest.param(lambda content: content + content, id="twice"),
        pytest.param(lambda content: flip(content, 0), id="first bit"),
        pytest.param(lambda content: flip(content, len(content) // 2), id="a bit in the middle"),
        pytest.param(lambda content: flip(content, len(content) - 1), id="last bit"),
        pytest.param(lambda content: b"\0" * len(content), id="zeros"),
    ],
)
def test_a_damaged_file_is_rejected_and_named_and_changes_nothing(trainer, state, name, damage):
    content = damage((state / name).read_bytes())
    (state / name).unlink()
    if content is not None:
        (state / name).write_bytes(content)
    assert_rejected(trainer, state, name)


def flip(content, index):
    return content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :]


@pytest.mark.parametrize("name", FILES)
def test_a_file_from_another_state_is_rejected(trainer, state, name, tmp_path):
    """As after an interrupted copy."""
    other = tmp_path / "other"
    trainer_of_other = make_state_trainer(seed=5)
    train(trainer_of_other, num_epochs=1)
    trainer_of_other.save_training_state(other)
    if (other / name).read_bytes() == (state / name).read_bytes():
        pytest.skip("the files are identical")
    shutil.copy(other / name, state / name)
    before = everything_in(trainer)
    with pytest.raises(CheckpointError):
        trainer.load_training_state(state)
    assert_equal(everything_in(trainer), before)


def test_a_directory_in_place_of_a_file_is_rejected(trainer, state):
    for name in FILES[1:]:
        content = (state / name).read_bytes()
        (state / name).unlink()
        (state / name).mkdir()
        assert_rejected(trainer, state, name)
        (state / name).rmdir()
        (state / name).write_bytes(content)


# --- hostile content ---------------------------------------------------------------------------------------------


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def hostile_files(trace):
    """Return a hostile pickle in each container format."""
    zipped, legacy = io.BytesIO(), io.BytesIO()
    contents = {"trainer": Hostile(trace), "rng": Hostile(trace), "state": Hostile(trace)}
    torch.save(contents, zipped)
    torch.save(contents, legacy, _use_new_zipfile_serialization=False)
    return {"zip": zipped.getvalue(), "legacy": legacy.getvalue(), "bare": pickle.dumps(Hostile(trace))}


@pytest.mark.parametrize("container", ["zip", "legacy", "bare"])
def test_a_hostile_file_does_run_code_if_it_is_loaded_unsafely(tmp_path, container):
    (tmp_path / "file").write_bytes(hostile_files(tmp_path / "trace")[container])
    if container == "bare":
        pickle.loads((tmp_path / "file").read_bytes())
    else:
        torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("container", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("has_right_checksum", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_no_file_of_a_state_ever_runs_code(trainer, state, tmp_path, name, container, has_right_checksum):
    """Not even if the attacker writes a matching manifest."""
    (state / name).write_bytes(hostile_files(tmp_path / "trace")[container])
    if has_right_checksum and name != "manifest.json":
        rewrite_manifest(state)
    assert_rejected(trainer, state, name if not has_right_checksum else "")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", NAMES_ACCELERATE_LOOKS_FOR)
@pytest.mark.parametrize("is_listed", [True, False])
def test_no_file_that_accelerate_looks_for_ever_runs_code(trainer, state, tmp_path, name, is_listed):
    (state / name).write_bytes(hostile_files(tmp_path / "trace")["zip"])
    if is_listed:
        rewrite_manifest(state)
    else:
        assert_rejected(trainer, state, name)
    if is_listed and name != "scaler.pt":  # the only one that is read, from states of mixed precision
        make_state_trainer().load_training_state(state)
    assert not (tmp_path / "trace").exists()
