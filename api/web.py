"""Pages for someone with a picture: sign in, hand pictures in, compare before and after.

The page itself is one template; what it does it does through the public API, by the session's cookie. `as_pages` is
what every page of Enlarger has in common, the operator's (`api.dashboard`) included. The headers that keep pages safe
(content security policy, no-store) are those of every answer, in `api.app`.
"""

from __future__ import annotations

import functools
import gzip
from pathlib import Path
from urllib.parse import urlencode

from flask import Blueprint, Response, g, redirect, render_template, request
from werkzeug.wrappers import Response as AnyResponse

from api import auth, problems, words
from api.context import Context
from api.schemas import LARGEST_SCALE
from shared import keys
from shared.catalog import CARDS
from shared.db import clock
from shared.errors import EnlargerError, Forbidden, Unauthorized
from shared.pictures import FORMATS

SAMPLES = Path(__file__).parent / "static" / "samples"
"""A crop of one photograph as each model enlarges it; `static/samples/README.md` says how they are made."""


def blueprint(context: Context) -> Blueprint:
    pages = Blueprint("web", __name__)
    as_pages(pages)
    settings = context.settings

    @pages.get("/")
    def enlarge() -> AnyResponse | str:
        caller = auth.caller(context)
        if not caller.may("jobs") and caller.may("viewer"):
            # A key for the operator's pages alone has been signed in with: this page is not for it.
            return redirect("/admin", 303)
        auth.caller(context, "jobs")
        return render_template(
            "enlarge.html",
            here="enlarge",
            models=CARDS,
            samples={path.stem for path in SAMPLES.glob("*.webp")},
            scales=range(1, LARGEST_SCALE + 1),
            formats=[format for format in FORMATS if format.written],
            read_formats=", ".join(format.name.upper() for format in FORMATS),
            accept=",".join(part for format in FORMATS for part in (format.mime_type, format.extension)),
            limits={
                "upload_bytes": settings.max_upload_bytes,
                "input_px": settings.max_input_px,
                "output_px": settings.max_output_px,
            },
        )

    @pages.get("/sign-in")
    def sign_in() -> AnyResponse | str:
        token = request.args.get("token")
        if token is None:
            return _form(signed_out="signed-out" in request.args)
        try:
            key_id = keys.read_sign_in_token(settings.secret_key, token)
            if _comes_from_elsewhere():
                # Another site's link: it must not put a person into a session of that site's choosing unasked.
                with context.database.reading() as session:
                    key = keys.by_id(session, key_id, now=clock(session))
                return _form(link=token, key_name=key.name)
            return _begin(key_id)
        except Unauthorized as error:
            return Response(_form(problem=error.detail), 401)

    @pages.post("/sign-in")
    def sign_in_with_key() -> AnyResponse:
        """By a key, or by the link that another site led here with."""
        if _comes_from_elsewhere():
            raise Forbidden("Sign in from this service's own page.")
        try:
            auth.check_csrf()
        except Forbidden:
            return Response(_form(problem="The page had been open for too long. Please try again."), 403)
        try:
            if "token" in request.form:
                return _begin(keys.read_sign_in_token(settings.secret_key, request.form["token"]))
            with context.database.reading() as session:
                key = keys.authenticate(session, request.form.get("key", "").strip(), now=clock(session))
            return _begin(key.id)
        except Unauthorized as error:
            return Response(_form(problem=error.detail), 401)

    @pages.post("/sign-out")
    def sign_out() -> AnyResponse:
        auth.caller(context)
        auth.sign_out(context)
        return redirect("/sign-in?signed-out", 303)

    def _begin(key_id: str) -> AnyResponse:
        auth.sign_in(context, key_id)
        # 303: a reload of the page that follows must not send the key again.
        return redirect(own_path(request.values.get("next"), "/"), 303)

    def _form(*, problem: str | None = None, signed_out: bool = False, link: str = "", key_name: str = "") -> str:
        auth.begin_form()
        next = own_path(request.values.get("next"), "/")
        return render_template(
            "sign_in.html", problem=problem, signed_out=signed_out, next=next, link=link, key_name=key_name
        )

    def _comes_from_elsewhere() -> bool:
        return request.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site")

    return pages


def as_pages(pages: Blueprint) -> None:
    """What every page has: the caller and the CSRF token at hand in templates, and errors said in words."""

    for word in (words.ago, words.seconds, words.size_of_file, words.megapixels):
        pages.add_app_template_filter(word)

    @pages.context_processor
    def who_is_here() -> dict[str, object]:
        return {"caller": g.get("caller"), "csrf_token": auth.csrf_token()}

    @pages.errorhandler(EnlargerError)
    def say(error: EnlargerError) -> AnyResponse:
        answer = problems.answer(error)
        if request.accept_mimetypes.best_match(["text/html", "application/json"]) == "application/json":
            return answer
        if isinstance(error, Unauthorized):
            return to_sign_in()
        problem = problems.TABLE[error.code]
        page = render_template(
            "notice.html",
            title=problem.title,
            detail=error.detail,
            request_id=g.get("request_id") if problem.status >= 500 else None,
        )
        # Retry-After and the like are the same for people.
        return Response(page, answer.status_code, [h for h in answer.headers if not h[0].startswith("Content-")])


def compressed(response: AnyResponse) -> AnyResponse:
    """A script or style sheet of ours, gzipped where the browser takes that: OpenSeadragon is 350 kB, or 90.

    Nothing is compressed that a caller's secrets stand in (BREACH), nor what is compressed already. Done once a process
    and file.
    """
    response.vary.add("Accept-Encoding")
    if (
        response.status_code != 200
        or response.mimetype not in ("text/javascript", "text/css")
        or request.accept_encodings.quality("gzip") == 0
        or not isinstance(response, Response)
    ):
        return response
    response.direct_passthrough = False
    etag, _ = response.get_etag()
    body = response.get_data()
    response.set_data(_gzipped(body))
    response.headers["Content-Encoding"] = "gzip"
    if etag is not None:
        # The same address has two bodies: a weak tag is true of both.
        response.set_etag(etag, weak=True)
    return response


@functools.lru_cache(maxsize=64)
def _gzipped(body: bytes) -> bytes:
    return gzip.compress(body, 6, mtime=0)


def to_sign_in() -> AnyResponse:
    """To the sign-in page, and from there back to what was asked for."""
    wanted = request.full_path.rstrip("?") if request.method == "GET" else "/"
    return redirect("/sign-in" if wanted == "/" else f"/sign-in?{urlencode({'next': wanted})}", 303)


def own_path(path: str | None, otherwise: str) -> str:
    """`path` where it leads to a page of ours, else `otherwise`: a link must not send a person to another site."""
    # Browsers read a backslash as a slash, and drop tabs and line ends.
    if path is None or not path.startswith("/") or path.startswith("//") or any(c in path for c in "\\\t\r\n"):
        return otherwise
    return path
