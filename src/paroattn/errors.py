"""The errors that tell a user what to do; the command line prints them as one line. Anything else is a bug."""

from __future__ import annotations

import importlib.util


class InputError(ValueError):
    """An argument, an option or a file is not what it has to be; the message says what was found and expected."""


class PlanError(InputError):
    """A plan cannot be made, read or applied; the message says what was found, expected and what to do."""


class MissingPartError(ImportError):
    """An optional part of paroattn is not installed; the message is the pip line that installs it."""


def require(package: str, *modules: str) -> None:
    """Raise `MissingPartError` unless all modules that a package brings are installed.

    Args:
        package: what to install, with its extra, such as "paroattn[cli]".
        modules: import names.

    Example:
        >>> require("paroattn[cli]", "json", "pathlib")
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise MissingPartError(f"{', '.join(missing)} {verb} not installed; run: pip install '{package}'")
