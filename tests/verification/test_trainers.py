"""What both checks require of ``make_trainer``."""

from __future__ import annotations

import pytest

from _support import make_dataset, make_model, make_trainer
from pytorch_accelerated.verification import check_invariance, verify_resume

both_checks = pytest.mark.parametrize("check", [check_invariance, verify_resume])


@both_checks
def test_a_trainer_instead_of_a_function_is_rejected(check):
    with pytest.raises(TypeError, match=r"`make_trainer` is of type Trainer\. Expected a function that"):
        check(make_trainer(), make_dataset(48))


@both_checks
@pytest.mark.parametrize(("func", "kind"), [(make_model, "Linear"), (lambda: None, "NoneType")])
def test_a_function_that_does_not_return_a_trainer_is_rejected(check, func, kind):
    with pytest.raises(
        TypeError, match=rf"`make_trainer` returned a value of type {kind}\. Expected a new `Trainer` on each call"
    ):
        check(func, make_dataset(48))
