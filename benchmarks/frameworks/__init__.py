"""The frameworks that are compared; one file for each says how it trains and evaluates.

A file has a function ``train(job)``, and usually ``evaluate(job)``, written as the documentation of the framework
shows it. What a `Job` asks for that is not the framework's default is switched on or off by its documented options.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Framework:
    """What the runner has to know about a framework."""

    title: str
    package: str
    """The distribution whose version is reported."""
    import_statement: str
    """What a program that trains with it imports."""
    environment: str = "peers"
    """The virtual environment it is installed in; `requirements-NAME.txt` says what that holds."""
    module: str = ""
    """The file here, if it is not called like the framework."""
    cases: str = "A A-off B C D E M S"
    """The cases it takes part in."""


HAND_WRITTEN = "hand_written"
OURS = "pytorch_accelerated"

FRAMEWORKS = {
    HAND_WRITTEN: Framework("by hand", "torch", "import torch", "own", cases="A B D M S"),
    OURS: Framework(
        "pytorch-accelerated",
        "pytorch-accelerated",
        "from pytorch_accelerated import Trainer",
        "own",
        cases="A A' A-off B B' C D E F G H M R R-2 S Z scaling",
    ),
    "ignite": Framework("Ignite", "pytorch-ignite", "from ignite.engine import Engine", cases="A A-off B C D E G M S"),
    "skorch": Framework("skorch", "skorch", "from skorch import NeuralNet"),
    "accelerate_loop": Framework(
        "Accelerate loop", "accelerate", "from accelerate import Accelerator", cases="A A-off B C D E G H M S"
    ),
    "previous": Framework(
        "0.1.61",
        "pytorch-accelerated",
        "from pytorch_accelerated import Trainer",
        "previous",
        module=OURS,
        cases="A A-off B C D E G H M S",
    ),
    "torchtnt": Framework("torchtnt", "torchtnt", "from torchtnt.framework import train", "older"),
    "transformers": Framework(
        "HF Trainer", "transformers", "from transformers import Trainer", cases="A A-off B C D E G M S"
    ),
    "fastai": Framework("fastai", "fastai", "from fastai.learner import Learner"),
    "lightning": Framework("Lightning", "lightning", "import lightning", cases="A A-off B C D E G H M S"),
    "composer": Framework("Composer", "mosaicml", "import frameworks.composer", "older"),
    "keras": Framework("Keras (torch)", "keras", "import os; os.environ['KERAS_BACKEND'] = 'torch'; import keras"),
}
