"""Every setting of Enlarger: name, default, unit in the name, and a sentence. Read once, then frozen.

Each field is read from the environment as `ENLARGER_<NAME IN CAPITALS>`, or from `<that name>_FILE` naming a file
that holds the value (for secrets). `docs/settings.md` is generated from this class and tested against it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import Field
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

ENV_PREFIX = "ENLARGER_"


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="ignore")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003  (pydantic-settings gives all five)
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # Settings made in code are what the code says; only `load` looks at the environment.
        return (init_settings,)

    # Where things are.
    data_dir: Path = Field(Path(".enlarger"), description="Folder of the embedded stack: SQL file, blobs, logs, keys.")
    database_url: str = Field(
        "",
        repr=False,  # may carry a password
        description="SQLAlchemy URL; empty is SQLite in `data_dir`. PostgreSQL: "
        "`postgresql+psycopg://user:password@host/name`, with `?pooled=transaction` behind it where that address is "
        "PgBouncer's, in transaction mode.",
    )
    redis_url: str = Field(
        "redis://127.0.0.1:6379/0", repr=False, description="Redis that carries messages; holds no truth."
    )
    storage_endpoint_url: str = Field("", description="S3 endpoint; empty is AWS. The embedded stack fills it in.")
    storage_public_url: str = Field(
        "", description="The S3 address clients reach, for which links are signed; empty is `storage_endpoint_url`."
    )
    storage_bucket: str = Field("enlarger", description="Bucket of every blob.")
    storage_region: str = Field("us-east-1", description="Region that requests to storage are signed for.")
    storage_access_key: str = Field("", description="Access key id of object storage.")
    storage_secret_key: str = Field("", repr=False, description="Secret key of object storage.")
    storage_timeout_seconds: float = Field(10.0, gt=0, description="Longest silence of storage before a call fails.")
    result_delivery: Literal["redirect", "stream"] = Field(
        "redirect",
        description="How pictures leave: a redirect to a presigned link, or streamed by the API (unreachable storage).",
    )
    presigned_link_seconds: int = Field(900, gt=0, description="Life of a presigned link.")

    # Secrets and access.
    secret_key: str = Field(
        "",
        repr=False,
        description="Signs sessions and derives webhook secrets; the same on every host. The embedded stack makes one.",
    )
    bootstrap_admin_key: str = Field(
        "", repr=False, description="Where set (`enl_...`), is created as an admin key at start."
    )
    session_seconds: int = Field(7 * 86400, gt=0, description="Life of a page's sign-in.")
    cookie_secure: bool = Field(
        False, description="Send the session cookie over HTTPS only, as `__Host-enlarger`. Turn on behind TLS."
    )
    admin_read_only: bool = Field(False, description="The pages under `/admin` show everything and change nothing.")
    trusted_proxies: int = Field(
        0, ge=0, description="Proxies in front of the API whose `X-Forwarded-*` headers are believed; 0 believes none."
    )
    rate_limit_per_minute: int = Field(6000, gt=0, description="Requests a key may make in a minute.")
    allow_private_addresses: tuple[str, ...] = Field(
        (),
        description='Private CIDR blocks that source URLs and webhooks may reach, as JSON: `["192.168.1.0/24"]`.',
    )

    # Limits on what is handed in.
    max_upload_bytes: int = Field(100_000_000, gt=0, description="Largest picture file taken.")
    max_input_px: int = Field(50_000_000, gt=0, description="Most pixels of an input, read from its header.")
    max_output_px: int = Field(1_000_000_000, gt=0, description="Most pixels of a result.")
    max_queued_jobs_per_key: int = Field(1000, gt=0, description="Queued jobs a key may have; more is 429 queue-full.")
    max_batch_items: int = Field(1000, gt=0, description="Most pictures of one batch.")
    max_wait_seconds: int = Field(60, gt=0, description="Longest `Prefer: wait`.")
    fetch_timeout_seconds: float = Field(20.0, gt=0, description="Longest time for fetching an `image_url`.")

    # How long things are kept.
    result_ttl_seconds: int = Field(7 * 86400, gt=0, description="A finished job's pictures are kept this long.")
    upload_ttl_seconds: int = Field(
        3600, gt=0, description="A presigned upload not turned into a job is swept after this."
    )
    idempotency_ttl_seconds: int = Field(86400, gt=0, description="An Idempotency-Key is remembered this long.")

    # The life of an attempt.
    lease_seconds: float = Field(20.0, gt=0, description="An attempt without progress for this long is believed dead.")
    lease_renew_seconds: float = Field(5.0, gt=0, description="Progress renews the lease at most this often.")
    rescue_interval_seconds: float = Field(2.0, gt=0, description="The relay looks for passed leases this often.")
    relay_interval_seconds: float = Field(
        1.0, gt=0, description="The relay looks for unsent messages and due deliveries this often."
    )
    resend_after_seconds: float = Field(60.0, gt=0, description="A queued job's message is sent again after this long.")
    max_attempts: int = Field(3, gt=0, description="Attempts at a job before it fails.")
    retry_delay_seconds: float = Field(2.0, ge=0, description="Wait before the second attempt; doubles after each.")
    sweep_interval_seconds: float = Field(
        60.0, gt=0, description="The relay asks for sweeps of what has expired this often."
    )
    worker_lost_after_seconds: float = Field(
        30.0, gt=0, description="A worker not heard of for this long is shown as lost."
    )

    # Workers.
    worker_device: Literal["auto", "cpu", "gpu"] = Field(
        "auto", description="Device of this image worker; auto is a GPU where there is one."
    )
    worker_concurrency: int = Field(1, gt=0, description="Image worker processes on this host; one job each.")
    gpu_attempts: int = Field(
        4,
        gt=0,
        description="Jobs that one worker process may have in its GPU's networks at once: their tiles share calls. "
        "On a CPU it is always one.",
    )
    bulk_after_interactive_jobs: int = Field(
        4,
        gt=0,
        description="Interactive jobs come first; after so many of them in a row a worker process takes a bulk job, "
        "where one waits.",
    )
    chores_concurrency: int = Field(4, gt=0, description="Chores (webhooks, sweeps) done at once by one chores worker.")
    torch_threads: int = Field(
        0, ge=0, description="Threads of the network in each process; 0 is cores / worker_concurrency."
    )
    tile_px: int = Field(
        0, ge=0, description="Longest side of a tile in input px; 0 lets the plan choose by memory and time."
    )
    tile_memory_bytes: int = Field(
        1_000_000_000, gt=0, description="Memory one network call may take for its activations."
    )
    split_above_px: int = Field(
        32_000_000,
        ge=0,
        description="A picture handed in that is larger is shared by all idle image workers, as shards of its bands "
        "(results as PNG or TIFF); 0 shares none.",
    )
    shard_output_px: int = Field(
        8_000_000, gt=0, description="Pixels of the result in one shard, about: what a lost worker costs at most."
    )
    models_dir: str = Field(
        "",
        description="Folder of your own models (`.safetensors`, `.pth`, `.pt` of any network that spandrel reads) on "
        "a worker's host; read when a worker starts. Hosts may have different ones: a job goes where its model is. "
        "`enlarger doctor` says what is wrong with a file.",
    )

    # Webhooks.
    webhook_timeout_seconds: float = Field(15.0, gt=0, description="Longest time for one webhook delivery.")
    webhook_retry_seconds: tuple[float, ...] = Field(
        (0, 5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400),
        description="When a delivery is tried, each as seconds after the try before; then it is abandoned.",
    )

    # Logs and server.
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")
    log_format: Literal["json", "text"] = Field("json", description="One JSON object a line, or text for people.")
    traces_url: str = Field(
        "",
        description="Collector of OpenTelemetry traces (OTLP over HTTP): `http://host:4318/v1/traces`; empty: none.",
    )
    api_threads: int = Field(
        32, gt=0, description="Requests one API process answers at once; an event stream holds one."
    )
    event_poll_seconds: float = Field(0.25, gt=0, description="Event streams and waits look at SQL this often.")
    event_ping_seconds: float = Field(15.0, gt=0, description="A silent event stream sends a comment this often.")

    @property
    def sqlalchemy_url(self) -> str:
        """`database_url`, or SQLite in `data_dir`."""
        return self.database_url or f"sqlite:///{self.data_dir.absolute() / 'enlarger.db'}"


def load(environ: Mapping[str, str] = os.environ) -> Settings:
    """Settings from the environment. `ENLARGER_X_FILE=path` stands for `ENLARGER_X=<what the file holds>` and wins.

    Raises pydantic.ValidationError naming each setting that is wrong, OSError where a named file cannot be read.
    """
    given = dict(environ)
    for name in Settings.model_fields:
        variable = ENV_PREFIX + name.upper()
        path = given.get(f"{variable}_FILE")
        if path:
            given[variable] = Path(path).read_text().strip()
    source = EnvSettingsSource(Settings)
    source.env_vars = {name.lower(): value for name, value in given.items()}
    return Settings(**source())


def table() -> str:
    """`docs/settings.md`: every variable, its default and its sentence, in Markdown."""
    lines = [
        "# Settings",
        "",
        "Printed by `python -m shared.settings`; the words are those of `shared/settings.py`. Every variable can also",
        f"be given as a file: with `{ENV_PREFIX}SECRET_KEY_FILE=/run/secrets/key` that file holds what",
        f"`{ENV_PREFIX}SECRET_KEY` would.",
        "",
        "| variable | default | what it is |",
        "| --- | --- | --- |",
    ]
    for name, declared in Settings.model_fields.items():
        choices = get_args(declared.annotation) if get_origin(declared.annotation) is Literal else ()
        one_of = f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else ""
        default = _shown(declared.default)
        lines.append(f"| `{ENV_PREFIX}{name.upper()}` | {default} | {declared.description}{one_of} |")
    return "\n".join(lines) + "\n"


def _shown(default: Any) -> str:
    """A default as one would write it in the variable."""
    if default in ("", ()):
        return "(empty)"
    written = str(default) if isinstance(default, str | Path) else json.dumps(default)
    return f"`{written}`"


if __name__ == "__main__":
    sys.stdout.write(table())
