"""`kalm serve`."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kalm_integrations.cli import options
from kalm_integrations.cli.terminal import note
from kalm_integrations.errors import MissingExtraError

if TYPE_CHECKING:
    from kalm_integrations.serving.settings import ServiceSettings


Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of this machine's.")]
Store = Annotated[
    str | None,
    typer.Option(help="Folder of an LMDB store, or a redis:// URL: encodings are kept there, and found by text."),
]
ApiKeyEnv = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Environment variable with the key that requests must carry.", show_default="none"),
]
MaxDocuments = Annotated[int, typer.Option(min=1, help="Documents of one request.")]
Instruction = Annotated[
    str | None,
    typer.Option(help="What makes a passage relevant, where a request does not say.", show_default="the checkpoint's"),
]
LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"], typer.Option(help="How much is logged; the access log is info.")
]


def serve(
    model: options.Model = "pico",
    names: Annotated[
        list[str] | None,
        typer.Option(
            "--name",
            help="A further name that requests may call the model by; may be given several times.",
            show_default="none",
        ),
    ] = None,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8080,
    store: Store = None,
    max_store_bytes: Annotated[
        int | None, typer.Option(help="Bound of the store; what was not used for longest goes.", show_default="none")
    ] = None,
    api_key_env: ApiKeyEnv = None,
    max_queue: Annotated[
        int | None, typer.Option(min=1, help="Pairs that may wait; more are refused with 429.", show_default="65536")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds until a request is given up with 504.")] = 120.0,
    max_documents: MaxDocuments = 1000,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Bytes of one request.")] = 32 * 2**20,
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with a model of its own.")] = 1,
    ratio: options.Ratio = None,
    codec: options.Codec = None,
    instruction: Instruction = None,
    max_passage_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Longer passages are read in windows of so many tokens, or cut.", show_default="1024"),
    ] = None,
    long_passages: options.LongPassages = None,
    max_windows: options.MaxWindows = None,
    revision: options.Revision = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    traces: Annotated[
        bool, typer.Option("--traces", help="Send OpenTelemetry spans by OTLP, as the OTEL_… variables say.")
    ] = False,
    log_level: LogLevel = "info",
) -> None:
    """Serve a model over HTTP.

    It answers in the formats of Cohere, Jina and TEI. Passages that come as texts are encoded once: with a store they are
    found again by their text, also after a restart and by other processes. SIGTERM and Ctrl-C finish the requests that run.
    """
    check_installed("kalm serve")
    from kalm_integrations.serving.running import bind, configure_logging, serve, url_of
    from kalm_integrations.serving.settings import ServiceSettings

    given: dict[str, Any] = {
        "compression_ratio": ratio,
        "storage_codec": codec,
        "instruction": instruction,
        "max_passage_tokens": max_passage_tokens,
        "long_passages": long_passages,
        "max_windows": max_windows,
        "revision": revision,
        "device": device,
        "dtype": dtype,
    }
    settings = ServiceSettings.make(
        model=model,
        model_names=tuple(names or ()),
        model_settings={name: value for name, value in given.items() if value is not None},
        store=store,
        max_store_bytes=max_store_bytes,
        api_key_env=api_key_env,
        max_queue=max_queue,
        timeout=timeout,
        max_documents=max_documents,
        max_body_bytes=max_body_bytes,
        workers=workers,
        log_level=log_level,
        traces=traces,
    )
    warn_of_strangers(settings, host)
    with bind(host, port) as listening:
        configure_logging(log_level)
        serve(settings, listening, lambda: print(f"kalm serves {model} on {url_of(listening)}", flush=True))


def check_installed(command: str) -> None:
    """Import what the service needs.

    Raises:
        MissingExtraError: one is not installed.
    """
    try:
        for module in ("fastapi", "prometheus_client", "uvicorn"):
            __import__(module)
    except ModuleNotFoundError as error:
        msg = f"{command} needs {error.name}, which is not installed; run: pip install 'kalm-integrations[serve]'"
        raise MissingExtraError(msg) from error


def warn_of_strangers(settings: ServiceSettings, host: str) -> None:
    """Say so where others can reach a service, and it has no key.

    Raises:
        SettingsError: the variable that is to hold the key does not.
    """
    if settings.read_key() is None and not _is_loopback(host):
        note(f"warning: everybody who reaches {host} may ask, because there is no --api-key-env")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
