"""TOML -> recipes: a configuration is read, checked and composed here.

    config = load("pipeline.toml")          # raises ConfigError with every problem
    config.pipelines                        # ready for the runner

A file for `serve` is read by `serving.load_server`, which is not imported here: a pipeline has
no use for the server room.

Rule of the room: nothing is opened, dialed or started while a configuration is read.
"""

from __future__ import annotations

from .compose import Config, connection, load

__all__ = ["Config", "connection", "load"]
