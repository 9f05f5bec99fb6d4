"""Names of metrics: under which they are recorded, and which would overwrite the record of another."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch

from pytorch_accelerated._measuring.comparison import one_number
from pytorch_accelerated._types import MetricValue

NAMES_OF_LOSS = ("loss", "loss_epoch")
"""After the stem of a pass: ``train_loss_epoch``, ``eval_loss_epoch``, ``evaluation_loss``."""

_MAX_ENTRIES = 1000  # of one result; more are not meant to be looked at one by one


class MetricNames:
    """The names that the metrics of one pass over the data may have.

    A metric is recorded under the stem of its pass and its name: ``train_`` and ``accuracy``. A stem may begin with
    another one: that of the dataset ``train`` is ``train_eval_``. Each record belongs to the longest stem, so a metric
    of training must not be called ``eval_accuracy`` then.

    Args:
        stem: That of the pass.
        stems: Those of all passes of the run.
        taken: Names that the pass records already.

    Example:
        >>> names = MetricNames("train_", ["train_", "train_eval_"])
        >>> names.check("accuracy")
        >>> names.check("eval_accuracy")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: ... would be recorded as 'train_eval_accuracy', ...
    """

    def __init__(self, stem: str = "", stems: Iterable[str] = (), taken: Collection[str] = ()) -> None:
        self.stem = stem
        self._taken = taken
        self._longer_stems = tuple(other for other in stems if other != stem and other.startswith(stem))

    def check(self, name: object, source: str = "A step returned") -> None:
        """Raise unless a metric may have this name.

        Args:
            name: The name, without the stem.
            source: Where it comes from, for the message.

        Raises:
            TypeError: It is no text.
            ValueError: The library, or another pass, records something else under this name.
        """
        if not isinstance(name, str):
            raise TypeError(
                f"{source} a metric with the name {name!r}, of type {type(name).__name__}. Expected a text."
            )
        problem = None
        if name in NAMES_OF_LOSS:
            problem = "under which the library records the loss"
        elif name in self._taken:
            problem = "which is also the name of a metric in `metrics` of the Trainer"
        elif self._longer_stems and (self.stem + name).startswith(self._longer_stems):
            problem = f"which would be recorded as {self.stem + name!r}, like a metric of another evaluation dataset"
        if problem is not None:
            raise ValueError(f"{source} a metric with the name {name!r}, {problem}. Give it another name.")


def stem_of(loss_name: str) -> str:
    """Return what is put in front of the names of the metrics of a pass, given the name of its loss.

    Example:
        >>> stem_of("train_loss_epoch")
        'train_'
    """
    return f"{loss_name.partition('_')[0]}_"


def stems_of_run(dataset_names: Iterable[str], is_training_run: bool) -> set[str]:
    """Return the stems of the passes of a run: what is put in front of the names of their metrics.

    Args:
        dataset_names: Those of the evaluation datasets; that of a single one is empty.
        is_training_run: Whether it is a call of `train`.

    Example:
        >>> sorted(stems_of_run(["test"], is_training_run=True))
        ['test_eval_', 'test_intermediate_eval_', 'train_']
    """
    fronts = [f"{name}_" if name else "" for name in dataset_names]
    if not is_training_run:
        return {f"{front}evaluation_" for front in fronts}
    return {"train_", *(f"{front}{kind}eval_" for front in fronts for kind in ("", "intermediate_"))}


def named_numbers(name: str, result: MetricValue) -> Iterator[tuple[str, float]]:
    """Yield the numbers in the result of a metric, each with a name. Reads from the device.

    Args:
        name: That of the metric; empty if the entries of the result have names of their own.
        result: A number, or a tensor, sequence or mapping of numbers. What is ``None`` is left out.

    Raises:
        TypeError: Something else is in it.
        ValueError: It has too many entries.

    Example:
        >>> dict(named_numbers("f1", torch.tensor([0.5, 1.0])))
        {'f1_0': 0.5, 'f1_1': 1.0}
    """
    if result is None:
        return
    if isinstance(result, torch.Tensor) and result.numel() > _MAX_ENTRIES:
        raise ValueError(
            f"The metric {name!r} has the shape {tuple(result.shape)}. Expected at most {_MAX_ENTRIES} numbers, each "
            "of which is recorded. Reduce it, or compute it in a callback."
        )
    number = one_number(result) if getattr(result, "ndim", 0) == 0 or len(result) == 1 else None
    if number is not None:
        yield name, float(number)
        return
    for key, item in _items_of(name, result):
        yield from named_numbers(f"{name}_{key}" if name else str(key), item)


def _items_of(name: str, result: MetricValue) -> Iterable[tuple[object, MetricValue]]:
    if isinstance(result, Mapping):
        return result.items()
    if isinstance(result, torch.Tensor) or hasattr(result, "tolist"):
        result = result.tolist()
    if isinstance(result, (tuple, list)):
        return enumerate(result)
    raise TypeError(
        f"The metric {name!r} is {result!r}, of type {type(result).__name__}. Expected a number, or a tensor or "
        "mapping of numbers."
    )
