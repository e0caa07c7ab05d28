"""What the user got wrong: one clear line on standard error and exit code 2."""

import argparse
import sys
from collections.abc import Callable


class UserError(ValueError):
    """A fault that the user can mend: what was given, what is needed, what to change."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, whose faults are UserErrors: one line, without the usage before it."""

    def error(self, message: str):
        """Raises UserError."""
        raise UserError(f"{message} (see --help)")


def run(main: Callable[[], None]) -> None:
    """Runs a command; a UserError becomes one line on standard error and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
