"""`kalm ui`."""

from __future__ import annotations

import threading
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kalm_integrations.cli import options
from kalm_integrations.cli.ranking import read_passages
from kalm_integrations.cli.serve import (
    ApiKeyEnv,
    Host,
    Instruction,
    LogLevel,
    MaxDocuments,
    Store,
    check_installed,
    warn_of_strangers,
)
from kalm_integrations.cli.terminal import note
from kalm_integrations.corpora.text import name_of
from kalm_integrations.errors import SettingsError

if TYPE_CHECKING:
    import socket

DEFAULT_PORT = 8080


def ui(
    passages: Annotated[
        Path | None,
        typer.Argument(
            metavar="[PASSAGES]",
            help="File of passages to ask, as kalm rerank reads it; the page takes others too.",
            show_default="none",
        ),
    ] = None,
    model: options.Model = "pico",
    candidates: Annotated[
        int, typer.Option(min=1, help="Passages of the file that are ranked for a question; of more, BM25 chooses.")
    ] = 100,
    text_field: options.TextField = "text",
    title_field: options.TitleField = "title",
    skip_bad: options.SkipBad = False,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    host: Host = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="Port to listen on; 0 takes a free one.",
            show_default=f"{DEFAULT_PORT}, or a free one if that is taken",
        ),
    ] = None,
    store: Store = None,
    api_key_env: ApiKeyEnv = None,
    max_documents: MaxDocuments = 1000,
    ratio: options.Ratio = None,
    codec: options.Codec = None,
    instruction: Instruction = None,
    revision: options.Revision = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    log_level: LogLevel = "warning",
) -> None:
    """Serve a page to try a model out.

    It ranks passages for your questions, and shows the order before and after, scores, times, and what encodings take at
    each compression ratio and codec. It is the service of kalm serve with a page, until Ctrl-C; the page asks nobody else.
    """
    check_installed("kalm ui")
    from kalm_integrations.serving.running import configure_logging, serve_here, url_of
    from kalm_integrations.serving.settings import ServiceSettings
    from kalm_integrations.serving.ui.collection import Collection, Page

    given: dict[str, Any] = {
        "compression_ratio": ratio,
        "storage_codec": codec,
        "instruction": instruction,
        "revision": revision,
        "device": device,
        "dtype": dtype,
    }
    settings = ServiceSettings.make(
        model=model,
        model_settings={name: value for name, value in given.items() if value is not None},
        store=store,
        api_key_env=api_key_env,
        max_documents=max_documents,
        log_level=log_level,
    )
    warn_of_strangers(settings, host)
    collection = None
    if passages is not None:
        rows = read_passages(passages, text_field, title_field, skip_bad=skip_bad)
        collection = Collection(name_of(passages), rows, min(candidates, max_documents))
    with _bind(host, port) as listening:
        configure_logging(log_level)
        url = f"{url_of(listening)}/ui/"

        def announce() -> None:
            print(f"kalm shows {model} on {url} (Ctrl-C ends it)", flush=True)
            if open_browser:
                threading.Thread(target=_open, args=(url,), daemon=True).start()

        serve_here(settings, listening, announce, page=Page(collection))


def _bind(host: str, port: int | None) -> socket.socket:
    """Return a socket that listens on a port, or on a free one if nobody asked for the one that is taken.

    Raises:
        SettingsError: the address cannot be used.
    """
    from kalm_integrations.serving.running import bind

    if port is not None:
        return bind(host, port)
    try:
        return bind(host, DEFAULT_PORT)
    except SettingsError:
        return bind(host, 0)


def _open(url: str) -> None:
    # On a thread: a browser of the terminal runs until it is closed.
    if not webbrowser.open(url):
        note(f"there is no browser to open; go to {url}")
