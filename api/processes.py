"""What gunicorn does between listening and starting the API's processes: it loads what all of them need, once.

`shared.stack.command` names this module as gunicorn's configuration.
"""

from __future__ import annotations

import gc
import importlib
from typing import Any


def when_ready(server: Any) -> None:
    """gunicorn's hook: its sockets listen, so whoever asks from now on is answered, and nobody has been forked yet.

    Modules only: what connects, or has threads, is made by `create_app` in each process.
    """
    # What modules define stays: to look through it again and again takes a seventh of the time that loading it does.
    gc.disable()
    importlib.import_module("api.app")
    if server.cfg.workers > 1:
        # What each would load beside its start, for its first questions to the other servers, and have a copy of. One
        # alone is alive sooner without.
        importlib.import_module("redis")
        importlib.import_module("shared.storage").load_sdk()
    # And a collection in a process would have it copy every page of theirs.
    gc.freeze()
    gc.enable()
