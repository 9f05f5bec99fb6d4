"""Who may import whom: the floors of the package, from the ground up; and that importing it changes nothing."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from _support import SOURCE, run_python

PACKAGE = "pytorch_accelerated"
FILES = sorted(SOURCE.rglob("*.py"))
OPTIONAL = {
    "matplotlib",
    "sklearn",
    "tensorboard",
    "torchmetrics",
    "timm",
    "transformers",
    "wandb",
    "torchvision",
    "mlflow",
    "pandas",
    "IPython",
}

FLOORS = [
    {"exceptions", "_types", "_messages", "_proxy", "_console", "progress", "time_ledger"},
    {"_hints", "_tensors", "_views", "metrics", "run_config"},
    {"_arguments", "_data", "_means", "_measuring"},
    {"_accumulation", "_history", "_models", "_step"},
    {"_distributed", "_optimizers", "_plots", "diagnosis", "finetuning"},
    {"_predictions", "_requests", "summary", "tracking", "utils"},
    {"_checkpoint"},
    {"_recording", "schedulers", "states"},
    {"_position", "_scheduling"},
    {"_run", "plotting"},
    {"_tools", "callbacks"},
    {"_loop", "_start"},
    {"_saving"},
    {"trainer"},
    {"verification", "__init__"},
]
"""The modules and rooms (folders) of each floor. A module imports from its own room and the floors below."""

PAIRS = [{"_means", "_measuring"}, {"_distributed", "_optimizers"}]
"""What shares a floor, and may import from each other."""

MAY_IMPORT_ACCELERATE = {
    "__init__.py",
    "trainer.py",
    "_distributed/accelerator.py",
    "_distributed/collectives.py",
    "_distributed/copies.py",
    "_distributed/decorators.py",
    "_distributed/fast_path.py",
    "_distributed/precision.py",
    "_distributed/registry.py",
    "_distributed/trackers.py",
}
MAY_NAME_ACCELERATE_IN_TYPES = {
    *MAY_IMPORT_ACCELERATE,
    "_tools.py",
    "_checkpoint/portable.py",
    "_checkpoint/collecting.py",
    "_checkpoint/parts.py",
    "_checkpoint/reading.py",
    "_checkpoint/restoring.py",
    "_start/resuming.py",
    "_start/updates.py",
}


def top_of(module: str) -> str:
    """Return the room of a module, or the module itself, given as path below the package: ``callbacks.saving``."""
    return module.partition(".")[0] or "__init__"


def floor_of(module: str) -> int:
    """Return the floor of a module or room."""
    top = top_of(module)
    for number, floor in enumerate(FLOORS):
        if top in floor:
            return number
    pytest.fail(f"{module} is on no floor: add it to `FLOORS`, where it belongs")


def module_of(path: Path) -> str:
    """Return the dotted name below the package; empty for the package itself."""
    parts = list(path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_in(path: Path) -> Iterator[tuple[str, bool, bool]]:
    """Yield each imported module, whether only for type checking, and whether inside a function."""

    def visit(node: ast.AST, is_typing: bool, is_local: bool) -> Iterator[tuple[str, bool, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, is_typing, is_local) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno}: imports are absolute"
                submodules = [f"{child.module}.{alias.name}" for alias in child.names]
                known = [name for name in submodules if path_of(name) is not None]
                names = known if len(known) == len(submodules) else [*known, child.module]
                yield from ((name, is_typing, is_local) for name in names)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for part in child.body:
                    yield from visit(ast.Module([part], []), True, is_local)
                for part in child.orelse:
                    yield from visit(ast.Module([part], []), is_typing, is_local)
            else:
                is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from visit(child, is_typing, is_local or is_function)

    yield from visit(ast.parse(path.read_text()), False, False)


def path_of(module: str) -> Path | None:
    """Return the file of a module of the package."""
    if module.partition(".")[0] != PACKAGE:
        return None
    base = SOURCE.joinpath(*module.split(".")[1:])
    candidates = (base.with_suffix(".py"), base / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


def ids(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_a_module_imports_only_from_its_own_room_and_the_floors_below(path):
    own = top_of(module_of(path))
    for name, is_typing, _ in imports_in(path):
        if name.partition(".")[0] == PACKAGE and not is_typing:
            other = top_of(name.partition(".")[2])
            is_below = floor_of(other) < floor_of(own)
            assert is_below or own == other or {own, other} in PAIRS, f"{ids(path)} imports {name}"


def test_every_pair_is_on_one_floor_and_needed():
    found = {
        frozenset({top_of(module_of(path)), top_of(name.partition(".")[2])})
        for path in FILES
        for name, is_typing, _ in imports_in(path)
        if name.partition(".")[0] == PACKAGE and not is_typing
    }
    for pair in PAIRS:
        assert len({floor_of(top) for top in pair}) == 1
        assert frozenset(pair) in found


def test_every_module_that_the_floors_and_the_exceptions_name_exists():
    modules = {module_of(path).partition(".")[0] or "__init__" for path in FILES}
    assert set().union(*FLOORS) == modules
    assert sum(map(len, FLOORS)) == len(modules)
    files = {ids(path) for path in FILES}
    assert files >= MAY_NAME_ACCELERATE_IN_TYPES


def test_every_exception_for_accelerate_is_needed():
    importing = {ids(path) for path in FILES for name, *_ in imports_in(path) if name.partition(".")[0] == "accelerate"}
    assert importing == MAY_NAME_ACCELERATE_IN_TYPES


@pytest.mark.parametrize(
    "room",
    sorted(path.name for path in SOURCE.glob("_[a-z]*") if path.is_dir()),
)
def test_a_room_has_an_empty_init_and_a_readme_with_a_line_for_each_file(room):
    folder = SOURCE / room
    assert (folder / "__init__.py").read_text() == ""
    text = (folder / "README.md").read_text()
    files = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert [name for name in files if f"`{name}`" not in text] == []


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_accelerate_is_imported_in_few_places(path):
    for name, is_typing, _ in imports_in(path):
        if name.partition(".")[0] == "accelerate":
            assert ids(path) in (MAY_NAME_ACCELERATE_IN_TYPES if is_typing else MAY_IMPORT_ACCELERATE)


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_optional_packages_are_imported_in_the_function_that_needs_them(path):
    for name, is_typing, is_local in imports_in(path):
        if name.partition(".")[0] in OPTIONAL:
            assert is_typing or is_local, f"{ids(path)} imports {name} at its top"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_callbacks_and_schedulers_name_the_trainer_for_type_checking_only(path):
    if module_of(path).partition(".")[0] in ("callbacks", "schedulers"):
        named = [is_typing for name, is_typing, _ in imports_in(path) if name == f"{PACKAGE}.trainer"]
        assert all(named)


def test_no_module_imports_itself_through_others():
    graph = {
        path: {path_of(name) for name, is_typing, is_local in imports_in(path) if not (is_typing or is_local)} - {None}
        for path in FILES
    }
    # A module in a folder loads the `__init__` of the folder first, which is not an import of its own.
    done: set[Path] = set()

    def visit(path: Path, trail: list[Path]) -> None:
        assert path not in trail, " -> ".join(map(ids, [*trail, path]))
        if path not in done:
            for imported in graph[path]:
                visit(imported, [*trail, path])
            done.add(path)

    for path in FILES:
        visit(path, [])


def test_the_rules_see_an_import_in_every_place():
    assert ("accelerate", True, False) in list(imports_in(SOURCE / "_tools.py"))
    found = list(imports_in(SOURCE / "_loop.py"))
    assert (f"{PACKAGE}._data.rng", False, False) in found
    assert (f"{PACKAGE}.callbacks", True, False) in found
    assert ("safetensors", False, True) in list(imports_in(SOURCE / "_checkpoint" / "reading.py"))


def test_importing_the_package_changes_no_random_state_no_logging_and_imports_nothing_optional():
    report = json.loads(
        run_python(
            """
import hashlib, json, logging, os, pickle, random, signal, sys, warnings
import numpy, torch, accelerate

def states():
    parts = (torch.get_rng_state().numpy().tobytes(), pickle.dumps(numpy.random.get_state()), repr(random.getstate()))
    loggers = {name: (logger.level, logger.disabled, logger.propagate, len(logger.handlers))
               for name, logger in logging.root.manager.loggerDict.items() if isinstance(logger, logging.Logger)}
    root = (logging.root.level, logging.root.handlers[:], logging.root.disabled, logging.root.manager.disable)
    return {
        "rng": hashlib.sha256(repr(parts).encode()).hexdigest(),
        "loggers": repr(sorted(loggers.items())),
        "root logger": repr(root),
        "environment": repr(sorted(os.environ.items())),
        "warning filters": repr(warnings.filters),
        "signal": repr(signal.getsignal(signal.SIGINT)),
        "threads": repr((torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())),
        "accelerator": repr(accelerate.state.AcceleratorState._shared_state),
    }

before, modules = states(), set(sys.modules)
import pytorch_accelerated
from pytorch_accelerated import callbacks, finetuning, run_config, schedulers, tracking, trainer, utils
after = states()
# A logger that is merely created, by any module, is not a setting.
changed = [name for name in before if before[name] != after[name] and name != "loggers"]
levels = {name for name in logging.root.manager.loggerDict if name.startswith("pytorch_accelerated")}
print(json.dumps({"changed": changed, "new": sorted(set(sys.modules) - modules), "all": sorted(sys.modules),
                  "own_loggers": sorted(levels)}))
""",
            has_imported_nothing=True,
            PYTHONWARNINGS="error",
        )
    )
    assert report["changed"] == []
    assert report["own_loggers"] == []
    assert OPTIONAL & {name.partition(".")[0] for name in report["all"]} == set()
    assert {name.partition(".")[0] for name in report["new"]} <= {PACKAGE, "tqdm", "signal", "difflib"}
