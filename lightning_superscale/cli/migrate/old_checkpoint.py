"""What a checkpoint of the old run holds, and how the new run goes on from it."""

from __future__ import annotations

import shlex

from lightning_superscale.checkpoint.tools.summary import OURS, Summary, summarize

_KINDS = {
    "deepspeed": "DeepSpeed's ZeRO checkpoint",
    "deepspeed-universal": "DeepSpeed's universal checkpoint",
    "lightning": "a Lightning file",
    "lightning-sharded": "a sharded directory of Lightning's FSDP or ModelParallel strategy",
    "dcp": "a directory of torch.distributed.checkpoint",
    "safetensors": "safetensors, which are weights only",
    OURS: "a checkpoint of lightning-superscale",
}


def describe(path: str) -> list[str]:
    """Sentences on what of a checkpoint is loaded, what is not, and the commands. No tensor's values are read.

    Raises:
        CheckpointError: there is no checkpoint, or none that can be read; says why.
    """
    summary = summarize(path)
    held = ", ".join(f"{len(tensors)} {name}" for name, tensors in summary.classes().items())
    step = "" if summary.step is None else f", after {summary.step} optimizer steps"
    lines = [f"{path} is {_KINDS.get(summary.format, summary.format)}{step}. It holds {held}."]
    lines += [f"Loaded: {'; '.join(_loaded(summary))}."]
    if missing := _missing(summary):
        lines.append(f"Not loaded: {'; '.join(missing)}.")
    if summary.format == "safetensors":
        return [*lines, "", f"    lightning_superscale.load_from_checkpoint(MyModule, {path!r})"]
    return [*lines, "", *_commands(summary, path)]


def _commands(summary: Summary, path: str) -> list[str]:
    names = " --names names.json" if summary.optimizers_missing else ""
    # fit() resumes from what a Trainer saved; a file for it can be made of any other state.
    if not _is_of_a_trainer(summary):
        convert = f"superscale checkpoint consolidate{names} {shlex.quote(path)} migrated.ckpt"
        return ["Once, without a GPU, and then in the script:", "", f"    {convert}", *_fit("migrated.ckpt")]
    if summary.format == OURS:
        return _fit(path)
    convert = f"superscale checkpoint convert{names} {shlex.quote(path)} migrated.ckpt"
    return [*_fit(path), "", "or, once and without a GPU, convert it first:", "", f"    {convert}"]


def _fit(path: str) -> list[str]:
    return [f"    trainer.fit(module, datamodule, ckpt_path={path!r})"]


def _is_of_a_trainer(summary: Summary) -> bool:
    return summary.rest is not None and "lr_schedulers" in summary.rest


def _loaded(summary: Summary) -> list[str]:
    found = ["weights and buffers"]
    classes = summary.classes()
    if "masters" in classes:
        found.append("fp32 masters")
    if "optimizer states" in classes:
        found.append("optimizer states")
    if summary.step is not None:
        found.append("the number of steps")
    rates = [group["lr"] for one in summary.optimizers for group in one.groups if "lr" in group]
    if rates:
        found.append(f"options of parameter groups, lr {', '.join(map(str, rates))} among them")
    if summary.rest and "loops" in summary.rest:
        found.append("loops, callbacks and schedulers of the Trainer")
    return found


def _missing(summary: Summary) -> list[str]:
    found = []
    if summary.optimizers_missing:
        found.append("optimizer states, unless fit() knows the module: the file numbers them, and does not name them")
    if summary.format != "safetensors" and "optimizer states" not in summary.classes():
        found.append("optimizer states: it has none, and the optimizer starts anew")
    if not _is_of_a_trainer(summary):
        found.append("epoch, batch, callbacks and schedulers of a Trainer: it holds none of these, and they start anew")
    return found
