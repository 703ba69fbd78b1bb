"""An audit log as the settings have it, for the calls of a server."""

from __future__ import annotations

from guard_service.audit.entries import Asker
from guard_service.audit.keys import AuditError, read_keys
from guard_service.audit.log import Log
from guard_service.audit.recording import Audit
from guard_service.audit.writer import Writer
from guard_service.config import Settings
from guard_service.interceptors import CALL
from guard_service.metrics import AuditMetrics


def open_audit(settings: Settings, metrics: AuditMetrics) -> Audit | None:
    """None where none is set. To be closed by its writer. Raises OSError that says what to do."""
    if settings.audit is None or settings.audit_key is None:
        return None
    try:
        keys = read_keys(settings.audit_key)
        payload_key = None
        if settings.audit_payload_key is not None:
            from guard_service.audit.payload import read_public

            payload_key = read_public(settings.audit_payload_key)
        log = Log(settings.audit, keys, settings.audit_segment_bytes, settings.audit_fsync)
    except AuditError as error:
        raise OSError(str(error)) from error
    metrics.reached.set_function(lambda: log.reached.lines)
    writer = Writer(log, settings.audit_failure == "refuse", metrics)
    return Audit(writer, keys.prints, asker, payload_key)


def asker() -> Asker:
    """The call in progress."""
    call = CALL.get()
    return Asker(
        call.rpc,
        call.request_id,
        call.tenant,
        call.spot.trace_id if call.spot is not None else "",
    )
