"""Writing training states, immediately or in the background."""

from __future__ import annotations

import signal
import threading
import zipfile
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch

import _runs
from _support import Probe, make_dataset, make_trainer, raiser, train
from pytorch_accelerated._checkpoint import writer as writer_module
from pytorch_accelerated._checkpoint.folder import Lineage
from pytorch_accelerated._checkpoint.writer import BackgroundWriter, CollectedState
from pytorch_accelerated.callbacks import SaveTrainingStateCallback
from pytorch_accelerated.exceptions import CheckpointError
from pytorch_accelerated.states import list_states, verify_state


@pytest.fixture
def gate(monkeypatch):
    """An event that the writing thread waits for before it writes."""
    gate = threading.Event()
    write_state = writer_module.write_state

    def write_later(*args, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            assert gate.wait(60)
        write_state(*args, **kwargs)

    monkeypatch.setattr(writer_module, "write_state", write_later)
    return gate


def train_six_steps(trainer, **kwargs):
    train(trainer, make_dataset(12), per_device_batch_size=2, **kwargs)


# --- the background thread ---------------------------------------------------------------------------------------


def test_the_caller_continues_during_a_background_write():
    may_end, written = threading.Event(), []
    writer = BackgroundWriter()
    writer.start(lambda: (may_end.wait(20), written.append(1)))
    assert writer.is_active
    assert written == []
    may_end.set()
    writer.wait()
    assert written == [1]
    assert not writer.is_active
    writer.wait()  # returns immediately


def test_an_error_in_the_background_is_raised_once_by_wait():
    def fail():
        raise OSError("no room")

    writer = BackgroundWriter()
    writer.start(fail)
    with pytest.raises(OSError, match="no room"):
        writer.wait()
    writer.wait()


# --- in the background -------------------------------------------------------------------------------------------


def test_the_run_continues_while_the_state_of_an_earlier_step_is_written(gate, tmp_path):
    """The state is that of step 2, although it is written only in step 6."""
    seen = []

    def save(trainer, step, **_):
        if step == 1:
            trainer.save_training_state(tmp_path / "state", in_background=True)
            seen.append(trainer.model.state_dict()["weight"].clone())
        if step == 5:
            assert not (tmp_path / "state").exists()
            gate.set()

    trainer = make_trainer(callbacks=[Probe(on_train_step_end=save)])
    train_six_steps(trainer)
    assert verify_state(tmp_path / "state").position.num_updates == 2
    other = make_trainer()
    other.load_training_state(tmp_path / "state")
    assert torch.equal(other.model.state_dict()["weight"], seen[0])
    assert not torch.equal(trainer.model.state_dict()["weight"], seen[0])


def test_the_state_of_an_epoch_is_written_while_its_evaluation_runs(gate, tmp_path):
    existed = []

    def look(trainer, **_):
        existed.append((tmp_path / "epoch_1").exists())
        gate.set()

    saves = SaveTrainingStateCallback(tmp_path, save_every_n_epochs=1, in_background=True)
    train_six_steps(make_trainer(callbacks=[saves, Probe(on_eval_step_end=look)]), eval_dataset=make_dataset(2))
    assert existed == [False]
    assert (tmp_path / "epoch_1").is_dir()


@pytest.mark.parametrize("end", ["completed", "signal"])
def test_the_last_state_of_a_run_is_written_at_once(end, tmp_path):
    """Nothing is left to wait for when the run is over, nor when a signal gives it little time."""
    threads = []
    saves = SaveTrainingStateCallback(tmp_path, in_background=True)
    start = BackgroundWriter.start
    with (
        mock.patch.object(BackgroundWriter, "start", lambda *args: (threads.append(1), start(*args))),
        pytest.raises(SystemExit) if end == "signal" else nullcontext(),
    ):
        stop = Probe(on_train_step_end=lambda *_, **__: end == "signal" and signal.raise_signal(signal.SIGTERM))
        train_six_steps(make_trainer(callbacks=[saves, stop]))
    assert [state.path.name for state in list_states(tmp_path)] == ["step_1" if end == "signal" else "final"]
    assert threads == []


def test_one_state_is_written_at_a_time_and_the_run_waits_for_the_last(tmp_path):
    saves = SaveTrainingStateCallback(
        tmp_path, save_every_n_steps=1, save_at_end=False, in_background=True, max_checkpoints=2
    )
    threads = []
    watch = Probe(on_train_step_end=lambda trainer, **_: threads.append(num_writers()))
    train_six_steps(make_trainer(callbacks=[saves, watch]))
    assert max(threads) <= 1
    assert num_writers() == 0
    assert [state.path.name for state in list_states(tmp_path)] == ["step_5", "step_6"]


def num_writers():
    return sum(thread.name == "training state writer" for thread in threading.enumerate())


def test_states_written_in_the_background_resume_exactly(tmp_path):
    trainer = _runs.make_trainer(tmp_path, in_background=True)
    expected = _runs.train(trainer, gradient_accumulation_steps=4)
    for step in (3, 6, 10, 15, 18):
        other = _runs.make_trainer(tmp_path / "resumed", save_every_n_steps=None)
        resumed = _runs.train(other, gradient_accumulation_steps=4, resume_from=tmp_path / f"step_{step}")
        assert _runs.differences(expected, resumed) == []


def test_an_error_in_the_background_ends_the_run_at_the_next_save(tmp_path, monkeypatch):
    trainer = make_trainer(callbacks=[SaveTrainingStateCallback(tmp_path, save_every_n_steps=1, in_background=True)])
    fail_at(monkeypatch, "step_3")
    with pytest.raises(CheckpointError, match=r"step_3' could not be written: \[Errno 28\] no room"):
        train_six_steps(trainer)
    assert trainer.progress.num_updates == 4
    assert [state.path.name for state in list_states(tmp_path)] == ["step_1", "step_2"]


def test_an_error_of_the_last_write_is_raised_at_the_end_of_the_run(tmp_path, monkeypatch):
    def save(trainer, step, **_):
        if step == 5:
            trainer.save_training_state(tmp_path / "mine", in_background=True)

    fail_at(monkeypatch, "mine")
    trainer = make_trainer(callbacks=[Probe(on_train_step_end=save)])
    with pytest.raises(CheckpointError, match="no room"):
        train_six_steps(trainer)
    monkeypatch.undo()
    train_six_steps(trainer)  # the trainer stays usable


def test_an_error_in_the_background_can_be_a_warning(tmp_path, monkeypatch):
    saves = SaveTrainingStateCallback(tmp_path, save_every_n_steps=1, in_background=True, on_save_error="warn")
    fail_at(monkeypatch, "step_3")
    with pytest.warns(UserWarning, match="no room.*Training continues without this state") as warned:
        train_six_steps(make_trainer(callbacks=[saves]))
    assert len(warned) == 1
    assert [state.path.name for state in list_states(tmp_path)] == [*(f"step_{n}" for n in (1, 2, 4, 5, 6)), "final"]


def test_an_exception_of_the_run_wins_and_the_write_error_becomes_a_note(tmp_path, monkeypatch):
    def save(trainer, step, **_):
        if step == 2:
            trainer.save_training_state(tmp_path / "mine", in_background=True)

    fail_at(monkeypatch, "mine")
    fail = Probe(on_train_epoch_end=raiser(LookupError("of the run")))
    with pytest.raises(LookupError, match="of the run") as raised:
        train_six_steps(make_trainer(callbacks=[Probe(on_train_step_end=save), fail]))
    assert any("mine' could not be written" in note for note in raised.value.__notes__)


def fail_at(monkeypatch, name):
    """Let every write to a state of this name fail."""
    write_file = writer_module._write_file

    def write(path, contents):
        if f".{name}." in str(path):
            raise OSError(28, "no room")
        write_file(path, contents)

    monkeypatch.setattr(writer_module, "_write_file", write)


def test_and_then_is_called_when_the_state_is_complete(tmp_path):
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
def test_files_can_be_loaded_with_torch_alone(state, mmap):
    """They lack the checksums of PyTorch, which `torch.load` ignores."""
    with zipfile.ZipFile(state / "model.pt") as file:
        assert {entry.CRC for entry in file.infolist()} == {0}
    weights = torch.load(state / "model.pt", weights_only=True, mmap=mmap)
    assert list(weights) == ["weight", "bias"]
    optimizer = torch.load(state / "optimizer.pt", weights_only=True, mmap=mmap)
    assert set(optimizer) == {"state", "param_groups"}


@pytest.mark.parametrize("is_on", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_checksum_option_of_pytorch_is_restored(tmp_path, monkeypatch, is_on, fails):
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
    """Other programs may unpack them, and there is no manifest with other checksums."""
    make_trainer().save_checkpoint(tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt") as file:
        assert file.testzip() is None


def test_two_simultaneous_writes_restore_the_checksum_option(tmp_path, monkeypatch):
    """In older versions of PyTorch it is global: a thread must not restore what another thread has set."""
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
def test_a_file_that_cannot_be_fsynced_or_read_again_fails_the_save(state, monkeypatch, name, file):
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


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("file", ["model.pt", "optimizer.pt", "trainer_state.pt", "process_0.pt"])
def test_a_file_that_pytorch_truncated_fails_the_save(state, monkeypatch, file):
    """PyTorch 2.6 does not notice that the disk has no space for the last part of a file."""
    torch_save = torch.save

    def save(contents, path):
        torch_save(contents, path)
        if Path(path).name == file:
            truncate(Path(path))

    before = verify_state(state)
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(
        CheckpointError, match=rf"state' could not be written: the end of '{file}' is missing.*unchanged"
    ):
        make_trainer().save_training_state(state)
    assert verify_state(state) == before
    assert [path.name for path in state.parent.iterdir()] == ["state"]


@pytest.mark.parametrize("file", ["optimizer.bin", "random_states_0.pkl"])
def test_a_truncated_file_of_accelerate_fails_the_save(tmp_path, file):
    def save_shards(folder):
        torch.save({"a": torch.ones(3)}, folder / file)
        truncate(folder / file)

    contents = CollectedState(files={}, local_files={}, metadata={}, save_shards=save_shards)
    with pytest.raises(CheckpointError, match=rf"the end of '{file}' is missing"):
        writer_module.write_state(tmp_path / "state", contents, lineage=Lineage(), is_main=True, num_processes=1)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_accelerate_in_the_legacy_format_is_saved(tmp_path):
    def save_shards(folder):
        torch.save({"a": torch.ones(3)}, folder / "optimizer.bin", _use_new_zipfile_serialization=False)

    contents = CollectedState(files={}, local_files={}, metadata={}, save_shards=save_shards)
    writer_module.write_state(tmp_path / "state", contents, lineage=Lineage(), is_main=True, num_processes=1)
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["manifest.json", "optimizer.bin"]
