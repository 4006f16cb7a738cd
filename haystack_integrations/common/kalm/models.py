"""From a component's parameters to a reranker, and back to what a pipeline's YAML keeps."""

import inspect
import threading
from typing import Any

from haystack.utils import ComponentDevice, Secret

from kalm_integrations.core.reranker import KalmReranker
from kalm_integrations.core.types import Reranker
from kalm_integrations.errors import SettingsError
from kalm_integrations.hosting import as_reranker

HUB_TOKEN = Secret.from_env_var(["HF_API_TOKEN", "HF_TOKEN"], strict=False)
"""The components' default `token`."""

# For the whole process: a lock in each component would forbid copying it.
_opening = threading.Lock()


class WithReranker:
    """A component that was given a reranker, or the settings to open one when it is first needed.

    The constructor keeps each of its arguments in an attribute of the same name.
    """

    model: str | Reranker
    token: Secret | None
    device: ComponentDevice | None
    model_kwargs: dict[str, Any] | None
    _reranker: Reranker | None = None

    @property
    def reranker(self) -> Reranker:
        """The reranker, opened at the first use; `reranker.stats` says what it has done.

        Raises:
            SettingsError: a setting is unknown or breaks a rule, or settings came with a reranker that has its own.
            CheckpointError: the checkpoint cannot be used.
        """
        if self._reranker is None:
            with _opening:
                # Pipelines run components in several threads: the others find what the first has opened.
                if self._reranker is None:
                    self._reranker = self._open()
        return self._reranker

    def _settings(self) -> dict[str, Any]:
        """Return the arguments of `KalmReranker.from_pretrained` for which the component has parameters."""
        raise NotImplementedError

    def _open(self) -> Reranker:
        settings = {"device": self.device.to_torch_str() if self.device else None, **self._settings()}
        further = self.model_kwargs or {}
        allowed = inspect.signature(KalmReranker.from_pretrained).parameters.keys() - settings - {"model", "token"}
        if not further.keys() <= allowed:
            msg = f"model_kwargs may hold {', '.join(sorted(allowed))}, but got {', '.join(sorted(further.keys() - allowed))}"
            raise SettingsError(msg)
        # A reranker that was given has been fetched already.
        token = self.token.resolve_value() if self.token and isinstance(self.model, str) else None
        return as_reranker(self.model, token=token, **settings, **further)

    def _init_parameters(self) -> dict[str, Any]:
        """Return the constructor's arguments, for `to_dict`.

        Raises:
            SettingsError: the model is a reranker object.
        """
        if not isinstance(self.model, str):
            msg = (
                f"model must be an alias, a hub id or a folder to be serialised, but got a {type(self.model).__name__}; "
                "components with the same checkpoint, device and dtype share the loaded weights anyway"
            )
            raise SettingsError(msg)
        names = inspect.signature(type(self).__init__).parameters
        return {name: getattr(self, name) for name in names if name != "self"}

    def _get_telemetry_data(self) -> dict[str, Any]:
        return {"model": self.model if isinstance(self.model, str) else type(self.model).__name__}
