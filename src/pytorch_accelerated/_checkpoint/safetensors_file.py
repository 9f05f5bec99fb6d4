"""Checkpoints in the format of safetensors: the weights of a model, for other programs, and a few plain entries."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from pytorch_accelerated._checkpoint.checksum import EMPTY_CHECKSUM, LENGTH_SIZE, seal
from pytorch_accelerated._checkpoint.files import as_plain, local_path, name_for_pytorch, write_atomically
from pytorch_accelerated._checkpoint.names import METADATA
from pytorch_accelerated._types import StateDict, StateMapping
from pytorch_accelerated.exceptions import CheckpointError

SUFFIX = ".safetensors"
_MODEL = "model_state_dict"
_ENTRIES, _VERSIONS = "pytorch_accelerated.entries", "pytorch_accelerated.versions"  # texts in the file's metadata


def is_safetensors_path(path: str | os.PathLike[str]) -> bool:
    """Tell whether a checkpoint of this name is written in the format of safetensors."""
    return Path(path).suffix.lower() == SUFFIX


def check_has_safetensors() -> None:
    """Raise unless the package is installed.

    Raises:
        ModuleNotFoundError: It is not.
    """
    try:
        import safetensors.torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Files in the format of safetensors need the package `safetensors`. Install it with `pip install "
            f"'pytorch-accelerated[safetensors]'`, or save with another suffix than {SUFFIX!r}, such as '.pt'.",
            name=error.name,
        ) from error


def save_safetensors(checkpoint: StateMapping, path: str | os.PathLike[str]) -> list[str]:
    """Write the model of a checkpoint to one file atomically, and those of its other entries that are JSON.

    Tensors that are the same are written once, and those that share memory as copies of each other. The file carries a
    checksum.

    Returns:
        The names of the entries that such a file cannot contain. They are left out.

    Raises:
        CheckpointError: The file cannot be written, or the state of the model contains more than tensors.
        ModuleNotFoundError: safetensors is not installed.
    """
    check_has_safetensors()
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors, tied = _separate(checkpoint[_MODEL], path)
    others = {name: _as_json(value) for name, value in checkpoint.items() if name != _MODEL}
    stored = {name: text for name, text in others.items() if text is not None}
    versions = _as_json(dict(getattr(checkpoint[_MODEL], METADATA, {})))
    metadata = {"format": "pt", "checksum": EMPTY_CHECKSUM, **tied, _ENTRIES: json.dumps(stored)}
    if versions:
        metadata[_VERSIONS] = versions

    def write(temporary: Path) -> None:
        mode = temporary.stat().st_mode
        try:
            save_file(tensors, temporary, metadata)
        except (SafetensorError, ValueError, KeyError) as error:  # a tensor is sparse, or of a type that is unknown
            raise RuntimeError(str(error)) from error
        temporary.chmod(mode)  # safetensors makes its files readable by their owner only
        _sort_metadata(temporary)
        seal(temporary)

    write_atomically(path, write)
    return [name for name, text in others.items() if text is None]


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a file in order. safetensors writes the same contents differently each time."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(LENGTH_SIZE), "little")
        header: dict[str, Any] = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
        if len(ordered) == size:
            file.seek(LENGTH_SIZE)
            file.write(ordered)


def _as_json(value: object) -> str | None:
    """Return a value as text, or ``None`` if JSON would not give it back as it is."""
    try:
        plain = as_plain(value)
        text = json.dumps(plain)
    except (CheckpointError, TypeError, ValueError):
        return None
    return text if repr(json.loads(text)) == repr(plain) else None


def load_safetensors(path: str | os.PathLike[str]) -> StateDict:
    """Read a file into host memory as a checkpoint: its tensors as ``model_state_dict``, next to the entries stored.

    Raises:
        CheckpointError: It is damaged.
        ModuleNotFoundError: safetensors is not installed.
    """
    check_has_safetensors()
    from safetensors import SafetensorError, safe_open

    path = local_path(path)
    try:
        with name_for_pytorch(path) as name, safe_open(name, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            names = list(file.keys())
            tensors: dict[str, Any] = {key: file.get_tensor(key).clone() for key in names}  # they are memory-mapped
        entries = {name: json.loads(text) for name, text in json.loads(metadata.get(_ENTRIES, "{}")).items()}
        versions = json.loads(metadata.get(_VERSIONS, "{}"))
    except (SafetensorError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"The checkpoint {str(path)!r} could not be read: {error}. The file is damaged. Use an undamaged copy."
        ) from error
    tied = {name: tensors[kept] for name, kept in metadata.items() if kept in tensors and name not in tensors}
    state = OrderedDict({**tensors, **tied})
    if versions:
        vars(state)[METADATA] = OrderedDict(versions)
    return {_MODEL: state, **entries}


def _separate(state: StateMapping, path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return tensors that share no memory, and for each that is left out as the same as another, the name of that."""
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    names: dict[object, str] = {}
    storages: set[int] = set()
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            kind = f"{value.layout} tensor" if isinstance(value, torch.Tensor) else type(value).__name__
            raise CheckpointError(
                f"The checkpoint {os.fspath(path)!r} could not be written: {name!r} of the model is a {kind}, and "
                f"files with the suffix {SUFFIX!r} contain dense tensors only. Choose another suffix, such as '.pt'."
            )
        tensor = value.detach()
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and place in names:
            tied[name] = names[place]
            continue
        names[place] = name
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone().contiguous() if storage in storages else tensor.contiguous()
        storages.add(storage)
    return tensors, tied
