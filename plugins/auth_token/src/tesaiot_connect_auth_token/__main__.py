"""Writes token files: `python -m tesaiot_connect_auth_token new FILE --organisation acme`.

Owns: the command line. Rule: a token goes to standard output, alone; everything else beside it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tesaiot_connect import ConnectorError

from .store import COMMAND, Token, add_token, digest, revoke_token, token_file


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 if nothing was changed."""
    given = _parser().parse_args(arguments)
    try:
        if given.command == "new":
            _new(given)
        elif given.command == "revoke":
            _revoke(given)
        else:
            _list(given)
    except (ConnectorError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Make, revoke and list the tokens of a token file. A broker that runs with the file "
        "notices within seconds.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="new | revoke | list")
    new = commands.add_parser("new", help="make a token, and print it once")
    new.add_argument("file", metavar="FILE", type=Path, help="the token file; made if it is not there")
    new.add_argument("--organisation", metavar="X", required=True, help="organisation the token is for")
    new.add_argument(
        "--name", metavar="N", default="",
        help="name of who uses it; a second token of this name replaces the first without a gap",
    )  # fmt: skip
    new.add_argument(
        "--days", metavar="D", type=float, default=90.0, help="how long it is valid; default 90, 0 for ever"
    )
    revoke = commands.add_parser("revoke", help="revoke the tokens of a name, or one token by its id")
    revoke.add_argument("file", metavar="FILE", type=Path)
    revoke.add_argument("name", metavar="NAME-OR-ID", help="as `list` shows it")
    listed = commands.add_parser("list", help="show the tokens of a file")
    listed.add_argument("file", metavar="FILE", type=Path)
    return parser


def _new(given: argparse.Namespace) -> None:
    token = add_token(given.file, given.organisation, name=given.name, days=given.days or None)
    tokens = token_file(given.file).read()
    made = tokens[digest(token)]
    print(token)
    print(f"{made.name}, {_end(made)}. This is the only time that it is shown.", file=sys.stderr)
    for other in tokens.values():
        if other.name == made.name and other != made:
            print(
                f"{other.id} has the same name: {_end(other)}. When nobody uses it any more: "
                f"{COMMAND} revoke {given.file} {other.id}",
                file=sys.stderr,
            )


def _revoke(given: argparse.Namespace) -> None:
    count = revoke_token(given.file, given.name)
    if not count:
        raise ValueError(f"there is no token {given.name!r} in {given.file}: see {COMMAND} list {given.file}")
    print(f"revoked {count} token{'' if count == 1 else 's'}")


def _list(given: argparse.Namespace) -> None:
    tokens = sorted(token_file(given.file).read().values(), key=lambda one: (one.organisation, one.name))
    if not tokens:
        print(f"no tokens in {given.file}")
        return
    rows = [("ID", "NAME", "ORGANISATION", "VALID")]
    rows += [(one.id, one.name, one.organisation, _end(one)) for one in tokens]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]))


def _end(token: Token) -> str:
    if token.valid_until is None:
        return "for ever"
    date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(token.valid_until))
    days, left = divmod(token.valid_until - time.time(), 86400)
    if days < 0:
        return f"expired on {date}"
    days = round(days + left / 86400)
    return f"until {date}, {days:.0f} day{'' if days == 1 else 's'} left"


if __name__ == "__main__":
    sys.exit(main())
