"""Proofs on your own model and data.

`check_invariance` shows that the numbers do not depend on how the work is split, `verify_resume` that a run which was
interrupted ends as if it had not been.
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
