"""What works of a connection, and why the rest does not: every endpoint tried alone.

Owns: the look at each endpoint (`endpoint`, `sample`, `certificate`), what was found (`findings`), and what
it means together (`causes` and `verdict`, without I/O). Rule: it disturbs nobody: its own client id, a clean
session, no will, nothing retained, and nothing learned for or taken from those who connect for real.
"""

from .diagnose import Plan, diagnose
from .findings import Diagnosis, Finding, Step, StepName, document

__all__ = ["Diagnosis", "Finding", "Plan", "Step", "StepName", "diagnose", "document"]
