"""`pytorch_accelerated.states`: the public functions about training states, and the command line."""

from __future__ import annotations

import ast
import itertools
import shutil

import pytest

from _saved import make_up_state
from _starting import run_from_scratch
from _support import SOURCE
from pytorch_accelerated import states
from pytorch_accelerated.exceptions import CheckpointError


@pytest.fixture
def folder(tmp_path):
    metrics = {"eval_loss_epoch": 0.123456789, "text": "nan"}
    make_up_state(tmp_path / "epoch_1", epochs=1, metrics={"eval_loss_epoch": 0.5})
    make_up_state(tmp_path / "step_7", epochs=1, batches=3, metrics=metrics, settings={"sampler": "RandomSampler"})
    return tmp_path


def run(capsys, *arguments):
    """Return the exit code, stdout and stderr."""
    code = states.main([*map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def damage(state):
    content = (state / "process_0.pt").read_bytes()
    (state / "process_0.pt").write_bytes(b"X" + content[1:])


# --- functions ---------------------------------------------------------------------------------------------------


def test_states_are_listed_and_the_newest_is_found(folder):
    assert [state.path.name for state in states.list_states(str(folder))] == ["epoch_1", "step_7"]
    assert states.find_latest_state(str(folder)) == folder / "step_7"
    damage(folder / "step_7")
    assert states.find_latest_state(folder) == folder / "epoch_1"
    shutil.rmtree(folder / "epoch_1")
    assert states.find_latest_state(folder) is None


def test_listing_and_finding_states_change_nothing(folder):
    """A run may be saving there at the same time."""
    (folder / "step_7").rename(folder / ".step_7.old")
    make_up_state(folder / ".step_9.tmp")
    states.list_states(folder)
    assert states.find_latest_state(folder) == folder / "epoch_1"
    assert {path.name for path in folder.iterdir()} == {"epoch_1", ".step_7.old", ".step_9.tmp"}


def test_verify_state_finds_an_altered_file(folder):
    assert states.verify_state(str(folder / "step_7")).position.num_batches_in_epoch == 3
    damage(folder / "step_7")
    with pytest.raises(CheckpointError, match=r"step_7' is damaged: process_0\.pt is missing or altered"):
        states.verify_state(folder / "step_7")


# --- the command line --------------------------------------------------------------------------------------------


def test_list_prints_the_states_oldest_first_with_their_problems(folder, capsys):
    (folder / "epoch_9").mkdir()
    (folder / "step_7" / "process_0.pt").unlink()
    code, printed, _ = run(capsys, "list", folder)
    assert code == 0
    header, *rows = (line.split() for line in printed.splitlines())
    assert header == ["name", "epochs", "batches", "updates", "size", "metrics", "files"]
    assert rows[0][:4] == ["epoch_9", "?", "?", "?"]
    assert " ".join(rows[0]).endswith("it has no readable manifest.json (it is missing). Use an older state.")
    assert rows[1] == ["epoch_1", "1", "0", "0", "69", "B", "eval_loss_epoch=0.5", "complete"]
    assert rows[2][:4] == ["step_7", "1", "3", "0"]
    assert " ".join(rows[2][6:]) == "eval_loss_epoch=0.123457 text=nan NOT VALID: process_0.pt is missing or altered"


def test_verify_checks_one_state_or_all_in_a_folder(folder, capsys):
    assert run(capsys, "verify", folder) == (0, f"{folder / 'epoch_1'}: valid\n{folder / 'step_7'}: valid\n", "")
    damage(folder / "step_7")
    code, printed, _ = run(capsys, "verify", folder)
    first, second = printed.splitlines()
    assert code == 1
    assert first == f"{folder / 'epoch_1'}: valid"
    assert second.startswith(f"{folder / 'step_7'}: The training state")
    assert "is damaged: process_0.pt is missing or altered" in second
    assert run(capsys, "verify", folder / "epoch_1")[0] == 0
    assert run(capsys, "verify", folder / "step_7")[0] == 1


def test_show_prints_the_whole_manifest(folder, capsys):
    code, printed, _ = run(capsys, "show", folder / "step_7")
    lines = [line.split() for line in printed.splitlines()]
    assert code == 0
    for line in (
        ["files", "are", "complete"],
        ["position"],
        ["num_batches_in_epoch", "3"],
        ["eval_loss_epoch", "0.123456789"],
        ["sampler", "RandomSampler"],
        ["model.pt", "18", "B"],
    ):
        assert line in lines
    (folder / "step_7" / "model.pt").unlink()
    code, printed, _ = run(capsys, "show", folder / "step_7")
    assert code == 1
    assert "NOT VALID: model.pt is missing or altered" in printed


@pytest.mark.parametrize("command", ["list", "verify", "show"])
def test_a_missing_path_is_an_error(tmp_path, capsys, command):
    code, printed, error = run(capsys, command, tmp_path / "nothing")
    assert (code, printed) == (1, "")
    assert error.startswith("error: ")
    assert "nothing'" in error


def test_a_folder_without_states_can_be_listed_but_not_verified(tmp_path, capsys):
    code, printed, error = run(capsys, "verify", tmp_path)
    assert (code, printed) == (1, "")
    assert error.startswith(
        f"error: There is no training state in '{tmp_path}'. Expected a training state, or a folder"
    )
    assert run(capsys, "list", tmp_path)[0] == 0


def test_the_command_runs_as_a_module(folder):
    command = ("-m", "pytorch_accelerated.states", "verify", str(folder))
    result = run_from_scratch(*command)
    assert (result.returncode, result.stderr) == (0, "")
    damage(folder / "epoch_1")
    assert run_from_scratch(*command).returncode == 1


def imported_modules(path):
    """Return the names of all modules that a file imports, at its top and in functions, and those of their packages."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
    return names | {parent for name in names for parent in itertools.accumulate(name.split("."), "{}.{}".format)}


def path_of_module(name):
    """Return the file of a module of this library; ``None`` for another name."""
    base = SOURCE.joinpath(*name.split(".")[1:])
    candidates = (base.with_suffix(".py"), base / "__init__.py") if name.startswith("pytorch_accelerated.") else ()
    return next((path for path in candidates if path.is_file()), None)


def test_the_command_needs_no_module_that_imports_accelerate():
    """A lighter `__init__` of the package would therefore make the command fast."""
    waiting, seen = ["pytorch_accelerated.states"], set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        modules = imported_modules(path_of_module(name))
        assert "accelerate" not in modules, name
        waiting += [module for module in modules - seen if path_of_module(module) is not None]
    rooms = {name.removeprefix("pytorch_accelerated.") for name in seen}
    assert {"_checkpoint", "_checkpoint.files", "_checkpoint.folder", "_checkpoint.manifest"} <= rooms
    assert not {name for name in rooms if name.startswith(("_distributed", "callbacks", "trainer"))}
