"""What aioquic is told of an endpoint's options.

Owns: that translation, for both halves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.packet import QuicProtocolVersion

from tesaiot_connect import ConnectFailed, Duration

from .endpoint import CONNECTION_ID
from .qlog import QlogFolder

if TYPE_CHECKING:
    from .transport import QuicAioquic

_VERSIONS = {1: QuicProtocolVersion.VERSION_1, 2: QuicProtocolVersion.VERSION_2}
_CLIENT_IDLE = 45.0
_LISTENER_IDLE = 3600.0


def configuration(recipe: QuicAioquic, *, is_client: bool) -> QuicConfiguration:
    idle = recipe.idle_timeout
    if idle is None:
        idle = Duration(_CLIENT_IDLE if is_client else _LISTENER_IDLE)
    try:
        qlog = QlogFolder(recipe.qlog_folder) if recipe.qlog_folder is not None else None
    except OSError as error:
        raise ConnectFailed(
            f"the qlog folder {recipe.qlog_folder} cannot be used: {error.strerror}",
            fix="choose a folder that this program may write to, or leave out `qlog_folder`",
        ) from error
    return QuicConfiguration(
        is_client=is_client,
        alpn_protocols=list(recipe.alpn),
        congestion_control_algorithm=recipe.congestion_control,
        connection_id_length=CONNECTION_ID,
        idle_timeout=idle,
        max_data=recipe.connection_window,
        max_stream_data=recipe.stream_window,
        max_datagram_size=recipe.max_datagram_size,
        quic_logger=qlog,
        supported_versions=[_VERSIONS[one] for one in recipe.versions],
    )
