"""The command `tesaiot-connect`.

Owns: the verbs' names, exit codes, and the one place where an error becomes words. Rules: a
verb is imported only when it is used, so that every command starts fast and light; no
traceback reaches a user who did not ask for it with `--debug`.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from ..errors import ConfigError, ConnectorError, Disconnected, PluginError, Unsupported

__all__ = ["FAILED", "INVALID_CONFIG", "UNREACHABLE", "USAGE", "command", "execute", "main"]

FAILED, USAGE, UNREACHABLE, INVALID_CONFIG = 1, 2, 69, 78
"""Exit codes; 0 is success. 69 and 78 are EX_UNAVAILABLE and EX_CONFIG of sysexits.h."""

VERBS = {
    "run": "Run the pipelines of a file.",
    "lint": "Check files without connecting to anything.",
    "check": "Connect every connection of a file; move no data.",
    "doctor": "Say which endpoints work, which would be used, and why not the others.",
    "bundle": "Look into a bundle that the platform gave out.",
    "plugins": "List what is installed, and what is broken.",
    "pub": "Publish messages.",
    "sub": "Subscribe and print messages.",
    "serve": "Run the embedded broker.",
    "sandbox": "Run a stand-in of the platform on this machine.",
    "schema": "Print the JSON Schema of pipeline.toml.",
}


class _Verbs(click.Group):
    """A group whose commands are modules of this package, imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        found: click.Command = importlib.import_module(f".{cmd_name}", __package__).command
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], VERBS, 1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Commands: {', '.join(VERBS)}."
            ctx.fail(f"there is no command {args[0]!r}. {hint}")
        return super().resolve_command(ctx, args)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(None, "-V", "--version", package_name="tesaiot-connect", prog_name="tesaiot-connect")
@click.option("--debug", is_flag=True, help="Show tracebacks, and log everything.")
@click.pass_context
def command(ctx: click.Context, debug: bool) -> None:
    """Move IoT telemetry between MQTT brokers and everything else."""
    ctx.obj["debug"] = debug


def execute(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code. Raises only with `--debug`."""
    settings: dict[str, Any] = {"debug": False}
    try:
        code = command.main(
            args=None if arguments is None else list(arguments),
            prog_name="tesaiot-connect",
            standalone_mode=False,
            obj=settings,
        )
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.exceptions.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return 130
    except Exception as error:
        if settings["debug"]:
            raise
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            # the reader of our output has gone (`... | head`): nothing to say, and nowhere to say it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED
        code, text = explain(error)
        click.echo(text, err=True)
    return code if isinstance(code, int) else 0


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code and words for an error."""
    if isinstance(error, BaseExceptionGroup):
        return explain(error.exceptions[0])
    if isinstance(error, ConfigError):
        count = len(error.problems)
        if count == 1:
            return INVALID_CONFIG, str(error.problems[0])
        return INVALID_CONFIG, f"{error.what}\n{count} problems"
    if isinstance(error, PluginError):
        return INVALID_CONFIG, f"error: {error}"
    if isinstance(error, Disconnected | Unsupported):
        return UNREACHABLE, f"error: {error}"
    if isinstance(error, ConnectorError):
        return FAILED, f"error: {error}"
    if isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename else ""
        return FAILED, f"error: {name}{error.strerror or error}"
    return FAILED, (
        f"error: {type(error).__name__}: {error}\nThis is a bug in tesaiot-connect or in a plugin: please "
        "report it with what the same command says as `tesaiot-connect --debug ...`"
    )


def main() -> None:
    sys.exit(execute())
