"""`mhla-gen COMMAND [CONFIG.yaml] [key=value …]`: parse, load the config, make one call."""

import argparse
import difflib
import errno
import gc
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mhla_gen.cli.early import check_early
from mhla_gen.config import SCHEMAS, load_config, to_yaml
from mhla_gen.config.fields import kinds_of
from mhla_gen.config.reading import is_setting
from mhla_gen.errors import UserError, shortened
from mhla_gen.version import __version__


class Command(NamedTuple):
    """A sub-command."""

    summary: str
    function: str
    """`module:function` that does the work, called with the settings and `dry_run`."""
    folder_key: str | None = None
    """The setting that a word means when it stands where a config file would."""
    word: str = "FOLDER"
    """What that word is, in help."""
    imports: tuple[str, ...] = ()
    """Modules that the function imports itself."""


_FLAGS = ("--dry-run", "--print-config", "--help", "-h", "--version")
# What a machine refuses, and no program can fix.
_REFUSALS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO),
    *(errno.ESTALE, errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE, errno.ENFILE),
)
# What torch says, in a RuntimeError, of a tensor that fits no memory or no address.
_TOO_LARGE = ("you tried to allocate", "Storage size calculation overflowed")
# The keys are those of SCHEMAS. Modules are imported only when their command runs.
COMMANDS: dict[str, Command] = {
    "quickstart": Command(
        "train, sample and evaluate on handwritten digits, in minutes on a CPU",
        "mhla_gen.quickstart.quickstart:quickstart",
    ),
    "train": Command(
        "train, tune or distill a diffusion transformer on images or clips",
        "mhla_gen.cli.commands:train",
        imports=("mhla_gen.distillation", "mhla_gen.training.loop"),
    ),
    "cache": Command(
        "encode images or clips to latents once, for all training runs",
        "mhla_gen.cli.commands:cache",
        imports=("mhla_gen.data.caching.build",),
    ),
    "sample": Command(
        "sample images or videos from classes or prompts, with a saved pipeline",
        "mhla_gen.sampling.sampling:sample",
        folder_key="pipeline",
    ),
    "evaluate": Command(
        "compare samples with a reference: FID, sFID, IS, precision, recall, KID, FVD",
        "mhla_gen.evaluation.evaluation:evaluate",
    ),
    "reference": Command(
        "compute the statistics of your own images, as a reference for evaluate",
        "mhla_gen.evaluation.reference:build_reference",
    ),
    "inspect": Command(
        "draw a model's mixing matrices, attention maps, rank and entropy",
        "mhla_gen.inspection.inspection:inspect",
        folder_key="model",
    ),
    "inspect sensitivity": Command(
        "measure what replacing each softmax layer costs, and plan which ones to keep",
        "mhla_gen.inspection.sensitivity:sensitivity",
        folder_key="model",
    ),
    "convert": Command(
        "import or export DiT, DeiT and Wan checkpoints of other code",
        "mhla_gen.cli.commands:convert",
        imports=("mhla_gen.conversion.conversion",),
    ),
    "bench": Command(
        "measure latency and memory of attention operators or whole models",
        "mhla_gen.bench.benchmark:bench",
        folder_key="subject",
        word="ops | model",
    ),
    "doctor": Command("test every part of the installation", "mhla_gen.cli.commands:doctor"),
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
        epilog="`mhla-gen COMMAND --print-config` explains all settings; configs/ has examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mhla-gen {__version__}")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, help=argparse.SUPPRESS, prog="mhla-gen"
    )
    for name, command in COMMANDS.items():
        key = command.folder_key
        sub = commands.add_parser(name, description=command.summary)
        sub.add_argument(
            "arguments",
            nargs="*",
            metavar=f"{f'{command.word} | ' if key else ''}CONFIG.yaml | key=value",
            help=f"{f'{key}={command.word}, or ' if key else ''}a config file, and settings that "
            "override it; --print-config lists them",
        )
        sub.add_argument(
            "--dry-run", action="store_true", help="check everything and write nothing"
        )
        sub.add_argument(
            "--print-config",
            action="store_true",
            help="print every setting with its value and meaning, and exit",
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; the exit status.

    Errors that a user can fix are printed as one line; `MHLA_GEN_TRACEBACK=1` adds the traceback.
    """
    given = _joined_command(sys.argv[1:] if argv is None else argv)
    if mistake := _mistake(given):
        print(f"mhla-gen: error: {mistake}", file=sys.stderr)
        return 2
    # argparse takes settings on one side of a flag only.
    args = build_parser().parse_args(sorted(given, key=lambda word: word.startswith("-")))
    name = args.command
    if name != "bench":
        _prepare_processor()
    _silence_libraries()
    try:
        config = _config_of(name, args.arguments)
        if args.print_config:
            print(to_yaml(config, comments=True), end="")
            return 0
        check_early(config)
        _loaded(COMMANDS[name], own_process=argv is None)(config, dry_run=args.dry_run)
        if "accelerate" in sys.modules:
            importlib.import_module("mhla_gen.runtime.processes").part_processes()
    except KeyboardInterrupt as error:
        print(f"\nmhla-gen {name}: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130
    except Exception as error:
        said = _said(error)
        if said is None or os.environ.get("MHLA_GEN_TRACEBACK") == "1":
            raise
        print(f"mhla-gen {name}: error: {shortened(said)}", file=sys.stderr)
        return 2
    return 0


def _loaded(command: Command, own_process: bool) -> Callable[..., None]:
    """The function of a command, with what it imports.

    That is millions of objects which stay until the process ends. The garbage collector would walk
    them again and again, and once more at the end: half of the time of a command that does little.
    """
    module, function = command.function.split(":")
    if own_process:
        gc.disable()
    for name in (*command.imports, module):
        importlib.import_module(name)
    if own_process:
        gc.freeze()
        gc.enable()
    return getattr(sys.modules[module], function)


def _prepare_processor() -> None:
    """Set what libraries read when torch is loaded, unless the user has.

    Then MKL's products of one row do not depend on a weight's address in memory, so that a resumed
    run is exact on every processor; and OpenMP's threads sleep while they wait for work, instead of
    spinning on cores that others need.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _silence_libraries() -> None:
    """Hide a warning that no user can act on, of a 4-bit kernel that bitsandbytes lacks.

    Nothing here needs the kernel; diffusers imports peft, which imports bitsandbytes.
    """
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)


def _said(error: Exception) -> str | None:
    """What a user can do about an error; None for a bug of the program."""
    number = getattr(error, "errno", None)
    if isinstance(error, UserError) or (isinstance(error, OSError) and number in _REFUSALS):
        full = number in (errno.ENOSPC, errno.EDQUOT)
        # What is whole stays, and is not made again.
        return f"{error}; free some space, then run the same command again" if full else str(error)
    # Told by name so that --help needs no torch.
    if type(error).__name__ == "OutOfMemoryError":
        return "out of GPU memory; lower batch_size or the image size"
    if isinstance(error, MemoryError) or any(said in str(error) for said in _TOO_LARGE):
        return (
            "out of memory; lower batch_size, the image size, the sizes of the model, or whatever "
            "setting has a large number"
        )
    return None


def _mistake(given: Sequence[str]) -> str | None:
    """What is wrong with the command line, and what to write instead."""
    name = next((word for word in given if not word.startswith("-")), None)
    if name is None:
        return None
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        return f"there is no command {name}; {meant}"
    words = list(given)
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if not word.startswith("-") or word in _FLAGS:
            continue
        key, equals, value = word.lstrip("-").partition("=")
        key = key.replace("-", "_")
        if not equals and not following.startswith("-"):
            value = following
        if key in ("config", "c", "config_file"):
            return f"give the config file without a flag: mhla-gen {name} {value or 'FILE'}"
        known = [*kinds_of(SCHEMAS[name])]
        near = [key] if key.split(".")[0] in known else difflib.get_close_matches(key, known, n=1)
        if near:
            return f"settings are written key=value: {near[0]}={value or '…'} instead of {word}"
        return (
            f"there is no flag {word}; settings are written key=value, flags are --dry-run and "
            "--print-config"
        )
    return None


def _config_of(name: str, arguments: Sequence[str]) -> Any:
    """The settings that the arguments of a command stand for."""
    schema, folder_key = SCHEMAS[name], COMMANDS[name].folder_key
    first = arguments[0] if arguments else None
    if first is None or _is_override(first, schema):
        return load_config(None, arguments, schema)
    if folder_key is not None and not first.endswith((".yaml", ".yml")):
        return load_config(None, [f"{folder_key}={first}", *arguments[1:]], schema)
    return load_config(first, arguments[1:], schema)


def _is_override(word: str, schema: type) -> bool:
    """Whether a word sets something; a file or folder may have = in its name, too."""
    known = word.partition("=")[0].split(".")[0].split("[")[0] in kinds_of(schema)
    return "=" in word and (known or (is_setting(word) and not os.path.exists(word)))


def _joined_command(argv: Sequence[str]) -> list[str]:
    """The arguments with a command of two words as one."""
    both = " ".join(argv[:2])
    return [both, *argv[2:]] if both in COMMANDS else list(argv)
