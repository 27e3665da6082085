"""Writes password files: `python -m tesaiot_connect_auth_password FILE USER`.

Owns: the command line. Rule: a password is never an argument, where other users could see it.
"""

from __future__ import annotations

import argparse
import getpass
import sys
from collections.abc import Sequence
from pathlib import Path

from tesaiot_connect import ConnectorError

from .users import COMMAND, add_user, remove_user


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 if nothing was changed."""
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Add a user to a password file, or change or remove one. A broker that runs with the "
        "file notices within seconds. The password is asked for twice.",
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="the password file; made if it is not there")
    parser.add_argument("user", metavar="USER", help="name of the user or device")
    parser.add_argument("--organisation", metavar="X", help='organisation of the user; "" for none any more')
    parser.add_argument(
        "--valid-until", metavar="DATE", help='2026-12-31, or 2026-12-31T12:00:00Z; "" for ever again'
    )
    parser.add_argument(
        "--stdin", action="store_true", help="read the password from standard input, one line"
    )
    parser.add_argument("--remove", action="store_true", help="remove the user")
    given = parser.parse_args(arguments)
    if given.remove and (given.stdin or given.organisation is not None or given.valid_until is not None):
        parser.error("--remove goes with no other option")
    try:
        if given.remove:
            if not remove_user(given.file, given.user):
                raise ValueError(f"there is no user {given.user!r} in {given.file}")
            print(f"removed {given.user}")
            return 0
        new = add_user(
            given.file,
            given.user,
            _password(given.user, given.stdin),
            organisation=given.organisation,
            valid_until=given.valid_until,
        )
        print(f"added {given.user}" if new else f"changed {given.user}")
    except (ConnectorError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, EOFError):
        print("\nnothing was changed", file=sys.stderr)
        return 1
    return 0


def _password(user: str, from_stdin: bool) -> str:
    if from_stdin:
        return sys.stdin.readline().rstrip("\r\n")
    if not sys.stdin.isatty():
        raise ValueError("there is no terminal to ask for the password: give it with --stdin")
    password = getpass.getpass(f"Password for {user}: ")
    if getpass.getpass("Again: ") != password:
        raise ValueError("the two passwords differ: nothing was changed")
    return password


if __name__ == "__main__":
    sys.exit(main())
