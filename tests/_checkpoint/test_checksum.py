"""A checkpoint carries a checksum: a damaged one is refused, and other programs read it as before."""

from __future__ import annotations

import os
import random
import zipfile
import zlib

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from _support import assert_same_weights, make_dataset, mse, train, weights_of
from pytorch_accelerated import Trainer
from pytorch_accelerated._checkpoint.checksum import EMPTY_CHECKSUM, check_undamaged, seal
from pytorch_accelerated.exceptions import CheckpointError


def make_trainer(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    return Trainer(model, mse, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), callbacks=(), seed=0)


def everything(trainer):
    states = trainer.optimizer.state_dict()["state"].values()
    averages = {f"average {index}": state["momentum_buffer"] for index, state in enumerate(states)}
    return {name: value.clone() for name, value in {**weights_of(trainer.model), **averages}.items()}


def flipped(data, bit):
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


@pytest.fixture(scope="module")
def trained():
    return train(make_trainer(1), make_dataset(8))


def save(trainer, path, is_foreign):
    """Write a checkpoint, as this library does or, without a checksum, as other programs do."""
    if not is_foreign:
        trainer.save_checkpoint(path, {"epoch": 3}, save_optimizer=path.suffix == ".pt")
    elif path.suffix == ".pt":
        torch.save(trainer.model.state_dict(), path)
    else:
        save_file(trainer.model.state_dict(), path)


@pytest.mark.parametrize(
    ("suffix", "is_foreign", "num_flips"),
    [(".pt", False, 120), (".safetensors", False, 120), (".pt", True, 60)],
    ids=["checkpoint", "safetensors", "other program"],
)
def test_no_flipped_bit_loads_other_weights(trained, tmp_path, suffix, is_foreign, num_flips):
    path, generator = tmp_path / f"model{suffix}", random.Random(7)
    num_flips = int(os.environ.get("NUM_FLIPS", num_flips))
    save(trained, path, is_foreign)
    data, other = path.read_bytes(), make_trainer(2)
    entries = str(other.load_checkpoint(path))
    expected = everything(other)
    other = make_trainer(2)
    before, num_refused = everything(other), 0
    for bit in generator.sample(range(8 * len(data)), num_flips):
        path.write_bytes(flipped(data, bit))
        try:
            loaded = other.load_checkpoint(path)
        except CheckpointError:
            num_refused += 1
            assert_same_weights(everything(other), before)
        else:  # harmless: the checksum's own label, or what nobody reads
            assert_same_weights(everything(other), expected)
            assert str(loaded) == entries
            other = make_trainer(2)
    print(f"{suffix}, foreign: {is_foreign}: {num_flips} flips, {num_refused} refused, the others harmless")
    assert num_refused > num_flips * (0.5 if is_foreign else 0.9)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_bit_flipped_in_each_byte_that_belongs_to_the_checksum_is_refused_or_harmless(trained, tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    save(trained, path, is_foreign=False)
    data, other = path.read_bytes(), make_trainer(2)
    start = data.index(EMPTY_CHECKSUM[:-8].encode())
    for byte in range(start - 22, start + len(EMPTY_CHECKSUM)):
        path.write_bytes(flipped(data, 8 * byte + byte % 8))
        try:
            other.load_checkpoint(path, load_optimizer=False)
        except CheckpointError:
            continue
        assert_same_weights(weights_of(other.model), weights_of(trained.model))


def test_a_damaged_checkpoint_is_refused_with_the_reason(trained, tmp_path):
    path = tmp_path / "model.pt"
    save(trained, path, is_foreign=False)
    path.write_bytes(flipped(path.read_bytes(), 4000))
    with pytest.raises(CheckpointError, match=r"contents do not match the checksum in it. The file is damaged"):
        make_trainer(2).load_checkpoint(path)
    with pytest.raises(CheckpointError, match="damaged"):  # it is not that it does not fit
        make_trainer(2).load_checkpoint(path, strict=False)


def test_damage_to_a_file_of_another_program_is_refused_with_the_name_of_the_record(tmp_path):
    path, values = tmp_path / "model.pt", torch.arange(1000.0)
    torch.save({"weight": values}, path)
    data = path.read_bytes()
    path.write_bytes(flipped(data, 8 * (data.index(values.numpy().tobytes()) + 50)))
    with pytest.raises(CheckpointError, match=r"its record 'model/data/0' does not match the checksum of it"):
        make_trainer(2).load_checkpoint(path)


def test_damage_to_the_list_of_records_is_refused_or_harmless(trained, tmp_path):
    path = tmp_path / "model.pt"
    save(trained, path, is_foreign=True)
    data, other = path.read_bytes(), make_trainer(2)
    start = data.index(b"PK\x01\x02")
    attributes = [8 * (start + 38) + bit for bit in range(32)]  # of the first record
    for bit in (*attributes, *range(8 * start, 8 * len(data), 29)):
        path.write_bytes(flipped(data, bit))
        try:
            other.load_checkpoint(path)
        except CheckpointError:
            continue
        assert_same_weights(weights_of(other.model), weights_of(trained.model))


@pytest.mark.parametrize("is_zip", [True, False], ids=["without checksums", "not a zip archive"])
def test_a_file_without_any_checksums_is_read(trained, tmp_path, is_zip, monkeypatch):
    path = tmp_path / "model.pt"
    if is_zip:
        set_crc32 = getattr(torch.serialization, "set_crc32_options", None)
        if set_crc32 is None:
            pytest.skip("this version of PyTorch always computes them")
        set_crc32(False)
    try:
        torch.save(trained.model.state_dict(), path, _use_new_zipfile_serialization=is_zip)
    finally:
        if is_zip:
            set_crc32(True)
    other = make_trainer(2)
    other.load_checkpoint(path)
    assert_same_weights(weights_of(other.model), weights_of(trained.model))


@pytest.mark.parametrize("is_mapped", [True, False])
def test_other_programs_read_the_file_as_before(trained, tmp_path, is_mapped):
    path = tmp_path / "model.pt"
    save(trained, path, is_foreign=False)
    saved = torch.load(path, weights_only=True, mmap=is_mapped)
    assert set(saved) == {"model_state_dict", "optimizer_state_dict", "epoch"}
    assert_same_weights(saved["model_state_dict"], weights_of(trained.model))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(EMPTY_CHECKSUM[:-8].encode())


def test_safetensors_reads_the_file_as_its_own(trained, tmp_path):
    path = tmp_path / "model.safetensors"
    save(trained, path, is_foreign=False)
    assert_same_weights(load_file(path), weights_of(trained.model))


def test_large_files_are_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("pytorch_accelerated._checkpoint.checksum._BLOCK_SIZE", 100)
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.arange(500.0)}, path)
    seal(path)
    check_undamaged(path)
    monkeypatch.undo()
    check_undamaged(path)


@pytest.mark.parametrize("contents", [b"", b"PK\x03\x04", b"x" * 7, b"\xff" * 8 + b"{", b"PK\x05\x06" + bytes(18)])
def test_what_is_no_checkpoint_is_refused_with_a_clear_error(tmp_path, contents):
    path = tmp_path / "model.pt"
    path.write_bytes(contents)
    with pytest.raises(CheckpointError, match="could not be read"):
        make_trainer(2).load_checkpoint(path)


def test_the_checksum_is_a_format(tmp_path):
    """Later versions have to read it: that of all bytes but its own digits, at the end of the file."""
    torch.save({"value": torch.arange(5.0)}, tmp_path / "file.pt")
    seal(tmp_path / "file.pt")
    contents = (tmp_path / "file.pt").read_bytes()
    label = b"pytorch_accelerated.crc32:"
    assert contents[-len(label) - 8 : -8] == label
    assert contents[-8:] == b"%08x" % zlib.crc32(contents[:-8])
