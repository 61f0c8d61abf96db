"""The `curl` command that hands in a picture with the settings of a job: for a person to read, copy and run."""

from __future__ import annotations

import shlex

from shared.deliveries import TERMINAL_EVENTS
from shared.models import Job
from shared.pictures import format_named

# What the contract takes for granted: left out, so that what is written down is what matters.
_USUAL = {
    "classify": "false",
    "quality": "95",
    "lossless": "false",
    "metadata": "safe",
    "alpha": "model",
    "background": "#ffffff",
    "device": "auto",
    "priority": "interactive",
}


def command(job: Job, base_url: str) -> str:
    """For a shell in which ENLARGER_API_KEY is set and the picture lies under its own name."""
    fields = {
        "model": job.model,
        "scale": str(job.scale),
        "format": job.format,
        "classify": _flag(job.classify),
        "quality": str(job.quality),
        "lossless": _flag(job.lossless),
        "metadata": job.metadata_policy,
        "alpha": job.alpha,
        "background": job.background,
        "device": job.device,
        "priority": job.priority,
        "ttl_seconds": str(job.ttl_seconds),
    }
    optional = {
        "deadline_seconds": None if job.deadline_seconds is None else str(job.deadline_seconds),
        "external_id": job.external_id,
        "webhook_url": job.webhook_url,
        "webhook_events": None
        if job.webhook_url is None or set(job.webhook_events) == set(TERMINAL_EVENTS)
        else ",".join(job.webhook_events),
    }
    fields |= {name: value for name, value in optional.items() if value is not None}
    parts = [
        f"curl -sS {shlex.quote(base_url.rstrip('/') + '/v1/jobs')}",
        '-H "Authorization: Bearer $ENLARGER_API_KEY"',
        f"-F {shlex.quote(f'image=@{_quoted(_picture_name(job))}')}",
        # --form-string: a value that begins with @ or < is a value, and no file.
        *(
            f"--form-string {shlex.quote(f'{name}={value}')}"
            for name, value in fields.items()
            if _USUAL.get(name) != value
        ),
    ]
    return " \\\n  ".join(parts)


def _picture_name(job: Job) -> str:
    return job.input_name or f"picture{format_named(job.input_format).extension}"


def _quoted(name: str) -> str:
    """As curl reads the name of a file in a form: in double quotes where it holds what would end it."""
    if not set(name) & set(',;"\\'):
        return name
    return '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _flag(value: bool) -> str:
    return "true" if value else "false"
