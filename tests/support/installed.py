"""Plugins that are installed as far as the catalog can tell, and in no package."""

from __future__ import annotations

from typing import Any

from tesaiot_connect import hookspecs


class EntryPoint:
    """Of a plugin whose hooks are the attributes of `plugin`: a module or a class."""

    group, dist = hookspecs.GROUP, None

    def __init__(self, plugin: Any, name: str = "fake") -> None:
        self.name = self.value = name
        self._plugin = plugin

    def load(self) -> Any:
        return self._plugin
