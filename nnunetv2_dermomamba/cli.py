"""The ``dermomamba`` command.

Each sub-command is a module with ``add_arguments(parser)``, ``run(args) -> int`` and ``EXAMPLES``, imported only when
it is called; its docstring and the examples, of at most 80 columns, are the help.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from nnunetv2_dermomamba import __version__

__all__ = ["main"]

COMMANDS = {
    "predict": ("nnunetv2_dermomamba.predict.cli", "masks from photographs"),
    "evaluate": ("nnunetv2_dermomamba.evaluation.cli", "figures and a report from masks"),
    "info": ("nnunetv2_dermomamba.info", "the network's size and cost, and what it would run on"),
}


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds the default to the help of every option that has none of its own words for it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        if text is None or not action.option_strings or action.required or "(default: " in text:
            return text
        if action.default is argparse.SUPPRESS:  # --help
            return text
        if action.default in (None, False):
            return f"{text} (default: {'off' if action.nargs == 0 else 'none'})"
        return f"{text} (default: %(default)s)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command.

    Returns:
        Exit status: 0 for success, 1 if some cases were not done, 2 if nothing was.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="dermomamba", description="DermoMamba: skin lesions from dermoscopy photographs."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    called = argv[0] if argv and argv[0] in COMMANDS else None
    for name, (module_name, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, formatter_class=_HelpFormatter)
        if name == called:
            module = importlib.import_module(module_name)
            command.description = module.__doc__
            command.epilog = module.EXAMPLES
            module.add_arguments(command)
    args = parser.parse_args(argv)
    try:
        status = module.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader has enough, as ``head`` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its end
        return 141  # as of a command that SIGPIPE ends
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
