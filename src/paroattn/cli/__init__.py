"""The command line: reads arguments, calls the package, prints. Other distributions add commands by entry points."""

from __future__ import annotations

from paroattn.errors import MissingPartError, require


def main() -> None:
    """The script `paroattn`."""
    try:
        modules = ("click", "diffusers", "imageio", "packaging", "PIL", "platformdirs", "rich", "transformers")
        require("paroattn[cli]", *modules)
        from paroattn.cli.group import command_line
    except MissingPartError as error:
        raise SystemExit(f"Error: {error}") from None
    except KeyboardInterrupt:  # imports take seconds
        raise SystemExit(130) from None
    command_line()
