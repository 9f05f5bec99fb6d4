"""A pass of predictions: which outputs of each batch are kept, gathered from all processes, and joined."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from pytorch_accelerated._console.shown_bar import progress_bar
from pytorch_accelerated._data.loaders import (
    batch_size_of,
    enumerate_batches,
    is_map_style,
    num_batches_of,
    num_samples_of,
)
from pytorch_accelerated._data.sharding import ShardedBatchSampler, part_of_rest, sharding_of
from pytorch_accelerated._distributed.collectives import all_gather_nested
from pytorch_accelerated._messages import warn
from pytorch_accelerated._step import targets_of
from pytorch_accelerated._tensors.batch_size import size_of_predictions
from pytorch_accelerated._tensors.joining import OutputJoiner
from pytorch_accelerated._tensors.nested import named_items
from pytorch_accelerated._tensors.output_types import restorer_of_types
from pytorch_accelerated._tensors.parts import as_parts
from pytorch_accelerated._types import Batch, Loader, ModelOutput, Nested
from pytorch_accelerated.run_config import TrainerRunConfig

OutputChoice: TypeAlias = str | int | Collection[str | int] | Callable[[ModelOutput], ModelOutput] | None
"""Which outputs of a model are kept: those of a name or an index, of several, or what a function makes of them."""

CACHES = ("past_key_values", "cache")
"""Outputs that only serve the next call of a model."""


@dataclass(frozen=True)
class PredictionSettings:
    """The arguments of `Trainer.predict` that say what it returns.

    Args:
        outputs: Which outputs are kept; ``None`` for all that have a part for each sample, without caches.
        return_targets: Whether the targets of the batches are returned too.
        padding_value: Fills rows that are shorter than those of other batches; ``None`` if all ought to be alike.
        on_every_process: Whether every process has the result, or the main process only.
        move_to_host: Whether the result is in host memory, or on the device.
        shows_progress: Whether there may be a progress bar.
    """

    outputs: OutputChoice = None
    return_targets: bool = False
    padding_value: float | None = None
    on_every_process: bool = True
    move_to_host: bool = True
    shows_progress: bool = True


class Predictions:
    """Gathers and joins the outputs of one pass over a dataset.

    Args:
        settings: What is returned.
        config: Of the run.
        loader: Yields the batches.
        device: The device of this process.
        process_index: Its rank.
        caches: Names of outputs that are left out unless they are asked for.
        print_fn: Prints the progress where there is no terminal.
    """

    def __init__(
        self,
        settings: PredictionSettings,
        config: TrainerRunConfig,
        loader: Loader,
        device: torch.device,
        process_index: int = 0,
        caches: Collection[str] = CACHES,
        print_fn: Callable[[str], object] = print,
    ) -> None:
        self._settings = settings
        self._config = config
        self._loader = loader
        self._device = device
        self._num_samples = _NumSamples(loader, config.num_processes, process_index)
        self._is_kept = settings.on_every_process or config.is_world_process_zero
        self._joiner = OutputJoiner(settings.padding_value, settings.move_to_host, self._is_kept)
        if settings.outputs is None:
            self._joiner.left_out.update(("outputs", name) for name in caches)
        self._print = print_fn
        self._restore_types: Callable[[Nested], Nested] | None = None

    def of_all_batches(self, calculate: Callable[[Batch], ModelOutput]) -> ModelOutput:
        """Return the outputs for all samples, with the targets if these are wanted; ``None`` on a process without.

        Must be called on every process.

        Args:
            calculate: Returns the outputs of the model for a batch.

        Raises:
            ValueError: The outputs of a batch do not fit to those before, or have no part for each sample, or lack a
                name that was asked for. Raised on every process.
        """
        sharding = sharding_of(self._loader)
        is_shown = self._settings.shows_progress and self._config.is_world_process_zero
        with progress_bar("predictions", num_batches_of(self._loader), self._print, is_shown=is_shown) as show:
            for step, batch, _ in enumerate_batches(self._loader):
                is_dummy = sharding is not None and sharding.is_dummy(step)
                self._add(calculate(batch), batch, is_dummy)
                show(step + 1, self._num_samples.done)
        return self._result()

    def _add(self, outputs: ModelOutput, batch: Batch, is_dummy: bool) -> None:
        whole: dict[Hashable, Nested] = {"outputs": self._choose(outputs)}
        if self._settings.return_targets:
            whole["targets"] = targets_of(
                batch, "`return_targets` is set", "Use data with targets, or leave out `return_targets`."
            )
        if self._restore_types is None:
            self._restore_types = restorer_of_types(whole)
        told = whole["outputs"] if callable(self._settings.outputs) else outputs
        size = size_of_predictions(batch, told, self._num_samples.in_next_batch())
        local = {name: as_parts(value, size, (name,), self._joiner.left_out) for name, value in whole.items()}
        # Rows travel from device to device. They are joined in the order of the ranks, which is that of the dataset.
        of_ranks = all_gather_nested(None if is_dummy else (local, size), self._config.num_processes, self._device)
        present = [of_rank for of_rank in of_ranks if of_rank is not None]
        self._num_samples.add(sum(num_samples for _, num_samples in present))
        self._joiner.num_expected = self._num_samples.total
        for parts, num_samples in present:
            self._joiner.add(parts, num_samples)

    def _result(self) -> ModelOutput:
        if self._restore_types is None or not self._is_kept:
            return None
        result = self._restore_types(self._joiner.result())
        left_out = self._joiner.describe_left_out()
        if left_out is not None and self._config.is_world_process_zero:
            warn(left_out)
        return (result["outputs"], result["targets"]) if self._settings.return_targets else result["outputs"]

    def _choose(self, outputs: ModelOutput) -> ModelOutput:
        """Return the outputs that are wanted; those of a dataclass stay in it, but the others count as left out."""
        choice = self._settings.outputs
        if choice is None:
            return outputs
        if callable(choice):
            return choice(outputs)
        named = _items_of(outputs)
        names = [choice] if isinstance(choice, (str, int)) else list(choice)
        missing = [name for name in names if name not in named]
        if missing:
            contents = f"with {list(named)}" if named else "without names or parts"
            raise ValueError(
                f"`outputs` asks for {missing}, but the model returned a `{type(outputs).__name__}` {contents}. Pass "
                "names or indices of what there is, or a function of what the model returns."
            )
        if isinstance(choice, (str, int)):
            return named[choice]
        if named_items(outputs) is None:
            return tuple(named[name] for name in names)
        if isinstance(outputs, Mapping) and not is_dataclass(outputs):
            return {name: named[name] for name in names}
        self._joiner.left_out.update(("outputs", name) for name in named if name not in names)
        return outputs


class _NumSamples:
    """How many samples there are, in all batches and in the next one, as far as the loader tells.

    Args:
        loader: Yields the batches.
        num_processes: The world size.
        process_index: The rank of this process.
    """

    total = 0
    """The samples in all batches; 0 if it is not known."""

    def __init__(self, loader: Loader, num_processes: int, process_index: int) -> None:
        self._num_processes = num_processes
        self._process_index = process_index
        self.done = 0
        """The samples in the batches so far."""

        self._batch_size: int | None = None
        self._keeps_batches = False
        source: Any = getattr(loader, "dl", loader)
        num_steps = num_batches_of(loader)
        if not is_map_style(source) or num_steps is None:
            return
        sampler = getattr(source, "batch_sampler", None)
        self._keeps_batches = isinstance(sampler, ShardedBatchSampler) and sampler.fixed_size is None
        self._batch_size = batch_size_of(source, None, 0) or None
        num_samples = num_samples_of(source)
        if self._batch_size is not None and num_samples is not None:
            num_in_step = self._batch_size * num_processes
            is_plausible = num_samples > (num_steps - 1) * num_in_step
            self.total = min(num_samples, num_steps * num_in_step) if is_plausible else 0

    def in_next_batch(self) -> int | None:
        """Return the number of samples in the next batch of this process; ``None`` if it is not known."""
        num_left = self.total - self.done
        if self._batch_size is None or num_left <= 0:
            return self._batch_size
        if num_left >= self._batch_size * self._num_processes:  # there is a full batch for each rank
            return self._batch_size
        if self._keeps_batches and num_left > self._batch_size * (self._num_processes - 1):  # at least a short one
            return min(self._batch_size, num_left - self._batch_size * self._process_index)
        part = part_of_rest(num_left, self._batch_size, self._num_processes, self._process_index)
        return part.stop - part.start or self._batch_size

    def add(self, num_samples: int) -> None:
        """Count the samples in a step of all processes."""
        self.done += num_samples


def _items_of(outputs: ModelOutput) -> Mapping[Any, ModelOutput]:
    named = named_items(outputs)
    if named is not None:
        return named
    return dict(enumerate(outputs)) if isinstance(outputs, (tuple, list)) else {}


def caches_of(model: nn.Module) -> set[str]:
    """Return the names of the outputs of a model that are of no use when it has been called.

    The models of transformers list them in their configuration.
    """
    named = getattr(getattr(model, "config", None), "keys_to_ignore_at_inference", ())
    return {*CACHES, *(named if isinstance(named, (list, tuple, set)) else ())}
