"""Writing training states: to a temporary folder first, and in a background thread if that is requested."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import distributed

from pytorch_accelerated._checkpoint.files import (
    check_zip_is_complete,
    create_folder,
    flush_to_disk,
    local_path,
    name_for_pytorch,
    remove,
    repair_folder,
    replace_folder,
    starts_like_zip,
    temporary_path,
)
from pytorch_accelerated._checkpoint.folder import Lineage
from pytorch_accelerated._checkpoint.host_memory import HostMemory
from pytorch_accelerated._checkpoint.lock import keep_locked
from pytorch_accelerated._checkpoint.manifest import FileMetadata, file_metadata, name_state, write_manifest
from pytorch_accelerated._data.workers import defer_worker_errors, is_worker_failure
from pytorch_accelerated._distributed.collectives import run_on_all
from pytorch_accelerated._distributed.waiting import explain_vain_wait, new_host_group
from pytorch_accelerated._types import StateDict
from pytorch_accelerated.exceptions import CheckpointError, add_note

_POLL_SECONDS = 0.1
_SUFFIXES_OF_TORCH_SAVE = (".pt", ".bin", ".pkl")
_checksum_option_lock = threading.Lock()


@dataclass(frozen=True)
class CollectedState:
    """The contents of a training state that is not on disk yet.

    Args:
        files: The contents of the files that the main process writes, by file name.
        local_files: The contents of the files that this process writes.
        metadata: The entries of the manifest that are known by now.
        save_shards: Writes sharded objects to a directory; ``None`` if nothing is sharded.
    """

    files: Mapping[str, StateDict]
    local_files: Mapping[str, StateDict]
    metadata: Mapping[str, object]
    save_shards: Callable[[Path], None] | None = field(default=None, repr=False)

    def copied_to(self, memory: HostMemory) -> CollectedState:
        """Return a copy whose tensors do not change while training continues."""
        files, local_files = memory.copy((dict(self.files), dict(self.local_files)))
        return replace(self, files=files, local_files=local_files)


# --- in the background -------------------------------------------------------------------------------------------


class BackgroundWriter:
    """Runs one write at a time in a thread. An error there is raised by `wait`."""

    def __init__(self) -> None:
        self._is_active = False
        self._is_done = threading.Event()
        self._error: Exception | None = None

    def start(self, write: Callable[[], object]) -> None:
        """Call a function in the background. The previous call must have been waited for."""
        with defer_worker_errors():
            self._is_done.clear()
            self._is_active = True
            threading.Thread(target=self._run, args=(write,), name="training state writer").start()

    @property
    def is_active(self) -> bool:
        """Whether a write was started and has not been waited for."""
        return self._is_active

    def wait(self) -> None:
        """Wait until the current write has ended.

        Raises:
            Exception: The error of a write since the last call.
        """
        # `Thread.join` would consider the thread ended if a signal handler interrupted it.
        while self._is_active and not self._is_done.is_set():
            with defer_worker_errors():
                self._is_done.wait(_POLL_SECONDS)
        self._is_active = False
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, write: Callable[[], object]) -> None:
        try:
            write()
        except Exception as error:
            explain_vain_wait(error)
            self._error = error
        finally:
            self._is_done.set()


class StateWriter:
    """Writes the training states of a trainer, immediately or in the background, one at a time."""

    def __init__(self) -> None:
        self._background = BackgroundWriter()
        self._memory = HostMemory()
        self._group: distributed.ProcessGroup | None = None

    def __reduce__(self) -> tuple[type[StateWriter], tuple[()]]:
        """Let a copy of the trainer start with a writer of its own; what is being written belongs to the original."""
        return type(self), ()

    def write(
        self,
        target: str | os.PathLike[str],
        state: CollectedState,
        lineage: Lineage,
        *,
        is_main: bool,
        num_processes: int,
        in_background: bool,
        on_complete: Callable[[], object] | None,
    ) -> None:
        """Write a state. Must be called on every process.

        Args:
            target: The directory.
            state: What was collected.
            lineage: Numbers the states of the run.
            is_main: Whether this is the main process.
            num_processes: The world size.
            in_background: Whether to return as soon as the state has been copied, unless it is sharded.
            on_complete: Called on the main process when the state is complete.

        Raises:
            CheckpointError: This state, or the previous one, could not be written, on this process or another.
        """
        self.wait()
        task = partial(
            write_state,
            local_path(target),
            lineage=lineage,
            is_main=is_main,
            num_processes=num_processes,
            on_complete=on_complete,
        )
        if in_background and state.save_shards is None:
            copied = run_on_all(lambda: state.copied_to(self._memory), num_processes)
            self._background.start(partial(task, copied, group=self._separate_group(num_processes)))
        else:
            task(state)

    def wait(self) -> None:
        """Wait until the state that is being written is complete.

        Raises:
            CheckpointError: It could not be written, on this process or another.
        """
        self._background.wait()

    def finish(self, error: BaseException) -> None:
        """Wait for the state that is being written when a run has failed. Another error becomes a note on this one."""
        while True:
            try:
                self.wait()
            except Exception as failure:  # such as the loss of another process
                add_note(error, str(failure))
            if not self._background.is_active:  # a signal may have interrupted the wait
                return

    def release(self) -> None:
        """Free what is only needed during a run. No write may be active."""
        self._memory = HostMemory()
        if self._group is not None:
            distributed.destroy_process_group(self._group)
            self._group = None

    def _separate_group(self, num_processes: int) -> distributed.ProcessGroup | None:
        # The run continues meanwhile in the default group, whose collectives must be called in the same order on all
        # processes.
        if num_processes > 1 and self._group is None:
            self._group = new_host_group()
        return self._group


# --- one state ---------------------------------------------------------------------------------------------------


def write_state(
    target: Path,
    state: CollectedState,
    *,
    lineage: Lineage,
    is_main: bool,
    num_processes: int,
    on_complete: Callable[[], object] | None = None,
    group: distributed.ProcessGroup | None = None,
) -> None:
    """Write a state. Must be called on every process.

    All files are written to a temporary folder next to the target, the manifest last. Then the folder is renamed to its
    final name. No process starts one of these steps before all have finished the previous one.

    Args:
        target: The directory.
        state: What was collected.
        lineage: Numbers the states of the run.
        is_main: Whether this is the main process.
        num_processes: The world size.
        on_complete: Called on the main process when the state is complete.
        group: The process group in which the processes report errors; ``None`` for the default group.

    Raises:
        CheckpointError: The state could not be written, on this process or another.
    """
    temporary = temporary_path(target)
    checksums: dict[str, FileMetadata] = {}

    def begin() -> None:
        if is_main:
            create_folder(target.parent)
            keep_locked(target.parent)
            repair_folder(target)
            temporary.mkdir()

    def write() -> None:
        if state.save_shards is not None:
            state.save_shards(temporary)
        files = {**state.local_files, **state.files} if is_main else state.local_files
        checksums.update(_write_files(temporary, files))

    def commit() -> None:
        if is_main:
            _check_files_of_others(temporary, checksums)
            generation, number = lineage.take_number(target.parent)
            write_manifest(temporary, {**state.metadata, "generation": generation, "number": number}, checksums)
            replace_folder(target)
            if on_complete is not None:
                on_complete()

    try:
        for step in (begin, write, commit):
            run_on_all(_with_explained_errors(step, target), num_processes, group)
    except BaseException:
        if is_main:
            remove(temporary, ignore_errors=True)
        raise


def _check_files_of_others(directory: Path, checked: Iterable[str]) -> None:
    """Raise if the end of a file is missing that Accelerate, or what it calls, wrote with `torch.save`.

    The file format from before PyTorch 1.6 cannot be checked.
    """
    for path in directory.rglob("*"):
        if path.suffix in _SUFFIXES_OF_TORCH_SAVE and path.name not in checked and starts_like_zip(path):
            check_zip_is_complete(path)


def _write_files(directory: Path, files: Mapping[str, StateDict]) -> dict[str, FileMetadata]:
    """Write files, flush them to disk, and return size and checksum of each.

    While one file is written, threads flush the previous ones and read them again for their checksums.
    """
    flushes: list[Future[None]] = []
    checksums: dict[str, Future[FileMetadata]] = {}
    threads = ThreadPoolExecutor(max_workers=2)
    try:
        for name, contents in files.items():
            _write_file(directory / name, contents)
            with defer_worker_errors():
                flushes.append(threads.submit(flush_to_disk, directory / name))
                checksums[name] = threads.submit(file_metadata, directory / name)
    finally:
        with defer_worker_errors():
            threads.shutdown()
    with defer_worker_errors():
        for flush in flushes:
            flush.result()
        return {name: checksum.result() for name, checksum in checksums.items()}


def _write_file(path: Path, contents: StateDict) -> None:
    try:
        with _without_checksums_of_pytorch(), name_for_pytorch(path, os.O_RDWR | os.O_CREAT) as name:
            torch.save(contents, name)  # with a file object, it would block the other threads
        check_zip_is_complete(path)
    except RuntimeError:
        # PyTorch does not say why the operating system refused to write. Python does.
        with path.open("ab", buffering=0) as file:
            file.write(bytes(2**16))
            os.fsync(file.fileno())
        raise


@contextmanager
def _without_checksums_of_pytorch() -> Iterator[None]:
    # They take as long as the writing itself, and `torch.load` ignores them. The manifest has the ones that count.
    with _checksum_option_lock:  # in older versions of PyTorch, the option is global to all threads
        is_on = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            yield
        finally:
            torch.serialization.set_crc32_options(is_on)


def _with_explained_errors(step: Callable[[], None], target: Path) -> Callable[[], None]:
    from safetensors import SafetensorError  # a dependency of accelerate

    def explained() -> None:
        try:
            step()
        except CheckpointError:
            raise
        except (OSError, RuntimeError, SafetensorError) as error:
            if is_worker_failure(error):
                raise
            raise CheckpointError(
                f"{name_state(target)} could not be written: {error}. Earlier states are unchanged. Check that the "
                "folder is writable on every node and that the disk has free space."
            ) from error

    return explained
