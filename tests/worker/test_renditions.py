"""A stored result in another form: made by the chores worker's code from real files in real storage."""

from __future__ import annotations

import io
import zipfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shared import jobs, renditions
from shared.db import Database, clock
from shared.errors import StaleAttempt
from shared.models import Job, JobState, Rendition
from shared.storage import Storage
from tests.factories import a_job_in, a_key, a_result
from worker.codec.encode import open_encoder
from worker.renditions import make


def a_finished_job(database: Database, storage: Storage, result: bytes | None, **asked: Any) -> Job:
    """A succeeded job whose result, a PNG, lies in storage; None: nothing lies there."""
    storage.ensure_bucket()
    with database.transaction() as session:
        now = clock(session)
        job, claim = a_job_in(JobState.RUNNING, session, a_key(session, now), now, **asked)
        key = f"{job.blob_prefix}/result-1.png"
        jobs.succeed(session, claim, a_result(claim, key=key, width=700, height=300), now=now)
        session.refresh(job)
    if result is not None:
        storage.put(key, io.BytesIO(result), "image/png")
    return job


def asked_for(database: Database, job: Job, kind: str) -> None:
    with database.transaction() as session:
        renditions.ask(session, job, kind, now=clock(session))


def rendition(database: Database, job: Job, kind: str) -> Rendition:
    with database.reading() as session:
        return renditions.found(session, job.id, kind)


def a_result_png(tmp_path: Path, *, channels: int = 3, bits: int = 8) -> bytes:
    """A ramp of 700 x 300 px as the worker writes it; half transparent where there is alpha."""
    dtype = np.uint8 if bits == 8 else np.uint16
    top = np.iinfo(dtype).max
    rows = np.broadcast_to(np.linspace(0, top, 700).astype(dtype)[None, :, None], (300, 700, channels)).copy()
    if channels in (2, 4):
        rows[..., -1] = top // 2
    path = tmp_path / "result.png"
    with open_encoder(path, "png", 700, 300, channels=channels, bits=bits) as encoder:
        encoder.write(rows)
    return path.read_bytes()


@pytest.mark.parametrize("kind", renditions.FORMATS)
@pytest.mark.parametrize(("channels", "bits"), [(3, 8), (1, 8), (4, 16)])
def test_a_result_is_made_into_every_format(
    sqlite_database: Database, storage: Storage, tmp_path: Path, kind: str, channels: int, bits: int
) -> None:
    result = a_result_png(tmp_path, channels=channels, bits=bits)
    job = a_finished_job(sqlite_database, storage, result, background="#ff0000")
    asked_for(sqlite_database, job, kind)
    make(sqlite_database, storage, job.id, kind)
    made = rendition(sqlite_database, job, kind)
    assert made.key is not None, made.error_detail
    file = io.BytesIO()
    storage.get(made.key, file)
    assert made.bytes == len(file.getvalue())
    with Image.open(file) as image:
        assert (image.format, image.size) == (kind.upper(), (700, 300))
        assert image.info["icc_profile"]
        red, green, blue, alpha = image.convert("RGBA").getpixel((350, 150))  # type: ignore[misc]
    flattened = channels == 4 and kind == "jpeg"
    assert alpha == (255 if flattened or channels != 4 else pytest.approx(127, abs=2))
    # Half a gray of 127 on red.
    assert red == pytest.approx(191 if flattened else 127, abs=4)
    assert (green, blue) == pytest.approx((63, 63) if flattened else (127, 127), abs=4)


def test_a_pyramid_has_every_tile_of_every_level(sqlite_database: Database, storage: Storage, tmp_path: Path) -> None:
    job = a_finished_job(sqlite_database, storage, a_result_png(tmp_path))
    asked_for(sqlite_database, job, renditions.ZOOM)
    make(sqlite_database, storage, job.id, renditions.ZOOM)
    key = rendition(sqlite_database, job, renditions.ZOOM).key
    assert key is not None
    file = io.BytesIO()
    storage.get(key, file)
    with zipfile.ZipFile(file) as archive:
        tiles = {entry.filename: entry for entry in archive.infolist() if entry.filename.endswith(".jpeg")}
        # 700 px are 2 tiles of 512, and 11 levels down to one pixel.
        assert {name for name in tiles if "/10/" in name} == {"zoom_files/10/0_0.jpeg", "zoom_files/10/1_0.jpeg"}
        assert {int(name.split("/")[1]) for name in tiles} == set(range(11))
        assert {entry.compress_type for entry in tiles.values()} == {zipfile.ZIP_STORED}
        with Image.open(io.BytesIO(archive.read("zoom_files/10/1_0.jpeg"))) as tile:
            assert tile.size == (188, 300)


def test_what_is_not_owed_is_not_made(sqlite_database: Database, storage: Storage, tmp_path: Path) -> None:
    job = a_finished_job(sqlite_database, storage, a_result_png(tmp_path))
    make(sqlite_database, storage, job.id, "webp")
    make(sqlite_database, storage, "job_none", "webp")
    asked_for(sqlite_database, job, "webp")
    make(sqlite_database, storage, job.id, "webp")
    key = rendition(sqlite_database, job, "webp").key
    # A second copy of the message.
    make(sqlite_database, storage, job.id, "webp")
    assert [name for name in storage.keys(job.blob_prefix) if "rendition" in name] == [key]


def test_a_result_that_is_gone_or_broken_fails_with_the_reason(sqlite_database: Database, storage: Storage) -> None:
    gone = a_finished_job(sqlite_database, storage, None)
    asked_for(sqlite_database, gone, "webp")
    make(sqlite_database, storage, gone.id, "webp")
    assert rendition(sqlite_database, gone, "webp").error_code == "gone"

    broken = a_finished_job(sqlite_database, storage, b"\x89PNG\r\n\x1a\n and nothing more")
    asked_for(sqlite_database, broken, "webp")
    for tries in (1, 2, 3):
        make(sqlite_database, storage, broken.id, "webp")
        failed = rendition(sqlite_database, broken, "webp")
        assert (failed.tries_used, failed.error_code) == (tries, "internal" if tries == 3 else None)
        with sqlite_database.transaction() as session:
            found = renditions.found(session, broken.id, "webp")
            found.lease_until = None if found.lease_until is None else clock(session) - timedelta(seconds=1)
    # Asked again, it is owed again.
    asked_for(sqlite_database, broken, "webp")
    again = rendition(sqlite_database, broken, "webp")
    assert (again.error_code, again.tries_used, again.number) == (None, 0, 3)


def test_a_job_deleted_meanwhile_leaves_no_file(
    sqlite_database: Database, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = a_finished_job(sqlite_database, storage, a_result_png(tmp_path))
    asked_for(sqlite_database, job, "webp")
    put = storage.put

    def put_and_remove(*arguments: Any, **options: Any) -> None:
        put(*arguments, **options)
        with sqlite_database.transaction() as session:
            jobs.remove(session, job.id, now=clock(session))

    monkeypatch.setattr(storage, "put", put_and_remove)
    with pytest.raises(StaleAttempt):
        make(sqlite_database, storage, job.id, "webp")
    assert [key for key in storage.keys(job.blob_prefix) if "rendition" in key] == []
