"""Signs and sends one Delivery (Standard Webhooks 1.0), and records what came of it.

A receiver may hear of an event twice (a worker that dies between the answer and its record), always under the same
`webhook-id`; it never hears of one through an address Enlarger does not connect to.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.orm import Session
from standardwebhooks.webhooks import Webhook

from shared import deliveries
from shared.db import Database, clock
from shared.deliveries import DeliveryClaim
from shared.errors import BlockedUrl, FetchFailed
from shared.models import DeliveryState
from shared.outgoing import GuardedClient
from shared.settings import Settings
from shared.telemetry import log, tallies

GONE = 410

LEASE_OVER_TIMEOUT_SECONDS = 45
"""A name server that does not answer comes before the timeout of a try, and writing down what came of it after."""


@dataclass(frozen=True)
class Reply:
    """What one try came to."""

    status: int | None
    """Of the receiver's answer; None where there was none."""
    error: str | None
    """None where it was delivered."""
    seconds: float
    retry_after_seconds: float | None = None
    can_be_tried_again: bool = True


def signed_headers(delivery_id: str, body: str, secret: str, sent_at: datetime) -> dict[str, str]:
    """The three headers of Standard Webhooks 1.0, for a body sent at that moment; `secret` is `whsec_...`."""
    return {
        "webhook-id": delivery_id,
        "webhook-timestamp": str(int(sent_at.timestamp())),
        "webhook-signature": Webhook(secret).sign(delivery_id, sent_at, body),
    }


class Postman:
    """Makes tries at deliveries: claim, send, record. While it sends, no transaction is open."""

    def __init__(
        self,
        database: Database,
        client: GuardedClient,
        settings: Settings,
        *,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._database = database
        self._client = client
        self._settings = settings
        self._jitter = jitter

    def deliver(self, delivery_id: str) -> DeliveryState | None:
        """One try. Says where the delivery stands then; None where it is not due, taken, done, or its endpoint is off.

        Raises StaleAttempt where it was resent or removed meanwhile, DatabaseUnavailable where that cannot be known.
        """
        with self._database.transaction() as session:
            claim = deliveries.claim(
                session,
                delivery_id,
                lease_seconds=self._settings.webhook_timeout_seconds + LEASE_OVER_TIMEOUT_SECONDS,
                now=clock(session),
            )
            sent_at = clock(session)
        if claim is None:
            return None
        return self._record(claim, self._send(claim, sent_at))

    def _send(self, claim: DeliveryClaim, sent_at: datetime) -> Reply:
        """One POST; any answer, or none, is a Reply."""
        secret = deliveries.signing_secret(self._settings.secret_key, claim.secret_id)
        body = json.dumps(claim.payload, ensure_ascii=False, separators=(",", ":"))
        headers = {"Content-Type": "application/json", **signed_headers(claim.id, body, secret, sent_at)}
        try:
            answer = self._client.post(
                claim.url, body.encode(), headers, timeout_seconds=self._settings.webhook_timeout_seconds
            )
        except BlockedUrl as error:
            return Reply(None, error.detail, 0.0, can_be_tried_again=False)
        except FetchFailed as error:
            return Reply(None, error.detail, 0.0)
        if 200 <= answer.status < 300:
            return Reply(answer.status, None, answer.seconds)
        return Reply(
            answer.status,
            f"The receiver answered {answer.status}.",
            answer.seconds,
            answer.retry_after_seconds,
            # 410 Gone: the receiver wants no more of these (Standard Webhooks 1.0).
            can_be_tried_again=answer.status != GONE,
        )

    def _record(self, claim: DeliveryClaim, reply: Reply) -> DeliveryState:
        with self._database.transaction() as session:
            now = clock(session)
            state = self._recorded(session, claim, reply, now)
        tallies.count("enlarger_webhook_tries_total", outcome=str(state))
        log.info(
            "webhook.tried",
            delivery_id=claim.id,
            type=claim.type,
            try_number=claim.number,
            status=reply.status,
            error=reply.error,
            seconds=round(reply.seconds, 3),
            state=str(state),
        )
        return state

    def _recorded(self, session: Session, claim: DeliveryClaim, reply: Reply, now: datetime) -> DeliveryState:
        if reply.error is None:
            assert reply.status is not None
            deliveries.delivered(session, claim, status=reply.status, seconds=reply.seconds, now=now)
            return DeliveryState.DELIVERED
        if not reply.can_be_tried_again:
            if reply.status == GONE:
                deliveries.turn_off_endpoint(session, claim, reason="The receiver answered 410 Gone.", now=now)
            deliveries.abandon(session, claim, error=reply.error, status=reply.status, seconds=reply.seconds, now=now)
            return DeliveryState.ABANDONED
        return deliveries.defer(
            session,
            claim,
            status=reply.status,
            error=reply.error,
            seconds=reply.seconds,
            schedule_seconds=self._settings.webhook_retry_seconds,
            retry_after_seconds=reply.retry_after_seconds,
            jitter=self._jitter(),
            now=now,
        )
