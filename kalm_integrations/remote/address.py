"""Where a service is, and the key to it. Neither is looked up here, so that components can check theirs."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import urlsplit

from kalm_integrations.core.types import plain
from kalm_integrations.errors import SettingsError

API_KEY_VARIABLE = "KALM_API_KEY"
"""Environment variable of the key, where none is given."""

SCHEMES = ("http://", "https://")


def is_address(model: object) -> bool:
    """Return whether a model's name is the address of a service."""
    return isinstance(model, str) and model.lower().startswith(SCHEMES)


def check_address(url: object) -> str:
    """Return the address of a service, without a slash at its end.

    Raises:
        SettingsError: it is none, or has a password or a query in it, which is not shown.
    """
    text: Any = plain(url)
    rule = "the address of a service must be http://host:port or https://host:port, a path may follow"
    if not is_address(text):
        msg = f"{rule}, but got {text!r}" if isinstance(text, str) and "@" not in text else f"{rule}, but got something else"
        raise SettingsError(msg)
    scheme = text.partition("://")[0]
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        msg = f"{rule}, but got one of {scheme} that has no such form"
        raise SettingsError(msg) from error
    if "@" in text or "?" in text or "#" in text:
        # Not shown: there may be a password in it.
        msg = (
            f"{rule}, and nothing else, but got one of {scheme} with a user, a query or a fragment; for a service that asks "
            f"for a key set {API_KEY_VARIABLE}, or give RemoteReranker an api_key"
        )
        raise SettingsError(msg)
    if not host or any(not "!" <= character <= "~" for character in text):
        msg = f"{rule}, in printable ASCII, but got {text!r}"
        raise SettingsError(msg)
    return str(text.rstrip("/"))


def check_key(api_key: object) -> str | None:
    """Return the key that was given, or else that of the environment, if there is one.

    Raises:
        SettingsError: it is no string that can stand in a header; it is not shown.
    """
    key: Any = plain(os.environ.get(API_KEY_VARIABLE) or None if api_key is None else api_key)
    if key is None:
        return None
    if not isinstance(key, str) or not key or any(not "!" <= character <= "~" for character in key):
        msg = (
            "an API key must be a string of printable ASCII characters without spaces, but got another one; strip line ends "
            f"from it, or from {API_KEY_VARIABLE}"
        )
        raise SettingsError(msg)
    return key
