"""From a component's parameters to a reranker, and back to what a pipeline's YAML keeps."""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from haystack import default_from_dict, default_to_dict
from haystack.utils import ComponentDevice, Secret
from pydantic import BeforeValidator, Field, InstanceOf

from haystack_integrations.common.kalm.documents import DocumentLayout
from kalm_integrations.core.base import is_reranker
from kalm_integrations.core.types import shown
from kalm_integrations.errors import SettingsError
from kalm_integrations.hosting.fields import EncodingFields, assigned
from kalm_integrations.hosting.models import Opened, WithModel
from kalm_integrations.remote.address import is_address

if TYPE_CHECKING:
    from typing_extensions import Self

HUB_TOKEN = Secret.from_env_var(["HF_API_TOKEN", "HF_TOKEN"], strict=False)
"""The components' default `token`."""


def _to_device(device: object) -> ComponentDevice | None:
    """Return a device of torch's or a name as Haystack's, which `to_dict` can write."""
    if device is None:
        return None
    try:
        found = device if isinstance(device, ComponentDevice) else ComponentDevice.from_str(str(device))
        found.to_torch_str()  # refuses a map of several devices
    except ValueError as error:
        msg = f"device must be None, one ComponentDevice, or a name as 'cpu' or 'cuda:0', but got {shown(device)}"
        raise SettingsError(msg) from error
    return found


def _to_names(names: object) -> list[object]:
    if names is None:
        return []
    if not isinstance(names, (list, tuple)):
        msg = f"meta_fields_to_embed must be a list of strings, but got {names!r}; put the name into a list"
        raise SettingsError(msg)
    return list(names)


class ComponentFields(EncodingFields):
    """Parameters of both components, with the rules that `hosting` has for them."""

    device: Annotated[InstanceOf[ComponentDevice] | None, BeforeValidator(_to_device)] = None  # type: ignore[assignment]
    token: InstanceOf[Secret] | None = Field(default=None, repr=False)
    meta_fields_to_embed: Annotated[list[str], BeforeValidator(_to_names)]
    embedding_separator: str
    model_kwargs: Annotated[dict[str, Any], BeforeValidator(lambda given: {} if given is None else given)] = Field(repr=False)

    def model_settings(self) -> dict[str, Any]:
        """Return what `as_reranker` takes beside the model, the token aside."""
        device: ComponentDevice | None = self.device
        return super().model_settings() | {"device": device.to_torch_str() if device else None}

    @property
    def layout(self) -> DocumentLayout:
        """What of a document makes the passage, and where its encoding lies."""
        return DocumentLayout(tuple(self.meta_fields_to_embed), self.embedding_separator, self.encoding_key)


class KalmComponent(WithModel):
    """A component whose parameters are attributes of the same name: checked together, and assigned or refused one by one.

    Copies share the loaded model, the stores, and what the component calls. Like pickles they are in no pipeline, except when
    the whole pipeline is copied.
    """

    _fields_class: ClassVar[type[ComponentFields]]
    _fields: ComponentFields
    """The parameters. An assignment replaces all, so that a query that is under way keeps those that it began with."""
    _opened: Opened | None = None

    def _keep(self, /, **parameters: Any) -> None:
        """Check parameters, and keep all or none.

        Raises:
            SettingsError: one is unknown or breaks a rule; the message names it.
        """
        token = parameters["token"]
        if isinstance(token, str) and token:
            # Not by pydantic, whose errors show what they were given.
            parameters["token"] = Secret.from_token(token)
        self._fields = assigned(self._fields_class, parameters, type(self).__name__)

    def _parameters(self) -> dict[str, Any]:
        return {name: getattr(self._fields, name) for name in self._fields_class.model_fields}

    def __getattr__(self, name: str) -> Any:
        """Return a parameter."""
        if name in self._fields_class.model_fields:
            return getattr(self._fields, name)
        return object.__getattribute__(self, name)  # which says that there is none, or why a property failed

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign a parameter if all are valid with it.

        Raises:
            SettingsError: they are not, or there is no such parameter; nothing has changed.
        """
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            self._keep(**{**self._parameters(), name: value})

    @property
    def layout(self) -> DocumentLayout:
        """What of a document makes the passage, and where its encoding lies."""
        return self._fields.layout

    def model_settings(self) -> dict[str, Any]:
        """Return what `as_reranker` takes beside the model, the token aside."""
        return self._fields.model_settings()

    def credentials(self) -> dict[str, Any]:
        """Return the token for the hub, where the checkpoint is fetched by this component; a service does that itself."""
        token, model = self._fields.token, self._fields.model
        if token is None or is_reranker(model) or is_address(model):
            return {}
        return {"token": token.resolve_value()}

    def to_dict(self) -> dict[str, Any]:
        """Return the component as a dictionary.

        Raises:
            SettingsError: a part lives in this process only: `model` is a reranker, `payload_store` a mapping, `write_back` no
                function that can be imported, or `token` a plain token.
        """
        super().check_travels()
        parameters = self._parameters() | {"token": self._described_token()}
        model_kwargs = self._fields.model_kwargs.items()
        parameters["model_kwargs"] = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in model_kwargs} or None
        return default_to_dict(self, **parameters)

    def _described_token(self) -> dict[str, Any] | None:
        """Return where the token is to be found, for YAML and pickles, into which the token itself must not go."""
        token = self._fields.token
        try:
            return None if token is None else token.to_dict()
        except ValueError as error:
            msg = (
                "token must name an environment variable to be serialised, but got a plain token; give "
                "Secret.from_env_var('HF_TOKEN') instead"
            )
            raise SettingsError(msg) from error

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Return the component that `to_dict` described."""
        return default_from_dict(cls, data)

    def check_travels(self) -> None:
        """Check that the component can go to another process, where it opens its model anew.

        Raises:
            SettingsError: a part lives in this process only; the message says what to give instead.
        """
        super().check_travels()
        self._described_token()
        store = getattr(self, "document_store", None)
        if store is not None:
            msg = (
                f"{type(self).__name__} must have no document_store to go to another process by pickling, but got a "
                f"{type(store).__name__}, of which that process would write to a copy; load the pipeline from YAML there, or "
                "pass write_back a function that opens the store"
            )
            raise SettingsError(msg)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as parameters.

        Raises:
            SettingsError: see `check_travels`.
        """
        self.check_travels()
        return type(self), (), self._parameters()

    def __setstate__(self, parameters: dict[str, Any]) -> None:
        """Take parameters that travelled."""
        self._keep(**parameters)

    def __copy__(self) -> Self:
        """Return a copy."""
        made = type(self)()
        vars(made).update({name: value for name, value in vars(self).items() if not _is_haystacks(name)})
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a copy with lists and dictionaries of its own."""
        made = memo[id(self)] = copy.copy(self)
        vars(made)["_fields"] = copy.deepcopy(self._fields, memo)
        if id(vars(self)["__haystack_added_to_pipeline__"]) in memo:
            vars(made).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items() if _is_haystacks(name)})
        return made

    def _get_telemetry_data(self) -> dict[str, Any]:
        model = self._fields.model
        return {"model": model if isinstance(model, str) else type(model).__name__}


def _is_haystacks(name: str) -> bool:
    """Return whether Haystack has set an attribute: sockets and the pipeline belong to one instance."""
    return name.startswith("__")
