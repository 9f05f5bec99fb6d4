"""States whose files lie: manifests with a right checksum and wrong contents, and contents that explode when read.

Whatever is in them, an explicit path gives one clear error, `latest` falls back to an older state and says why, and the
command line shows the state. None of it takes long or much memory.
"""

from __future__ import annotations

import json
import os
import random
import resource
import socket
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from _saved import falsify_manifest, make_up_state
from _support import run_python
from pytorch_accelerated import states
from pytorch_accelerated._checkpoint import manifest as manifest_module
from pytorch_accelerated._checkpoint.files import load_file
from pytorch_accelerated._checkpoint.folder import find_newest_state
from pytorch_accelerated._checkpoint.manifest import NewerFormatError
from pytorch_accelerated.exceptions import CheckpointError

SECONDS = 60
NUM_FUZZED = int(os.environ.get("NUM_FUZZED", "400"))
"""How many random manifests, and random files, are tried: ``NUM_FUZZED=2000 pytest -k random ...``."""

GIANT = 10**15


def put(*keys, value):
    """Return a change of a manifest: set an entry, given by its path of keys."""

    def change(manifest):
        *outer, last = keys
        for key in outer:
            manifest = manifest[key]
        manifest[last] = value

    return change


COUNTS = [-1, 1.5, 2**64, 10**400, "3", True, None, [1], {}]
NOT_MAPPINGS = [None, 3, "text", [["a", 1]]]

FALSE_MANIFESTS = [
    *(put("num_processes", value=value) for value in [0, 3, 10**9, 10**18, *COUNTS]),
    *(put("format_version", value=value) for value in [0, *COUNTS]),
    *(put("generation", value=value) for value in COUNTS),
    *(put("number", value=value) for value in COUNTS),
    *(put("position", name, value=value) for name in ("num_updates", "num_batches_in_epoch") for value in COUNTS),
    *(put("position", "phase", value=value) for value in ["nowhere", None, 3, ["training"], {}]),
    put("position", "unknown", value=3),
    *(put("files", "model.pt", "size", value=value) for value in COUNTS),
    *(put("files", "model.pt", "crc32", value=value) for value in [None, 3, []]),
    *(put("files", "model.pt", value=value) for value in [None, 3, "text", []]),
    *(put("files", name, value={"size": 1, "crc32": "0"}) for name in ["", "../a", "/a", "a/../../b", "a\0b"]),
    *(put("metrics", "loss", value=value) for value in [None, [], {}, True]),
    *(put("versions", "torch", value=value) for value in [3, [], {}]),
    *(
        put(name, value=value)
        for name in ("position", "files", "metrics", "settings", "versions")
        for value in NOT_MAPPINGS
    ),
]

FALSE_TEXTS = {
    "deep": "[" * 200_000,
    "deep objects": '{"a":' * 200_000,
    "infinity": '{"format_version": Infinity}',
    "not a number": '{"format_version": NaN}',
    "huge float": '{"format_version": 1e999}',
    "huge integer": '{"format_version": ' + "9" * 100_000 + "}",
    "binary": "\udcff\udcfe",
    "too large": " " * (2**24 + 1),
}


@pytest.fixture
def folder(tmp_path):
    """A folder with an old state that is right, and a newer one."""
    make_up_state(tmp_path / "epoch_1", epochs=1)
    make_up_state(tmp_path / "epoch_2", epochs=2)
    return tmp_path


@pytest.fixture(autouse=True)
def _is_quick():
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < SECONDS


def assert_told(folder, capsys):
    """Assert that the newer state is refused with a clear error, and passed over with its reason."""
    with pytest.raises(CheckpointError) as caught:
        states.verify_state(folder / "epoch_2")
    assert "epoch_2" in str(caught.value)
    skipped = []
    assert find_newest_state(folder, skipped.append).path.name == "epoch_1"
    assert [reason for reason in skipped if "epoch_2" in reason], "the reason must be told"
    for command, place, code in (("list", folder, 0), ("verify", folder, 1), ("show", folder / "epoch_2", 1)):
        assert states.main([command, str(place)]) == code
    printed = capsys.readouterr()
    assert all(line.isprintable() for line in (printed.out + printed.err).splitlines())


@pytest.mark.parametrize("change", FALSE_MANIFESTS)
def test_a_manifest_that_lies_is_refused_and_passed_over_with_the_reason(folder, capsys, change):
    falsify_manifest(folder / "epoch_2", change)
    assert_told(folder, capsys)


@pytest.mark.parametrize("kind", FALSE_TEXTS)
def test_a_manifest_that_is_none_is_refused_and_passed_over_with_the_reason(folder, capsys, kind):
    text = FALSE_TEXTS[kind].encode("utf-8", "surrogateescape")
    (folder / "epoch_2" / "manifest.json").write_bytes(text)
    assert_told(folder, capsys)


@pytest.mark.parametrize("name", ["manifest.json", "model.pt", "trainer_state.pt", "process_0.pt"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "dangling link", "link to itself", "socket"])
def test_what_is_no_file_in_the_place_of_one_is_refused_and_not_waited_for(folder, capsys, name, kind, monkeypatch):
    path = folder / "epoch_2" / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        monkeypatch.chdir(path.parent)  # the path of a socket must be short
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(name)
    else:
        path.symlink_to(path if kind == "link to itself" else path.with_name("nothing"))
    assert_told(folder, capsys)


def test_a_giant_that_consists_of_holes_is_refused_without_being_read(folder, capsys):
    path = folder / "epoch_2" / "model.pt"
    with path.open("r+b") as file:
        try:
            file.truncate(GIANT)
        except OSError:
            file.truncate(2**42)
    falsify_manifest(folder / "epoch_2", put("files", "model.pt", "size", value=path.stat().st_size))
    assert_told(folder, capsys)


def test_a_flipped_bit_of_the_format_is_damage_and_not_a_newer_version(folder, capsys):
    manifest = folder / "epoch_2" / "manifest.json"
    for bit in range(8):
        content = manifest.read_bytes()
        at = content.index(b'"format_version": 2') + len(b'"format_version": ')
        manifest.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        assert_told(folder, capsys)
        manifest.write_bytes(content)


# --- contents ----------------------------------------------------------------------------------------------------


def doubled(value, times):
    for _ in range(times):
        value = [value, value]
    return value


def nested(times):
    value = [1]
    for _ in range(times):
        value = [value]
    return value


def in_itself():
    value = []
    value.append(value)
    return value


EXPLODING = {
    "expanded tensor": lambda: torch.zeros(1).expand(GIANT),
    "many expanded tensors": lambda: [torch.zeros(1).expand(10**8)] * 1000,
    "doubled lists": lambda: doubled(1, 60),
    "doubled dictionaries": lambda: {"a": doubled({"b": 1}, 60)},
    "deep": lambda: nested(400),
    "in itself": in_itself,
}


@pytest.mark.parametrize("kind", EXPLODING)
def test_contents_that_explode_are_refused(tmp_path, kind):
    torch.save({"state": EXPLODING[kind]()}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=r"could not be read"):
        load_file(tmp_path / "file.pt")


def test_contents_that_share_some_memory_are_loaded(tmp_path):
    weight = torch.randn(300, 300)
    contents = {"a": weight, "tied": weight, "bias": torch.zeros(1).expand(1000), "numbers": [0.5] * 200_000}
    torch.save(contents, tmp_path / "file.pt")
    loaded = load_file(tmp_path / "file.pt")
    assert torch.equal(loaded["tied"], weight)
    assert loaded["numbers"] == contents["numbers"]


def test_an_archive_that_grows_when_it_is_read_is_refused(tmp_path):
    torch.save({"weights": torch.zeros(10_000_000)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for part in plain.infolist():
            packed.writestr(part.filename, plain.read(part))
    with pytest.raises(CheckpointError, match="its parts are compressed"):
        load_file(tmp_path / "packed.pt")


# --- at random ---------------------------------------------------------------------------------------------------


def mutate(chance, content):
    """Return a changed copy of a file: bits flipped, pieces removed, repeated, exchanged or made up."""
    content = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 5))):
        at, length = chance.randrange(len(content)), chance.choice((1, 2, 8, 100))
        piece = content[at : at + length]
        match chance.randrange(5):
            case 0:
                content[at] ^= 1 << chance.randrange(8)
            case 1:
                del content[at : at + length]
            case 2:
                content[at:at] = piece * chance.choice((1, 10, 1000))
            case 3:
                content[at : at + length] = chance.randbytes(length)
            case _:
                content[at : at + length] = chance.choice((b"9" * 30, b"-1", b'"x"', b"null", b"[[[[", b"1e999", b"{}"))
        content = content or bytearray(b" ")
    return bytes(content)


def test_random_manifests_give_an_error_or_an_older_state(folder):
    chance, original = random.Random(1), (folder / "epoch_2" / "manifest.json").read_bytes()
    for number in range(NUM_FUZZED):
        if number % 2:
            (folder / "epoch_2" / "manifest.json").write_bytes(mutate(chance, original))
        else:  # with a right checksum
            text = mutate(chance, json.dumps({**json.loads(original), "checksum": None}).encode())
            try:
                entries = json.loads(text)
                entries.pop("checksum", None)
                (folder / "epoch_2" / "manifest.json").write_text(manifest_module._serialize(entries))
            except (ValueError, AttributeError, RecursionError):
                (folder / "epoch_2" / "manifest.json").write_bytes(text)
        with suppress(NewerFormatError):
            assert find_newest_state(folder).path.name in ("epoch_1", "epoch_2")


def test_random_changes_of_a_file_are_an_error_or_give_plain_values(tmp_path):
    chance = random.Random(2)
    contents = {"a": torch.arange(20.0), "b": [1, 2.5, "text", None], "c": {"d": (True, torch.ones(2, 2).bool())}}
    torch.save(contents, tmp_path / "file.pt")
    original = (tmp_path / "file.pt").read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(NUM_FUZZED):
        (tmp_path / "file.pt").write_bytes(mutate(chance, original))
        with suppress(CheckpointError):
            assert isinstance(load_file(tmp_path / "file.pt"), dict)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


# --- names -------------------------------------------------------------------------------------------------------

ODD_NAMES = [b"\xff\xfe", "ünïcode".encode(), b"\x1b[31mred", b"a\nb", b"with space", "\u202eltr".encode()]

TRAIN = """
import os, sys
import torch
sys.path.insert(0, {tests!r})
from _support import make_trainer, train
from pytorch_accelerated.callbacks import SaveBestModelCallback, SaveTrainingStateCallback
folder = os.fsdecode({folder!r})
best = SaveBestModelCallback(os.path.join(folder, "best.pt"), watch_metric="train_loss_epoch")
callbacks = [SaveTrainingStateCallback(folder), best]
for num_epochs in (1, 2):
    trainer = train(make_trainer(callbacks=callbacks), num_epochs=num_epochs, resume_from="latest")
trainer.load_checkpoint(os.path.join(folder, "best.pt"))
"""


@pytest.mark.parametrize("name", ODD_NAMES, ids=str)
def test_a_run_in_a_folder_of_an_odd_name_is_saved_and_resumed(tmp_path, name, capsys):
    folder = tmp_path / os.fsdecode(name)
    printed = run_python(TRAIN.format(tests=str(Path(__file__).parents[1] / "tools"), folder=os.fsencode(folder)))
    assert all(line.isprintable() for line in printed.splitlines())
    found = states.list_states(folder)
    assert [state.path.name for state in found][-1] == "final"
    assert [state.problem for state in found] == [None] * len(found)
    assert states.main(["verify", str(folder)]) == 0
    assert all(line.isprintable() for line in capsys.readouterr().out.splitlines())
