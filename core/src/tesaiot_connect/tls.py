"""TLS for stream transports: whom to trust, who we are, and what went wrong.

Owns: the `tls` table, the server's TLS table, and the words for TLS failures. Rule: a server's
certificate and name are verified unless a configuration says twice that they are not to be;
certificates are read from their files at every connect, so that they may be renewed under us.
"""

from __future__ import annotations

import contextlib
import logging
import ssl
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import attrs

from .errors import ConnectFailed, Disconnected
from .protocols import ClientCertificate, Secret
from .streams import explain_os_error

log = logging.getLogger(__name__)

_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
_NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME of OpenSSL


def _path(value: str | Path) -> Path:
    return Path(value)


@attrs.frozen(kw_only=True)
class TlsOptions:
    """Whom a client trusts: the `tls` table of a connection.

    The client's own certificate is not here: it is the connection's `auth` (type "mtls").
    """

    ca_file: Path | None = attrs.field(
        default=None,
        converter=attrs.converters.optional(_path),
        metadata={
            "help": "PEM file of the authorities to trust. Default: those of the operating system.",
            "exists": True,
        },
    )
    server_name: str | None = attrs.field(
        default=None,
        metadata={"help": "Name the server's certificate must have. Default: the host of the endpoint."},
    )
    minimum_version: Literal["1.2", "1.3"] = attrs.field(
        default="1.2",
        metadata={"help": "Oldest TLS version to accept."},
    )
    verify: Literal["full", "none"] = attrs.field(
        default="full",
        metadata={"help": "'none' accepts any server, so anybody in between can read and change everything."},
    )
    insecure: bool = attrs.field(
        default=False,
        metadata={"help": "Must be true beside `verify = 'none'`: says that this is meant."},
    )

    def __attrs_post_init__(self) -> None:
        if self.verify == "none" and not self.insecure:
            raise ValueError(
                'verify = "none" accepts any server. Put the CA into `ca_file` instead, or, '
                "where it is really meant, write insecure = true beside it"
            )

    def client_context(self, identity: ClientCertificate | None = None) -> ssl.SSLContext:
        """Reads all files anew. Raises ConnectFailed, naming the file and what to do."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = _VERSIONS[self.minimum_version]
        if self.verify == "none":
            log.warning('tls: verify = "none": the server is not verified, anybody may pose as it')
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        elif self.ca_file is None:
            context.load_default_certs()
        else:
            load_authorities(context, self.ca_file)
        if identity is not None:
            load_identity(context, identity)
        return context

    def diagnostic_context(self) -> ssl.SSLContext:
        """Verifies the chain but neither name nor dates: to learn why a server was rejected.

        A connection made with it must carry no data.
        """
        context = self.client_context()
        context.check_hostname = False
        context.verify_flags |= ssl.VerifyFlags(_NO_CHECK_TIME)
        return context


@attrs.frozen(kw_only=True)
class ServerTls:
    """Who a listener is and which clients it admits."""

    certificate: Path = attrs.field(
        converter=_path,
        metadata={
            "help": "PEM file: the server's certificate, then the intermediate ones.",
            "exists": True,
        },
    )
    key: Path = attrs.field(
        converter=_path,
        metadata={
            "help": "PEM file of the private key.",
            "exists": True,
        },
    )
    passphrase: Secret | None = attrs.field(
        default=None,
        metadata={"help": "Of the private key, where it is encrypted."},
    )
    ca_file: Path | None = attrs.field(
        default=None,
        converter=attrs.converters.optional(_path),
        metadata={
            "help": "PEM file of the authorities whose client certificates are accepted.",
            "exists": True,
        },
    )
    client_certificate: Literal["none", "optional", "required"] = attrs.field(
        default="none",
        metadata={
            "help": "Whether clients are asked for a certificate. One that is shown is always verified."
        },
    )
    minimum_version: Literal["1.2", "1.3"] = attrs.field(
        default="1.2",
        metadata={"help": "Oldest TLS version to accept."},
    )

    def __attrs_post_init__(self) -> None:
        if self.client_certificate != "none" and self.ca_file is None:
            raise ValueError(
                f'client_certificate = "{self.client_certificate}" needs `ca_file`: the '
                "authorities whose client certificates are accepted"
            )

    def server_context(self) -> ssl.SSLContext:
        """Reads all files. Raises ConnectFailed, naming the file and what to do."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = _VERSIONS[self.minimum_version]
        load_identity(
            context,
            ClientCertificate(str(self.certificate), str(self.key), self.passphrase),
            whose="server",
        )
        if self.ca_file is not None and self.client_certificate != "none":
            load_authorities(context, self.ca_file)
            required = self.client_certificate == "required"
            context.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
        return context


def load_authorities(context: ssl.SSLContext, ca_file: str | Path) -> None:
    """Raises ConnectFailed where the file cannot be read or holds no certificate."""
    _readable(ca_file, "CA file")
    try:
        context.load_verify_locations(cafile=ca_file)
    except (ssl.SSLError, OSError) as error:
        raise ConnectFailed(
            f"the CA file {ca_file} holds no certificate",
            fix="it must be PEM: text with -----BEGIN CERTIFICATE----- lines",
        ) from error


def load_identity(context: ssl.SSLContext, identity: ClientCertificate, *, whose: str = "client") -> None:
    """Raises ConnectFailed where a file is missing or unreadable or the two do not match."""
    asked = False

    def passphrase() -> str:  # without it OpenSSL would ask on the terminal
        nonlocal asked
        asked = True
        return "" if identity.passphrase is None else identity.passphrase.reveal()

    with contextlib.ExitStack() as opened:
        if identity.pem is None:
            _readable(identity.certificate, f"{whose} certificate")
            _readable(identity.key, f"{whose} key")
            files = (identity.certificate, identity.key)
        else:
            files = (opened.enter_context(_private_file(identity.pem)),) * 2
        try:
            context.load_cert_chain(*files, password=passphrase)
        except (ssl.SSLError, OSError, ValueError) as error:
            raise _unusable(identity, error, whose, asked=asked) from error


def _unusable(identity: ClientCertificate, error: Exception, whose: str, *, asked: bool) -> ConnectFailed:
    reason = getattr(error, "reason", None)
    if asked and identity.passphrase is None:
        return ConnectFailed(f"the {whose} key {identity.key} is encrypted", fix="set `passphrase` beside it")
    if reason == "KEY_VALUES_MISMATCH":
        return ConnectFailed(
            f"the {whose} key {identity.key} does not belong to the certificate {identity.certificate}",
            fix="use the key that the certificate was requested with",
        )
    if reason in _WEAK:
        return ConnectFailed(
            f"OpenSSL does not take the {whose} certificate {identity.certificate}: {_WEAK[reason]}",
            fix="have one issued for a P-256, Ed25519 or RSA key (2048 bits or more), with SHA-256",
        )
    if asked:
        return ConnectFailed(
            f"the passphrase does not open the {whose} key {identity.key}", fix="check `passphrase`"
        )
    return ConnectFailed(
        f"the {whose} certificate {identity.certificate} and key {identity.key} cannot be used",
        fix="both must be PEM files: -----BEGIN CERTIFICATE----- in one and a PRIVATE KEY in the other",
    )


_WEAK = {
    "EE_KEY_TOO_SMALL": "its key is too short",
    "CA_KEY_TOO_SMALL": "the key of its authority is too short",
    "CA_MD_TOO_WEAK": "its signature is too weak",
}


@contextlib.contextmanager
def _private_file(data: bytes) -> Iterator[str]:
    """A file with encrypted data, for the moment in which OpenSSL reads it; nobody else may."""
    try:
        descriptor, path = tempfile.mkstemp(suffix=".pem")
    except OSError as error:
        raise ConnectFailed(
            f"no temporary file can be made for the client certificate: {error.strerror}",
            fix=f"see to the folder {tempfile.gettempdir()}, or set TMPDIR to another one",
        ) from error
    try:
        with open(descriptor, "wb") as file:  # noqa: PTH123 - it is a descriptor
            file.write(data)
        yield path
    finally:
        Path(path).unlink()


def _readable(path: str | Path, what: str) -> None:
    try:
        with Path(path).open("rb"):
            return
    except FileNotFoundError as error:
        raise ConnectFailed(
            f"the {what} {path} does not exist", fix=f"relative paths start at {Path.cwd()}"
        ) from error
    except OSError as error:
        raise ConnectFailed(
            f"the {what} {path} cannot be read: {error.strerror}",
            fix="check its permissions and the user this program runs as",
        ) from error


# --- what a failure means -----------------------------------------------------------------

_EXPIRED, _NOT_YET = 10, 9
_UNKNOWN_CA = {2, 18, 19, 20, 21}  # X509_V_ERR_*: no issuer, self-signed, incomplete chain
_NAME = {62, 64}  # host name, IP address

_ALERTS = {
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": (
        "the server requires a client certificate",
        'set auth = { type = "mtls", certificate = ..., key = ... } on the connection',
    ),
    "TLSV1_ALERT_UNKNOWN_CA": (
        "the peer does not trust our certificate",
        "the peer's CA file must hold its issuer, or our file the intermediate certificates behind our own",
    ),
    "SSLV3_ALERT_BAD_CERTIFICATE": (
        "the peer rejects our certificate",
        "check that it is meant for this use and issued by the authority the peer expects",
    ),
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": (
        "the peer says that our certificate has expired",
        "renew it, or check the clocks of both machines",
    ),
    "SSLV3_ALERT_CERTIFICATE_REVOKED": ("the peer says that our certificate is revoked", "renew it"),
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": (
        "the peer does not accept our certificate",
        "the peer must trust the authority that issued it",
    ),
    "TLSV1_ALERT_PROTOCOL_VERSION": (
        "the two sides share no TLS version",
        "check `minimum_version` on both",
    ),
    "TLSV1_UNRECOGNIZED_NAME": (
        "the server does not know the name it was asked for",
        "check the endpoint's host, or `server_name` in the tls table",
    ),
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": (
        "the client showed no certificate, and this listener requires one",
        "give the client a certificate of an authority in the listener's `ca_file`",
    ),
}
_ALERTS["SSLV3_ALERT_HANDSHAKE_FAILURE"] = (
    "the peer broke off the TLS handshake",
    "it may require a client certificate, or share no cipher or TLS version with us",
)
_ALERTS["UNSUPPORTED_PROTOCOL"] = _ALERTS["TLSV1_ALERT_PROTOCOL_VERSION"]
_ALERTS["UNRECOGNIZED_NAME"] = _ALERTS["TLSV1_UNRECOGNIZED_NAME"]
_NOT_TLS = {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "HTTPS_PROXY_REQUEST", "UNKNOWN_PROTOCOL",
            "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"}  # fmt: skip


def tls_reason(error: BaseException) -> tuple[str, str]:
    """What a TLS failure means and what to do about it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        code = error.verify_code
        if code in _UNKNOWN_CA:
            return (
                f"the server's certificate is not from a trusted authority ({error.verify_message})",
                "put the CA that issued it into `ca_file` of the tls table",
            )
        if code == _EXPIRED:
            return (
                "the server's certificate has expired",
                "renew it on the server; if it is valid, this machine's clock is wrong",
            )
        if code == _NOT_YET:
            return (
                "the server's certificate is not valid yet",
                "this machine's clock is probably wrong: set it",
            )
        if code in _NAME:
            return (
                "the server's certificate is for another name",
                "use a name it has as the endpoint's host, or set `server_name` in the tls table",
            )
        return (
            f"the server's certificate was rejected: {error.verify_message}",
            "check the certificate chain that the server sends",
        )
    reason = getattr(error, "reason", None) or ""
    if reason in _ALERTS:
        return _ALERTS[reason]
    if reason in _NOT_TLS:
        return (
            "the port answers, but not with TLS",
            "check the port: 8883 is MQTT over TLS, 1883 is plain (mqtt://)",
        )
    if isinstance(error, ssl.SSLEOFError) or "EOF" in reason:
        return (
            "the peer hung up during the TLS handshake",
            "check that the port speaks TLS, in a version that `minimum_version` allows",
        )
    return (f"TLS failed: {reason or error}", "")


def _client_certificate(error: ssl.SSLCertVerificationError) -> tuple[str, str]:
    """Why a listener rejects the certificate that a client shows, and what to do about it."""
    if error.verify_code in _UNKNOWN_CA:
        return (
            f"the client's certificate is not from a trusted authority ({error.verify_message})",
            "give the client a certificate of an authority in the listener's `ca_file`",
        )
    if error.verify_code == _EXPIRED:
        return (
            "the client's certificate has expired",
            "renew it; if it is valid, this machine's clock is wrong",
        )
    if error.verify_code == _NOT_YET:
        return "the client's certificate is not valid yet", "this machine's clock is probably wrong: set it"
    return (
        f"the client's certificate was rejected: {error.verify_message}",
        "check the certificate chain that the client sends",
    )


def explain_tls(error: BaseException, *, accepted: bool = False) -> Disconnected:
    """What a broken TLS connection means, in words. Keeps the error as its cause.

    `accepted` is a listener's point of view: the certificate it rejects is a client's.
    """
    if not isinstance(error, ssl.SSLError):
        return explain_os_error(error)
    if accepted and isinstance(error, ssl.SSLCertVerificationError):
        what, fix = _client_certificate(error)
    else:
        what, fix = tls_reason(error)
    told = Disconnected(what, fix=fix)
    told.__cause__ = error
    return told


def certificate_facts(certificate: Mapping[str, Any]) -> str:
    """Names and validity of a certificate as `SSLObject.getpeercert()` gives it, for a message."""
    names = [str(value) for _kind, value in certificate.get("subjectAltName", ())]
    listed = ", ".join(names) or "no names at all"
    return (
        f"the certificate names {listed}; it is valid from {certificate.get('notBefore', '?')} "
        f"until {certificate.get('notAfter', '?')}"
    )
