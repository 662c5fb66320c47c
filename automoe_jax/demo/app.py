"""The demo's web application, on Flask and waitress."""

import importlib.util
import json
import logging
import threading
from collections.abc import Sequence
from importlib import resources
from typing import Any

from automoe_jax.demo.models import DemoModel
from automoe_jax.system.errors import UserError

MAX_LINES, MAX_CHARACTERS, MAX_HYPOTHESES = 20, 4000, 10
# Translations that are made or wait at once; who comes when there are more is told to come again.
MAX_WAITING, THREADS = 6, 8
_TOO_LONG = f"at most {MAX_CHARACTERS:,} are taken here: use `automoe translate` for more"
LOCAL = ("127.0.0.1", "localhost", "::1", "[::1]")
_HEADERS = {
    # The page needs nothing from elsewhere, and nobody may frame it.
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; img-src data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def check_installed():
    """Raises `UserError` where the web libraries are missing."""
    missing = [name for name in ("flask", "waitress") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"the demo needs {' and '.join(missing)}; install them with: pip install flask waitress"
        )


def make_app(models: Sequence[DemoModel], hosts: Sequence[str] = LOCAL) -> Any:
    """The Flask application: the page, and `POST /translate` with JSON to JSON.

    `hosts` are the names that it answers to, as a browser gives them; empty for any.
    """
    # Imported here: the libraries are optional.
    from flask import Flask, Response, request  # noqa: PLC0415
    from werkzeug.exceptions import HTTPException, RequestEntityTooLarge  # noqa: PLC0415

    app = Flask(__name__)
    app.config["MAX_CONTENT_LENGTH"] = 8 * MAX_CHARACTERS + 4096
    waiting = threading.BoundedSemaphore(MAX_WAITING)
    page = resources.files("automoe_jax.demo").joinpath("page.html").read_text(encoding="utf-8")
    about = [model.about for model in models]

    def answer(content: Any, status: int = 200) -> Response:
        text = json.dumps(content, ensure_ascii=False)
        return Response(text, status, mimetype="application/json")

    @app.before_request
    def check_host():
        # A name of elsewhere that leads here would let its pages read ours (DNS rebinding).
        name = request.host.rsplit(":", 1)[0] if not request.host.endswith("]") else request.host
        if hosts and name not in hosts:
            raise UserError(f"this page does not answer to the name {name}; give --host={name}")

    @app.after_request
    def with_headers(response: Response) -> Response:
        response.headers.update(_HEADERS)
        return response

    @app.errorhandler(Exception)
    def failed(error: Exception) -> Response:
        if isinstance(error, UserError):
            return answer({"error": str(error)}, 400)
        if isinstance(error, RequestEntityTooLarge):
            return answer({"error": f"that is too much; {_TOO_LONG}"}, 413)
        if isinstance(error, HTTPException):
            return answer({"error": error.description or str(error)}, error.code or 500)
        logging.getLogger(__name__).exception("a request failed")
        return answer({"error": "this could not be translated; the terminal says why"}, 500)

    @app.get("/")
    def show() -> Response:
        return Response(page, mimetype="text/html")

    @app.get("/models")
    def list_models() -> Response:
        return answer(about)

    @app.post("/translate")
    def translate() -> Response:
        # Of this type alone: a page from elsewhere cannot send it without asking.
        texts, beam, n = read_request(request.get_json(silent=True))
        if not waiting.acquire(blocking=False):
            return answer({"error": "too many requests at once; try again in a moment"}, 503)
        try:
            return answer([model.translate(texts, beam, n) for model in models])
        finally:
            waiting.release()

    return app


def read_request(given: Any) -> tuple[list[str], int | None, int]:
    """Sentences, beam size and number of hypotheses; `UserError` for anything else."""
    if not isinstance(given, dict) or not isinstance(given.get("text"), str):
        raise UserError('a JSON object with "text" is needed')
    text, beam, n = given["text"], given.get("beam_size"), given.get("num_hypotheses", 1)
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"the text has {len(text):,} characters; {_TOO_LONG}")
    lines = [line.strip() for line in text.splitlines()]
    lines = [line.replace("\0", "\ufffd") for line in lines if line]
    if len(lines) > MAX_LINES:
        raise UserError(f"the text has {len(lines)} lines; at most {MAX_LINES} are taken here")
    for name, value, most in (("beam_size", beam, 1000), ("num_hypotheses", n, MAX_HYPOTHESES)):
        allowed = type(value) is int and 1 <= value <= most
        if not allowed and not (name == "beam_size" and value is None):
            raise UserError(f"{name} is {value!r}; allowed: 1 to {most}")
    return [line.encode("utf-8", "replace").decode() for line in lines], beam, n


def listen(app: Any, host: str, port: int) -> Any:
    """A server that listens; its `run` answers. `UserError` where the address cannot be had."""
    from waitress.server import create_server  # noqa: PLC0415

    try:
        return create_server(app, host=host, port=port, threads=THREADS, ident=None)
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(
            f"{host}:{port} cannot be listened on ({reason}); give another --port or --host"
        ) from None


def address(server: Any) -> str:
    """The address to open in a browser."""
    # A name may stand for several addresses, each with a socket of its own.
    several = getattr(server, "effective_listen", None)
    host, port = several[0] if several else (server.effective_host, server.effective_port)
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
