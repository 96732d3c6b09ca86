"""Prove a fine-tune: by digests, and by running every artefact against a float64 reference.

`verify` does both, `prove` the digests alone, and `doctor` says what this machine can run. In the
folders: `digests/` reads every byte, `parity/` judges outputs, `runners/` runs one runtime each,
`environment/` looks at this machine, and `gpu/` proves and measures a machine with a GPU.

Names load when first used, so that digests need no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kilodelta.lazy import lazy

if TYPE_CHECKING:
    from kilodelta.verify.digests.proof import Proof as Proof
    from kilodelta.verify.digests.proof import prove as prove
    from kilodelta.verify.environment.doctor import Examination as Examination
    from kilodelta.verify.environment.doctor import doctor as doctor
    from kilodelta.verify.parity.report import Report as Report
    from kilodelta.verify.parity.result import Result as Result
    from kilodelta.verify.verification import Verification as Verification
    from kilodelta.verify.verification import verify as verify

_WHERE = {
    "Examination": "kilodelta.verify.environment.doctor",
    "Proof": "kilodelta.verify.digests.proof",
    "Report": "kilodelta.verify.parity.report",
    "Result": "kilodelta.verify.parity.result",
    "Verification": "kilodelta.verify.verification",
    "doctor": "kilodelta.verify.environment.doctor",
    "prove": "kilodelta.verify.digests.proof",
    "verify": "kilodelta.verify.verification",
}

__all__ = [
    "Examination",
    "Proof",
    "Report",
    "Result",
    "Verification",
    "doctor",
    "prove",
    "verify",
]

__getattr__, __dir__ = lazy(__name__, _WHERE)
