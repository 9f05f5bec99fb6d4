"""Models with outputs of many forms, the samples to predict for, and what each sample's part has to be."""

from __future__ import annotations

import importlib.util
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from pytorch_accelerated import Trainer

VOCABULARY = 11
PAD = -1.0
"""Fills predictions; no model returns it."""

Scores = namedtuple("Scores", ["values", "notes"])


@dataclass(frozen=True)
class Prediction:
    """An output with everything that a model may put into one."""

    values: torch.Tensor
    names: list[str]
    nested: dict[str, torch.Tensor]
    unused: None = None
    kind: str = "prediction"
    computed: int = field(default=0, init=False)


class Record(OrderedDict):
    """A mapping whose fields are its items too, like the outputs of transformers."""

    def __init_subclass__(cls) -> None:
        dataclass(cls)

    def __post_init__(self) -> None:
        for each in fields(self):
            if getattr(self, each.name) is not None:
                super().__setitem__(each.name, getattr(self, each.name))


class LanguageOutput(Record):
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Any = None


class Cache:
    """An output that is of no use after the batch."""

    def __init__(self, batch_size: int) -> None:
        self.keys = torch.zeros(batch_size, 1000)


def indices_of(num_samples: int) -> list[torch.Tensor]:
    """Return samples that are their own index, from 1 on."""
    return [torch.tensor([index + 1.0]) for index in range(num_samples)]


def boxes_of(value: float) -> torch.Tensor:
    """Return the boxes of a sample: as many as the remainder of its value by 4."""
    return torch.full((int(value) % 4, 4), value)


# --- models ------------------------------------------------------------------------------------------------------


def tensors(x: torch.Tensor) -> Any:
    return x * 2


def detections(x: torch.Tensor) -> Any:
    """Return what the detectors of torchvision return: a list with a dictionary for each image."""
    return [{"boxes": boxes_of(value.item()), "labels": torch.full((int(value) % 4,), 1)} for value in x]


def records(x: torch.Tensor) -> Any:
    return Prediction(x * 2, [f"sample {int(value)}" for value in x], {"half": x / 2})


def language(x: torch.Tensor) -> Any:
    return LanguageOutput(x.mean(), x[:, None].expand(-1, 3, 5) * 1.0, Cache(len(x)))


def pairs(x: torch.Tensor) -> Any:
    return x * 2, [x, {"third": x.flatten() * 3}]


def named_pairs(x: torch.Tensor) -> Any:
    return Scores(x * 2, [str(int(value)) for value in x])


def arrays(x: torch.Tensor) -> Any:
    return {"values": x.numpy() * 2, "names": np.array([f"{int(value)}" for value in x])}


def packed(x: torch.Tensor) -> Any:
    lengths = (x.flatten().long() % 3 + 1).tolist()
    return pack_padded_sequence(x.expand(-1, 3), lengths, batch_first=True, enforce_sorted=False)


def nested_tensors(x: torch.Tensor) -> Any:
    return torch.nested.nested_tensor([value.expand(int(value) % 3 + 1) for value in x])


def sparse_rows(x: torch.Tensor) -> Any:
    return torch.cat([x, 0 * x, x * 2], dim=1).to_sparse()


def hooks(x: torch.Tensor) -> Any:
    """Return rows with what has no part for each sample: a number, a count, weights, and a cache."""
    return {"rows": x, "loss": x.mean(), "weights": torch.ones(7, 2), "past_key_values": (Cache(len(x)),), "mode": "eval"}


def ragged(x: torch.Tensor) -> Any:
    """Return rows as wide as the largest value of the batch."""
    width = int(x.max())
    return {"rows": x.expand(-1, width).clone()}


# --- what each sample's part is ----------------------------------------------------------------------------------


def part_of(outputs: Any, index: int) -> Any:
    """Return the part of a sample in joined outputs, or in those of a single sample, as plain values."""
    if isinstance(outputs, (torch.Tensor, np.ndarray)):
        return outputs[index].tolist()
    if isinstance(outputs, PackedSequence):
        return part_of(torch.nn.utils.rnn.unpack_sequence(outputs), index)
    if isinstance(outputs, dict):
        return {name: part_of(item, index) for name, item in outputs.items()}
    if isinstance(outputs, Prediction):
        return {each.name: part_of(getattr(outputs, each.name), index) for each in fields(outputs)}
    if isinstance(outputs, tuple):
        return [part_of(item, index) for item in outputs]
    if isinstance(outputs, list):
        return plain(outputs[index])
    return outputs


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return value.tolist() if isinstance(value, torch.Tensor) else value
