"""The trainer stays small enough to hold in the head, and each function short enough to read in one go."""

from __future__ import annotations

import ast
import inspect
import io
import tokenize

import pytest

from _support import SOURCE, make_dataset, make_trainer, train
from pytorch_accelerated import Trainer
from pytorch_accelerated._loop import TrainingLoop
from pytorch_accelerated._saving import SavingLoop
from pytorch_accelerated._tools import TrainerTools
from pytorch_accelerated._views import RunAttribute, WritableRunAttribute

MAX_METHODS = 60
"""Methods and properties of the trainer's four classes together, next to the public ones of 0.1.61."""

MAX_ATTRIBUTES = 25
"""Attributes that a trainer has from construction on."""

METHODS_OF_0_1_61 = {
    "__init__",
    "backward_step",
    "calculate_eval_batch_loss",
    "calculate_train_batch_loss",
    "create_eval_dataloader",
    "create_scheduler",
    "create_train_dataloader",
    "device",
    "eval_epoch_end",
    "eval_epoch_start",
    "evaluate",
    "evaluation_run_end",
    "evaluation_run_start",
    "gather",
    "get_default_eval_dl_kwargs",
    "get_default_train_dl_kwargs",
    "get_model",
    "load_checkpoint",
    "load_training_state",
    "optimizer_step",
    "optimizer_zero_grad",
    "print",
    "save_checkpoint",
    "save_training_state",
    "scheduler_step",
    "train",
    "train_epoch_end",
    "train_epoch_start",
    "training_run_end",
    "training_run_epoch_end",
    "training_run_start",
}

SET_BY_PROGRAMS = {
    "_eval_dataloader",
    "_eval_dl_kwargs",
    "_loss_tracker",
    "_train_dataloader",
    "_train_dl_kwargs",
    "run_config",
}
"""The attributes of a run that programs written for 0.1.61 set on the trainer."""

MAX_FUNCTION_LINES = 30

EXCEPTIONS = {
    "_run.py:Run.__init__": "every attribute is assigned there, one a line",
}
"""Functions that may be longer, each with the reason."""

FILES = sorted(SOURCE.rglob("*.py"))
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


# --- the trainer -------------------------------------------------------------------------------------------------


def members_of_trainer():
    return {**vars(TrainerTools), **vars(TrainingLoop), **vars(SavingLoop), **vars(Trainer)}


def test_the_trainer_has_few_methods():
    methods = {
        name
        for name, member in members_of_trainer().items()
        if inspect.isfunction(member) or isinstance(member, (property, staticmethod, classmethod))
    }
    assert methods >= METHODS_OF_0_1_61
    assert len(methods - METHODS_OF_0_1_61) <= MAX_METHODS


def test_a_trainer_has_few_attributes():
    assert len(vars(make_trainer())) <= MAX_ATTRIBUTES


def test_a_run_adds_no_attribute_to_the_trainer():
    """What belongs to a run is in `Run`, so that a nested run leaves the outer one as it is."""
    trainer = make_trainer()
    before = set(vars(trainer))
    train(trainer, eval_dataset=make_dataset(4))
    trainer.evaluate(make_dataset(4))
    trainer.predict(make_dataset(4))
    assert set(vars(trainer)) == before


def test_of_the_attributes_of_a_run_only_those_can_be_set_that_programs_set():
    views = {name: member for name, member in members_of_trainer().items() if isinstance(member, RunAttribute)}
    assert {name for name, view in views.items() if isinstance(view, WritableRunAttribute)} == SET_BY_PROGRAMS


def test_private_names_of_the_trainer_have_the_prefix_that_subclasses_avoid():
    """Programs written for 0.1.61 may use any name that it did not use."""
    own = {name for name in [*members_of_trainer(), *vars(make_trainer())] if name.startswith("_") and name[1] != "_"}
    assert {name for name in own if not name.startswith("_loop_")} == {
        "_accelerator",
        "_add_epoch_loss_to_run_history",
        "_callbacks",
        "_check_eval_batch_size",
        "_clip_gradients",
        "_create_accelerator",
        "_create_callback_handler",
        "_create_run_config",
        "_eval_dataloader",
        "_eval_dl_kwargs",
        "_loss_tracker",
        "_perform_forward_and_backward_passes",
        "_prepare_model_optimizer_and_dataloaders",
        "_run_eval_epoch",
        "_run_evaluation",
        "_run_train_epoch",
        "_run_training",
        "_train_dataloader",
        "_train_dl_kwargs",
        "_update_loss_tracker",
    }


# --- functions ---------------------------------------------------------------------------------------------------


def code_lines(source: str) -> set[int]:
    """Return the numbers of the lines that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines


def function_lengths(source: str) -> dict[str, int]:
    """Return the code lines in the body of each function, without signature, docstring, blank lines and comments."""
    lines = code_lines(source)
    lengths: dict[str, int] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                visit(child, prefix)
                continue
            name = f"{prefix}{child.name}"
            if not isinstance(child, ast.ClassDef):
                body = child.body[1:] if ast.get_docstring(child) is not None else child.body
                lengths[name] = len(lines & set(range(body[0].lineno, child.end_lineno + 1))) if body else 0
            visit(child, f"{name}.")

    visit(ast.parse(source), "")
    return lengths


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_function_stays_within_its_budget(path):
    name_of_file = path.relative_to(SOURCE).as_posix()
    too_long = {
        name: length
        for name, length in function_lengths(path.read_text()).items()
        if length > MAX_FUNCTION_LINES and f"{name_of_file}:{name}" not in EXCEPTIONS
    }
    assert not too_long


def test_an_exception_from_the_budget_is_still_needed():
    lengths = {
        f"{path.relative_to(SOURCE).as_posix()}:{name}": length
        for path in FILES
        for name, length in function_lengths(path.read_text()).items()
    }
    assert {name for name in EXCEPTIONS if lengths.get(name, 0) <= MAX_FUNCTION_LINES} == set()


def test_only_code_lines_of_the_body_count():
    source = '''
class A:
    def f(
        self,
        x,
    ):
        """Doc.

        String.
        """
        # a comment
        y = (
            x
        )

        def g():
            return y

        return g
    def empty(self):
        """Doc."""
'''
    assert function_lengths(source) == {"A.f": 6, "A.f.g": 1, "A.empty": 0}
