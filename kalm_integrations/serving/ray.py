"""The service on a cluster, by Ray Serve: any number of replicas that share one store of encodings.

```sh
serve run kalm_integrations.serving.ray:app                                          # settings of the environment
serve run kalm_integrations.serving.ray:build model=pico store=redis://… num_gpus=0.25 max_replicas=8
```

Requests wait in the engine of a replica's reranker, which batches them. `serve.batch` was measured beside it
(`tests/benchmarks/ray_batching.py`): no setting of it is as fast with one client and with many.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError, model_validator

from kalm_integrations.core.settings import describe_problems
from kalm_integrations.errors import MissingExtraError, SettingsError
from kalm_integrations.serving.settings import ServiceSettings
from kalm_integrations.tracing import instrument_with_otlp

try:
    from ray import serve
except ImportError as error:
    msg = 'kalm_integrations.serving.ray needs Ray Serve; run: pip install "kalm-integrations[ray]"'
    raise MissingExtraError(msg) from error

if TYPE_CHECKING:
    from fastapi import FastAPI


class RaySettings(BaseModel):
    """What a replica takes of a machine, and how many there are."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    num_cpus: PositiveFloat = 1.0
    """Cores of a replica; torch computes on as many threads."""
    num_gpus: NonNegativeFloat = 0.0
    """GPUs of a replica; with 0.25 four replicas share one."""
    min_replicas: PositiveInt = 1
    max_replicas: PositiveInt = 4
    target_ongoing_requests: PositiveFloat = 4.0
    """Replicas are added where more than this run or wait for each, and taken away where fewer do."""
    max_ongoing_requests: PositiveInt = 64
    """That a replica is given at a time; what goes beyond it waits before the replicas."""

    @model_validator(mode="after")
    def _check(self) -> RaySettings:
        """Check what the settings are together.

        Raises:
            SettingsError: there are to be fewer replicas at most than at least.
        """
        if self.max_replicas < self.min_replicas:
            msg = f"max_replicas must not be less than min_replicas={self.min_replicas}, but is {self.max_replicas}"
            raise SettingsError(msg)
        return self


class Replica:
    """One of the service's processes; what it answers with is given to it by `build`."""

    def check_health(self) -> None:
        """Fail if the GPU is lost, so that Ray starts another replica: after such an error every request fails."""
        import torch

        if torch.cuda.is_initialized():
            torch.zeros(1, device="cuda").cpu()


def build(arguments: Mapping[str, Any]) -> serve.Application:
    """Return the service as an application of Ray Serve.

    Args:
        arguments: names and values of `RaySettings` and `ServiceSettings`; what is not among them is as the environment has
            it. Texts will do, as `serve run` gives them.

    Raises:
        SettingsError: a name is unknown, or a value breaks a rule.
    """
    settings, scaling = _split(arguments)

    def make_app() -> FastAPI:
        """Return a replica's application once its model is loaded: until then no request is sent to it."""
        from kalm_integrations.serving.app import create_app
        from kalm_integrations.serving.service import open_kalm

        if settings.traces:
            instrument_with_otlp()
        reranker = open_kalm(settings)
        reranker.warm_up()
        return create_app(settings, open_reranker=lambda _: reranker)

    deployed = serve.deployment(
        name="kalm",
        ray_actor_options={"num_cpus": scaling.num_cpus, "num_gpus": scaling.num_gpus},
        autoscaling_config={
            "min_replicas": scaling.min_replicas,
            "max_replicas": scaling.max_replicas,
            "target_ongoing_requests": scaling.target_ongoing_requests,
        },
        max_ongoing_requests=scaling.max_ongoing_requests,
        graceful_shutdown_timeout_s=float(settings.shutdown_seconds),
    )
    return deployed(serve.ingress(make_app)(Replica)).bind()


def _split(arguments: Mapping[str, Any]) -> tuple[ServiceSettings, RaySettings]:
    """Return the settings of the service and of its replicas."""
    given = ServiceSettings.from_env().model_dump(exclude_unset=True)
    given |= {name: value for name, value in arguments.items() if name not in RaySettings.model_fields}
    try:
        scaling = RaySettings(**{name: value for name, value in arguments.items() if name in RaySettings.model_fields})
    except ValidationError as error:
        msg = f"invalid settings: {describe_problems(error)}"
        raise SettingsError(msg) from error
    return ServiceSettings.make(**given), scaling


def __getattr__(name: str) -> Any:
    """Make `app` when it is asked for: it depends on the environment, and replicas import this module too."""
    if name != "app":
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return build({})
