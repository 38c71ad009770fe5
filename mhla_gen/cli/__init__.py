"""`mhla-gen COMMAND [CONFIG.yaml] [key=value …]`: parse, load the config, make one call."""

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from mhla_gen.config import SCHEMAS, load_config, to_yaml
from mhla_gen.version import __version__


class Command(NamedTuple):
    """A sub-command: `module.run(config, dry_run)` does the work."""

    summary: str
    module: str
    folder_key: str | None = None
    """The setting that a folder means when it stands where a config file would."""


# The keys are those of SCHEMAS. Modules are imported only when their command runs.
COMMANDS: dict[str, Command] = {
    "quickstart": Command(
        "train, sample and score on handwritten digits: minutes on a CPU",
        "mhla_gen.cli.quickstart",
    ),
    "train": Command(
        "train a diffusion transformer on images of classes, or a Wan on clips",
        "mhla_gen.cli.train",
    ),
    "cache": Command(
        "encode images or clips to latents, once for every training run", "mhla_gen.cli.cache"
    ),
    "sample": Command(
        "sample images of classes, or images and videos of prompts, from a saved pipeline",
        "mhla_gen.cli.sample",
        folder_key="pipeline",
    ),
    "evaluate": Command(
        "measure samples against a reference: FID, sFID, IS, precision, recall, KID, FVD",
        "mhla_gen.cli.evaluate",
    ),
    "reference": Command("write reference statistics of your own images", "mhla_gen.cli.reference"),
    "inspect": Command(
        "draw a model's mixing matrices, attention maps, rank and entropy",
        "mhla_gen.cli.inspect",
        folder_key="model",
    ),
    "inspect sensitivity": Command(
        "measure what replacing each softmax layer does, and plan which ones to keep",
        "mhla_gen.cli.sensitivity",
        folder_key="model",
    ),
    "convert": Command(
        "read DiT checkpoints of other code, or write them, and compare outputs",
        "mhla_gen.cli.convert",
    ),
    "bench": Command(
        "measure latency and memory of attention operators, or of whole models",
        "mhla_gen.cli.bench",
        folder_key="subject",
    ),
    "doctor": Command("try every part of the installation once", "mhla_gen.cli.doctor"),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all sub-commands."""
    # Written out: argparse breaks the line after every long command name.
    width = max(map(len, COMMANDS))
    listing = "\n".join(
        f"  {name:<{width}} {command.summary}" for name, command in COMMANDS.items()
    )
    parser = argparse.ArgumentParser(
        prog="mhla-gen",
        usage="mhla-gen COMMAND [CONFIG.yaml] [key=value …] [--dry-run] [--print-config]",
        description="Token-level multi-head linear attention for diffusion and video transformers."
        f"\n\ncommands:\n{listing}",
        epilog="Every setting is a key of the config; --print-config shows them all. Examples are\n"
        "in configs/.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mhla-gen {__version__}")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, help=argparse.SUPPRESS, prog="mhla-gen"
    )
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, description=command.summary)
        sub.add_argument(
            "arguments",
            nargs="*",
            metavar=f"{'FOLDER | ' if command.folder_key else ''}CONFIG.yaml | key=value",
            help="at most one config file, then overrides",
        )
        sub.add_argument("--dry-run", action="store_true", help="check everything, do nothing")
        sub.add_argument("--print-config", action="store_true", help="print the settings and stop")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; the exit status.

    Errors that a user can mend are printed as one line. `MHLA_GEN_TRACEBACK=1` shows where they
    come from.
    """
    given = _joined_command(sys.argv[1:] if argv is None else argv)
    # argparse takes settings on one side of a flag only.
    args = build_parser().parse_args(sorted(given, key=lambda word: word.startswith("-")))
    try:
        path, overrides = _split_arguments(args.arguments, COMMANDS[args.command].folder_key)
        config = load_config(path, overrides, SCHEMAS[args.command])
        if args.print_config:
            print(to_yaml(config), end="")
            return 0
        module = importlib.import_module(COMMANDS[args.command].module)
        module.run(config, dry_run=args.dry_run)
        if "accelerate" in sys.modules:
            importlib.import_module("mhla_gen.runtime.processes").part_processes()
    except (ValueError, OSError) as error:
        if os.environ.get("MHLA_GEN_TRACEBACK") == "1":
            raise
        full = getattr(error, "errno", None) == errno.ENOSPC
        # What is whole stays, and is not made again.
        remedy = "; make room, then give the same command again" if full else ""
        print(f"mhla-gen {args.command}: error: {error}{remedy}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        # torch.OutOfMemoryError, told by name so that --help needs no torch.
        if type(error).__name__ != "OutOfMemoryError":
            raise
        print(
            f"mhla-gen {args.command}: error: out of GPU memory; lower batch_size or the size",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as error:
        print(f"\nmhla-gen {args.command}: {error or 'interrupted'}", file=sys.stderr)
        return 130
    return 0


def _joined_command(argv: Sequence[str]) -> list[str]:
    """The arguments with a command of two words as one."""
    both = " ".join(argv[:2])
    return [both, *argv[2:]] if both in COMMANDS else list(argv)


def _split_arguments(
    arguments: Sequence[str], folder_key: str | None
) -> tuple[str | None, list[str]]:
    if arguments and "=" not in arguments[0]:
        if folder_key is not None and not arguments[0].endswith((".yaml", ".yml")):
            return None, [f"{folder_key}={arguments[0]}", *arguments[1:]]
        return arguments[0], list(arguments[1:])
    return None, list(arguments)
