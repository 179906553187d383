"""`firm-jax COMMAND`: what people do with models once they are trained. Each command is a module of this folder.

A module has `add_arguments(parser)` and `run(arguments) -> int`, the exit status; the first line of its docstring is
the command's help. It is imported only when it is asked for, so that no command needs what another needs.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from firm_jax.errors import FirmError

COMMANDS = ("bench", "export", "sample", "score", "serve")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command named by the arguments (those of the process by default); returns the exit status.

    An error of firm_jax ends with its message on stderr and status 2, as does a wrong use of the command; Ctrl-C with
    status 130.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    words = "FIRM: critics of images, and generators trained on them."
    parser = argparse.ArgumentParser(prog="firm-jax", description=words)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {}
    # All of them only where the whole list is to be shown.
    for name in given[:1] if given and given[0] in COMMANDS else COMMANDS:
        modules[name] = importlib.import_module(f"firm_jax.commands.{name}")
        words = modules[name].__doc__.strip()
        shown = {"description": words, "formatter_class": argparse.RawDescriptionHelpFormatter}
        modules[name].add_arguments(subparsers.add_parser(name, help=words.splitlines()[0], **shown))
    chosen = parser.parse_args(given)
    try:
        return modules[chosen.command].run(chosen)
    except FirmError as error:
        print(f"firm-jax {chosen.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
