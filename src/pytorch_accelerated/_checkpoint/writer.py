"""Writing in the background: a copy of what is to be written, and the one thread that writes it."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from pytorch_accelerated._checkpoint.files import (
    begins_as_archive,
    check_is_complete,
    flush_to_disk,
    make_folder,
    repair_folder,
    replace_folder,
    temporary_path,
)
from pytorch_accelerated._checkpoint.folder import Lineage
from pytorch_accelerated._checkpoint.host_memory import HostMemory
from pytorch_accelerated._checkpoint.manifest import file_metadata, write_manifest
from pytorch_accelerated._data.workers import defer_worker_errors, is_worker_failure
from pytorch_accelerated._distributed.collectives import PROCESS_TIMEOUT, run_on_all
from pytorch_accelerated.exceptions import CheckpointError, add_note

if TYPE_CHECKING:
    from accelerate import Accelerator


_SECONDS_BETWEEN_LOOKS = 0.1


class BackgroundWriter:
    """Writes in a thread, one thing at a time; what goes wrong there is raised where somebody waits for it."""

    def __init__(self) -> None:
        self._is_under_way = False
        self._is_done = threading.Event()
        self._error: Exception | None = None

    def start(self, write: Callable[[], Any]) -> None:
        """Call a function in the background; nothing else may be under way."""
        with defer_worker_errors():
            self._is_done.clear()
            self._is_under_way = True
            threading.Thread(target=self._run, args=(write,), name="training state writer").start()

    @property
    def is_under_way(self) -> bool:
        """Whether something was started that nobody has waited for."""
        return self._is_under_way

    def wait(self) -> None:
        """Wait until nothing is under way.

        Raises:
            Exception: What went wrong since the last time.
        """
        # `Thread.join` would take a thread for ended when a handler of signals interrupts it.
        while self._is_under_way and not self._is_done.is_set():
            with defer_worker_errors():
                self._is_done.wait(_SECONDS_BETWEEN_LOOKS)
        self._is_under_way = False
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception as error:
            self._error = error
        finally:
            self._is_done.set()


_SUFFIXES_OF_TORCH_SAVE = (".pt", ".bin", ".pkl")


_checksum_option = threading.Lock()


@dataclass(frozen=True)
class CollectedState:
    """What is to be saved, and nothing of it on the disk yet.

    Args:
        files: What the main process writes, by the name of the file.
        own_files: What this process writes.
        facts: What the manifest tells about it.
        save_shards: Writes what the processes hold in shards, and what belongs to it, into a directory.
    """

    files: Mapping[str, Any]
    own_files: Mapping[str, Any]
    facts: Mapping[str, Any]
    save_shards: Callable[[Path], None] | None = field(default=None, repr=False)

    def copied_to(self, memory: HostMemory) -> CollectedState:
        """Return the same from tensors of its own, which training does not change."""
        files, own_files = memory.copy_of((dict(self.files), dict(self.own_files)))
        return replace(self, files=files, own_files=own_files)


class StateWriter:
    """Writes the training states of a trainer, at once or in the background, where one at a time is under way."""

    def __init__(self) -> None:
        self._background = BackgroundWriter()
        self._memory = HostMemory()
        self._group: Any = None

    def write(
        self,
        target: str | os.PathLike[str],
        state: CollectedState,
        lineage: Lineage,
        accelerator: Accelerator,
        in_background: bool,
        and_then: Callable[[], Any] | None,
    ) -> None:
        """Write a state; in the background what can be copied. Must be called on every process.

        Args:
            target: The directory.
            state: What was collected.
            lineage: Numbers the states of the run.
            accelerator: The accelerator.
            in_background: Whether to go on meanwhile.
            and_then: What the main process does when the state is complete.

        Raises:
            CheckpointError: It, or the one before, could not be written, on this process or another.
        """
        self.wait()
        is_main, num_processes = accelerator.is_main_process, int(accelerator.num_processes)
        task = partial(write_state, Path(target), lineage=lineage, is_main=is_main, num_processes=num_processes)
        if in_background and state.save_shards is None:
            copied = run_on_all(lambda: state.copied_to(self._memory), num_processes)
            self._background.start(partial(task, copied, and_then=and_then, group=self._own_group(num_processes)))
        else:
            task(state, and_then=and_then)

    def wait(self) -> None:
        """Wait until the state under way is complete.

        Raises:
            CheckpointError: It could not be written, on this process or another.
        """
        self._background.wait()

    def finish(self, error: BaseException) -> None:
        """Wait for the state under way when a run has failed; what goes wrong becomes a note on the error."""
        while True:
            try:
                self.wait()
            except Exception as failure:  # such as the loss of another process
                add_note(error, str(failure))
            if not self._background.is_under_way:  # a signal may interrupt the waiting
                return

    def release(self) -> None:
        """Let go of what is only needed while a run lasts; nothing may be under way."""
        self._memory = HostMemory()
        if self._group is not None:
            distributed.destroy_process_group(self._group)
            self._group = None

    def _own_group(self, num_processes: int) -> Any:
        # The run goes on meanwhile and uses the default group, whose exchanges have to come in the same order.
        if num_processes > 1 and self._group is None:
            self._group = distributed.new_group(backend="gloo", timeout=PROCESS_TIMEOUT)
        return self._group


def write_state(
    target: Path,
    state: CollectedState,
    *,
    lineage: Lineage,
    is_main: bool,
    num_processes: int,
    and_then: Callable[[], Any] | None = None,
    group: Any = None,
) -> None:
    """Write what was collected. Must be called on every process.

    Everything goes into a temporary folder beside the target, a manifest of all files last; then the folder gets its
    name. No process goes on to the next of these steps before all have finished the one before.

    Args:
        target: The directory.
        state: What was collected.
        lineage: Numbers the states of the run.
        is_main: Whether this is the main process.
        num_processes: How many write the state together.
        and_then: What the main process does when the state is complete.
        group: How the processes tell each other; ``None`` for the default group.

    Raises:
        CheckpointError: It could not be written, on this process or another.
    """
    temporary = temporary_path(target)
    sealed: dict[str, Any] = {}

    def begin() -> None:
        if is_main:
            make_folder(target.parent)
            repair_folder(target)
            temporary.mkdir()

    def write() -> None:
        if state.save_shards is not None:
            state.save_shards(temporary)
        files = {**state.own_files, **state.files} if is_main else state.own_files
        sealed.update(_write_files(temporary, files))

    def commit() -> None:
        if is_main:
            _check_files_of_others(temporary, sealed)
            generation, number = lineage.take_number(target.parent)
            write_manifest(temporary, {**state.facts, "generation": generation, "number": number}, sealed)
            replace_folder(target)
            if and_then is not None:
                and_then()

    try:
        for step in (begin, write, commit):
            run_on_all(_explaining(step, target), num_processes, group)
    except BaseException:
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _check_files_of_others(directory: Path, own_files: Iterable[str]) -> None:
    """Raise if the end of a file is missing that Accelerate, or what it calls, wrote by `torch.save`.

    Files in the format from before PyTorch 1.6 do not show it.
    """
    for path in directory.rglob("*"):
        if path.suffix in _SUFFIXES_OF_TORCH_SAVE and path.name not in own_files and begins_as_archive(path):
            check_is_complete(path)


def _write_files(directory: Path, files: Mapping[str, Any]) -> dict[str, Any]:
    """Write files, flush them to the disk, and return size and checksum of each.

    While one is written, those before are flushed, and read again for their checksums.
    """
    flushed: list[Future[None]] = []
    sealed: dict[str, Future[dict[str, Any]]] = {}
    others = ThreadPoolExecutor(max_workers=2)
    try:
        for name, contents in files.items():
            _write_file(directory / name, contents)
            with defer_worker_errors():
                flushed.append(others.submit(flush_to_disk, directory / name))
                sealed[name] = others.submit(file_metadata, directory / name)
    finally:
        with defer_worker_errors():
            others.shutdown()
    with defer_worker_errors():
        for flush in flushed:
            flush.result()
        return {name: facts.result() for name, facts in sealed.items()}


def _write_file(path: Path, contents: Any) -> None:
    try:
        with _without_checksums_of_pytorch():
            torch.save(contents, str(path))  # given a file object, it would hold up the other threads
        check_is_complete(path)
    except RuntimeError:
        # PyTorch does not say why the system refused; Python does.
        with path.open("ab", buffering=0) as file:
            file.write(bytes(2**16))
            os.fsync(file.fileno())
        raise


@contextmanager
def _without_checksums_of_pytorch() -> Iterator[None]:
    # They take as long as the writing, and `torch.load` does not look at them; the manifest has those that count.
    with _checksum_option:  # which older versions of PyTorch have once for all threads
        is_on = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            yield
        finally:
            torch.serialization.set_crc32_options(is_on)


def _explaining(step: Callable[[], None], target: Path) -> Callable[[], None]:
    from safetensors import SafetensorError  # a requirement of accelerate

    def explained() -> None:
        try:
            step()
        except CheckpointError:
            raise
        except (OSError, RuntimeError, SafetensorError) as error:
            if is_worker_failure(error):
                raise
            raise CheckpointError(
                f"The training state {str(target)!r} could not be written: {error}. States saved before are untouched. "
                "Check that the folder is writable, on every machine, and that the disk has room."
            ) from error

    return explained
