"""The `inlay` command.

Errors are one line, `inlay: error: wanted ..., got ...; do ...`, and exit status 2. INLAY_DEBUG=1
shows the traceback instead.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from . import adapter, estimate, generate, init, train

COMMANDS = (init, train, estimate, generate, adapter)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        return int(args.run(args) or 0)
    except KeyboardInterrupt:
        print("inlay: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("INLAY_DEBUG", "0") not in ("", "0"):
            raise
        print(f"inlay: error: {_one_line(error)}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="inlay", description="Fine-tune a small dense piece set into a frozen model.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for module in COMMANDS:
        module.add_parsers(commands)
    doctor = commands.add_parser("doctor", help="what was built, what was found, what was chosen")
    doctor.set_defaults(run=_doctor)
    return parser


def _doctor(args: argparse.Namespace) -> int | None:
    from .. import doctor

    return doctor.main()


def _one_line(error: Exception) -> str:
    # str(KeyError) is the repr of its argument; a missing message still deserves its type.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__
