"""Which known name another one stands for: by its meaning first, then by its spelling."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_SIMILAR_ENOUGH = 0.8

_SYNONYMS = {
    "begin": "start",
    "before": "start",
    "pre": "start",
    "after": "end",
    "post": "end",
    "finish": "end",
    "batch": "step",
    "iteration": "step",
    "training": "train",
    "fit": "train_run",
    "fitting": "train_run",
    "val": "eval",
    "valid": "eval",
    "validate": "eval",
    "validation": "eval",
    "evaluation": "eval",
    "test": "eval",
    "compute": "calculate",
    "loader": "dataloader",
    "dl": "dataloader",
    "sched": "scheduler",
    "opt": "optimizer",
}

_MOMENTS = ("start", "end")


def spell_out(name: str) -> str:
    """Return a name in the library's words, with the moment behind: ``after_fit`` is ``train_run_end``.

    Example:
        >>> spell_out("on_validation_batch_begin")
        'eval_step_start'
    """
    words = [_SYNONYMS.get(word, word) for word in name.lower().split("_")]
    words = [word for word in words if word and word != "on"]
    return "_".join(sorted(words, key=lambda word: word in _MOMENTS))


def nearest(name: str, known: Iterable[str], cutoff: float = _SIMILAR_ENOUGH) -> str | None:
    """Return the known name with the meaning of another name, or with the most similar spelling.

    Args:
        name: The name.
        known: The names to choose from.
        cutoff: How similar the spelling must be, from 0 to 1: only names of the same meaning are found with 1.

    Example:
        >>> nearest("on_train_epoch_begin", ["on_train_epoch_start", "on_train_epoch_end"])
        'on_train_epoch_start'
    """
    spelled_out = {spell_out(each): each for each in known}
    similar = difflib.get_close_matches(spell_out(name), spelled_out, n=1, cutoff=cutoff)
    return spelled_out[similar[0]] if similar else None


def metric_meant(name: str, known: Iterable[str], cutoff: float = _SIMILAR_ENOUGH) -> str | None:
    """Return the known metric that a name probably stands for; ``None`` if there is none.

    Args:
        name: The name.
        known: The names to choose from.
        cutoff: How similar the spelling must be, from 0 to 1; see `nearest`.

    Example:
        >>> metric_meant("val_loss", ["train_loss_epoch", "eval_loss_epoch"])
        'eval_loss_epoch'
    """
    short = {each.removesuffix("_epoch"): each for each in known}
    meant = nearest("train_loss" if name == "loss" else name.removesuffix("_epoch"), short, cutoff)
    return None if meant is None else short[meant]
