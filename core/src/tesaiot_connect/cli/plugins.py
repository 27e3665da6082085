"""`plugins`: what is installed, what it brings, and what is broken."""

from __future__ import annotations

from typing import Any

import click


@click.command("plugins")
@click.option("--all", "everything", is_flag=True, help="Built-ins too, and packages that are not installed.")
@click.option("--json", "as_json", is_flag=True, help="As one JSON document.")
def command(everything: bool, as_json: bool) -> None:
    """List installed plugins, what each brings, and why one is broken.

    A broken plugin stops nothing but the files that ask for it.
    """
    from ..plugins import PACKAGES, load

    catalog = load()
    rows: list[dict[str, Any]] = [
        {
            "kind": one.kind,
            "name": one.name,
            "schemes": sorted(one.recipe.schemes) if one.kind == "transport" else [],
            "package": one.plugin.dist,
            "version": one.plugin.version,
            "built_in": one.plugin.name == "builtin",
        }
        for one in catalog.implementations
        if everything or one.plugin.name != "builtin"
    ]
    broken = [
        {"plugin": plugin.name, "package": plugin.dist, "version": plugin.version, "problem": reason}
        for plugin, reason in catalog.failures()
    ]
    installed = {plugin.dist for plugin in catalog.plugins}
    missing = sorted(set(PACKAGES.values()) - installed) if everything else []
    if as_json:
        import msgspec

        document = {"implementations": rows, "broken": broken, "not_installed": missing}
        click.echo(msgspec.json.format(msgspec.json.encode(document)).decode())
        return
    for row in sorted(rows, key=lambda row: (row["kind"], row["name"])):
        schemes = f"  ({', '.join(row['schemes'])})" if row["schemes"] else ""
        click.echo(f"{row['kind']:14} {row['name']:16} {_from(row)}{schemes}")
    if not rows:
        click.echo("no plugins are installed; --all shows the built-in components")
    for failure in broken:
        click.secho(f"broken         {failure['plugin']:16} {_from(failure)}: {failure['problem']}", fg="red")
    for package in missing:
        click.echo(f"not installed  {package}")


def _from(row: dict[str, Any]) -> str:
    return "built in" if row.get("built_in") else f"{row['package'] or '?'} {row['version']}".strip()
