"""Certificates for tests: an authority of one's own. Needs the package `trustme`."""

from __future__ import annotations

import datetime
from pathlib import Path

from ..protocols import ClientCertificate
from ..tls import ServerTls


class Certificates:
    """An authority and what it issues, as PEM files in `folder`."""

    def __init__(self, folder: str | Path, *, name: str = "test authority") -> None:
        import trustme

        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._authority = trustme.CA(organization_name=name)
        self._issued = 0
        self.ca_file = self._folder / "ca.pem"
        self._authority.cert_pem.write_to_path(str(self.ca_file))

    def server(
        self,
        *names: str,
        expired: bool = False,
        clients: Certificates | None = None,
        required: bool = True,
    ) -> ServerTls:
        """A server's certificate for host names and addresses, by default those of loopback.

        `clients` is the authority whose client certificates are `required`, or only verified.
        """
        certificate, key = self._issue(names or ("localhost", "127.0.0.1", "::1"), expired)
        if clients is None:
            return ServerTls(certificate=certificate, key=key)
        return ServerTls(
            certificate=certificate,
            key=key,
            ca_file=clients.ca_file,
            client_certificate="required" if required else "optional",
        )

    def client(self, name: str = "device-1", *, expired: bool = False) -> ClientCertificate:
        """An identity whose common name is `name`."""
        certificate, key = self._issue((f"{name}.device",), expired, common_name=name)
        return ClientCertificate(str(certificate), str(key))

    def _issue(
        self, names: tuple[str, ...], expired: bool, *, common_name: str | None = None
    ) -> tuple[Path, Path]:
        day = datetime.timedelta(days=1)
        now = datetime.datetime.now(datetime.UTC)
        issued = self._authority.issue_cert(
            *names,
            common_name=common_name,
            not_before=now - 30 * day,
            not_after=now - day if expired else now + 30 * day,
        )
        self._issued += 1
        certificate = self._folder / f"{self._issued}.pem"
        key = self._folder / f"{self._issued}.key"
        certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(str(key))
        return certificate, key
