"""Checks of what is given as data: no dataset, an empty one, several at once, arguments that nothing uses."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pytorch_accelerated._data.loaders import is_dataset, is_map_style, is_shardable, num_batches_of
from pytorch_accelerated._hints.meaning import nearest
from pytorch_accelerated._messages import warn

_DEFAULT_BATCH_SIZE = 8
"""That of `train`, `evaluate` and `predict`."""

_EXPECTED = "Expected a dataset with one item per sample."

_MAX_PARTS = 4
"""Inputs and targets come in a few tensors. More of them are taken for samples."""


def check_is_dataset(name: str, data: object, collate_fn: object = None) -> None:
    """Raise if data would be taken for samples, but evidently consists of whole columns or of whole datasets.

    Args:
        name: The name of the argument.
        data: The data.
        collate_fn: The user's function that makes batches, which may take samples of any kind.

    Raises:
        TypeError: It is a class, a path, some tensors or arrays with the same number of rows, a table, or a sequence or
            mapping of datasets; or ``collate_fn`` cannot be called.
    """
    if collate_fn is not None:
        if not callable(collate_fn):
            raise TypeError(
                f"`collate_fn` is {collate_fn!r}, of type {type(collate_fn).__name__}. Expected a function that "
                "makes a batch from a list of samples. Pass one, or leave it out."
            )
        return
    problem = _describe_kind(data) or _describe_columns(data) or _describe_datasets(name, data)
    if problem is not None:
        raise TypeError(f"`{name}` is {problem}")


def _describe_kind(data: object) -> str | None:
    if inspect.isclass(data):
        return f"the class `{data.__name__}`. Expected an instance. Pass `{data.__name__}(...)`."
    if isinstance(data, (str, bytes, os.PathLike)):
        return (
            f"{data!r}, of type {type(data).__name__}. Expected a dataset. Pass one that reads the samples from there."
        )
    if hasattr(data, "iloc") and hasattr(data, "columns"):
        return f"a {type(data).__name__}. {_EXPECTED} Pass `TensorDataset(X, y)`, with tensors of its columns."
    return None


def _describe_columns(data: Any) -> str | None:
    is_mapping = type(data) is dict and all(isinstance(key, str) for key in data)
    if not (is_mapping or type(data) in (tuple, list)) or not 1 < len(data) <= _MAX_PARTS:
        return None
    columns = list(data.values()) if is_mapping else list(data)
    if not all(isinstance(column, (torch.Tensor, np.ndarray)) and column.ndim for column in columns):
        return None
    num_rows = {len(column) for column in columns}
    is_alike = len({(tuple(column.shape), column.dtype) for column in columns}) == 1
    if len(num_rows) > 1 or (is_alike and not isinstance(data, tuple)):  # samples in a list, or datasets by name
        return None
    kind = "tensors" if isinstance(columns[0], torch.Tensor) else "arrays"
    names = [str(key) for key in data] if is_mapping else ["X", "y"] if len(columns) == 2 else None
    given = ", ".join(names if names is not None else [f"x{number}" for number in range(1, len(columns) + 1)])
    convert = "" if kind == "tensors" else ", with `torch.as_tensor` of each array"
    return (
        f"a {type(data).__name__} of {len(columns)} {kind} with {num_rows.pop()} rows each. {_EXPECTED} "
        f"Pass `TensorDataset({given})`{convert}."
    )


def _describe_datasets(name: str, data: object) -> str | None:
    if not isinstance(data, (Sequence, Mapping)) or isinstance(data, (Dataset, DataLoader)) or not data:
        return None
    parts = list(data.values()) if isinstance(data, Mapping) else list(data)
    if not all(isinstance(part, (Dataset, DataLoader)) for part in parts):
        return None
    kind = f"a {type(data).__name__} of {len(parts)} datasets"
    if name == "train_dataset":
        return f"{kind}. Expected one. Pass `ConcatDataset([...])` of them, or the one that you mean."
    if isinstance(data, Mapping):
        return None
    return f"{kind}. Expected one, or a dictionary with a name for each. Pass `{{'first': ..., 'second': ...}}`."


def check_loader_arguments(name: str, given: object, loader_class: Callable[..., Any]) -> None:
    """Raise unless keyword arguments for a loader are those of its class.

    Args:
        name: The name of the argument of `train`, `evaluate` or `predict`.
        given: What the user passed.
        loader_class: The class that will be called with them.

    Raises:
        TypeError: They are not a mapping, contain the dataset, or a name that the loader does not have.
    """
    if given is None:
        return
    if not isinstance(given, Mapping):
        raise TypeError(
            f"`{name}` is of type {type(given).__name__}. Expected a dictionary of arguments for the `DataLoader`. "
            "Pass `{'num_workers': 2}`, for example."
        )
    parameters = inspect.signature(loader_class).parameters
    if "dataset" in given:
        raise TypeError(f"`{name}` contains `dataset`. Expected the other arguments of the `DataLoader`. Leave it out.")
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    unknown = [key for key in given if key not in parameters]
    if unknown:
        similar = nearest(str(unknown[0]), parameters, cutoff=0.7)
        remedy = f"Did you mean {similar!r}?" if similar else "Leave it out, or override `create_train_dataloader`."
        raise TypeError(f"`{name}` contains {unknown[0]!r}, which is not an argument of the `DataLoader`. {remedy}")


def check_data_not_empty(name: str, data: object) -> None:
    """Raise if a dataset is missing or known to be empty.

    Raises:
        ValueError: It is empty, or missing.
        TypeError: It is neither a dataset nor an iterable.
    """
    if data is None:
        raise ValueError(f"`{name}` is None. Expected a dataset, or an iterable of batches. Pass one.")
    if not hasattr(data, "__getitem__") and not hasattr(data, "__iter__"):
        raise TypeError(f"`{name}` is of type {type(data).__name__}. Expected a dataset, or an iterable of batches.")
    if isinstance(data, (Dataset, Sequence, DataLoader)) and num_batches_of(data) == 0:
        raise ValueError(
            f"`{name}` is empty: its length is 0. Expected at least one sample. Check how it was built or filtered."
        )


@contextmanager
def explain_bad_data(name: str, data: object) -> Iterator[None]:
    """If the body fails to create a loader because its dataset is missing or empty, raise an error that says so.

    The dataset is not checked before: a subclass may create its loader from anything.

    Raises:
        ValueError: The dataset is empty, or missing.
        TypeError: It is neither a dataset nor an iterable.
    """
    try:
        yield
    except (TypeError, ValueError):
        check_data_not_empty(name, data)
        raise


def check_reiterable(
    train_dataset: object, eval_dataset: object, num_epochs: int, max_num_train_steps: int | None
) -> None:
    """Raise if data that can be iterated over only once is needed in several epochs.

    Raises:
        ValueError: It is an iterator, such as a generator, and only the number of epochs limits the run.
    """
    for name, each in {"train_dataset": train_dataset, "eval_dataset": eval_dataset}.items():
        is_iterator = hasattr(each, "__next__") and not is_dataset(each)
        if is_iterator and num_epochs > 1 and max_num_train_steps is None:
            raise ValueError(
                f"`{name}` is an iterator ({type(each).__name__}), exhausted after the first of {num_epochs} epochs. "
                "Pass an object of a class whose `__iter__` starts over, `def __iter__(self): return make_batches()`, "
                "or use `num_epochs=1`."
            )


def check_data_of_loader(name: str, loader: object) -> None:
    """Raise if a `DataLoader` was created from a dataset that is missing or known to be empty.

    Raises:
        ValueError: It is empty, or missing.
        TypeError: It is no dataset.
    """
    if is_map_style(loader):
        check_data_not_empty(name, getattr(loader, "dataset", None))


def check_loader_not_empty(name: str, loader: object) -> None:
    """Raise if the loader of a real dataset yields no batch.

    Raises:
        ValueError: An epoch would have no batch.
    """
    dataset = getattr(loader, "dataset", None)
    if not isinstance(dataset, (Dataset, Sequence)) or num_batches_of(loader) != 0:
        return
    raise ValueError(
        f"The loader of `{name}` yields no batch: {num_batches_of(dataset)} samples do not fill one batch of "
        f"{getattr(loader, 'batch_size', None)}, and `drop_last` is set. Use a smaller `per_device_batch_size`, or "
        "`drop_last=False`."
    )


def warn_about_ready_batches(name: str, loader: object) -> None:
    """Warn if the samples in a list look like batches, which a loader would batch once more."""
    data: Any = getattr(loader, "dataset", None)
    if not is_shardable(loader) or not isinstance(data, (list, tuple)) or not data:
        return
    if not isinstance(data[0], (list, tuple, dict)):
        return
    first = data[0].values() if isinstance(data[0], dict) else data[0]
    tensors = [item for item in first if isinstance(item, torch.Tensor)]
    sizes = {tensor.shape[0] if tensor.ndim > 0 else 0 for tensor in tensors}
    if len(tensors) > 1 and len(tensors) == len(first) and len(sizes) == 1 and max(sizes) > 1:
        warn(
            f"The items of `{name}`, a {type(data).__name__}, look like ready batches of {max(sizes)} samples. Items "
            "of a list are taken for samples, so they are batched once more. For ready batches, pass an object that "
            "has only `__iter__`, or `batch_size=None` in the arguments of its loader. If they are samples, pass them "
            "as a `Dataset`, and this warning ends.",
        )


def warn_about_ready_loaders(
    train_data: object, eval_data: object, batch_size: int, collate_fn: object, dl_kwargs: Mapping[str, object]
) -> None:
    """Warn about arguments that nothing uses because the user has made the loaders.

    Args:
        train_data: What `train` was given to train on; ``None`` in `evaluate` and `predict`.
        eval_data: What is evaluated; ``None`` for nothing.
        batch_size: The ``per_device_batch_size``. It counts as not given if it is the default, or that of the loader.
        collate_fn: The function that makes batches; ``None`` if it was not given.
        dl_kwargs: The arguments for the loaders, by the names under which they were given.
    """
    eval_sets = list(eval_data.values()) if isinstance(eval_data, dict) else [] if eval_data is None else [eval_data]
    train_sets = [] if train_data is None else [train_data]
    sets = [*train_sets, *eval_sets]
    sizes = {getattr(each, "batch_size", None) for each in sets}
    is_default = batch_size == _DEFAULT_BATCH_SIZE or not sizes.isdisjoint({batch_size, None})
    _warn_if_ignored("per_device_batch_size", None if is_default else batch_size, sets)
    _warn_if_ignored("collate_fn", collate_fn, sets)
    for name, given in dl_kwargs.items():
        _warn_if_ignored(name, given, train_sets if name == "train_dataloader_kwargs" else eval_sets)


def _warn_if_ignored(name: str, given: object, data: Collection[object]) -> None:
    if given is None or not data or not all(isinstance(each, DataLoader) for each in data):
        return
    warn(
        f"`{name}` has no effect, because the data are a ready `DataLoader`, which makes the batches. Pass the dataset "
        f"in place of the loader, or leave `{name}` out."
    )
