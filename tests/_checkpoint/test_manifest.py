"""What a manifest tells, and how a directory that does not agree with it is found out."""

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

from _saved import make_up_state, rewrite_manifest
from pytorch_accelerated._checkpoint import manifest as manifest_module
from pytorch_accelerated._checkpoint.manifest import SavedState
from pytorch_accelerated.exceptions import CheckpointError
from pytorch_accelerated.progress import TrainingProgress


@pytest.fixture
def path(tmp_path):
    return make_up_state(tmp_path / "state", num_processes=2)


def test_a_manifest_gives_back_what_was_written(tmp_path):
    facts = {
        "metrics": {"loss": 0.1, "strange": "nan"},
        "settings": {"optimizer.betas": [0.9, 0.999], "scheduler": None},
        "generation": 3,
        "number": 7,
    }
    path = make_up_state(tmp_path / "state", epochs=2, batches=5, num_processes=2, **facts)
    saved = manifest_module.verify_state(path)
    assert saved.path == path
    assert saved.position == TrainingProgress(num_epochs_completed=2, num_batches_in_epoch=5)
    assert {name: getattr(saved, name) for name in facts} == facts
    assert saved.num_processes == 2
    assert saved.format_version == 2
    assert set(saved.files) == {"trainer_state.pt", "process_0.pt", "process_1.pt", "model.pt"}
    assert saved.size == sum((path / name).stat().st_size for name in saved.files)
    assert json.loads((path / "manifest.json").read_text())["size"] == saved.size
    assert saved.versions["torch"] == metadata.version("torch")
    assert set(saved.versions) == {"pytorch-accelerated", "torch", "accelerate", "python"}
    assert saved.problem is None


def test_files_in_folders_are_listed_too(path):
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
    monkeypatch.setattr(manifest_module, "_version_of", manifest_module._version_of.__wrapped__)  # it remembers
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
def test_metrics_are_finite_numbers_or_short_texts(value, expected):
    assert manifest_module.as_json_number(value) == expected


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_all_files_may_be_read_by_whom_the_umask_allows(tmp_path, umask):
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
def test_all_files_and_folders_are_flushed_to_the_disk(path, monkeypatch):
    (path / "shards").mkdir()
    (path / "shards" / "one").touch()
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink()))
    rewrite_manifest(path)
    assert set(flushed) == {path, *path.rglob("*")}
    assert flushed[-1] == path


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_what_was_flushed_before_is_not_flushed_again(path, monkeypatch):
    flushed = []
    facts = {"model.pt": manifest_module.file_metadata(path / "model.pt")}
    (path / "manifest.json").unlink()
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink()))
    manifest_module.write_manifest(path, {}, flushed=facts)
    assert sorted(flushed[:-2]) == [path / "process_0.pt", path / "process_1.pt", path / "trainer_state.pt"]
    assert flushed[-2:] == [path / "manifest.json", path]


# --- order -------------------------------------------------------------------------------------------------------


def test_states_are_in_the_order_of_their_runs_and_of_where_these_were():
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


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no training state '.*nothing'.*`save_training_state`"):
        manifest_module.verify_state(tmp_path / "nothing")


@pytest.mark.parametrize("text", [None, "", "{}", "[]", "3", "{", '{"files": 3}', '{"format_version": 2, "files": {}}'])
def test_a_directory_without_a_manifest_is_no_state(path, text):
    (path / "manifest.json").unlink()
    if text is not None:
        (path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"no complete training state: it has no readable manifest.json"):
        manifest_module.verify_state(path)


def test_a_place_in_the_run_that_there_is_not_makes_a_manifest_unreadable(path):
    position = {**TrainingProgress().state_dict(), "phase": "nowhere"}
    rewrite_manifest(path, position=position)
    with pytest.raises(CheckpointError, match=r"no readable manifest.json"):
        manifest_module.verify_state(path)


def test_every_byte_of_a_manifest_counts(path):
    """Also those by which it would still be one, of another position for example."""
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


def test_a_state_of_a_newer_version_is_refused_as_such(path):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format_version": 3}))
    with pytest.raises(CheckpointError, match=r"written by a newer version .* format 3, .* up to 2. Update"):
        manifest_module.verify_state(path)


@pytest.mark.parametrize("name", ["trainer_state.pt", "process_0.pt", "process_1.pt", "model.pt"])
@pytest.mark.parametrize(
    ("damage", "is_seen_by_size"),
    [
        (lambda content: None, True),
        (lambda content: b"", True),
        (lambda content: content[:-1], True),
        (lambda content: content + b"x", True),
        (lambda content: b"X" + content[1:], False),
    ],
    ids=["missing", "empty", "truncated", "longer", "altered"],
)
def test_a_damaged_file_is_named(path, name, damage, is_seen_by_size):
    content = damage((path / name).read_bytes())
    (path / name).unlink()
    if content is not None:
        (path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"is damaged: {name} is missing or altered"):
        manifest_module.verify_state(path)
    saved = manifest_module.read_manifest(path)
    assert (manifest_module.find_damage(saved, compares_checksums=False) is not None) == is_seen_by_size


@pytest.mark.parametrize("name", ["trainer_state.pt", "process_1.pt"])
def test_a_file_that_every_state_has_must_be_listed(path, name):
    (path / name).unlink()
    rewrite_manifest(path)
    with pytest.raises(CheckpointError, match=rf"{name} is missing or altered"):
        manifest_module.verify_state(path)


@pytest.mark.parametrize(
    ("name", "is_refused"),
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
def test_a_file_that_is_not_listed_is_refused_if_accelerate_might_read_it(path, name, is_refused):
    (path / name).touch()
    if is_refused:
        with pytest.raises(CheckpointError, match=rf"is damaged: {name} does not belong to it"):
            manifest_module.verify_state(path)
    else:
        manifest_module.verify_state(path)


def test_a_file_that_cannot_be_read_is_damaged(path, monkeypatch):
    def fail(file):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(manifest_module, "crc32_of", fail)
    with pytest.raises(CheckpointError, match="is damaged"):
        manifest_module.verify_state(path)


def test_each_file_is_read_once(path, monkeypatch):
    names, crc32_of = [], manifest_module.crc32_of
    monkeypatch.setattr(manifest_module, "crc32_of", lambda file: (names.append(file.name), crc32_of(file))[1])
    manifest_module.verify_state(path)
    assert sorted(names) == ["model.pt", "process_0.pt", "process_1.pt", "trainer_state.pt"]


def test_nothing_is_read_if_a_size_is_wrong(path, monkeypatch):
    """Large files take long to read."""
    monkeypatch.setattr(manifest_module, "crc32_of", None)
    (path / "process_1.pt").write_text("short")
    with pytest.raises(CheckpointError, match=r"is damaged: process_1.pt is missing or altered"):
        manifest_module.verify_state(path)


def test_of_several_altered_files_the_first_is_named(path):
    for name in ("model.pt", "process_1.pt"):
        content = (path / name).read_bytes()
        (path / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(CheckpointError, match=r"is damaged: process_1.pt is missing or altered"):
        manifest_module.verify_state(path)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../outside"])
def test_files_outside_of_the_directory_are_not_looked_at(path, name):
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["checksum"]
    manifest["files"][name] = {"size": 1, "crc32": ""}
    (path / "manifest.json").write_text(manifest_module._seal(manifest))
    with pytest.raises(CheckpointError, match="no readable manifest"):
        manifest_module.verify_state(path)


def test_numbers_that_json_does_not_have_never_get_into_a_manifest(tmp_path):
    (tmp_path / "state").mkdir()
    with pytest.raises(ValueError, match="JSON compliant"):
        manifest_module.write_manifest(tmp_path / "state", {"metrics": {"loss": math.nan}})
