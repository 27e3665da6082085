"""`bundle`: what the platform handed out, and what comes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from . import options

if TYPE_CHECKING:
    from ..config import Bundle


class _Verbs(click.Group):
    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            ctx.fail(f"there is no command {args[0]!r}. Write: tesaiot-connect bundle show DIR")
        return super().resolve_command(ctx, args)


@click.group("bundle", cls=_Verbs)
def command() -> None:
    """Look into a bundle: the folder of files that the platform gives out for a device."""


@command.command("show", short_help="Print its values, and where each came from.")
@click.argument("folder", metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="As one JSON document.")
@options.env_file
def show(folder: str, as_json: bool, env_file: str | None) -> None:
    """Print every value that a connection with this bundle has, and where it came from.

    In the order in which they count: mqtt-quic-config.json, the environment, .env, defaults. What a
    pipeline file writes beside `bundle` counts before them all. Secrets are not shown. Exits 78 if
    the bundle is damaged, with everything that is wrong.
    """
    from ..config import read_bundle

    found = read_bundle(folder, options.environment(env_file))
    for warning in found.warnings:
        click.echo(f"warning: {warning}", err=True)
    if as_json:
        click.echo(_as_json(found))
    else:
        _as_table(found)


def _as_table(found: Bundle) -> None:
    rows = [(one.key, one.shown, one.origin) for one in found.settings]
    key_width = max(len(key) for key, _, _ in rows)
    value_width = min(max(len(value) for _, value, _ in rows), 48)
    click.echo(f"{found.folder}\n")
    click.secho(f"{'key':{key_width}}  {'value':{value_width}}  from", bold=True)
    for setting, (key, value, origin) in zip(found.settings, rows, strict=True):
        click.secho(f"{key:{key_width}}  {value:{value_width}}  {origin}", dim=not setting.given)


def _as_json(found: Bundle) -> str:
    import msgspec

    document = {
        "folder": str(found.folder),
        "settings": [
            {
                "key": one.key,
                "value": one.shown if one.secret or not isinstance(one.value, bool) else one.value,
                "from": one.origin,
                "secret": one.secret,
                "given": one.given,
            }
            for one in found.settings
        ],
        "warnings": [str(warning) for warning in found.warnings],
    }
    return msgspec.json.format(msgspec.json.encode(document)).decode()
