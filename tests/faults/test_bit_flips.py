"""A random bit that is flipped anywhere in a training state is refused, or harmless: no other numbers are loaded.

    NUM_FLIPS=1000 python -m pytest tests/faults/test_bit_flips.py tests/_checkpoint/test_checksum.py -k bit -s

The second file has the same for checkpoints.
"""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest
import torch
from torch.distributed import checkpoint

from _saved import assert_equal, everything_in, make_state_trainer, train
from _support import make_dataset
from pytorch_accelerated._checkpoint.writer import StateWriter
from pytorch_accelerated.callbacks import EarlyStoppingCallback, SaveBestModelCallback
from pytorch_accelerated.exceptions import CheckpointError

NUM_FLIPS = int(os.environ.get("NUM_FLIPS", "60"))


def make_trainer(folder, seed):
    best = SaveBestModelCallback(folder / "best.pt", load_saved_checkpoint=False)
    return make_state_trainer([EarlyStoppingCallback(9), best], seed=seed)


def everything(trainer):
    return {**everything_in(trainer), "callbacks": trainer.callback_handler.state_dict()}


def save_with_shards(trainer, path, monkeypatch):
    """Save a state that has the files of a sharded one in addition, as PyTorch writes them."""
    write = StateWriter.write

    def write_with_shards(writer, target, state, *args, **kwargs):
        def save_shards(folder):
            shards = {"model": trainer.model.state_dict()}
            checkpoint.save(shards, checkpoint_id=folder / "pytorch_model_fsdp_0", no_dist=True)

        write(writer, target, replace(state, save_shards=save_shards), *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(StateWriter, "write", write_with_shards)
        trainer.save_training_state(path)


def random_places(path, generator):
    """Yield files and bits in them: every second time in any file, else where the most bytes are."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    sizes = [file.stat().st_size for file in files]
    for number in range(NUM_FLIPS):
        file = generator.choice(files) if number % 2 else generator.choices(files, sizes)[0]
        yield file, generator.randrange(8 * file.stat().st_size)


@pytest.mark.parametrize("kind", ["plain", "in the background", "sharded"])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_no_flipped_bit_of_a_state_loads_other_numbers(tmp_path, monkeypatch, kind):
    trainer, path, generator = make_trainer(tmp_path, 4), tmp_path / "state", random.Random(3)
    train(trainer, num_epochs=2, eval_dataset=make_dataset(8))
    if kind == "sharded":
        save_with_shards(trainer, path, monkeypatch)
        assert (path / "pytorch_model_fsdp_0" / ".metadata").exists()
    else:
        trainer.save_training_state(path, in_background=kind != "plain")
        trainer.wait_for_training_state()
    other = make_trainer(tmp_path, 5)
    train(other, num_epochs=1, eval_dataset=make_dataset(8))
    before, refusals = everything(other), list[str]()
    random_state = torch.get_rng_state()
    for file, bit in random_places(path, generator):
        data = bytearray(intact := file.read_bytes())
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        try:
            other.load_training_state(path)
        except CheckpointError as error:
            refusals.append(str(error))
        else:
            assert_equal(everything(other), everything(trainer))
            other = make_trainer(tmp_path, 5)
            train(other, num_epochs=1, eval_dataset=make_dataset(8))
            torch.set_rng_state(random_state)
        assert_equal(everything(other), before)
        file.write_bytes(intact)
    other.load_training_state(path)
    assert_equal(everything(other)["weights"], everything(trainer)["weights"])
    assert all(str(path) in message for message in refusals)
    print(f"{kind}: {NUM_FLIPS} flips, {len(refusals)} refused, {NUM_FLIPS - len(refusals)} harmless")
