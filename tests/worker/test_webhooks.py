"""Deliveries against a real HTTP receiver, verified by the standard's own library."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime, timedelta

import pytest
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from shared import deliveries
from shared.db import Database, clock
from shared.errors import StaleAttempt
from shared.models import ApiKey, Delivery, DeliveryState, Endpoint
from shared.outgoing import GuardedClient
from shared.settings import Settings
from tests.conftest import Receiver, Reply, closed_port
from tests.factories import a_job, a_key, an_endpoint
from worker.webhooks import Postman, signed_headers

LOOPBACK = ["127.0.0.0/8"]


@pytest.fixture
def key(sqlite_database: Database) -> ApiKey:
    with sqlite_database.transaction() as session:
        return a_key(session, clock(session))


def postman(database: Database, settings: Settings, allowed: list[str] = LOOPBACK, jitter: float = 0.0) -> Postman:
    return Postman(database, GuardedClient(allowed), settings, jitter=lambda: jitter)


def owed(database: Database, key: ApiKey, url: str) -> str:
    """A canceled job's event, owed to `url`."""
    with database.transaction() as session:
        now = clock(session)
        job = a_job(session, key, now, webhook_url=url, external_id="größer")
        (delivery_id,) = deliveries.owe(session, job, "job.canceled", now)
    return delivery_id


def found(database: Database, delivery_id: str) -> Delivery:
    with database.transaction() as session:
        return session.get_one(Delivery, delivery_id)


def make_due(database: Database, delivery_id: str) -> None:
    with database.transaction() as session:
        session.get_one(Delivery, delivery_id).due_at = clock(session)


def test_a_signature_is_that_of_the_standards_own_example() -> None:
    # Standard Webhooks 1.0, "Verifying webhook authenticity"; also the vector of its reference libraries.
    headers = signed_headers(
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        '{"test": 2432232314}',
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        datetime.fromtimestamp(1614265330, UTC),
    )
    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_a_delivery_arrives_signed_and_the_receiver_can_verify_it(
    sqlite_database: Database, settings: Settings, key: ApiKey, receiver: Receiver
) -> None:
    delivery_id = owed(sqlite_database, key, f"{receiver.url}/hook?a=1")
    assert postman(sqlite_database, settings).deliver(delivery_id) == DeliveryState.DELIVERED

    (request,) = receiver.requests
    assert (request.method, request.path) == ("POST", "/hook?a=1")
    headers = dict(request.headers)
    secret = deliveries.signing_secret(settings.secret_key, key.id)
    body = Webhook(secret).verify(request.body, headers)
    assert body["type"] == "job.canceled"
    assert body["data"]["external_id"] == "größer"
    assert headers["webhook-id"] == delivery_id
    assert headers["Content-Type"] == "application/json"
    with pytest.raises(WebhookVerificationError):
        Webhook(secret).verify(request.body.replace(b"canceled", b"succeeded"), headers)

    row = found(sqlite_database, delivery_id)
    assert row.state == DeliveryState.DELIVERED
    assert [entry["status"] for entry in row.tries] == [204]


def test_a_delivered_event_is_not_sent_again(
    sqlite_database: Database, settings: Settings, key: ApiKey, receiver: Receiver
) -> None:
    delivery_id = owed(sqlite_database, key, receiver.url)
    tried = [postman(sqlite_database, settings).deliver(delivery_id) for _ in range(3)]
    assert tried == [DeliveryState.DELIVERED, None, None]
    assert len(receiver.requests) == 1


def test_an_event_that_is_owed_to_nobody_is_not_sent(sqlite_database: Database, settings: Settings) -> None:
    assert postman(sqlite_database, settings).deliver("msg_none") is None


def test_a_refused_event_is_tried_on_the_schedule_and_then_abandoned_under_one_id(
    sqlite_database: Database, settings: Settings, key: ApiKey, receiver: Receiver
) -> None:
    settings = settings.model_copy(update={"webhook_retry_seconds": (0.0, 5.0, 300.0)})
    delivery_id = owed(sqlite_database, key, receiver.url)
    receiver.replies += [Reply(500), Reply(503), Reply(404)]
    man = postman(sqlite_database, settings, jitter=0.5)
    waits, states = [], []
    for _ in range(3):
        states.append(man.deliver(delivery_id))
        row = found(sqlite_database, delivery_id)
        waits.append((row.due_at - datetime.fromisoformat(row.tries[-1]["at"])).total_seconds())
        make_due(sqlite_database, delivery_id)
    assert states == [DeliveryState.PENDING, DeliveryState.PENDING, DeliveryState.ABANDONED]
    # Half of the greatest jitter, a tenth.
    assert waits[:2] == [pytest.approx(5 * 1.05), pytest.approx(300 * 1.05)]
    assert [entry["status"] for entry in found(sqlite_database, delivery_id).tries] == [500, 503, 404]
    assert {request.headers["webhook-id"] for request in receiver.requests} == {delivery_id}
    assert man.deliver(delivery_id) is None


def test_the_default_schedule_is_the_contracts() -> None:
    minute, hour = 60, 3600
    assert Settings().webhook_retry_seconds == (
        0, 5, 5 * minute, 30 * minute, 2 * hour, 5 * hour, 10 * hour, 14 * hour, 20 * hour, 24 * hour,
    )  # fmt: skip


def test_retry_after_is_honoured_where_it_is_longer_than_the_schedule(
    sqlite_database: Database, settings: Settings, key: ApiKey, receiver: Receiver
) -> None:
    delivery_id = owed(sqlite_database, key, receiver.url)
    receiver.replies.append(Reply(429, {"Retry-After": "120"}))
    before = datetime.now(UTC)
    postman(sqlite_database, settings).deliver(delivery_id)
    assert found(sqlite_database, delivery_id).due_at >= before + timedelta(seconds=120)


def test_a_redirect_is_not_followed_and_counts_as_a_failure(
    sqlite_database: Database, settings: Settings, key: ApiKey, receiver: Receiver
) -> None:
    delivery_id = owed(sqlite_database, key, f"{receiver.url}/here")
    receiver.replies.append(Reply(302, {"Location": f"{receiver.url}/there"}))
    assert postman(sqlite_database, settings).deliver(delivery_id) == DeliveryState.PENDING
    assert [request.path for request in receiver.requests] == ["/here"]


def test_gone_turns_the_endpoint_off_and_nothing_more_is_sent_there(
    sqlite_database: Database, settings: Settings, key: ApiKey, receiver: Receiver
) -> None:
    with sqlite_database.transaction() as session:
        now = clock(session)
        endpoint = an_endpoint(session, key, now, url=receiver.url, events=("job.canceled",))
        job = a_job(session, key, now)
        first, second = (deliveries.owe(session, job, "job.canceled", now)[0] for _ in range(2))
    receiver.replies.append(Reply(410))
    man = postman(sqlite_database, settings)
    assert man.deliver(first) == DeliveryState.ABANDONED
    with sqlite_database.transaction() as session:
        row = session.get_one(Endpoint, endpoint.id)
        assert (row.disabled_at is not None, row.disabled_reason) == (True, "The receiver answered 410 Gone.")
    assert man.deliver(second) is None
    assert found(sqlite_database, second).state == DeliveryState.ABANDONED
    assert len(receiver.requests) == 1


def test_a_private_address_is_never_reached_and_the_log_says_why(
    sqlite_database: Database, settings: Settings, key: ApiKey, receiver: Receiver
) -> None:
    delivery_id = owed(sqlite_database, key, receiver.url)
    assert postman(sqlite_database, settings, allowed=[]).deliver(delivery_id) == DeliveryState.ABANDONED
    (entry,) = found(sqlite_database, delivery_id).tries
    assert "does not connect to" in entry["error"]
    assert receiver.requests == []


def test_a_receiver_that_is_not_there_is_tried_again(
    sqlite_database: Database, settings: Settings, key: ApiKey
) -> None:
    delivery_id = owed(sqlite_database, key, f"http://127.0.0.1:{closed_port()}/")
    assert postman(sqlite_database, settings).deliver(delivery_id) == DeliveryState.PENDING
    (entry,) = found(sqlite_database, delivery_id).tries
    assert entry["status"] is None
    assert "ConnectError" in entry["error"]


def test_a_try_whose_delivery_was_resent_meanwhile_changes_nothing(
    sqlite_database: Database, settings: Settings, key: ApiKey
) -> None:
    delivery_id = owed(sqlite_database, key, "http://127.0.0.1/")

    class ResentMeanwhile(GuardedClient):
        def post(self, *args: object, **options: object) -> None:  # type: ignore[override]
            with sqlite_database.transaction() as session:
                deliveries.resend(session, delivery_id, now=clock(session))
            return super().post(f"http://127.0.0.1:{closed_port()}/", b"", {}, timeout_seconds=1)

    man = Postman(sqlite_database, ResentMeanwhile(LOOPBACK), settings)
    with pytest.raises(StaleAttempt):
        man.deliver(delivery_id)
    row = found(sqlite_database, delivery_id)
    assert (row.state, row.tries) == (DeliveryState.PENDING, [])


def test_two_tries_at_once_send_one_request(
    sqlite_database: Database, settings: Settings, key: ApiKey, receiver: Receiver
) -> None:
    delivery_id = owed(sqlite_database, key, receiver.url)
    man = postman(sqlite_database, settings)
    threads = [threading.Thread(target=man.deliver, args=(delivery_id,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(receiver.requests) == 1


def test_the_body_is_json_of_what_the_job_was_when_the_event_happened(
    sqlite_database: Database, settings: Settings, key: ApiKey, receiver: Receiver
) -> None:
    delivery_id = owed(sqlite_database, key, receiver.url)
    postman(sqlite_database, settings).deliver(delivery_id)
    sent = json.loads(receiver.requests[0].body)
    assert set(sent) == {"type", "timestamp", "data"}
    assert sent["data"]["status"] == "queued"
    assert sent == dict(found(sqlite_database, delivery_id).payload)
