"""How training states get to the disk: at once, or while the run goes on."""

from __future__ import annotations

import threading
import zipfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import _runs
from _support import Probe, make_dataset, make_trainer, raiser
from pytorch_accelerated._checkpoint import writer as writer_module
from pytorch_accelerated._checkpoint.folder import Lineage
from pytorch_accelerated._checkpoint.writer import CollectedState
from pytorch_accelerated.callbacks import SaveTrainingStateCallback
from pytorch_accelerated.exceptions import CheckpointError
from pytorch_accelerated.states import list_states, verify_state


@pytest.fixture
def gate(monkeypatch):
    """Keeps the writing thread from writing until it is opened."""
    gate = threading.Event()
    write_state = writer_module.write_state

    def write_later(*args, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            assert gate.wait(60)
        write_state(*args, **kwargs)

    monkeypatch.setattr(writer_module, "write_state", write_later)
    return gate


def train(trainer, num_samples=12, **kwargs):
    trainer.train(make_dataset(num_samples), **{"num_epochs": 1, "per_device_batch_size": 2, **kwargs})


def test_the_run_goes_on_while_a_state_of_an_earlier_step_is_written(gate, tmp_path):
    """The state is that of step 2, although it is written after the last step."""
    seen = []

    def save(trainer, step, **_):
        if step == 1:
            trainer.save_training_state(tmp_path / "state", in_background=True)
            seen.append(trainer.model.state_dict()["weight"].clone())
        if step == 5:
            assert not (tmp_path / "state").exists()
            gate.set()

    trainer = make_trainer(callbacks=[Probe(on_train_step_end=save)])
    train(trainer)
    assert verify_state(tmp_path / "state").position.num_updates == 2
    other = make_trainer()
    other.load_training_state(tmp_path / "state")
    assert torch.equal(other.model.state_dict()["weight"], seen[0])
    assert not torch.equal(trainer.model.state_dict()["weight"], seen[0])


def test_only_one_state_is_under_way_and_the_end_waits_for_the_last(tmp_path):
    saves = SaveTrainingStateCallback(
        tmp_path, save_every_n_steps=1, save_at_end=False, in_background=True, max_checkpoints=2
    )
    threads = []
    watch = Probe(on_train_step_end=lambda trainer, **_: threads.append(writers()))
    train(make_trainer(callbacks=[saves, watch]))
    assert max(threads) <= 1
    assert writers() == 0
    assert [state.path.name for state in list_states(tmp_path)] == ["step_5", "step_6"]


def writers():
    return sum(thread.name == "training state writer" for thread in threading.enumerate())


def test_states_written_in_the_background_resume_exactly(tmp_path):
    trainer = _runs.make_trainer(tmp_path, in_background=True)
    expected = _runs.train(trainer, gradient_accumulation_steps=4)
    for step in (3, 6, 10, 15, 18):
        other = _runs.make_trainer(tmp_path / "resumed", save_every_n_steps=None)
        resumed = _runs.train(other, gradient_accumulation_steps=4, resume_from=tmp_path / f"step_{step}")
        assert _runs.differences(expected, resumed) == []


def test_a_failure_in_the_background_ends_the_run_at_the_next_save(tmp_path, monkeypatch):
    trainer = make_trainer(callbacks=[SaveTrainingStateCallback(tmp_path, save_every_n_steps=1, in_background=True)])
    fail_at(monkeypatch, "step_3")
    with pytest.raises(CheckpointError, match=r"step_3' could not be written: \[Errno 28\] no room"):
        train(trainer)
    assert trainer.progress.num_updates == 4
    assert [state.path.name for state in list_states(tmp_path)] == ["step_1", "step_2"]


def test_a_failure_of_the_last_state_is_raised_at_the_end(tmp_path, monkeypatch):
    def save(trainer, step, **_):
        if step == 5:
            trainer.save_training_state(tmp_path / "mine", in_background=True)

    fail_at(monkeypatch, "mine")
    trainer = make_trainer(callbacks=[Probe(on_train_step_end=save)])
    with pytest.raises(CheckpointError, match="no room"):
        train(trainer)
    monkeypatch.undo()
    train(trainer)  # it can be used again


def test_a_failure_may_be_a_warning(tmp_path, monkeypatch):
    saves = SaveTrainingStateCallback(tmp_path, save_every_n_steps=1, in_background=True, on_save_error="warn")
    fail_at(monkeypatch, "step_3")
    with pytest.warns(UserWarning, match="no room.*The run goes on without it") as warned:
        train(make_trainer(callbacks=[saves]))
    assert len(warned) == 1
    assert [state.path.name for state in list_states(tmp_path)] == [*(f"step_{n}" for n in (1, 2, 4, 5, 6)), "final"]


def test_an_exception_of_the_run_comes_first_and_the_failure_is_a_note(tmp_path, monkeypatch):
    def save(trainer, step, **_):
        if step == 2:
            trainer.save_training_state(tmp_path / "mine", in_background=True)

    fail_at(monkeypatch, "mine")
    fail = Probe(on_train_epoch_end=raiser(LookupError("of the run")))
    with pytest.raises(LookupError, match="of the run") as raised:
        train(make_trainer(callbacks=[Probe(on_train_step_end=save), fail]))
    assert any("mine' could not be written" in note for note in raised.value.__notes__)


def fail_at(monkeypatch, name):
    write_file = writer_module._write_file

    def write(path, contents):
        if f".{name}." in str(path):
            raise OSError(28, "no room")
        write_file(path, contents)

    monkeypatch.setattr(writer_module, "_write_file", write)


def test_what_comes_after_happens_when_the_state_is_complete(tmp_path):
    seen = []
    trainer = make_trainer()
    for in_background in (False, True):
        path = tmp_path / f"state_{in_background}"
        trainer.save_training_state(
            path, in_background=in_background, and_then=lambda path=path: seen.append(verify_state(path).path)
        )
    trainer.wait_for_training_state()
    assert seen == [tmp_path / "state_False", tmp_path / "state_True"]


# --- files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def state(tmp_path):
    make_trainer().save_training_state(tmp_path / "state")
    return tmp_path / "state"


@pytest.mark.parametrize("mmap", [False, True])
def test_files_can_be_read_by_pytorch_alone(state, mmap):
    """They lack the checksums of PyTorch, which it does not look at."""
    with zipfile.ZipFile(state / "model.pt") as file:
        assert {entry.CRC for entry in file.infolist()} == {0}
    weights = torch.load(state / "model.pt", weights_only=True, mmap=mmap)
    assert list(weights) == ["weight", "bias"]
    optimizer = torch.load(state / "optimizer.pt", weights_only=True, mmap=mmap)
    assert set(optimizer) == {"state", "param_groups"}


@pytest.mark.parametrize("is_on", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_option_of_pytorch_is_put_back(tmp_path, monkeypatch, is_on, fails):
    seen, save = [], torch.save

    def watched(contents, path):
        seen.append(torch.serialization.get_crc32_options())
        if fails:
            raise OSError(28, "no room")
        save(contents, path)

    monkeypatch.setattr(torch, "save", watched)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(is_on)
    try:
        with pytest.raises(CheckpointError) if fails else nullcontext():
            make_trainer().save_training_state(tmp_path / "state")
        assert torch.serialization.get_crc32_options() is is_on
    finally:
        torch.serialization.set_crc32_options(before)
    assert set(seen) == {False}


def test_checkpoints_keep_the_checksums_of_pytorch(tmp_path):
    """They are for other programs too, some of which unpack them; and nothing else checks them."""
    make_trainer().save_checkpoint(tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt") as file:
        assert file.testzip() is None


def test_two_files_at_once_leave_the_option_as_it_was(tmp_path, monkeypatch):
    """Older versions of PyTorch have it once for all threads; what another writer has set must not be put back."""
    option = [True]
    monkeypatch.setattr(torch.serialization, "get_crc32_options", lambda: option[0])
    monkeypatch.setattr(torch.serialization, "set_crc32_options", lambda value: option.__setitem__(0, value))
    entered, second_begins = threading.Event(), threading.Event()

    def save(contents, path):
        if contents == "first":
            entered.set()
            second_begins.wait(60)
            ends.append("first")
        else:
            ends.append("second")
        torch_save(contents, path)

    torch_save, ends = torch.save, []
    monkeypatch.setattr(torch, "save", save)

    def write_second():
        assert entered.wait(60)
        second_begins.set()
        writer_module._write_file(tmp_path / "second", "second")

    thread = threading.Thread(target=write_second)
    thread.start()
    writer_module._write_file(tmp_path / "first", "first")
    thread.join()
    assert ends == ["first", "second"]
    assert option == [True]


@pytest.mark.parametrize("name", ["flush_to_disk", "file_metadata"])
@pytest.mark.parametrize("file", ["model.pt", "process_0.pt"])
def test_a_file_that_cannot_be_flushed_or_read_again_is_not_saved(state, monkeypatch, name, file):
    act = getattr(writer_module, name)

    def fail(path):
        if path.name == file:
            raise OSError(5, "Input/output error", str(path))
        return act(path)

    monkeypatch.setattr(writer_module, name, fail)
    before = verify_state(state)
    with pytest.raises(CheckpointError, match=rf"could not be written: .*Input/output error.*{file}"):
        make_trainer().save_training_state(state)
    assert verify_state(state) == before
    assert [path.name for path in state.parent.iterdir()] == ["state"]


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("file", ["model.pt", "optimizer.pt", "trainer_state.pt", "process_0.pt"])
def test_a_file_whose_end_pytorch_has_lost_is_not_saved(state, monkeypatch, file):
    """PyTorch 2.6 does not notice that the disk had no room for the last part of a file."""
    torch_save = torch.save

    def save(contents, path):
        torch_save(contents, path)
        if Path(path).name == file:
            cut_off(Path(path))

    before = verify_state(state)
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(
        CheckpointError, match=rf"state' could not be written: the end of '{file}' is missing.*untouched"
    ):
        make_trainer().save_training_state(state)
    assert verify_state(state) == before
    assert [path.name for path in state.parent.iterdir()] == ["state"]


@pytest.mark.parametrize("file", ["optimizer.bin", "random_states_0.pkl"])
def test_a_file_of_accelerate_whose_end_is_lost_is_not_saved(tmp_path, file):
    def save_shards(folder):
        torch.save({"a": torch.ones(3)}, folder / file)
        cut_off(folder / file)

    contents = CollectedState(files={}, own_files={}, facts={}, save_shards=save_shards)
    with pytest.raises(CheckpointError, match=rf"the end of '{file}' is missing"):
        writer_module.write_state(tmp_path / "state", contents, lineage=Lineage(), is_main=True, num_processes=1)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_accelerate_in_the_former_format_is_saved(tmp_path):
    def save_shards(folder):
        torch.save({"a": torch.ones(3)}, folder / "optimizer.bin", _use_new_zipfile_serialization=False)

    contents = CollectedState(files={}, own_files={}, facts={}, save_shards=save_shards)
    writer_module.write_state(tmp_path / "state", contents, lineage=Lineage(), is_main=True, num_processes=1)
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["manifest.json", "optimizer.bin"]
