"""A client that shows a certificate.

Owns: the recipe. Rule: the files are read and checked anew at every connect, so what is wrong with
them is said before any traffic, and a renewed certificate is used from the next connect on.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path

import attrs

from tesaiot_connect import (
    ClientCertificate,
    ConnectFailed,
    Credentials,
    Duration,
    Secret,
    SecretFrom,
    Unsupported,
    read_secret,
    secret_changed,
    secret_stamp,
)


@attrs.frozen
class CertificateLogin:
    """One attempt: the certificate was shown in the TLS handshake, CONNECT carries the rest."""

    credentials: Credentials

    async def respond(self, data: bytes, /) -> bytes:
        raise ConnectFailed(
            "the broker asks for an enhanced authentication, which a client certificate does not have",
            fix="see what the broker's log says of this client",
        )

    async def finish(self, data: bytes, /) -> None:
        """Nothing to check: the server proved itself in the TLS handshake."""


def _path(value: str | Path) -> Path:
    return Path(value)


def _no_hardware(_instance: object, field: attrs.Attribute[Path | None], value: Path | None) -> None:
    if value is not None and any(part.startswith("pkcs11:") for part in value.parts):
        raise Unsupported(
            f"`{field.name}` is a PKCS#11 URI, and Python's TLS reads keys from files alone",
            fix="write the URI into a PEM file (uri2pem of OpenSSL's pkcs11-provider), set up that provider "
            "in openssl.cnf, and give that file as `key`; or use a TLS proxy that holds the key",
        )


@attrs.frozen(kw_only=True)
class AuthMtls:
    """A client certificate, as PEM files or from a PKCS#12 file, for mqtts:// and wss://.

    `username` and `password` are for brokers that ask for both.
    """

    certificate: Path | None = attrs.field(
        default=None,
        converter=attrs.converters.optional(_path),
        validator=_no_hardware,
        metadata={
            "help": "PEM file: the client's certificate, then the intermediate ones.",
            "exists": True,
        },
    )
    key: Path | None = attrs.field(
        default=None,
        converter=attrs.converters.optional(_path),
        validator=_no_hardware,
        metadata={"help": "PEM file of the private key. Default: the file `certificate`.", "exists": True},
    )
    pkcs12: Path | None = attrs.field(
        default=None,
        converter=attrs.converters.optional(_path),
        metadata={"help": "PKCS#12 file (.p12, .pfx) with both, instead of the two.", "exists": True},
    )
    passphrase: Secret | SecretFrom | None = attrs.field(
        default=None,
        metadata={"help": "Of the private key or the PKCS#12 file, where it is encrypted."},
    )
    warn: Duration = attrs.field(
        default=Duration(14 * 86400.0),
        metadata={"help": "How long before its end the certificate is warned of, at each connect."},
    )
    username: str | None = attrs.field(
        default=None, metadata={"help": "Sent in CONNECT as well, for brokers that want it."}
    )
    password: Secret | SecretFrom | None = attrs.field(
        default=None, metadata={"help": "Likewise; needs `username`."}
    )

    _stamp: list[Hashable] = attrs.field(factory=list, init=False, eq=False, repr=False)
    """What the files looked like before they were read last."""

    def __attrs_post_init__(self) -> None:
        if (self.certificate is None) == (self.pkcs12 is None):
            raise ValueError("give either `certificate` and `key`, or `pkcs12`")
        if self.pkcs12 is not None and self.key is not None:
            raise ValueError("`pkcs12` holds the key too: remove `key`")
        if self.password is not None and self.username is None:
            raise ValueError("`password` needs `username` beside it")

    async def begin(self) -> CertificateLogin:
        """Raises ConnectorError where the password cannot be read."""
        self._stamp[:] = [secret_stamp(*self._kept)]
        password = None if self.password is None else (await read_secret(self.password, "password")).encode()
        shown = f"the certificate {self.pkcs12 or self.certificate} of this connection's `auth`"
        also = " and `username` and `password` there" if self.username is not None else ""
        return CertificateLogin(Credentials(self.username, password, origin=shown + also))

    async def identity(self) -> ClientCertificate:
        """Reads and checks the files. Raises ConnectFailed, naming the file and what to do."""
        from . import files  # it loads cryptography

        passphrase = None if self.passphrase is None else await read_secret(self.passphrase, "passphrase")
        if self.pkcs12 is not None:
            found = files.from_pkcs12(self.pkcs12, passphrase)
        else:
            assert self.certificate is not None
            found = files.from_pem(self.certificate, self.key or self.certificate, passphrase)
        files.judge(found, self.warn)
        return found.identity

    async def changed(self) -> None:
        """Returns when one of the files is not as it was at the latest `begin`."""
        await secret_changed(self._stamp[0] if self._stamp else secret_stamp(*self._kept), *self._kept)

    @property
    def _kept(self) -> list[Secret | SecretFrom]:
        """All that is in files."""
        files = [SecretFrom(file=one) for one in (self.certificate, self.key, self.pkcs12) if one is not None]
        return [*files, *(one for one in (self.passphrase, self.password) if one is not None)]
