"""Checks that run on your own model and data.

`check_invariance` checks that the numbers do not depend on how a batch is split. `verify_resume` checks that an
interrupted and resumed run ends like an uninterrupted one. Both train the trainers that your function creates, through
the public interface of the trainer only, and must be called on every process.
"""

# What lives here: `invariance` and `resume` hold one check each, from its function down to its comparisons; `_trainers`
# creates the trainers for both. Nothing else in the package imports this folder.

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
