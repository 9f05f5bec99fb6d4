"""The contents of a manifest, and the detection of directories that do not match it."""

from __future__ import annotations

import json
import math
import os
import random
import stat
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from _saved import falsify_manifest, make_up_state, rewrite_manifest
from pytorch_accelerated._checkpoint import manifest as manifest_module
from pytorch_accelerated._checkpoint.manifest import SavedState
from pytorch_accelerated.exceptions import CheckpointError
from pytorch_accelerated.progress import TrainingProgress


@pytest.fixture
def path(tmp_path):
    return make_up_state(tmp_path / "state", num_processes=2)


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    entries = {
        "metrics": {"loss": 0.1, "strange": "nan"},
        "settings": {"optimizer.betas": [0.9, 0.999], "scheduler": None},
        "generation": 3,
        "number": 7,
    }
    path = make_up_state(tmp_path / "state", epochs=2, batches=5, num_processes=2, **entries)
    saved = manifest_module.verify_state(path)
    assert saved.path == path
    assert saved.position == TrainingProgress(num_epochs_completed=2, num_batches_in_epoch=5)
    assert {name: getattr(saved, name) for name in entries} == entries
    assert saved.num_processes == 2
    assert saved.format_version == 2
    assert set(saved.files) == {"trainer_state.pt", "process_0.pt", "process_1.pt", "model.pt"}
    assert saved.size == sum((path / name).stat().st_size for name in saved.files)
    assert json.loads((path / "manifest.json").read_text())["size"] == saved.size
    assert saved.versions["torch"] == metadata.version("torch")
    assert set(saved.versions) == {"pytorch-accelerated", "torch", "accelerate", "python"}
    assert saved.problem is None


def test_files_in_subfolders_are_listed_too(path):
    (path / "shards" / "deep").mkdir(parents=True)
    (path / "shards" / "deep" / "one").write_text("1")
    rewrite_manifest(path)
    assert "shards/deep/one" in manifest_module.verify_state(path).files
    (path / "shards" / "deep" / "one").write_text("2")
    with pytest.raises(CheckpointError, match=r"is damaged: shards/deep/one is missing or altered"):
        manifest_module.verify_state(path)


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(manifest_module, "version", missing)
    monkeypatch.setattr(manifest_module, "_version_of", manifest_module._version_of.__wrapped__)  # without its cache
    versions = manifest_module.installed_versions()
    assert (versions["pytorch-accelerated"], versions["torch"], versions["accelerate"]) == (None, None, None)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.5, 0.5),
        (3, 3.0),
        (torch.tensor(0.25), 0.25),
        (np.float32(0.5), 0.5),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        ("text", "text"),
        (torch.zeros(2), "tensor([0., 0.])"),
        ([1] * 100, str([1] * 100)[:80]),
    ],
)
def test_metrics_become_finite_numbers_or_short_texts(value, expected):
    assert manifest_module.as_json_scalar(value) == expected


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_all_files_have_the_permissions_of_the_umask(tmp_path, umask):
    """Safetensors makes its files readable by their owner only."""
    before = os.umask(umask)
    try:
        path = tmp_path / "state"
        path.mkdir()
        (path / "model.pt").touch(mode=0o600)
        (path / "other").touch()
        manifest_module.write_manifest(path, {})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o666 & ~umask}


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_all_files_and_folders_are_fsynced(path, monkeypatch):
    (path / "shards").mkdir()
    (path / "shards" / "one").touch()
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink()))
    rewrite_manifest(path)
    assert set(flushed) == {path, *path.rglob("*")}
    assert flushed[-1] == path


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_files_with_a_known_checksum_are_not_fsynced_again(path, monkeypatch):
    flushed = []
    checksums = {"model.pt": manifest_module.file_metadata(path / "model.pt")}
    (path / "manifest.json").unlink()
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink()))
    manifest_module.write_manifest(path, {}, checksums=checksums)
    assert sorted(flushed[:-2]) == [path / "process_0.pt", path / "process_1.pt", path / "trainer_state.pt"]
    assert flushed[-2:] == [path / "manifest.json", path]


# --- order -------------------------------------------------------------------------------------------------------


def test_states_are_sorted_by_generation_and_position():
    def state(generation, number, *position):
        return SavedState(Path("x"), TrainingProgress(*position), generation=generation, number=number)

    in_order = [
        SavedState(Path("without a manifest")),
        state(0, 9, 0, 3, 3, 12, "training"),
        state(0, 8, 0, 3, 3, 12, "evaluation"),
        state(0, 0, 1, 0, 3, 12, "training"),
        state(0, 0, 1, 2, 4, 16, "training"),
        state(0, 0, 1, 2, 5, 16, "training"),
        state(0, 1, 1, 2, 5, 16, "training"),
        state(1, 0, 0, 0, 0, 0, "training"),
        SavedState(Path("of a newer version"), format_version=manifest_module.FORMAT_VERSION + 1),
    ]
    shuffled = random.Random(0).sample(in_order, len(in_order))
    assert sorted(shuffled, key=lambda saved: saved.order) == in_order


# --- damage ------------------------------------------------------------------------------------------------------


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no training state '.*nothing'.*`save_training_state`"):
        manifest_module.verify_state(tmp_path / "nothing")


@pytest.mark.parametrize("text", [None, "", "{}", "[]", "3", "{", '{"files": 3}', '{"format_version": 2, "files": {}}'])
def test_a_directory_without_a_readable_manifest_is_not_a_state(path, text):
    (path / "manifest.json").unlink()
    if text is not None:
        (path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"not a complete training state: it has no readable manifest.json"):
        manifest_module.verify_state(path)


def test_an_unknown_phase_makes_a_manifest_unreadable(path):
    position = {**TrainingProgress().state_dict(), "phase": "nowhere"}
    rewrite_manifest(path, position=position)
    with pytest.raises(CheckpointError, match=r"no readable manifest.json"):
        manifest_module.verify_state(path)


def test_a_change_of_any_byte_of_a_manifest_is_detected(path):
    """Including changes that leave valid JSON, such as another position."""
    manifest = path / "manifest.json"
    content = manifest.read_bytes()
    for index in range(len(content)):
        manifest.write_bytes(content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :])
        with pytest.raises(CheckpointError):
            manifest_module.read_manifest(path)
    for other in (content[:-1], content + b" ", content + content):
        manifest.write_bytes(other)
        with pytest.raises(CheckpointError):
            manifest_module.read_manifest(path)


def test_a_state_of_a_newer_version_is_rejected_with_the_advice_to_upgrade(path):
    falsify_manifest(path, lambda manifest: manifest.update(format_version=3))
    with pytest.raises(CheckpointError, match=r"written by a newer version .* format 3, .* up to 2. Upgrade"):
        manifest_module.verify_state(path)


@pytest.mark.parametrize("name", ["trainer_state.pt", "process_0.pt", "process_1.pt", "model.pt"])
@pytest.mark.parametrize(
    ("damage", "changes_size"),
    [
        (lambda content: None, True),
        (lambda content: b"", True),
        (lambda content: content[:-1], True),
        (lambda content: content + b"x", True),
        (lambda content: b"X" + content[1:], False),
    ],
    ids=["missing", "empty", "truncated", "longer", "altered"],
)
def test_a_damaged_file_is_named(path, name, damage, changes_size):
    content = damage((path / name).read_bytes())
    (path / name).unlink()
    if content is not None:
        (path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"is damaged: {name} is missing or altered"):
        manifest_module.verify_state(path)
    saved = manifest_module.read_manifest(path)
    assert (manifest_module.find_damage(saved, compare_checksums=False) is not None) == changes_size


@pytest.mark.parametrize("name", ["trainer_state.pt", "process_1.pt"])
def test_a_manifest_must_list_the_files_that_every_state_has(path, name):
    (path / name).unlink()
    rewrite_manifest(path)
    with pytest.raises(CheckpointError, match=rf"{name} is missing or altered"):
        manifest_module.verify_state(path)


@pytest.mark.parametrize(
    ("name", "is_rejected"),
    [
        ("custom_checkpoint_0.pkl", True),
        ("optimizer_1.bin", True),
        ("scaler.pt", True),
        ("random_states_7.pkl", True),
        ("model_1.safetensors", True),
        ("notes.txt", False),
        ("tokenizer.pt", False),
    ],
)
def test_an_unlisted_file_is_rejected_if_accelerate_would_read_it(path, name, is_rejected):
    (path / name).touch()
    if is_rejected:
        with pytest.raises(CheckpointError, match=rf"is damaged: {name} is not part of the state"):
            manifest_module.verify_state(path)
    else:
        manifest_module.verify_state(path)


def test_the_reason_why_a_file_cannot_be_read_is_told(path, monkeypatch):
    """It may be an intact one."""

    def fail(file):
        raise OSError(5, "Input/output error", str(file))

    monkeypatch.setattr(manifest_module, "crc32_of", fail)
    with pytest.raises(CheckpointError, match=r"cannot be read: .*Input/output error: '.*trainer_state.pt'"):
        manifest_module.verify_state(path)


def test_verification_reads_each_file_once(path, monkeypatch):
    names, crc32_of = [], manifest_module.crc32_of
    monkeypatch.setattr(manifest_module, "crc32_of", lambda file: (names.append(file.name), crc32_of(file))[1])
    manifest_module.verify_state(path)
    assert sorted(names) == ["model.pt", "process_0.pt", "process_1.pt", "trainer_state.pt"]


def test_verification_reads_no_file_if_a_size_is_wrong(path, monkeypatch):
    """Reading large files takes long."""
    monkeypatch.setattr(manifest_module, "crc32_of", None)
    (path / "process_1.pt").write_text("short")
    with pytest.raises(CheckpointError, match=r"is damaged: process_1.pt is missing or altered"):
        manifest_module.verify_state(path)


def test_the_first_of_several_altered_files_is_named(path):
    for name in ("model.pt", "process_1.pt"):
        content = (path / name).read_bytes()
        (path / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(CheckpointError, match=r"is damaged: process_1.pt is missing or altered"):
        manifest_module.verify_state(path)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../outside"])
def test_a_manifest_must_not_list_files_outside_the_directory(path, name):
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["checksum"]
    manifest["files"][name] = {"size": 1, "crc32": ""}
    (path / "manifest.json").write_text(manifest_module._serialize(manifest))
    with pytest.raises(CheckpointError, match="no readable manifest"):
        manifest_module.verify_state(path)


def test_a_manifest_cannot_contain_numbers_that_json_lacks(tmp_path):
    (tmp_path / "state").mkdir()
    with pytest.raises(ValueError, match="JSON compliant"):
        manifest_module.write_manifest(tmp_path / "state", {"metrics": {"loss": math.nan}})
