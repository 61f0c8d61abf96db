"""Rows as the wire contract shows them, in JSON values: what the API answers and webhooks carry."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from shared.models import Batch, Delivery, DeliveryState, Job, JobState


def job_view(job: Job, *, queue_position: int | None = None, waits_for: str | None = None) -> dict[str, Any]:
    """The job as the contract shows it: the body of `GET /v1/jobs/{id}` and the `data` of webhooks. JSON values."""
    return {
        "id": job.id,
        "status": str(job.state),
        "model": job.model,
        "routing": {"model": job.model, "reason": job.routing_reason},
        "scale": job.scale,
        "classify": job.classify,
        "device": job.running_device or job.device,
        "priority": job.priority,
        "attempt": job.attempt,
        "created_at": iso(job.created_at),
        "started_at": iso(job.started_at),
        "finished_at": iso(job.finished_at),
        "expires_at": iso(job.expires_at),
        "deadline_at": iso(job.deadline_at),
        "cancel_requested_at": iso(job.cancel_requested_at),
        "queue_position": queue_position,
        "waits_for": waits_for,
        "progress": {
            "fraction": round(job.fraction, 4),
            "phase": job.phase,
            "bands_done": job.bands_done,
            "bands_total": job.bands_total,
            "eta_seconds": None if job.eta_seconds is None else round(job.eta_seconds, 1),
        },
        "input": {
            "width": job.input_width,
            "height": job.input_height,
            "format": job.input_format,
            "bytes": job.input_bytes,
            "sha256": job.input_sha256,
            "name": job.input_name,
        },
        "result": None
        if job.state != JobState.SUCCEEDED
        else {
            "width": job.result_width,
            "height": job.result_height,
            "format": job.format,
            "bytes": job.result_bytes,
            "sha256": job.result_sha256,
            "url": f"/v1/jobs/{job.id}/result",
        },
        "labels": job.labels if job.state == JobState.SUCCEEDED else None,
        "timings": job.timings if job.state == JobState.SUCCEEDED else None,
        "report_url": f"/v1/jobs/{job.id}/report" if has_report(job) else None,
        "preview": job.preview,
        "warnings": list(job.warnings or ()),
        "error": None
        if job.error_code is None
        else {"code": job.error_code, "detail": job.error_detail, "retryable": bool(job.error_retryable)},
        "external_id": job.external_id,
        "batch_id": job.batch_id,
    }


def has_report(job: Job) -> bool:
    """Previews have none, and neither have jobs from before there were reports."""
    return job.state == JobState.SUCCEEDED and job.report is not None


def iso(moment: datetime | None) -> str | None:
    """As the contract writes moments: UTC, milliseconds, `Z`."""
    return None if moment is None else moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def batch_view(session: Session, batch: Batch) -> dict[str, Any]:
    """The batch as the contract shows it, with a state per item in the order they were handed in."""
    items = session.execute(
        select(Job.id, Job.state, Job.external_id, Job.error_code).where(Job.batch_id == batch.id).order_by(Job.id)
    ).all()
    return {
        "id": batch.id,
        "status": "completed" if batch.remaining == 0 else "running",
        "created_at": iso(batch.created_at),
        "total": batch.total,
        "remaining": batch.remaining,
        "items": [
            {"id": i.id, "status": str(i.state), "external_id": i.external_id, "error_code": i.error_code}
            for i in items
        ],
    }


def delivery_view(delivery: Delivery) -> dict[str, Any]:
    return {
        "id": delivery.id,
        "type": delivery.type,
        "job_id": delivery.job_id,
        "batch_id": delivery.batch_id,
        "endpoint_id": delivery.endpoint_id,
        "url": delivery.url,
        "status": str(delivery.state),
        "created_at": iso(delivery.created_at),
        "next_try_at": iso(delivery.due_at) if delivery.state == DeliveryState.PENDING else None,
        "finished_at": iso(delivery.finished_at),
        "tries": list(delivery.tries),
    }
