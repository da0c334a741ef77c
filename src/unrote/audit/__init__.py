"""What a model memorized, measured from its images: neighbours, ratios, held-out control, quality."""

from unrote.audit.result import AuditReport
from unrote.audit.run import audit

__all__ = ["AuditReport", "audit"]
