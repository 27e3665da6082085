"""Client certificates: a client's auth, and the authenticator of a listener."""

from __future__ import annotations

from collections.abc import Mapping

from tesaiot_connect import Auth, Authenticator, hookimpl

from .client import AuthMtls
from .server import CertificateAuth

__all__ = ["AuthMtls", "CertificateAuth"]


@hookimpl
def tesaiot_auths() -> Mapping[str, type[Auth]]:
    return {"mtls": AuthMtls}


@hookimpl
def tesaiot_authenticators() -> Mapping[str, type[Authenticator]]:
    return {"mtls": CertificateAuth}
