"""What paho was told about TLS, as our options.

Owns: `tls_set`, `tls_set_context` and `tls_insecure_set` for URLs. Rule: whatever cannot be kept
is refused; no setting becomes weaker in silence.
"""

from __future__ import annotations

import ssl
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..protocols import ClientCertificate, Secret
from ..tls import TlsOptions

_OLD = ("PROTOCOL_TLSv1", "PROTOCOL_TLSv1_1", "PROTOCOL_SSLv2", "PROTOCOL_SSLv3")
_ELSEWHERE = {
    "ciphers": "ciphers cannot be chosen for a URL: leave `ciphers` out of tls_set",
    "alpn_protocols": "the transport of a URL chooses its ALPN: leave `alpn_protocols` out of tls_set",
}


class Trust:
    """paho's SSL context, and the arguments of the `tls_set` that made it; None if the user made it.

    It is read at each use, since `tls_insecure_set` changes it.
    """

    def __init__(self, context: ssl.SSLContext, given: Mapping[str, Any] | None) -> None:
        self.context = context
        self._given = given
        self._file: Path | None = None

    def options(self) -> TlsOptions:
        """Raises ValueError for what a URL cannot have."""
        context = self.context
        for name, told in _ELSEWHERE.items():
            if self._given is not None and self._given.get(name) is not None:
                raise ValueError(told)
        if context.protocol in [getattr(ssl, name) for name in _OLD if hasattr(ssl, name)]:
            raise ValueError("TLS before 1.2 is not spoken with a URL: leave `tls_version` out of tls_set")
        if context.verify_mode is ssl.CERT_NONE:
            return TlsOptions(verify="none", insecure=True)
        if not context.check_hostname:
            raise ValueError(
                "with a URL, the name in the server's certificate cannot be left unchecked alone: use a "
                "name that it has, or give up all verification with tls_set(cert_reqs=ssl.CERT_NONE)"
            )
        newest = context.minimum_version in (ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.MAXIMUM_SUPPORTED)
        return TlsOptions(ca_file=self._authorities(), minimum_version="1.3" if newest else "1.2")

    def identity(self) -> ClientCertificate | None:
        """The client certificate that `tls_set` named; a context does not tell of one."""
        given = self._given or {}
        certificate = given.get("certfile")
        if certificate is None:
            return None
        password = given.get("keyfile_password")
        if callable(password):
            password = password()
        if isinstance(password, (bytes, bytearray)):
            password = password.decode()
        return ClientCertificate(
            str(certificate),
            str(given.get("keyfile") or certificate),
            None if password is None else Secret(password),
        )

    def _authorities(self) -> Path | None:
        """Those of a context that the user made come from a file that lives as long as this object."""
        if self._given is not None:
            ca_file = self._given.get("ca_certs")
            return None if ca_file is None else Path(ca_file)
        if self._file is None:
            found = self.context.get_ca_certs(binary_form=True)
            if not found:
                raise ValueError(
                    "the SSL context given to tls_set_context does not tell whom it trusts: with a URL, use "
                    "tls_set(ca_certs=...), or tls_set() for the authorities of the operating system"
                )
            with tempfile.NamedTemporaryFile("w", prefix="tesaiot-ca-", suffix=".pem", delete=False) as file:
                file.writelines(ssl.DER_cert_to_PEM_cert(certificate) for certificate in found)
            self._file = Path(file.name)
            weakref.finalize(self, self._file.unlink, missing_ok=True)
        return self._file
