"""A small service on a reranker, for tests of its client: the protocol, nothing else, and whatever goes wrong on demand."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from kalm_integrations import Passage
from kalm_integrations.core.base import Reranker
from kalm_integrations.remote.protocol import (
    EncodingsAnswer,
    EncodingsRequest,
    ScoreAnswer,
    ScoreRequest,
    SentSpan,
    ServiceFacts,
)

Answer = tuple[int, dict[str, str], bytes]
"""Status, headers, body."""


@dataclass
class Service:
    """What a test sees of a service, and what it may change."""

    reranker: Reranker
    url: str = ""
    key: str | None = None
    prefix: str = ""
    ratio: int = 4
    spans: bool = True
    """Whether it says that it scores sentences."""
    windows: bool = True
    """Whether it says how it reads long passages."""
    requests: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)
    """Path, headers and body of each."""
    instead: deque[Callable[[Any], Answer | None]] = field(default_factory=deque)
    """Called for the next requests with what has the connection; what they return is sent, None answers as usual."""

    def sent(self, path: str) -> list[Any]:
        """Return the bodies of the requests for a path."""
        return [body for asked, _, body in self.requests if asked == self.prefix + path]

    def answer(self, path: str, body: Any) -> Answer:
        if path == self.prefix + "/v1/kalm":
            facts = ServiceFacts(
                model="tiny",
                fingerprint=self.reranker.fingerprint,
                compression_ratio=self.ratio,
                storage_codec="fp32",
                version="0",
                spans=self.spans,
                windows_fingerprint=self.windows_fingerprint,
                max_passage_tokens=getattr(self.reranker, "max_passage_tokens", None) if self.windows else None,
            )
            return as_json(facts)
        if path == self.prefix + "/v1/encodings":
            texts = EncodingsRequest.model_validate(body).texts
            made = self.reranker.encode_to_metadata(texts)
            return as_json(EncodingsAnswer(model="tiny", fingerprint=self.reranker.fingerprint, encodings=made))
        if path == self.prefix + "/v1/score":
            return as_json(self._score(ScoreRequest.model_validate(body)))
        return 404, {}, b'{"detail": "Not Found"}'

    def _score(self, asked: ScoreRequest) -> ScoreAnswer:
        reading = self.reranker.read([Passage(passage.text, passage.encoding) for passage in asked.passages])
        wanted = [index for index, passage in enumerate(asked.passages) if passage.held and reading[index] == "missing"]
        if wanted:
            return self._of_model(wanted=wanted)
        spans = len(reading) if asked.spans else None
        ranking = self.reranker.rank(asked.query, reading, instruction=asked.instruction, spans=spans)
        ranked = sorted(ranking, key=lambda place: place.index)
        return self._of_model(
            margins=[place.margin for place in ranked],
            scores=[place.score for place in ranked],
            statuses=list(reading),
            spans=[[SentSpan(**span.to_dict()) for span in place.spans] for place in ranked if place.spans is not None],
            windows=[place.window for place in ranked] if self.windows else [],
        )

    @property
    def windows_fingerprint(self) -> str | None:
        return (*self.reranker.fingerprints, None)[1] if self.windows else None

    def _of_model(self, **told: Any) -> ScoreAnswer:
        return ScoreAnswer(fingerprint=self.reranker.fingerprint, windows_fingerprint=self.windows_fingerprint, **told)


def as_json(message: Any, status: int = 200) -> Answer:
    body = message.model_dump_json() if hasattr(message, "model_dump_json") else json.dumps(message)
    return status, {"content-type": "application/json"}, body.encode()


def refusal(status: int, detail: Any = "no", **headers: str) -> Callable[[Any], Answer]:
    """Return what answers a request with an error."""
    _, kind, body = as_json({"detail": detail})
    return lambda _: (status, {**kind, **{name.replace("_", "-"): value for name, value in headers.items()}}, body)


@contextmanager
def serve(reranker: Reranker, **settings: Any) -> Iterator[Service]:
    """Run a service on a free port of this machine, as long as the context lasts."""
    service = Service(reranker, **settings)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

        def _answer(self, body: Any) -> None:
            service.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
            answer = service.instead.popleft()(self) if service.instead else None
            if answer is None and service.key and self.headers["authorization"] != f"Bearer {service.key}":
                answer = refusal(401, "a key is needed")(self)
            status, headers, content = answer or service.answer(self.path, body)
            if status == 0:  # the connection is gone
                self.close_connection = True
                return
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        # A client that hangs up is what some tests are about.
        handle_error = lambda *_: None  # noqa: E731

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    service.url = f"http://127.0.0.1:{server.server_port}{service.prefix}"
    try:
        yield service
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
