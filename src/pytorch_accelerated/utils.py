"""Public helpers under one import path. They are defined in the private modules that use them."""

from pytorch_accelerated._arguments.lengths import Length
from pytorch_accelerated._data.limits import LIMIT_BATCHES_ENV_VAR, DataLoaderSlice, LimitBatches
from pytorch_accelerated._data.workers import worker_init_fn
from pytorch_accelerated._distributed.collectives import remove_padding
from pytorch_accelerated._distributed.decorators import (
    local_process_zero_first,
    local_process_zero_only,
    world_process_zero_only,
)
from pytorch_accelerated._models.ema import ModelEma

__all__ = [
    "LIMIT_BATCHES_ENV_VAR",
    "DataLoaderSlice",
    "Length",
    "LimitBatches",
    "ModelEma",
    "local_process_zero_first",
    "local_process_zero_only",
    "remove_padding",
    "worker_init_fn",
    "world_process_zero_only",
]
