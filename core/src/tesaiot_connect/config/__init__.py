"""TOML -> recipes: a configuration is read, checked and composed here.

    config = load("pipeline.toml")          # raises ConfigError with every problem
    config.pipelines                        # ready for the runner
    bundle_connection("devices/d1/")        # a connection, as the platform's bundle says

A file for `serve` is read by `serving.load_server`, which is not imported here: a pipeline has
no use for the server room.

Rule of the room: nothing is opened, dialed or started while a configuration is read.
"""

from __future__ import annotations

from .bundle import Bundle, read_bundle
from .compose import Config, bundle_connection, connection, load

__all__ = ["Bundle", "Config", "bundle_connection", "connection", "load", "read_bundle"]
