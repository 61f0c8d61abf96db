"""The models that may be asked for: those of the catalogue, and one's own that a worker has come with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flask import Response, jsonify

from api.auth import Caller
from api.context import Context
from api.openapi import operation
from api.schemas import ModelPage, ModelView
from api.v1 import answers
from shared import catalog, own_models, queueing
from shared.catalog import ModelCard, OwnFile
from shared.db import clock
from shared.errors import ModelUnavailable, NotFound
from shared.models import Worker


@operation("GET", "/v1/models", "List the models", tag="models", answer=ModelPage)
def list_models(context: Context, _caller: Caller) -> Response:
    """What `model` may be, with the devices that hold each at present."""
    workers = _image_workers(context)
    return answers.page([_model_view(card, workers) for card in (*catalog.CARDS, *own_cards(context))], None)


@operation("GET", "/v1/models/{name}", "Look at a model", tag="models", answer=ModelView)
def get_model(context: Context, _caller: Caller, name: str) -> Response:
    """Its scale, licence, weights' hash, and what it promises of tiled results."""
    try:
        card = catalog.card(name, own_cards(context))
    except ModelUnavailable as error:
        raise NotFound(error.detail, **error.facts) from error
    return jsonify(_model_view(card, _image_workers(context)))


def card_named(context: Context, name: str) -> ModelCard:
    """The card of that name. For `auto` the one that is planned with until a worker has seen the picture: of those it
    may come to the costliest, tiny pictures aside. Raises ModelUnavailable."""
    if name == catalog.AUTO:
        return catalog.card(catalog.AUTO_PLANNED_AS)
    try:
        return catalog.card(name)
    except ModelUnavailable:
        named = own_cards(context, name)
        # Where there is none, all that there are are named.
        return catalog.card(name, named or own_cards(context))


def own_cards(context: Context, name: str | None = None) -> Sequence[ModelCard]:
    with context.database.reading() as session:
        return own_models.offered(session, now=clock(session), name=name)


def needs(card: ModelCard) -> str:
    """What a worker must have that not every worker has: the model, where it is one of one's own."""
    return card.name if isinstance(card.weights, OwnFile) else ""


def _image_workers(context: Context) -> Sequence[Worker]:
    with context.database.reading() as session:
        alive = queueing.live_workers(
            session, worker_lost_after_seconds=context.settings.worker_lost_after_seconds, now=clock(session)
        )
    return [worker for worker in alive if worker.kind == "images"]


def _model_view(card: ModelCard, workers: Sequence[Worker]) -> dict[str, Any]:
    return {
        "name": card.name,
        "scale": card.scale,
        "scales": [each.scale for each in card.at_each_scale],
        "summary": card.summary,
        "guarantee": card.guarantee,
        "on_gpu": catalog.ON_GPU,
        "architecture": card.architecture,
        "halo_px": card.halo_px,
        "licence": card.licence,
        "source_url": card.source_url,
        "origin": card.origin,
        "sha256": None if card.weights is None else card.weights.sha256,
        "is_default": card.name == catalog.DEFAULT_MODEL,
        "loaded_on": sorted({worker.device or "cpu" for worker in workers if card.name in worker.models_loaded}),
        "workers": sum(queueing.can_run(worker.models, card.name) for worker in workers),
    }
