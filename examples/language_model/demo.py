"""Train a small GPT on the text of the Python standard library with `strategy: superoffload`.

    python examples/language_model/demo.py                                  # config.yaml as it is
    python examples/language_model/demo.py --trainer.max_steps 50 --data.path some/dir --trainer.precision bf16-true

A second run goes on from the first one's checkpoint; `--fresh` starts anew.
"""

from __future__ import annotations

import difflib
import logging
import math
import shutil
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))  # runs from a checkout, installed or not

import torch  # noqa: E402
from lightning.pytorch import Trainer  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning.pytorch.strategies import StrategyRegistry  # noqa: E402
from lightning.pytorch.utilities.exceptions import MisconfigurationException  # noqa: E402

import lightning_superscale  # noqa: E402, F401 (registers the strategy names)
from examples.language_model.data import DataError, TextData  # noqa: E402
from examples.language_model.module import LanguageModel  # noqa: E402
from examples.language_model.report import ProgressLines, plot_history, read_history  # noqa: E402
from lightning_superscale import SuperScaleError  # noqa: E402


class UserError(Exception):
    """Something the user can correct: shown as one line, without a traceback."""


class DemoCLI(LightningCLI):
    """LightningCLI that resumes, and keeps checkpoint, logs and plot in one directory."""

    checkpoint_state: dict[str, Any] | None = None

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str, default="runs/demo", help="Where checkpoint, logs and plot go.")
        parser.add_argument("--fresh", type=bool, nargs="?", const=True, default=False, help="Don't resume.")
        parser.add_argument("--prompt", type=str, default="def ", help="Start of the text that is sampled at the end.")
        parser.add_argument("--sample_bytes", type=int, default=400, help="Length of that text.")
        parser.add_argument("--temperature", type=float, default=0.7, help="Of its sampling.")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.save_last": True,
                "checkpoint.save_top_k": 0,
                "checkpoint.save_on_train_epoch_end": True,
                "checkpoint.enable_version_counter": False,
            }
        )
        parser.link_arguments("run_dir", "checkpoint.dirpath")
        parser.link_arguments("data.seq_len", "model.gpt.context")

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def last_checkpoint(self) -> Path:
        return self.run_dir / "last.ckpt"

    def before_instantiate_classes(self) -> None:
        check_strategy_name(self.config.trainer.strategy)
        if self.config.fresh:
            self.last_checkpoint.unlink(missing_ok=True)
            shutil.rmtree(self.run_dir / "logs", ignore_errors=True)
        elif self.last_checkpoint.exists():
            self.checkpoint_state = read_checkpoint(self.last_checkpoint)
            self.extend_limits(self.checkpoint_state)

    def extend_limits(self, state: dict[str, Any]) -> None:
        """Let the resumed run take as many steps, and as much time, as one from the start."""
        trainer = self.config.trainer
        if trainer.max_steps > 0:
            trainer.max_steps += state["global_step"]
        used = state["callbacks"].get("Timer", {}).get("time_elapsed", {}).get("train", 0)
        if isinstance(trainer.max_time, str):
            days, hours, minutes, seconds = map(int, trainer.max_time.split(":"))
            limit = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds + math.ceil(used))
            rest = limit.seconds
            trainer.max_time = f"{limit.days:02}:{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = self.config.trainer
        if trainer.logger in (None, True):
            loggers = [CSVLogger(self.run_dir, name="logs")]
            if not sys.stdout.isatty():
                kwargs["enable_progress_bar"] = False
                loggers.append(ProgressLines(trainer.max_steps))
            kwargs["logger"] = loggers
        return super().instantiate_trainer(**kwargs)


def check_strategy_name(strategy: Any) -> None:
    known = ["auto", *StrategyRegistry.available_strategies()]
    if isinstance(strategy, str) and strategy.lower() not in known:
        close = difflib.get_close_matches(strategy.lower(), known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f": expected one of {', '.join(known)}."
        raise UserError(f"unknown trainer.strategy {strategy!r}{hint}")


def read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UserError(f"{path} is not a readable checkpoint. Pass --fresh to start anew. ({error})") from error


def check_same_model(cli: DemoCLI) -> None:
    if cli.checkpoint_state is None:
        return
    saved, wanted = cli.checkpoint_state["hyper_parameters"]["gpt"], cli.model.hparams["gpt"]
    different = [f"{key} {saved.get(key)} (now {wanted[key]})" for key in wanted if saved.get(key) != wanted[key]]
    if different:
        raise UserError(
            f"{cli.last_checkpoint} holds another model: {', '.join(different)}. "
            "Pass --fresh to start anew, or --run_dir for another place."
        )


def describe_data(data: TextData) -> str:
    corpus = data.corpus
    source = "the Python standard library" if data.path is None else str(data.path)
    return (
        f"Text: {source}: {len(corpus.train):,} bytes of {len(corpus.train_files):,} files for training, "
        f"{len(corpus.validation):,} of {len(corpus.validation_files):,} for validation."
    )


def describe_start(cli: DemoCLI) -> str:
    if cli.checkpoint_state is None:
        return f"Starting anew; checkpoint, logs and plot go to {cli.run_dir}."
    return (
        f"Resuming from {cli.last_checkpoint} at step {cli.checkpoint_state['global_step']}, up to step "
        f"{cli.trainer.max_steps}. Pass --fresh to start anew."
    )


def print_results(cli: DemoCLI, bits_per_byte: float) -> None:
    corpus = cli.datamodule.corpus
    rows = [
        ("validation, this model", bits_per_byte),
        ("validation, order-0 code of the training bytes", corpus.validation_order0_bits),
        ("order-0 entropy of all bytes", corpus.order0_bits),
    ]
    print(f"\nBits per byte after {cli.trainer.global_step} steps")
    for name, bits in rows:
        print(f"  {name:<48}{bits:6.3f}")


def sample_text(cli: DemoCLI) -> str:
    """A continuation of the prompt; the same for the same weights."""
    prompt = torch.tensor([list(cli.config.prompt.encode())])
    generator = torch.Generator().manual_seed(0)
    tokens = cli.model.cpu().eval().gpt.generate(prompt, cli.config.sample_bytes, cli.config.temperature, generator)
    return bytes(tokens[0].tolist()).decode("utf-8", errors="replace")


def write_plot(cli: DemoCLI, bits_per_byte: float) -> None:
    target = cli.run_dir / "loss.png"
    history = read_history(cli.run_dir / "logs")
    history.validation = [point for point in history.validation if point[0] < cli.trainer.global_step]
    history.validation.append((cli.trainer.global_step, bits_per_byte))
    num_params = sum(p.numel() for p in cli.model.parameters())
    source = "the Python standard library" if cli.datamodule.path is None else cli.datamodule.path.name
    strategy = cli.config.trainer.strategy
    name = strategy if isinstance(strategy, str) else type(cli.trainer.strategy).__name__
    title = f"Byte-level GPT of {num_params:,} parameters on {source}\n"
    title += f"strategy={name}, precision={cli.trainer.precision}"
    plot_history(history, cli.datamodule.corpus.validation_order0_bits, title, target)
    print(f"Loss plot: {target}")


def run(args: list[str] | None) -> None:
    try:
        cli = DemoCLI(
            LanguageModel,
            TextData,
            run=False,
            auto_configure_optimizers=False,
            args=args,
            parser_kwargs={"default_config_files": [str(Path(__file__).with_name("config.yaml"))]},
            save_config_kwargs={"overwrite": True},
        )
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise UserError(str(error)) from error
    print(describe_data(cli.datamodule))
    check_same_model(cli)
    print(describe_start(cli), flush=True)
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.last_checkpoint if cli.checkpoint_state else None)
    if 0 <= cli.trainer.global_step < cli.trainer.max_steps:
        print(f"\nStopped at step {cli.trainer.global_step} of {cli.trainer.max_steps}: run again to go on from there.")
    has_logs = isinstance(cli.trainer.logger, CSVLogger)
    cli.trainer.loggers = []  # the results are printed below
    [metrics] = cli.trainer.validate(cli.model, cli.datamodule, verbose=False)
    bits_per_byte = metrics["val_bits_per_byte"]
    print_results(cli, bits_per_byte)
    print(f"\nSample, temperature {cli.config.temperature:g}:\n{'-' * 80}\n{sample_text(cli)}\n{'-' * 80}\n")
    if has_logs:
        write_plot(cli, bits_per_byte)
    if cli.last_checkpoint.exists():
        print(f"Checkpoint: {cli.last_checkpoint} (run again to go on from it, or with --fresh to start anew)")


def main(args: list[str] | None = None) -> int:
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    try:
        run(args)
    except (UserError, DataError, SuperScaleError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
