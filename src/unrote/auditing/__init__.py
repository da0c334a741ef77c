"""What a model memorized, measured from its images: neighbours, ratios, held-out control, quality."""

from unrote.auditing.result import AuditReport
from unrote.auditing.run import audit

__all__ = ["AuditReport", "audit"]
