"""Processes for the chaos tests, the real ones but for a detail each.

    celery -A tests.chaos.processes:images worker     attempts are made with a network that costs nothing
    gunicorn 'tests.chaos.processes:api()'            an Idempotency-Key whose request died is free after seconds

What the harness may ask of it comes in two variables that only this module reads; no product setting can switch a
promise off.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
from typing import Any

from celery import Celery

from shared import jobs
from shared.settings import load
from worker.app import images_app
from worker.images import ImagesLoader

TILE_SECONDS = "CHAOS_TILE_SECONDS"
"""How long the network takes for a tile: an idle wait, so that long jobs cost no processor."""
FENCE = "CHAOS_FENCE"
"""`off` lets late attempts write: the control in which the checker must find double effects."""

POISON = (1.0, 0.0, 254 / 255)
"""A picture whose first pixel has this colour kills the process that works on it, as a fault in native code would."""


class Loader(ImagesLoader):
    def process_started(self) -> None:
        # Here and not above: main processes and the API import this module too, and are to stay without torch.
        from torch import Tensor

        from shared.catalog import ModelCard
        from tests.worker.a_network import Repeating
        from worker import enlarging

        tile_seconds = float(os.environ[TILE_SECONDS])

        class Paced(Repeating):
            """Repeats pixels, at a pace; dies of POISON."""

            def __init__(self, card: ModelCard, device: str) -> None:
                super().__init__(card, device, lambda _: threading.Event().wait(tile_seconds))

            def __call__(self, tile: Tensor, **asked: Any) -> Tensor:
                if all(abs(float(tile[0, c, 0, 0]) - value) < 1e-3 for c, value in enumerate(POISON)):
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().__call__(tile, **asked)

        enlarging.load = Paced
        if os.environ.get(FENCE) == "off":
            # All that is left of the fence's condition: the job's name.
            jobs._held = lambda claim: [jobs.Job.id == claim.job_id]
        super().process_started()


def api() -> Any:
    from api import idempotency
    from api.app import create_app

    # Customers of a killed API would spend most of a short run waiting. Requests that live longer are taken over then,
    # which is to be harmless.
    idempotency.STALE_SECONDS = 5
    return create_app()


@functools.cache
def _images() -> Celery:
    app = images_app(load())
    app.loader_cls = f"{__name__}:Loader"
    # The product's children are spawned and load torch each, since its threads do not survive a fork. The paced network
    # uses none of them, and a run with a hundred killed children would else be mostly imports.
    app.conf.worker_pool_start_method = "fork"
    import tests.worker.a_network  # noqa: F401
    import worker.execute  # noqa: F401  (for the children)

    return app


def __getattr__(name: str) -> Celery:
    if name == "images":
        return _images()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
