"""The frameworks that are compared. Each has a file that defines how it trains and evaluates.

A file has a function ``train(job)``, and usually ``evaluate(job)``, written as the framework's documentation shows. If
a `Job` needs something that is not the framework's default, documented options switch it on or off.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Framework:
    """What the runner needs to know about a framework."""

    title: str
    package: str
    """Name of the distribution whose version is reported."""
    import_statement: str
    """The import that a training program needs."""
    environment: str = "peers"
    """The virtual environment that it is installed in. `requirements-NAME.txt` lists what the environment holds."""
    module: str = ""
    """Name of its file in this folder, if it differs from the framework's name."""
    cases: str = "A A-off A-single B C D E M S"
    """The cases that it is measured in."""


HAND_WRITTEN = "hand_written"
OURS = "pytorch_accelerated"

FRAMEWORKS = {
    HAND_WRITTEN: Framework("by hand", "torch", "import torch", "own", cases="A B D M S"),
    OURS: Framework(
        "pytorch-accelerated",
        "pytorch-accelerated",
        "from pytorch_accelerated import Trainer",
        "own",
        cases="A A' A-off A-single B B' C D E F G H M R R-2 S Z scaling",
    ),
    "ignite": Framework(
        "Ignite", "pytorch-ignite", "from ignite.engine import Engine", cases="A A-off A-single B C D E G M S"
    ),
    "skorch": Framework("skorch", "skorch", "from skorch import NeuralNet"),
    "accelerate_loop": Framework(
        "Accelerate loop", "accelerate", "from accelerate import Accelerator", cases="A A-off A-single B C D E G H M S"
    ),
    "previous": Framework(
        "0.1.61",
        "pytorch-accelerated",
        "from pytorch_accelerated import Trainer",
        "previous",
        module=OURS,
        cases="A A-off A-single B C D E G H M S",
    ),
    "torchtnt": Framework("torchtnt", "torchtnt", "from torchtnt.framework import train", "older"),
    "transformers": Framework(
        "HF Trainer", "transformers", "from transformers import Trainer", cases="A A-off A-single B C D E G M S"
    ),
    "fastai": Framework("fastai", "fastai", "from fastai.learner import Learner"),
    "lightning": Framework("Lightning", "lightning", "import lightning", cases="A A-off A-single B C D E G H M S"),
    "composer": Framework("Composer", "mosaicml", "import frameworks.composer", "older"),
    "keras": Framework("Keras (torch)", "keras", "import os; os.environ['KERAS_BACKEND'] = 'torch'; import keras"),
}
