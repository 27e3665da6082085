"""What a command connects to: URLs, bundles, or connections of files.

Owns: the options of `pub` and `sub` that say it. Rule: a URL takes the same keys as a connection's table, by
--set.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import click

from ..errors import ConfigError, Problem
from . import options

if TYPE_CHECKING:
    from ..client import Client, MqttConnection

F = TypeVar("F", bound=Callable[..., Any])


def target_options(function: F) -> F:
    """The argument TARGET with -c, --set and --env-file."""
    overrides = "A key of the connection, or with -c of the file: --set tls.ca_file=ca.pem. May be repeated."
    for option in (
        click.option(
            "--env-file",
            metavar="FILE",
            help="NAME=value lines for the variables of FILE, a bundle or --set.",
        ),
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help=overrides),
        click.option("-c", "--config", "file", metavar="FILE", help="TARGET is a connection of this file."),
        click.argument("target", metavar="TARGET"),
    ):
        function = option(function)
    return function


def client(target: str, file: str | None, overrides: tuple[str, ...], env_file: str | None) -> Client:
    """A client for one connection, not dialed yet. Raises ConfigError.

    A client id that a file or bundle gives gets "-cli" at its end: whoever runs with it keeps its
    session. One of --set stays as it is.
    """
    from ..client import Client
    from ..config import connection, load

    if file is None:
        is_path = "://" not in target and (os.sep in target or "/" in target)
        if is_path or is_bundle(target):
            found = bundle(target, overrides, env_file)
        elif "://" not in target:
            what = f"{target!r} is neither a URL nor a folder that is there"
            fix = f"Write a URL, such as mqtts://{target}, or the folder of a bundle"
            raise ConfigError([Problem("command line", 0, "TARGET", what, fix)])
        else:
            found = connection(target, overrides=overrides, environ=options.environment(env_file))
        chosen = found.options
        if chosen.client_id and not any(one.partition("=")[0].strip() == "client_id" for one in overrides):
            chosen = attrs.evolve(chosen, client_id=f"{chosen.client_id}-cli", clean_session=True)
        return Client(found.dialer, chosen, auth=found.auth, name=target.partition("?")[0])
    known = load(file, overrides=overrides, env_file=env_file, need_pipelines=False).connections
    if target not in known:
        raise _unknown(file, target, known)
    return aside(known[target], "cli")


def connections(
    targets: Sequence[str], overrides: tuple[str, ...], env_file: str | None, name: str | None = None
) -> dict[str, MqttConnection]:
    """Every connection of the files, bundles and URLs, by the names to show; URLs are the endpoints of one.

    `name` is the one to take of the files. Raises ConfigError.
    """
    from ..config import connection, load

    found: dict[str, MqttConnection] = {}
    urls = [one for one in targets if "://" in one]
    paths = [one for one in targets if "://" not in one]
    files = [one for one in paths if not is_bundle(one)]
    for path in files:
        if not Path(path).exists() and ":" in path:
            what = f"{path!r} is neither a URL, nor a file or folder that is there"
            raise ConfigError([Problem("command line", 0, "", what, f"Write a URL, such as mqtts://{path}")])
    for path in paths:
        label = f"{path}: " if len(paths) > 1 else ""
        if path not in files:
            one = bundle(path, overrides, env_file)
            found[f"{label}{one.name}"] = one
            continue
        known = load(path, overrides=overrides, env_file=env_file, need_pipelines=False).connections
        if name is not None and name not in known and len(files) == 1:
            raise _unknown(path, name, known)
        found |= {f"{label}{one}": known[one] for one in known if name in (None, one)}
    if name is not None and not any(one.name == name for one in found.values()):
        raise _unknown(", ".join(files) or "command line", name, found)
    if urls:
        environ = options.environment(env_file)
        found["command line"] = connection(*urls, overrides=overrides, environ=environ)
    return found


def _unknown(where: str, name: str, known: Collection[str]) -> ConfigError:
    from ..config.document import nearest

    fix = nearest(name, known, "connections")
    return ConfigError([Problem(where, 0, "", f"there is no connection {name!r}", fix)])


def is_bundle(target: str) -> bool:
    """Whether it is the folder of a bundle; a URL is none, and neither is a file."""
    return "://" not in target and Path(target).is_dir()


def bundle(folder: str, overrides: tuple[str, ...], env_file: str | None) -> MqttConnection:
    """The connection of a bundle. Raises ConfigError."""
    from ..config import bundle_connection

    return bundle_connection(folder, overrides=overrides, environ=options.environment(env_file))


def aside(connection: MqttConnection, suffix: str) -> Client:
    """A client like the connection's own, under another client id, that leaves nothing behind."""
    from ..client import Client

    name = connection.options.client_id
    options = attrs.evolve(
        connection.options, client_id=f"{name}-{suffix}" if name else "", clean_session=True, will=None
    )
    return Client(connection.dialer, options, auth=connection.auth, name=connection.name)
