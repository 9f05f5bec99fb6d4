"""Models with outputs of many forms, the samples to predict for, and what each sample's part has to be."""

from __future__ import annotations

import importlib
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_sequence, unpack_sequence

from pytorch_accelerated import Trainer

PAD = -1.0
"""Fills predictions; no model returns it."""

Scores = namedtuple("Scores", ["values", "notes"])


class Predicting(nn.Module):
    """Returns what a function makes of its inputs."""

    def __init__(self, function: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: torch.Tensor) -> Any:
        return self.function(inputs)


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


class Memory:
    """An output without a part for each sample."""

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
    return LanguageOutput(x.mean(), x[:, None].expand(-1, 3, 5) * 1.0, Memory(len(x)))


def pairs(x: torch.Tensor) -> Any:
    return x * 2, (x, {"third": x.flatten() * 3})


def named_pairs(x: torch.Tensor) -> Any:
    return Scores(x * 2, [str(int(value)) for value in x])


def arrays(x: torch.Tensor) -> Any:
    return {"values": x.numpy() * 2, "names": np.array([f"{int(value)}" for value in x])}


def packed(x: torch.Tensor) -> Any:
    lengths = (x.flatten().long() % 3 + 1).tolist()
    return pack_padded_sequence(x.expand(-1, 3), lengths, batch_first=True, enforce_sorted=False)


def nested_tensors(x: torch.Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, that they may change
        return torch.nested.nested_tensor([value.expand(int(value) % 3 + 1) for value in x])


def sparse_rows(x: torch.Tensor) -> Any:
    return torch.cat([x, 0 * x, x * 2], dim=1).to_sparse()


def hooks(x: torch.Tensor) -> Any:
    """Return rows with what has no part for each sample: a number, a count, weights, and a cache."""
    return {
        "rows": x,
        "loss": x.mean(),
        "weights": torch.ones(7, 2),
        "past_key_values": (Memory(len(x)),),
        "mode": "eval",
    }


def objects(x: torch.Tensor) -> Any:
    return {"found": np.fromiter(([int(value)] for value in x), object, len(x)), "rows": x}


def ragged(x: torch.Tensor) -> Any:
    """Return rows as wide as the largest value of the batch, each filled as far as its own value."""
    columns = torch.arange(int(x.max()))
    return {"rows": torch.where(columns < x, x, PAD)}


FORMS = {
    function.__name__: function
    for function in (
        tensors,
        detections,
        records,
        language,
        pairs,
        named_pairs,
        arrays,
        packed,
        nested_tensors,
        sparse_rows,
        hooks,
        objects,
        ragged,
    )
}

SIZES = ((7, 3), (2, 2), (1, 1), (4, 2), (3, 1))
"""Numbers of samples, and of those in a batch of one process."""


def predict_form(name: str, num_samples: int, batch_size: int, **settings: Any) -> Any:
    """Return the predictions of the form of this name."""
    trainer = Trainer(Predicting(FORMS[name]), None, None, callbacks=())
    padding = {"padding_value": PAD} if name == "ragged" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is left out
        return trainer.predict(indices_of(num_samples), batch_size, **padding, **settings)


# --- what each sample's part is ----------------------------------------------------------------------------------

WITHOUT_PARTS = ("loss", "weights", "past_key_values", "mode")


def parts_of(outputs: Any) -> list[Any]:
    """Return the parts of all samples in joined outputs, or in those of a batch, as plain values."""
    if isinstance(outputs, PackedSequence):
        outputs = unpack_sequence(outputs)
    if isinstance(outputs, torch.Tensor):
        outputs = outputs.unbind() if outputs.is_nested else outputs.to_dense()
    if is_dataclass(outputs):
        outputs = {each.name: getattr(outputs, each.name) for each in fields(outputs)}
    if isinstance(outputs, dict):
        named = {name: parts_of(item) for name, item in outputs.items() if name not in WITHOUT_PARTS}
        names = [name for name, parts in named.items() if isinstance(parts, list)]
        return [dict(zip(names, parts, strict=True)) for parts in zip(*(named[name] for name in names), strict=True)]
    if isinstance(outputs, tuple) and not all(isinstance(part, torch.Tensor) and part.ndim < 2 for part in outputs):
        return list(zip(*map(parts_of, outputs), strict=True))
    return (
        [plain(part) for part in outputs] if hasattr(outputs, "__len__") and not isinstance(outputs, str) else outputs
    )


def expected_parts(name: str, num_samples: int) -> list[Any]:
    """Return what the model makes of each sample alone."""
    return [part for sample in indices_of(num_samples) for part in parts_of(FORMS[name](sample[None]))]


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, torch.Tensor) and value.ndim and PAD in value:
        value = value[value != PAD]
    return value.tolist() if hasattr(value, "tolist") else value


# --- a language model of transformers ----------------------------------------------------------------------------

NO_LABEL = -100


def make_texts(lengths: Sequence[int] = (5, 2, 7, 3, 1, 6, 4)) -> list[torch.Tensor]:
    """Return tokens, of other lengths in each text."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 20, (length,), generator=generator) for length in lengths]


def collate_texts(texts: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a batch that is as wide as its longest text."""
    mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    labels = pad_sequence(list(texts), batch_first=True, padding_value=NO_LABEL)
    return {"input_ids": labels.clamp(min=0), "attention_mask": mask, "labels": labels}


def language_model_predictions() -> dict[str, Any]:
    """Predict with a tiny causal language model of transformers, and compare with its outputs for each text alone."""
    transformers = importlib.import_module("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, **sizes)).eval()
    texts = make_texts()
    outputs, labels = Trainer(model, None, None, callbacks=()).predict(
        texts, 2, collate_fn=collate_texts, padding_value=NO_LABEL, return_targets=True
    )
    differences = []
    for text, logits, targets in zip(texts, outputs.logits, labels, strict=True):
        alone = model(text[None]).logits[0].detach()
        differences.append((logits[: len(text)] - alone).abs().max().item())
        assert targets.tolist() == [*text.tolist(), *[NO_LABEL] * (7 - len(text))]
    return {
        "outputs": list(outputs),
        "shapes": [list(outputs.logits.shape), list(labels.shape)],
        "largest difference": max(differences),
    }


EXPECTED_OF_LANGUAGE_MODEL = {
    "outputs": ["loss", "logits"],
    "shapes": [[7, 7, 20], [7, 7]],
}
