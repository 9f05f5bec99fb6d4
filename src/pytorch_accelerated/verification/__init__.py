"""Checks that run on your own model and data.

`check_invariance` checks that the numbers do not depend on how a batch is split. `verify_resume` checks that an
interrupted and resumed run ends like an uninterrupted one. Each has a module of its own, from the function down to the
comparisons; both train trainers that your function creates, and use only what is public in the trainer.
"""

from pytorch_accelerated.verification.invariance import (
    SPLIT_DEPENDENT_MODULES,
    InvarianceReport,
    SplitDifference,
    check_invariance,
)
from pytorch_accelerated.verification.resume import ResumeDifference, ResumeReport, verify_resume

__all__ = [
    "SPLIT_DEPENDENT_MODULES",
    "InvarianceReport",
    "ResumeDifference",
    "ResumeReport",
    "SplitDifference",
    "check_invariance",
    "verify_resume",
]
