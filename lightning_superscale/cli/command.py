"""The `superscale` command: its arguments, subcommands and exit codes."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

from rich.console import Console

from lightning_superscale import __version__
from lightning_superscale.cli import checkpoint as checkpoint_commands
from lightning_superscale.cli import doctor, trace
from lightning_superscale.cli.checkpoint import Reading, UsageError
from lightning_superscale.cli.estimate import command as estimate_command
from lightning_superscale.cli.migrate import command as migrate_command
from lightning_superscale.cli.simulate import command as simulate_command
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.run.report.recorder import DEFAULT_STEP


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="superscale", description="Tools of lightning-superscale.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("doctor", help="what this environment has, what is missing, and how to get it")
    tracing = commands.add_parser(
        "trace",
        help="run a training command and draw one of its steps, or a window of them, lane by lane",
        usage="superscale trace [--out FOLDER] [--step N] -- COMMAND [ARGUMENT ...]\n"
        "       superscale trace --draw TRACE.json",
    )
    tracing.add_argument("--out", type=Path, default=Path("runs/trace"), help="where trace and picture go")
    tracing.add_argument(
        "--step", type=int, default=DEFAULT_STEP, help="least number of steps before the recorded ones"
    )
    tracing.add_argument("--draw", type=Path, metavar="TRACE", help="draw an earlier trace again")
    tracing.add_argument("training", nargs=argparse.REMAINDER, metavar="COMMAND")
    about = "predict memory and time of training a model with every strategy, and recommend one"
    estimate_command.add_arguments(commands.add_parser("estimate", help=about, description=about.capitalize() + "."))
    about = "simulate steps of a strategy on clusters of several sizes, up to thousands of nodes, event by event"
    simulate_command.add_arguments(commands.add_parser("simulate", help=about, description=about.capitalize() + "."))
    _add_migrate_command(commands)
    _add_checkpoint_commands(commands)
    return parser


def _add_migrate_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = "say what a DeepSpeed configuration, or Lightning's DeepSpeed or FSDP strategy, is here, key by key"
    migrate = commands.add_parser("migrate", help=about, description=about.capitalize() + ".")
    migrate.add_argument(
        "config",
        metavar="CONFIG",
        help="ds_config.json, YAML with a strategy or a trainer section, or the strategy's call in Python; - for stdin",
    )
    migrate.add_argument("--yaml", action="store_true", help="print a section for LightningCLI instead of Python")
    migrate.add_argument("--json", action="store_true", help="all of it as JSON")
    migrate.add_argument(
        "--checkpoint", metavar="DIR", help="a checkpoint of the old run: say what of it can be loaded"
    )


def _add_checkpoint_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = "look into checkpoints of any known format, prove them whole, compare and convert them"
    checkpoint = commands.add_parser("checkpoint", help=about, description=about.capitalize() + ".")
    actions = checkpoint.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add(name: str, about: str, *places: str, has_drop: bool = True) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=about, description=about.capitalize() + ".")
        for place in places:
            action.add_argument(place.lower(), metavar=place)
        names = "where optimizer states are numbered: JSON list of parameter names for each optimizer, in its order"
        action.add_argument("--names", type=Path, metavar="FILE", help=names)
        if has_drop:
            action.add_argument("--drop-optimizer", action="store_true", help="weights and buffers only")
        return action

    inspect = add("inspect", "what a checkpoint holds; reads no values and runs nothing", "PATH", has_drop=False)
    inspect.add_argument("--tensors", action="store_true", help="list every tensor")
    inspect.add_argument("--json", action="store_true", help="all of it as JSON")
    add("verify", "read all of a checkpoint: every checksum, every element, every file", "PATH")
    diff = add("diff", "in what two checkpoints differ; exit code 0: nothing, 1: something, 2: can't tell", "A", "B")
    diff.add_argument("--rtol", type=float, default=0.0, help="relative tolerance of values (default: 0)")
    diff.add_argument("--atol", type=float, default=0.0, help="absolute tolerance of values (default: 0)")
    convert = add("convert", "write a checkpoint of any known format as one of lightning-superscale", "SRC", "DST")
    convert.add_argument("--overwrite", action="store_true", help="replace the checkpoint at DST, all at once")
    consolidate = add("consolidate", "one Lightning .ckpt file with weights and optimizer states", "SRC", "DST")
    consolidate.add_argument("--weights-only", action="store_true", dest="drop_optimizer", help="as --drop-optimizer")
    export = add("export", "write a checkpoint as one of another format", "SRC", "DST")
    export.add_argument("--to", required=True, choices=get_args(checkpoint_commands.ExportFormat))
    export.add_argument("--strip-prefix", default="", metavar="PREFIX", help="hf: of weights' names, such as `model.`")
    kinds = "deepspeed-universal: which optimizer DeepSpeed is going to run (default: torch's)"
    export.add_argument("--optimizer", choices=("torch", "deepspeed"), default="torch", help=kinds)


def _run_checkpoint_command(chosen: argparse.Namespace) -> int:
    reading = Reading(chosen.names, getattr(chosen, "drop_optimizer", False))
    if chosen.action == "inspect":
        return checkpoint_commands.inspect(chosen.path, reading, has_tensors=chosen.tensors, is_json=chosen.json)
    if chosen.action == "verify":
        return checkpoint_commands.verify(chosen.path, reading)
    if chosen.action == "diff":
        return checkpoint_commands.diff(chosen.a, chosen.b, reading, rtol=chosen.rtol, atol=chosen.atol)
    if chosen.action == "convert":
        return checkpoint_commands.convert(chosen.src, chosen.dst, reading, should_overwrite=chosen.overwrite)
    if chosen.action == "consolidate":
        return checkpoint_commands.export(chosen.src, chosen.dst, "lightning", reading)
    return checkpoint_commands.export(
        chosen.src, chosen.dst, chosen.to, reading, strip_prefix=chosen.strip_prefix, optimizer=chosen.optimizer
    )


class _Stopped(KeyboardInterrupt):
    """A signal that asks the process to end; it cleans up as after Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def _stoppable() -> Iterator[None]:
    """A context in which SIGTERM and SIGHUP raise `_Stopped`, once, unless the caller has them ignored or handled."""

    def stop(number: int, _: object) -> None:
        for one in taken:
            signal.signal(one, signal.SIG_IGN)  # the cleaning up is not stopped
        raise _Stopped(number)

    is_main = threading.current_thread() is threading.main_thread()
    asking = (signal.SIGTERM, signal.SIGHUP)
    taken = [one for one in asking if is_main and signal.getsignal(one) is signal.SIG_DFL]
    for one in taken:
        signal.signal(one, stop)
    try:
        yield
    finally:
        for one in taken:
            signal.signal(one, signal.SIG_DFL)


def _checkpoint(chosen: argparse.Namespace) -> int:
    command = f"superscale checkpoint {chosen.action}"
    try:
        with _stoppable():
            return _run_checkpoint_command(chosen)
    except SuperScaleError as error:
        print(f"{command}: {' '.join(str(error).split())}", file=sys.stderr)
        # For diff, 1 means that the checkpoints differ.
        return 2 if isinstance(error, UsageError) or chosen.action == "diff" else 1
    except BrokenPipeError:
        raise  # no fault of the checkpoint
    except OSError as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 2 if chosen.action == "diff" else 1
    except KeyboardInterrupt as stopped:
        # A checkpoint that had begun to take its name has it now; otherwise all its files are gone.
        written = f"; nothing half-written is left at {chosen.dst}" if hasattr(chosen, "dst") else ""
        print(f"{command}: interrupted{written}", file=sys.stderr)
        return 128 + (stopped.number if isinstance(stopped, _Stopped) else signal.SIGINT)


def _predict(chosen: argparse.Namespace) -> int:
    run = estimate_command.run if chosen.command == "estimate" else simulate_command.run
    try:
        return run(chosen)
    except SuperScaleError as error:
        print(f"superscale {chosen.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _migrate(chosen: argparse.Namespace) -> int:
    try:
        return migrate_command.run(
            chosen.config, checkpoint=chosen.checkpoint, is_yaml=chosen.yaml, is_json=chosen.json
        )
    except SuperScaleError as error:
        print(f"superscale migrate: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        arguments: the command line without the program's name; None for that of the process.

    Returns:
        The process's exit code. 0: success. 1: a part is missing, a checkpoint is damaged, two differ, a key to
        migrate is unknown, or no strategy fits. 2: the arguments do not fit, a comparison failed, or nothing could be
        migrated, estimated or simulated. 130: interrupted. 141: nothing reads the output any more, as after `| head`.
        After `trace`, that of the training command.
    """
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still in the buffer would raise once more when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return code


def _run(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if chosen.command == "doctor":
        checks = doctor.examine()
        Console(file=sys.stdout).print(doctor.table(checks))
        return 1 if any(check.status == "error" for check in checks) else 0
    if chosen.command in ("estimate", "simulate"):
        return _predict(chosen)
    if chosen.command == "migrate":
        return _migrate(chosen)
    if chosen.command == "checkpoint":
        # A name in a checkpoint need not be one that the terminal can show.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        return _checkpoint(chosen)
    command = chosen.training[1:] if chosen.training[:1] == ["--"] else chosen.training
    if bool(command) == (chosen.draw is not None):
        parser.error("trace takes a training command after --, or --draw with an earlier trace")
    if chosen.step < 1:
        parser.error("--step must be at least 1: the first step builds what later ones reuse")
    try:
        if chosen.draw is not None:
            trace.show(chosen.draw)
            return 0
        return trace.run(command, chosen.out, chosen.step)
    except SuperScaleError as error:
        print(f"superscale trace: {error}", file=sys.stderr)
        return 1
