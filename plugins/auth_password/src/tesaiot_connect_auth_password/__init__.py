"""Username and password: the client's login, and the password file of a broker."""

from __future__ import annotations

from collections.abc import Mapping

from tesaiot_connect import Auth, Authenticator, hookimpl

from .login import AuthPassword
from .server import PasswordFile
from .users import add_user, remove_user

__all__ = ["AuthPassword", "PasswordFile", "add_user", "remove_user"]


@hookimpl
def tesaiot_auths() -> Mapping[str, type[Auth]]:
    return {"password": AuthPassword}


@hookimpl
def tesaiot_authenticators() -> Mapping[str, type[Authenticator]]:
    return {"password": PasswordFile}
