"""The wire contract: what goes in and what comes out of /v1, as pydantic models.

Requests are checked by these models and refuse fields they do not know; answers are described by them (`/openapi.json`)
and open to new fields. Nothing here knows what lies behind the contract, so that clients can use it too.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, field_validator, model_validator

from shared.catalog import DEFAULT_MODEL
from shared.catalog import LARGEST_SCALE as LARGEST_SCALE

LONGEST_SECONDS = 366 * 86400
LARGEST_CROP_PX = 256

Status = Literal["queued", "running", "succeeded", "failed", "canceled", "expired"]
EventType = Literal[
    "job.started",
    "job.progress",
    "job.succeeded",
    "job.failed",
    "job.canceled",
    "job.expired",
    "batch.completed",
]
TERMINAL_EVENTS: tuple[EventType, ...] = ("job.succeeded", "job.failed", "job.canceled", "job.expired")
assert set(TERMINAL_EVENTS) <= set(get_args(EventType))


def _to_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError as error:
        raise ValueError("is outside the years 1 to 9999") from error


# SQL refuses NUL, and control characters have no business in a name or a header.
Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$")]
# What is not ASCII is percent-encoded or punycode in a URL that is sent. Where it may lead, `outgoing` decides.
Url = Annotated[str, Field(max_length=2048, pattern=r"^[\x21-\x7e]+$")]
Name = Annotated[str, Field(max_length=100, pattern=r"^[A-Za-z0-9._-]+$")]
Id = Annotated[str, Field(max_length=40, pattern=r"^[a-z]+_[0-9a-z]+$")]
Moment = Annotated[AwareDatetime, AfterValidator(_to_utc)]
Seconds = Annotated[int, Field(ge=1, le=LONGEST_SECONDS)]
Probability = Annotated[float, Field(ge=0, le=1)]


class Asked(BaseModel):
    """A request: fields it does not know are refused, so that a misspelt option is not silently ignored."""

    model_config = ConfigDict(extra="forbid")


class Answered(BaseModel):
    """An answer: fields may be added, so clients must let unknown ones pass."""

    # Nobody checks answers by these, they are only described by them: `/openapi.json` builds them when it is asked for.
    model_config = ConfigDict(extra="allow", defer_build=True)


class JobSettings(Asked):
    """How a picture is to be enlarged."""

    model: Name = Field(
        DEFAULT_MODEL,
        description="A name of `GET /v1/models`, or `auto`: chosen by what the picture is; `routing` says why.",
    )
    scale: int | None = Field(
        None, ge=1, le=LARGEST_SCALE, description="Enlargement of each side; without it, the network's own."
    )
    classify: bool = Field(False, description="Also say what the picture shows: `labels`, the five likeliest.")
    format: Literal["auto", "png", "jpeg", "webp", "tiff", "avif"] = Field(
        "auto",
        description="Of the result. `auto`: JPEG in, JPEG out; WebP in, WebP out where it surely fits; all else PNG.",
    )
    quality: int = Field(95, ge=1, le=100, description="Of lossy formats.")
    lossless: bool = Field(False, description="WebP and AVIF without loss.")
    metadata: Literal["safe", "keep", "strip"] = Field(
        "safe", description="`safe` drops GPS and serial numbers and keeps copyright."
    )
    alpha: Literal["model", "lanczos", "flatten"] = Field(
        "model", description="How transparency is enlarged; `flatten` lays the picture on `background`."
    )
    background: str = Field("#ffffff", pattern=r"^#[0-9a-fA-F]{6}$", description="Colour under `alpha: flatten`.")
    device: Literal["auto", "gpu", "cpu"] = Field("auto", description="`auto` is a GPU where one is at work.")
    priority: Literal["interactive", "bulk"] = Field(
        "interactive",
        description="Interactive jobs come first; while both wait, one of five that a worker takes is bulk.",
    )
    deadline_seconds: Seconds | None = Field(None, description="The job expires unless it has started by then.")
    ttl_seconds: Seconds | None = Field(None, description="Its pictures are kept this long after it has ended.")
    external_id: Annotated[Line, Field(max_length=255)] | None = Field(None, description="Your own name for it.")
    webhook_url: Url | None = Field(None, description="Told of this job's events; signed with the key's secret.")
    webhook_events: list[EventType] | None = Field(None, description="Which events; without it, the terminal ones.")


class JobRequest(JobSettings):
    """One picture and how it is to be enlarged. In JSON it is named by `image_url` or `upload_id`; in a form it is the
    part `image`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"image_url": "https://example.com/bird.png", "model": "srgan", "classify": True},
                {"upload_id": "upl_01jv0000000000000000000000", "scale": 2, "format": "webp"},
            ]
        }
    )

    image_url: Url | None = Field(None, description="Where to fetch the picture: a public http or https address.")
    upload_id: Id | None = Field(None, description="Of `POST /v1/uploads`, once the picture has been put there.")
    input_of: Id | None = Field(None, description="One of your own jobs: its picture is taken again.")


class PreviewRequest(Asked):
    """One crop of one picture, and the models to see it through. In JSON the picture is named by `image_url`,
    `upload_id` or `input_of`; in a form it is the part `image`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "image_url": "https://example.com/bird.png",
                    "models": ["srgan", "real-esrgan"],
                    "crop": [200, 120, 96, 96],
                }
            ]
        }
    )

    models: list[Name] | None = Field(
        None, min_length=1, max_length=40, description="Names of `GET /v1/models`; without it, all of them."
    )
    crop: list[int] | None = Field(
        None,
        min_length=4,
        max_length=4,
        description=f"x, y, width and height in px of the picture as it is seen, {LARGEST_CROP_PX} px a side at most; "
        "without it, the middle.",
    )
    scale: int = Field(4, ge=1, le=8, description="Enlargement of each side.")
    device: Literal["auto", "gpu", "cpu"] = "auto"
    priority: Literal["interactive", "bulk"] = "interactive"
    ttl_seconds: Seconds | None = None
    external_id: Annotated[Line, Field(max_length=255)] | None = None
    webhook_url: Url | None = None
    image_url: Url | None = None
    upload_id: Id | None = None
    input_of: Id | None = Field(None, description="One of your own jobs: its picture is taken again.")

    @field_validator("crop")
    @classmethod
    def _is_a_crop(cls, crop: list[int] | None) -> list[int] | None:
        if crop is not None:
            x, y, width, height = crop
            if min(x, y) < 0 or not (1 <= width <= LARGEST_CROP_PX and 1 <= height <= LARGEST_CROP_PX):
                raise ValueError(f"is x, y, width, height: from 0 on, and 1 to {LARGEST_CROP_PX} px a side")
        return crop


class BatchItem(Asked):
    """One picture of a batch."""

    image_url: Url | None = None
    upload_id: Id | None = None
    external_id: Annotated[Line, Field(max_length=255)] | None = None

    @model_validator(mode="after")
    def _has_one_source(self) -> BatchItem:
        if (self.image_url is None) == (self.upload_id is None):
            raise ValueError("needs either image_url or upload_id")
        return self


class BatchRequest(Asked):
    """Many pictures and one block of settings; every one is taken, or none."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "items": [{"image_url": "https://example.com/1.png", "external_id": "one"}],
                    "settings": {"model": "srgan", "priority": "bulk"},
                }
            ]
        }
    )

    items: list[BatchItem] = Field(min_length=1)
    settings: JobSettings = Field(default_factory=lambda: JobSettings())


class UploadRequest(Asked):
    """Nothing needs to be said to get an address to put a picture at."""

    model_config = ConfigDict(json_schema_extra={"examples": [{}]})


class EstimateRequest(Asked):
    """The size of a picture, and how it would be enlarged."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"width": 640, "height": 480, "input_format": "jpeg", "scale": 4}]}
    )

    width: int = Field(ge=1, le=10**6, description="Of the input in px, as it is seen.")
    height: int = Field(ge=1, le=10**6)
    input_format: Literal["png", "jpeg", "webp", "tiff", "avif", "gif", "bmp"] = "png"
    model: Name = DEFAULT_MODEL
    scale: int | None = Field(None, ge=1, le=LARGEST_SCALE)
    format: Literal["auto", "png", "jpeg", "webp", "tiff", "avif"] = "auto"
    lossless: bool = False
    device: Literal["auto", "gpu", "cpu"] = "auto"
    priority: Literal["interactive", "bulk"] = "interactive"


class EndpointRequest(Asked):
    """A standing webhook address."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"url": "https://example.com/hooks", "events": ["job.succeeded"]}]}
    )

    url: Url
    events: list[EventType] = Field(default_factory=lambda: [*TERMINAL_EVENTS, "batch.completed"], min_length=1)


class RenditionRequest(Asked):
    """In which form a job's result is wanted as well."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"kind": "webp"}]})

    kind: Literal["png", "jpeg", "webp", "tiff", "avif", "zoom"] = Field(
        description="A format, or `zoom`: a pyramid of tiles for looking at large results."
    )


class ListQuery(Asked):
    """Which part of a list."""

    limit: int = Field(20, ge=1, le=100)
    cursor: Annotated[Line, Field(max_length=200)] | None = Field(None, description="`next_cursor` of the page before.")


class JobsQuery(ListQuery):
    """Which jobs."""

    status: Status | None = None
    model: Name | None = None
    external_id: Annotated[Line, Field(max_length=255)] | None = None
    created_after: Moment | None = Field(None, description="With a time zone: `2026-01-31T12:00:00Z`.")
    input_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = Field(
        None, description="Jobs of one and the same picture: `input.sha256` of one of them."
    )


class ThumbnailQuery(Asked):
    of: Literal["input", "result"] = Field("result", description="Which of the job's pictures.")


class DeliveriesQuery(ListQuery):
    """Which deliveries."""

    job_id: Id | None = None


# --- answers --------------------------------------------------------------------------------------------------------


class Progress(Answered):
    fraction: Probability
    phase: str
    bands_done: int
    bands_total: int
    eta_seconds: float | None


class InputView(Answered):
    width: int
    height: int
    format: str
    bytes: int
    sha256: str
    name: str | None = None


class ResultView(Answered):
    width: int
    height: int
    format: str
    bytes: int
    sha256: str
    url: str


class Label(Answered):
    label: str
    index: int
    probability: Probability


class JobError(Answered):
    code: str
    detail: str | None
    retryable: bool


class Routing(Answered):
    model: str
    reason: str


class PreviewCrop(Answered):
    x: int
    y: int
    width: int
    height: int


class PreviewCell(PreviewCrop):
    """Where one model's answer lies on the result."""

    model: str
    seconds: float
    error: str | None = Field(description="Why the cell is empty.")


class PreviewFacts(Answered):
    crop: PreviewCrop = Field(description="In px of the input.")
    models: list[str]
    cells: list[PreviewCell] | None = Field(None, description="In px of the result; once the job has succeeded.")


class JobView(Answered):
    """A job as its owner sees it. New statuses may appear: take an unknown one as not finished unless `finished_at`
    is set."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "job_01jv0000000000000000000000",
                    "status": "succeeded",
                    "model": "srgan",
                    "routing": {"model": "srgan", "reason": "asked for by name"},
                    "scale": 4,
                    "classify": True,
                    "device": "cpu",
                    "attempt": 1,
                    "created_at": "2026-01-31T12:00:00.000Z",
                    "started_at": "2026-01-31T12:00:00.100Z",
                    "finished_at": "2026-01-31T12:00:02.900Z",
                    "expires_at": "2026-02-07T12:00:02.900Z",
                    "queue_position": None,
                    "waits_for": None,
                    "progress": {
                        "fraction": 1.0,
                        "phase": "done",
                        "bands_done": 6,
                        "bands_total": 6,
                        "eta_seconds": 0,
                    },
                    "input": {"width": 256, "height": 256, "format": "png", "bytes": 90123, "sha256": "0" * 64},
                    "result": {
                        "width": 1024,
                        "height": 1024,
                        "format": "png",
                        "bytes": 1401234,
                        "sha256": "1" * 64,
                        "url": "/v1/jobs/job_01jv0000000000000000000000/result",
                    },
                    "labels": [{"label": "goldfinch", "index": 11, "probability": 0.93}],
                    "timings": {"queued_seconds": 0.1, "upscale_seconds": 2.4},
                    "error": None,
                    "external_id": None,
                }
            ]
        }
    )

    id: str
    status: Status
    model: str = Field(description="`auto` until a worker has seen the picture; `preview` for a preview.")
    routing: Routing = Field(description="The model, and why it is this one.")
    scale: int
    classify: bool
    device: str
    attempt: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    expires_at: datetime | None
    queue_position: int | None = Field(
        description="1 is next; grows when a job comes before it whose key has had less of the workers. In lists "
        "always null."
    )
    waits_for: str | None = Field(
        None,
        description="Why nobody comes for a queued job, in words: no live worker has its model. Null where somebody "
        "will, and in lists.",
    )
    progress: Progress
    input: InputView
    result: ResultView | None
    labels: list[Label] | None
    timings: dict[str, float] | None
    report_url: str | None = Field(None, description="Where to see how true the result is, once there is one.")
    preview: PreviewFacts | None = None
    error: JobError | None
    external_id: str | None


class JobPage(Answered):
    data: list[JobView]
    next_cursor: str | None


class StripView(Answered):
    """A strip of the preview: its picture's place, in px of the result."""

    y: int
    width: int = Field(description="May be a little more than the result's; what is beyond is empty.")
    height: int
    url: str


class PreviewView(Answered):
    """The result as far as it has come, much smaller: `strips` from the top, of the newest attempt."""

    attempt: int
    strips: list[StripView]


class ZoomView(Answered):
    """A pyramid in the layout of Deep Zoom: level `levels - 1` is the result itself, each below it half as large."""

    width: int
    height: int
    tile_size: int
    overlap: Literal[0]
    levels: int
    format: Literal["jpeg", "webp"]
    tiles: str = Field(description="A tile's address, with `{level}`, `{column}` and `{row}`.")


class RenditionView(Answered):
    """A job's result in another form, made from the stored result."""

    kind: str
    status: Literal["pending", "made", "failed"]
    asked_at: datetime
    finished_at: datetime | None
    bytes: int | None
    url: str | None = Field(description="Where to fetch a format, once it is made.")
    zoom: ZoomView | None = Field(None, description="Of the kind `zoom`, once it is made.")
    error: JobError | None


class ReportView(Answered):
    """How true a result is to its input. The result is shrunk back by taking means and compared in 8 bits."""

    job_id: str
    model: str
    scale: int
    psnr_db: float | None = Field(description="Over all channels; null where nothing differs.")
    ssim: float | None = Field(description="Of luma, over windows of 8 px; null for pictures smaller than one.")
    colour_difference: float | None = Field(description="Mean CIE76 difference of the windows' colours.")
    seam_score: float | None = Field(
        description="Steps between px across the borders of tiles over those beside them: 1 is a seam that cannot be "
        "seen. Null where one tile made the picture."
    )
    seams: int = Field(description="Borders that were looked at.")
    tiles: int
    tiles_not_finite: int = Field(description="Answers of the network with NaN or infinity, computed again.")
    bands_flat: int = Field(description="Bands that came out flat where the input is not, computed again.")
    bands_done_again: int = Field(description="For those reasons, or for lack of memory.")
    precision: Literal["float32", "float16"]
    compare_seconds: float = Field(description="What this report took of the job.")


class UploadView(Answered):
    """Where to PUT a picture, and with which headers; then submit a job with `upload_id`."""

    upload_id: str
    url: str
    headers: dict[str, str]
    expires_at: datetime
    max_bytes: int


class BatchItemView(Answered):
    id: str
    status: Status
    external_id: str | None
    error_code: str | None


class BatchView(Answered):
    id: str
    status: Literal["running", "completed"]
    created_at: datetime
    total: int
    remaining: int
    items: list[BatchItemView]


class ModelView(Answered):
    """A card of the catalogue."""

    name: str
    scale: int = Field(description="What a job gets that names no scale.")
    scales: list[int] = Field(description="Those with a network of their own; others are a step down from the next.")
    summary: str
    guarantee: str
    on_gpu: str = Field(description="What was measured of it on GPUs.")
    architecture: str
    halo_px: int
    licence: str
    source_url: str
    origin: str = Field(description="Who trained it on what, and what carries it here.")
    sha256: str | None = Field(description="Of the weights at `scale`; null where there are none.")
    is_default: bool
    loaded_on: list[str] = Field(description="Devices of live workers that hold it in memory.")
    workers: int = Field(
        0,
        description="Live worker processes that can run it. With 0 a job is taken and waits; a model of one's own "
        "is offered for five minutes after the last worker that had it was heard of.",
    )


class ModelPage(Answered):
    data: list[ModelView]
    next_cursor: None


class OutputSize(Answered):
    width: int
    height: int
    megapixels: float
    format: str | None


class ExpectedSeconds(Answered):
    p50: float
    p95: float


class Refusal(Answered):
    code: str
    detail: str


class EstimateView(Answered):
    """What a job would come to."""

    model: str
    scale: int
    output: OutputSize
    format_can_hold: bool
    accepted: bool
    refusal: Refusal | None = Field(description="Why such a job would be refused at submit.")
    expected_seconds: ExpectedSeconds
    basis: Literal["history", "model-cost"] = Field(
        description="`history`: finished jobs of this model here; `model-cost`: its arithmetic on an average CPU."
    )
    history_jobs: int
    queue: str
    queue_wait_seconds: float
    workers: int = Field(description="Worker processes that serve the queue now; with 0 a job waits until one is back.")


class EndpointView(Answered):
    id: str
    url: str
    events: list[EventType]
    created_at: datetime
    disabled_at: datetime | None
    disabled_reason: str | None
    secret: str = Field(description="`whsec_...`: verifies signatures (Standard Webhooks).")


class EndpointPage(Answered):
    data: list[EndpointView]
    next_cursor: None


class DeliveryTry(Answered):
    at: datetime
    status: int | None
    error: str | None
    seconds: float


class DeliveryView(Answered):
    id: str
    type: str
    job_id: str | None
    batch_id: str | None
    endpoint_id: str | None
    url: str
    status: Literal["pending", "delivered", "abandoned"]
    created_at: datetime
    next_try_at: datetime | None
    finished_at: datetime | None
    tries: list[DeliveryTry]


class DeliveryPage(Answered):
    data: list[DeliveryView]
    next_cursor: str | None


class KeyView(Answered):
    """The key that calls."""

    id: str
    name: str
    scopes: list[str]
    expires_at: datetime | None
    webhook_secret: str = Field(description="`whsec_...`: verifies webhooks sent to a job's own `webhook_url`.")


class ProblemView(Answered):
    """RFC 9457. Facts (`limit_px`, `width_px`, ...) stand beside these."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "/problems/job-not-finished",
                    "title": "The job has not finished",
                    "status": 409,
                    "detail": "The job is running.",
                    "code": "job-not-finished",
                    "retryable": True,
                }
            ]
        }
    )

    type: str
    title: str
    status: int
    detail: str
    code: str
    retryable: bool


class HealthView(Answered):
    status: Literal["alive", "ready"]
    versions: dict[str, str] | None = Field(
        None, description="Of `/livez`: `enlarger`, `python`, and `schema`, the revision that this process is made for."
    )
    checks: dict[str, Any] | None = None
