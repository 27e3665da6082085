"""`process = "module:function"` -> the function.

Owns: importing an integrator's own step. Rule: the module is looked for beside the file that
names it first, like a script's, and whatever it does wrong while it is imported is a problem
of that key, not a traceback.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
from pathlib import Path

from ..protocols import Process
from .structure import Wrong

_NAME = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)\Z")


def load_process(text: str, folder: Path) -> Process:
    """Raises Wrong. `folder` stays on `sys.path`, for what the step imports when it runs."""
    match = _NAME.match(text)
    if match is None:
        raise Wrong(f"{text!r} is not a function", 'Write "module:function"')
    module_name, function_name = match.groups()
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name + ".").startswith(error.name + "."):
            fix = f"Put {module_name.replace('.', '/')}.py into {folder}, or install it"
            raise Wrong(f"there is no module {module_name!r}", fix) from error
        raise Wrong(f"{module_name} cannot be imported: {error}", f"Install {error.name}") from error
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())
        raise Wrong(
            f"{module_name} cannot be imported: {type(error).__name__}: {reason}",
            f"Run `python -c 'import {module_name}'` in {folder} to see where",
        ) from error
    for part in function_name.split("."):
        if not hasattr(found, part):
            known = [name for name, value in vars(found).items() if callable(value) and name[0] != "_"]
            near = difflib.get_close_matches(part, known, 1, 0.6)
            fix = f"Did you mean {near[0]!r}?" if near else f"Functions there: {', '.join(known) or 'none'}"
            raise Wrong(f"module {module_name} has no {part!r}", fix)
        found = getattr(found, part)
    if not callable(found):
        raise Wrong(f"{text} is not a function", "Write def step(records): ...; return the records to keep")
    try:
        inspect.signature(found).bind([])
    except TypeError as error:
        raise Wrong(
            f"{text} cannot be called with a batch: {error}", "It takes one argument, the list of records"
        ) from error
    except ValueError:  # built in: has no signature to look at
        pass
    process: Process = found
    return process
