"""How many samples the next batch of a process has, as far as the loader tells."""

from __future__ import annotations

import pytest
from torch.utils.data import BatchSampler, DataLoader

from pytorch_accelerated._data.sharding import ShardedBatchSampler
from pytorch_accelerated._predictions import _NumSamples


@pytest.mark.parametrize("num_processes", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_the_sizes_of_batches_are_those_that_the_samples_are_divided_into(num_processes, batch_size):
    for num_samples in range(1, 31):
        batches = BatchSampler(range(num_samples), batch_size, drop_last=False)
        samplers = [ShardedBatchSampler(batches, num_processes, rank) for rank in range(num_processes)]
        loaders = [DataLoader(range(num_samples), batch_sampler=sampler) for sampler in samplers]
        counts = [_NumSamples(loader, num_processes, rank) for rank, loader in enumerate(loaders)]
        for step, of_ranks in enumerate(zip(*map(list, samplers), strict=True)):
            is_real = [not sampler.is_dummy(step) for sampler in samplers]
            sizes = [len(indices) if real else 0 for indices, real in zip(of_ranks, is_real, strict=True)]
            assert counts[0].total == num_samples
            for count, size in zip(counts, sizes, strict=True):
                assert size in (0, count.in_next_batch())
                count.add(sum(sizes))
