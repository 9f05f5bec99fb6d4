"""Checkpoint files and training states: written whole or not at all, read without running code from them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pytorch_accelerated._distributed import is_sharded, registered
from pytorch_accelerated._rng import get_rng_state, set_rng_state
from pytorch_accelerated.exceptions import CheckpointError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.pt"
_COMPILED_PREFIX = "_orig_mod."
_STORABLE = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)


# --- files -------------------------------------------------------------------------------------------------------


def save_file(contents: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a dictionary to one file, which is whole or not there; an older file survives a failure.

    Parent folders are made. NumPy scalars and arrays are stored as numbers and tensors, so that the file can be read
    without running code from it.

    Raises:
        CheckpointError: The file cannot be written, or could not be read back safely.
    """
    path = Path(path)
    plain_contents = as_plain(contents)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save(plain_contents, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"The checkpoint {str(path)!r} could not be written: {error}. What was saved there before is untouched. "
            "Check that the folder is writable and the disk has room."
        ) from error


def load_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file that `save_file` wrote, or an older checkpoint, to host memory, without running code from it.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It is damaged, or holds objects other than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no checkpoint file {str(path)!r}. Expected the path of a file that `save_checkpoint` wrote."
        )
    try:
        with torch.serialization.safe_globals(_numpy_scalar_globals()):
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise CheckpointError(
            f"The checkpoint {str(path)!r} could not be read: {error}. It is damaged, or holds Python objects other "
            "than tensors, numbers, strings and containers of them, which are not loaded because that could run code."
        ) from error


def as_plain(value: Any, place: str = "") -> Any:
    """Return what can be stored and read back without running code, in nested containers too.

    NumPy scalars and arrays become numbers and tensors.

    Args:
        value: What to store.
        place: Where it stands, for the message.

    Raises:
        CheckpointError: Something in it is no tensor, number, string or container of them.
    """
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(value.copy())
    if type(value) in (dict, OrderedDict, Counter, defaultdict):
        plain = {key: as_plain(item, f"{place}[{key!r}]") for key, item in _with_plain_keys(value).items()}
        return type(value)(plain) if type(value) in (OrderedDict, Counter) else plain
    if type(value) in (tuple, list, set, torch.Size):
        return type(value)(as_plain(item, f"{place}[...]") for item in value)
    if value is None or isinstance(value, torch.Tensor) or type(value) in _STORABLE:
        return value
    raise CheckpointError(
        f"A {type(value).__name__} cannot be saved{' as ' + place if place else ''}: to read it back would mean to run "
        "code from the file. Save tensors, numbers, strings and containers of them, such as `vars(...)` or `str(...)`."
    )


def _with_plain_keys(mapping: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return a dictionary whose keys are no NumPy scalars."""
    return {key.item() if isinstance(key, np.generic) else key: item for key, item in mapping.items()}


def _numpy_scalar_globals() -> list[Any]:
    # Checkpoints of 0.1.61 may hold metric values that are NumPy scalars. They are harmless: a data type and bytes.
    dtypes = {type(np.dtype(name)) for name in ("float64", "float32", "float16", "int64", "int32", "bool")}
    build_scalar = np.float64(0.0).__reduce__()[0]
    return [build_scalar, np.dtype, *dtypes]


# --- checkpoints: one portable file ------------------------------------------------------------------------------


def build_checkpoint(
    model_state: Mapping[str, Any], optimizer: Any, scheduler: Any, extras: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Put a checkpoint together: one flat dictionary, the user's entries beside ours."""
    checkpoint: dict[str, Any] = {"model_state_dict": portable_state_dict(model_state)}
    for name, part in (("optimizer_state_dict", optimizer), ("scheduler_state_dict", scheduler)):
        if part is not None:
            checkpoint[name] = part.state_dict()
    return {**checkpoint, **(extras or {})}


def take_model_state(checkpoint: dict[str, Any], source: str) -> Mapping[str, Any]:
    """Take the model's state out of a checkpoint.

    Raises:
        CheckpointError: There is none in it.
    """
    if "model_state_dict" not in checkpoint:
        raise CheckpointError(
            f"{source} holds no `model_state_dict`, only {sorted(map(str, checkpoint))}. Expected a file that "
            "`save_checkpoint` wrote; a bare state dictionary is loaded with `model.load_state_dict`."
        )
    state: Mapping[str, Any] = checkpoint.pop("model_state_dict")
    return state


def portable_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's state under the names it has without `torch.compile`."""
    return {name.replace(_COMPILED_PREFIX, ""): value for name, value in state_dict.items()}


def load_model_state(model: nn.Module, state_dict: Mapping[str, Any], source: str) -> None:
    """Load a model's state, or refuse before anything has changed.

    Raises:
        CheckpointError: It is the state of another model; names the parameters that differ.
    """
    state_dict = portable_state_dict(state_dict)
    own_state = model.state_dict()
    check_same_model(portable_state_dict(own_state), state_dict, source)
    model.load_state_dict({name: state_dict[name.replace(_COMPILED_PREFIX, "")] for name in own_state})


def check_same_model(own: Mapping[str, Any], saved: Mapping[str, Any], source: str) -> None:
    """Raise unless both states have the same names and shapes.

    Raises:
        CheckpointError: They differ; lists what is missing, unexpected, or of another shape.
    """
    differences = {
        "missing in it": sorted(own.keys() - saved.keys()),
        "unexpected in it": sorted(saved.keys() - own.keys()),
        "of another shape": [
            f"{name} {_shape(saved[name])} instead of {_shape(own[name])}"
            for name in sorted(own.keys() & saved.keys())
            if _shape(own[name]) != _shape(saved[name])
        ],
    }
    described = [f"{kind}: {', '.join(names)}" for kind, names in differences.items() if names]
    if described:
        raise CheckpointError(
            f"{source} belongs to another model. Parameters {'; '.join(described)}. "
            "Nothing was loaded. Make the model with the settings it was saved with."
        )


def check_same_optimizer(optimizer: Any, state_dict: Mapping[str, Any], source: str) -> None:
    """Raise unless a saved optimizer has the same parameter groups.

    Raises:
        CheckpointError: It has others.
    """
    own = [len(group["params"]) for group in optimizer.param_groups]
    saved = [len(group["params"]) for group in state_dict["param_groups"]]
    if own != saved:
        raise CheckpointError(
            f"{source} belongs to another optimizer, with {saved} parameters in its groups instead of {own}. Nothing "
            "was loaded. Make the optimizer as it was, or pass `load_optimizer=False`."
        )


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if hasattr(value, "shape") else None


# --- states of the parts of a trainer ----------------------------------------------------------------------------


def states_of(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of each part that has one."""
    return {name: part.state_dict() for name, part in parts.items() if hasattr(part, "state_dict")}


def load_states(parts: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    """Restore what `states_of` returned, as far as the parts can take it."""
    for name, part in parts.items():
        if name in states and hasattr(part, "load_state_dict"):
            part.load_state_dict(states[name])


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients that a model has: part of its state while an accumulation window is open."""
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def load_gradients(model: nn.Module, gradients: Mapping[str, torch.Tensor]) -> None:
    """Restore what `gradients_of` returned."""
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].to(parameter.device) if name in gradients else None


# --- training states: a directory for exact resume ---------------------------------------------------------------


def save_state(
    directory: str | os.PathLike[str],
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    trainer_state: Mapping[str, Any],
    process_state: Mapping[str, Any],
) -> None:
    """Write a training state: all of it under ``directory``, or nothing. Must be called on every process.

    Everything goes into a temporary folder beside it, a manifest of all files last; then the folder gets its name.
    A state that was there before stays until the new one is complete.

    Args:
        directory: Where to.
        accelerator: The accelerator.
        model: The model, prepared or not.
        optimizer: The optimizer or ``None``.
        trainer_state: What is alike on all processes.
        process_state: What each process has for itself; the states of its random generators are added.

    Raises:
        CheckpointError: It could not be written.
    """
    target = Path(directory)
    temporary = target.with_name(f".{target.name}.tmp")
    trainer_state = as_plain(dict(trainer_state))
    process_state = as_plain({**process_state, "rng": get_rng_state()})
    try:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        with _saved_by_accelerate(accelerator, model, optimizer):
            accelerator.save_state(str(temporary))
        torch.save(process_state, temporary / _process_file(accelerator))
        if accelerator.is_main_process:
            torch.save(trainer_state, temporary / TRAINER_STATE)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _write_manifest(temporary, accelerator.num_processes)
            _replace_directory(temporary, target)
        accelerator.wait_for_everyone()
    except (OSError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"The training state {str(target)!r} could not be written: {error}. States saved before are untouched. "
            "Check that the folder is writable and the disk has room."
        ) from error


def load_state(
    directory: str | os.PathLike[str], accelerator: Accelerator, model: nn.Module, optimizer: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Restore model, optimizer, scaler and random generators. Must be called on every process.

    Returns:
        What was saved as ``trainer_state`` and as ``process_state``.

    Raises:
        FileNotFoundError: There is no such directory.
        CheckpointError: It is no complete training state, or that of another model; nothing has been changed.
    """
    source = Path(directory)
    verify_state(source)
    trainer_state = load_file(source / TRAINER_STATE)
    process_state = load_file(source / _process_file(accelerator))
    weights = source / "model.safetensors"
    if weights.is_file() and not is_sharded(accelerator):
        _check_weights(weights, accelerator.unwrap_model(model, keep_torch_compile=False))
    with _saved_by_accelerate(accelerator, model, optimizer):
        accelerator.load_state(str(source))
    set_rng_state(process_state.pop("rng"))
    return trainer_state, process_state


def verify_state(directory: Path) -> dict[str, Any]:
    """Check a training state against its manifest, and return the manifest.

    Raises:
        FileNotFoundError: There is no such directory.
        CheckpointError: A file is missing, damaged, or there is no manifest.
    """
    if not directory.is_dir():
        raise FileNotFoundError(
            f"There is no training state {str(directory)!r}. Expected a directory that `save_training_state` wrote."
        )
    try:
        manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text())
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{str(directory)!r} is no complete training state: it has no readable {MANIFEST}. Use an older one."
        ) from error
    for name, facts in files.items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != facts["size"] or _sha256(path) != facts["sha256"]:
            raise CheckpointError(f"The training state {str(directory)!r} is damaged: {name} is missing or altered.")
    return manifest


@contextmanager
def _saved_by_accelerate(accelerator: Accelerator, model: nn.Module, optimizer: Any) -> Iterator[None]:
    if not is_sharded(accelerator):
        model = accelerator.unwrap_model(model, keep_torch_compile=False)
    with registered(accelerator, model, optimizer):
        yield


def _check_weights(path: Path, model: nn.Module) -> None:
    from safetensors import safe_open  # a requirement of accelerate

    with safe_open(path, framework="pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    own = model.state_dict()
    pointers = {saved_name: own[saved_name].data_ptr() for saved_name in saved if saved_name in own}
    # Of tensors that share their memory only one is in the file.
    own = {name: value for name, value in own.items() if name in saved or value.data_ptr() not in pointers.values()}
    check_same_model(own, saved, f"The training state {str(path.parent)!r}")


def _process_file(accelerator: Accelerator) -> str:
    return f"process_{accelerator.process_index}.pt"


def _write_manifest(directory: Path, num_processes: int) -> None:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    files = {str(path.relative_to(directory)): {"size": path.stat().st_size, "sha256": _sha256(path)} for path in paths}
    manifest = {
        "format_version": FORMAT_VERSION,
        "versions": {name: _version(name) for name in ("pytorch-accelerated", "torch", "accelerate")},
        "num_processes": num_processes,
        "files": files,
    }
    path = directory / MANIFEST
    path.write_text(json.dumps(manifest, indent=1))
    for written in (*paths, path, directory):
        _flush_to_disk(written)


def _replace_directory(new: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
    _flush_to_disk(target.parent)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
