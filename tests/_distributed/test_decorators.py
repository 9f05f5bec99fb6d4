"""The decorators that choose processes, in one process; two real processes are in `tests/distributed/`."""

from __future__ import annotations

import pytest
from accelerate.state import PartialState

from pytorch_accelerated.utils import local_process_zero_first, local_process_zero_only, world_process_zero_only

DECORATORS = {"RANK": world_process_zero_only, "LOCAL_RANK": local_process_zero_only}
"""By the environment variable that holds the rank they look at."""


@pytest.mark.parametrize("variable", DECORATORS)
@pytest.mark.parametrize(("rank", "expected"), [(None, "called"), ("0", "called"), ("1", None)])
def test_without_an_accelerator_the_rank_is_read_from_the_environment(variable, rank, expected, monkeypatch):
    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.delenv(variable, raising=False)
    if rank is not None:
        monkeypatch.setenv(variable, rank)
    assert DECORATORS[variable](lambda: "called")() == expected
    assert PartialState._shared_state == {}, "the query initialized the process with settings that nobody chose"


@pytest.mark.parametrize("variable", DECORATORS)
def test_with_an_accelerator_its_rank_is_used(variable, monkeypatch, accelerator):
    monkeypatch.setenv(variable, "1")
    assert DECORATORS[variable](lambda: "called")() == "called"


@pytest.mark.parametrize("decorate", [*DECORATORS.values(), local_process_zero_first])
def test_a_decorated_function_keeps_its_name_arguments_and_result(decorate, accelerator):
    @decorate
    def function(a, *, b=2):
        """Add."""
        return a + b

    assert function(1, b=4) == 5
    assert (function.__name__, function.__doc__) == ("function", "Add.")


@pytest.mark.parametrize("decorate", [*DECORATORS.values(), local_process_zero_first])
def test_a_method_can_be_decorated(decorate, accelerator):
    class Callback:
        name = "report"

        @decorate
        def on_training_run_end(self, trainer, **kwargs):
            return self.name, trainer, kwargs

    assert Callback().on_training_run_end("trainer", a=1) == ("report", "trainer", {"a": 1})
