"""Tokens: the client's login with one, and the token store of a broker."""

from __future__ import annotations

from collections.abc import Mapping

from tesaiot_connect import Auth, Authenticator, hookimpl

from .login import AuthToken
from .server import TokenFile
from .store import add_token, revoke_token

__all__ = ["AuthToken", "TokenFile", "add_token", "revoke_token"]


@hookimpl
def tesaiot_auths() -> Mapping[str, type[Auth]]:
    return {"token": AuthToken}


@hookimpl
def tesaiot_authenticators() -> Mapping[str, type[Authenticator]]:
    return {"token": TokenFile}
