"""Whole batches, indexed from tensors in memory instead of collated from samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, Dataset, RandomSampler, SequentialSampler, Subset, TensorDataset

from pytorch_accelerated._proxy import Proxy

_BATCHES_PER_PART = 1024
_BATCHES_PER_SELECTION = 16  # they are read this far ahead of training
_MAX_BYTES_PER_SELECTION = 2**19  # all of it stays in memory as long as one of its batches
_ALIGNMENT = 64  # bytes, as new tensors in host memory have it


def sliceable_tensors(dataset: Any) -> tuple[torch.Tensor, ...] | None:
    """Return the tensors of a plain in-memory `TensorDataset`, or of a `Subset` of one; ``None`` for anything else.

    A dataset is plain if a batch taken with one indexing operation is identical to one collated from single samples.
    """
    while type(dataset) is Subset:
        dataset = dataset.dataset
    if type(dataset) is not TensorDataset:
        return None
    is_plain = all(
        type(tensor) is torch.Tensor and tensor.layout is torch.strided and not tensor.requires_grad
        for tensor in dataset.tensors
    )
    return dataset.tensors if is_plain else None


def has_row_numbers(dataset: Any) -> bool:
    """Tell whether a `Subset`, at any depth, has whole numbers as indices. PyTorch takes some others too."""
    while type(dataset) is Subset:
        if not _are_row_numbers(dataset.indices):
            return False
        dataset = dataset.dataset
    return True


def _are_row_numbers(indices: Any) -> bool:
    if isinstance(indices, (torch.Tensor, np.ndarray)):
        kind = torch.as_tensor(indices[:0]).dtype if indices.ndim == 1 and indices.dtype != object else torch.bool
        return kind != torch.bool and not kind.is_floating_point and not kind.is_complex
    return all(issubclass(kind, (int, np.integer)) and kind is not bool for kind in set(map(type, indices)))


class WholeBatchDataset(Proxy, Dataset[list[torch.Tensor]], wraps="dataset"):
    """A view of an in-memory dataset that gives a `DataLoader` whole batches instead of single samples.

    Use it with `unchanged` as ``collate_fn``. The batches and their order are those of the plain dataset.

    Args:
        dataset: A dataset for which `sliceable_tensors` returns tensors. Other attributes are passed through.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors that the samples are rows of. The program may replace them between epochs."""
        return sliceable_tensors(self.dataset) or ()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: Sequence[int]) -> list[torch.Tensor]:
        """Return the batch of the samples at ``indices``, as default collation would."""
        dataset: Any = self.dataset
        while isinstance(dataset, Subset):
            indices = [int(dataset.indices[index]) for index in indices]
            dataset = dataset.dataset
        rows = torch.as_tensor(indices).long()
        return [tensor[rows] for tensor in self.tensors]

    def batches(self, order: torch.Tensor, batch_size: int) -> Iterator[list[torch.Tensor]]:
        """Yield samples in batches. The last batch has the remaining samples.

        Args:
            order: The indices of the samples, shape ``(samples,)``.
            batch_size: Samples in a batch.
        """
        dataset: Any = self.dataset
        while isinstance(dataset, Subset):
            order = torch.as_tensor(dataset.indices).long()[order]  # small integers would count as a mask
            dataset = dataset.dataset
        tensors = self.tensors
        order = order.to(tensors[0].device)
        selection_size = batch_size * _num_batches_per_selection(tensors, batch_size)
        # Part by part, so that the first of millions of batches does not wait until all are split.
        for part in torch.split(order, _BATCHES_PER_PART * batch_size) if len(order) else ():
            part_rows = part.where(part >= 0, part + len(dataset))
            for rows in torch.split(part_rows, selection_size):
                selected = [tensor.index_select(0, rows) for tensor in tensors]
                if len(rows) <= batch_size:
                    yield selected
                else:  # batches from `split` would be views, and writing to one would count as writing to the others
                    yield from map(list, zip(*(rows.unsafe_split(batch_size) for rows in selected), strict=True))


def _num_batches_per_selection(tensors: Sequence[torch.Tensor], batch_size: int) -> int:
    """Return how many batches to select with one operation, which takes less time than one after the other.

    If a batch would then begin at an address that no new tensor has, it is 1: kernels choose their instructions by the
    alignment of their inputs, and results might differ in the last bit.
    """
    bytes_per_batch = [batch_size * tensor[:1].nbytes for tensor in tensors]
    if any(num_bytes % _ALIGNMENT for num_bytes in bytes_per_batch):
        return 1
    return min(_BATCHES_PER_SELECTION, max(1, _MAX_BYTES_PER_SELECTION // max(1, sum(bytes_per_batch))))


def unchanged(batch: Any) -> Any:
    """Return a batch as it is: the ``collate_fn`` of a dataset that returns batches."""
    return batch


def whole_batches_of(loader: Any) -> Iterator[list[torch.Tensor]] | None:
    """Return the batches of an epoch without the overhead of a `DataLoader`; ``None`` if the loader needs it.

    The batches are identical to the loader's, in the order that the generator of its sampler determines.

    Args:
        loader: Any loader.
    """
    dataset, batch_sampler = loader.dataset, loader.batch_sampler
    is_plain = type(dataset) is WholeBatchDataset and loader.num_workers == 0 and not loader.pin_memory
    is_plain = is_plain and type(batch_sampler) is BatchSampler
    # `loader.sampler` is another sampler if the loader was created with a batch sampler.
    order = _order_of(batch_sampler.sampler, len(dataset)) if is_plain else None
    if order is None:
        return None
    num_left_out = len(order) % batch_sampler.batch_size if batch_sampler.drop_last else 0
    batches: Iterator[list[torch.Tensor]] = dataset.batches(
        order[: len(order) - num_left_out], batch_sampler.batch_size
    )
    return batches


def _order_of(sampler: Any, num_samples: int) -> torch.Tensor | None:
    """Return all indices that one of PyTorch's samplers yields in an epoch; ``None`` for other samplers."""
    if type(sampler) is SequentialSampler:
        return torch.arange(num_samples)
    is_permutation = (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and sampler.num_samples == num_samples
        and sampler.generator is not None
    )
    return torch.randperm(num_samples, generator=sampler.generator) if is_permutation else None
