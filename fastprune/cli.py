"""The command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .ops import build_info
from .train.demo import run_demo


def main(arguments: Sequence[str] | None = None) -> int:
    # argparse: two small commands don't pay for another dependency.
    options = _parser().parse_args(arguments)
    command: str = options.command
    if command == "info":
        print(f"fastprune {__version__}\n{build_info()}")
    else:
        run_demo(epochs=options.epochs, seed=options.seed, pictures=options.pictures)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastprune", description="Prunes neural networks with exact, fast kernels."
    )
    parser.add_argument("--version", action="version", version=f"fastprune {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="train a small network, prune it, show what is left")
    demo.add_argument("--epochs", type=_positive, default=10, help="default: %(default)s")
    demo.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    demo.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="write pictures of the channels there"
    )
    commands.add_parser("info", help="which implementation serves each operator here")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {number}")
    return number
