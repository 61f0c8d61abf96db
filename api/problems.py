"""One table: our errors -> HTTP status and RFC 9457 body. Nothing else decides what an error looks like outside.

A body has `type` (`/problems/<code>`, an address this service answers), `title`, `status`, `detail`, `code`,
`retryable` and the error's facts as further members. It never has a stack trace, and it is never HTML.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flask import Flask, Response, g, jsonify, request
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from shared.errors import DiskFull, EnlargerError, InternalError, NotFound, Unauthorized
from shared.telemetry import log

MIME_TYPE = "application/problem+json"
DEFAULT_RETRY_AFTER_SECONDS = 5


@dataclass(frozen=True)
class Problem:
    """What a code means on the wire: the same words at every occurrence."""

    status: int
    title: str
    meaning: str


TABLE: Mapping[str, Problem] = {
    # The request.
    "bad-request": Problem(400, "The request cannot be read", "Its syntax is wrong: JSON, multipart or a header."),
    "invalid-request": Problem(
        422, "The request asks for something there is not", "`errors` names each field that is wrong, and why."
    ),
    "unauthorized": Problem(401, "Nobody is signed in", "Send a live API key as `Authorization: Bearer <key>`."),
    "forbidden": Problem(403, "This key may not do that", "The key lacks the scope, or the page's token is missing."),
    "not-found": Problem(
        404, "There is nothing here", "The address is wrong, or what it names belongs to another key."
    ),
    "method-not-allowed": Problem(405, "This address does not take that method", "See `Allow` and /docs."),
    "unsupported-media-type": Problem(
        415,
        "The body is of a kind that is not read here",
        "Send multipart/form-data or application/json, as /docs says.",
    ),
    "http-error": Problem(400, "The request cannot be answered", "`status` and `detail` say why."),
    "gone": Problem(410, "It was here and has been swept", "Results are kept for a time; submit again."),
    "blob-missing": Problem(410, "The picture is not in storage any more", "Submit it again."),
    "rate-limited": Problem(429, "Too many requests", "Wait as long as `Retry-After` says."),
    "idempotency-mismatch": Problem(
        422, "The Idempotency-Key was used for another request", "Take a fresh key for each different request."
    ),
    "idempotency-in-progress": Problem(
        409, "The first request with this Idempotency-Key is still being answered", "Send it again a little later."
    ),
    # The picture.
    "invalid-image": Problem(422, "The picture cannot be read", "The file is broken, cut short or empty."),
    "unsupported-format": Problem(
        415, "The format is not one that is read or written", "`formats` names those that are."
    ),
    "input-too-large": Problem(
        413, "The picture handed in is too large", "In bytes (`limit_bytes`) or in pixels (`limit_px`)."
    ),
    "output-too-large": Problem(422, "The result would be too large", "Ask for a smaller scale."),
    "format-cannot-hold-size": Problem(
        422, "The format cannot hold a result of this size", "Ask for png or tiff, or for a smaller scale."
    ),
    "blocked-url": Problem(
        422, "The URL leads to an address that is not connected to", "Private addresses need the operator's leave."
    ),
    "fetch-failed": Problem(422, "The picture could not be fetched", "The source did not answer with 200 in time."),
    # The job.
    "queue-full": Problem(429, "Too many jobs of this key are waiting", "Submit again when some have run."),
    "job-not-cancelable": Problem(409, "The job has ended already", "Only queued and running jobs can be canceled."),
    "job-not-retryable": Problem(409, "The job cannot be retried", "Only failed, canceled and expired jobs can be."),
    "job-not-finished": Problem(
        409, "The job has not finished", "Wait for it: `Prefer: wait=60`, events or a webhook."
    ),
    "job-has-no-result": Problem(409, "The job has ended without a picture", "Its `error` says why."),
    "rendition-not-made": Problem(
        409, "The rendition has not been made", "Its own address says whether it is still being made, or why it failed."
    ),
    "model-unavailable": Problem(422, "There is no such model", "`GET /v1/models` lists those there are."),
    # What a job fails with; they stand in its `error` and are no answers to a request.
    "deadline-exceeded": Problem(504, "The deadline passed", "Ask for a later one, or retry when fewer jobs wait."),
    "out-of-memory": Problem(507, "No device has the memory", "Hand in a smaller picture."),
    "bad-output": Problem(500, "The network's answer was no picture", "Retry the job; tell the operator."),
    "worker-lost": Problem(500, "The worker was lost", "It died or hung with this job, more than once; retry the job."),
    # The service.
    "internal": Problem(500, "Something went wrong here", "The operator finds it in the log by `request_id`."),
    "unavailable": Problem(503, "A server that is needed does not answer", "Send the request again."),
    "storage-unavailable": Problem(503, "Object storage does not answer", "Send the request again."),
    "broker-unavailable": Problem(503, "Redis does not answer", "Send the request again."),
    "database-unavailable": Problem(503, "The database does not answer", "Send the request again."),
    "disk-full": Problem(503, "This host has no room for the picture", "Send the request again when room was made."),
    "too-many-streams": Problem(
        503, "Too many event streams are open", "Poll the job, or open the stream again a little later."
    ),
}

# What Flask and Werkzeug raise by themselves, in our words. 413 has facts and is made below.
_HTTP_CODES = {
    400: "bad-request",
    401: "unauthorized",
    403: "forbidden",
    404: "not-found",
    405: "method-not-allowed",
    410: "gone",
    413: "input-too-large",
    415: "unsupported-media-type",
    429: "rate-limited",
}
# These may be repeated in a moment: their answers say when.
_STATUSES_WITH_RETRY_AFTER = frozenset({429, 503})


def install(app: Flask) -> None:
    """Every error of the app leaves as a problem: ours, Werkzeug's and those nobody foresaw."""
    app.register_error_handler(EnlargerError, answer)
    app.register_error_handler(HTTPException, _answer_http)
    app.register_error_handler(Exception, _answer_unforeseen)
    app.add_url_rule("/problems/<code>", "problem", _explain)


def answer(error: EnlargerError) -> Response:
    """The error as a response."""
    # A code that is not for the outside (a stale attempt, a stack that did not start) has come where it should not.
    problem = TABLE.get(error.code, TABLE["internal"])
    if problem.status >= 500 and not isinstance(error, InternalError):
        log.error("http.problem", code=error.code, detail=error.detail, path=request.path)
    response = _response(problem, error.code, error.detail, problem.status, error.retryable, error.facts)
    retry_after = error.facts.get("retry_after_seconds")
    if retry_after is None and (error.retryable and problem.status in _STATUSES_WITH_RETRY_AFTER):
        retry_after = DEFAULT_RETRY_AFTER_SECONDS
    if retry_after is not None:
        response.headers["Retry-After"] = str(max(1, round(retry_after)))
    if isinstance(error, Unauthorized):
        response.headers["WWW-Authenticate"] = 'Bearer realm="enlarger"'
    return response


def _answer_http(error: HTTPException) -> Response:
    status = error.code or 500
    if status < 400:
        # A redirect that a converter or a page raised: not an error.
        found = error.get_response()
        return Response(found.get_data(), status, found.headers)
    code = _HTTP_CODES.get(status, "internal" if status >= 500 else "http-error")
    facts: dict[str, Any] = {}
    detail = error.description or TABLE[code].meaning
    if isinstance(error, RequestEntityTooLarge):
        # The request's own cap, where a route has set one.
        facts = {"limit_bytes": request.max_content_length}
        detail = f"The body is larger than {request.max_content_length:,} bytes."
    response = _response(TABLE[code], code, detail, status, False, facts)
    for name, value in error.get_headers(request.environ):
        if name in ("Allow", "Retry-After", "WWW-Authenticate"):
            response.headers[name] = value
    return response


def _answer_unforeseen(error: Exception) -> Response:
    if isinstance(error, OSError) and error.errno in DiskFull.ERRNOS:
        return answer(DiskFull())
    # Flask hands this the original exception; the log has its traceback, the customer the request's id.
    log.error("http.internal_error", path=request.path, method=request.method, exc_info=error)
    return answer(InternalError("Something went wrong on our side; the operator finds it by the request's id."))


def _response(
    problem: Problem, code: str, detail: str, status: int, retryable: bool, facts: Mapping[str, Any]
) -> Response:
    body = {
        "type": f"/problems/{code}",
        "title": problem.title,
        "status": status,
        "detail": detail,
        "code": code,
        "retryable": retryable,
        **facts,
        "request_id": g.get("request_id"),
    }
    response = jsonify(body)
    response.status_code = status
    response.mimetype = MIME_TYPE
    return response


def _explain(code: str) -> Response:
    """What a problem's `type` leads to."""
    problem = TABLE.get(code)
    if problem is None:
        raise NotFound("There is no such problem.", codes=sorted(TABLE))
    return jsonify({"code": code, "status": problem.status, "title": problem.title, "meaning": problem.meaning})
