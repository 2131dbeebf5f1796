"""One contestant of `step_cost.py`, `zero.py`, `superoffload.py` or `zenflow.py`, or one rank, in a process of its own.

A gradient norm is clipped to `--clip`; with `--clip-every 2` in every second step only, and to a bound that no norm
reaches in the others. Those of a GPU are in `gpu/contestants.py`, and what only `make bench` compares with in
`versus/contestants.py`.

Steps when told to. Talks JSON lines: says `{"ready": ...}` once warm; answers a number on standard input with the CPU
seconds (of all threads), wall seconds and loss of that many steps; answers "end" with a digest of its weights. CPU time
is read at the end of each step, so what a step leaves to worker threads is counted in the next one; with `--settle` a
turn ends only when nothing is under way any more.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import platform
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import psutil
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.models import SHAPES, Decoder, Shape, batches, num_params

CPU = torch.device("cpu")
# ZenFlow's example settings, of ours and of DeepSpeed's.
ZENFLOW: dict[str, Any] = {"topk": 0.1, "update_interval": 4, "select_interval": 64}
ALL_BF16 = {"master_weights": "bf16", "optimizer_states": "bf16"}
ADAMW = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


# A bound that no gradient norm reaches, so that what clips finds nothing to do.
UNREACHED = 1e6


class Turns:
    """The batches of a run. Hands one out per step that the controller asks for, and clocks what lies between.

    Sized, so that Lightning does not prefetch: it asks for a batch only when the step before it has ended.

    Attributes:
        device: where the model trains.
        num_ranks: processes that train together.
        on_warm, on_turn, on_end: called between warm-up and the first step that counts, after each turn, and after the
            last.
        settle: returns when the last step's work is done; None where the next step may go on with it.
        records_steps: whether our strategies say when their optimizers run, instead of what else they count.
        worker_seconds: CPU seconds so far of worker processes, where a contestant has any.
        facts: what else is known of the run; "memory_bytes" is what model, states and buffers take of the host,
            "written_bytes" what the steps that count wrote to sockets and files.
    """

    def __init__(
        self, shape: Shape, warmup: int, out: IO[str], device: str = "cpu", *, clip: float = 0.0, clip_every: int = 1
    ) -> None:
        self._clip, self._clip_every = clip, clip_every
        self._num_begun = 0
        self.device = torch.device(device)
        self.settle: Callable[[], None] | None = None
        self._batch = batches(shape)
        self._rank, self.num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.on_warm: Callable[[], None] = lambda: None
        self.on_turn: Callable[[], None] = lambda: None
        self.on_end: Callable[[], None] = lambda: None
        self.worker_seconds: Callable[[], float] = lambda: 0.0
        self.records_steps = False
        self._warmup = warmup
        self._out = out
        self._losses: list[Tensor] = []
        self.facts: dict[str, Any] = {}
        self._memory_before = 0

    def begin(self) -> None:
        """Note what memory is in use when libraries are loaded and nothing is made yet."""
        self._memory_before = memory_bytes()

    def __len__(self) -> int:
        return 10**9

    def record(self, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def say(self, **answer: Any) -> None:
        self._out.write(json.dumps(answer) + "\n")
        self._out.flush()

    def __iter__(self) -> Iterator[Tensor]:
        step = 0
        for _ in range(self._warmup):
            yield self._next(step)
            step += 1
        self._losses.clear()
        if self.settle is not None:
            self.settle()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.on_warm()
        written, cpu = written_bytes(), self._cpu_seconds()
        self.say(ready=self.facts)
        for line in sys.stdin:
            if line.strip() == "end":
                self.facts["written_bytes"] = written_bytes() - written
                self.facts["memory_bytes"] = memory_bytes() - self._memory_before
                self.on_end()
                return
            cpus, walls = [], []
            for _ in range(int(line)):
                start = time.perf_counter()
                yield self._next(step)
                step += 1
                if self.settle is not None and len(walls) + 1 == int(line):
                    self.settle()
                walls.append(time.perf_counter() - start)
                now = self._cpu_seconds()
                cpus.append(now - cpu)
                cpu = now
            self.on_turn()
            losses = [float(loss) for loss in self._losses]
            self._losses.clear()
            self.say(cpu=cpus, wall=walls, loss=losses)

    @property
    def bound(self) -> float:
        """What the norm of this step's gradients is clipped to; 0 for nothing."""
        return self._bound_of(self._num_begun)

    @property
    def bound_before(self) -> float:
        """What the step before was clipped to."""
        return self._bound_of(self._num_begun - 1)

    def _bound_of(self, step: int) -> float:
        return self._clip if not self._clip or step % self._clip_every == 0 else UNREACHED

    def _next(self, step: int) -> Tensor:
        self._num_begun = step
        return self._batch(step * self.num_ranks + self._rank).to(self.device)

    def _cpu_seconds(self) -> float:
        return time.process_time() + self.worker_seconds()


def memory_bytes() -> int:
    """Bytes that this process and its children take of the host by themselves, what they share counted once.

    What is mapped from files, such as libraries, is left out.
    """
    total = 0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        rollup = Path("/proc", str(process.pid), "smaps_rollup")
        if rollup.exists():
            fields = dict(line.split(":") for line in rollup.read_text().splitlines()[1:])
            total += sum(int(fields[key].split()[0]) * 1024 for key in ("Pss_Anon", "Pss_Shmem"))
        else:
            total += process.memory_info().rss
    return total


def written_bytes() -> int:
    """Bytes that this process has written so far, to sockets above all: gloo writes what it sends."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"])


def _threads_of_children() -> list[Path]:
    """The folders of the threads of each child process in /proc."""
    tasks = (Path("/proc", str(child.pid), "task") for child in psutil.Process().children(recursive=True))
    return [thread for task in tasks for thread in sorted(task.iterdir())]


def _nanoseconds_of_children() -> list[int]:
    """What each thread of each child process has run so far."""
    return [int((thread / "schedstat").read_text().split()[0]) for thread in _threads_of_children()]


def _has_runnable_children() -> bool:
    """Whether a thread of a child process runs, or would if it were given a core."""
    return any((thread / "stat").read_text().rpartition(")")[2].split()[0] == "R" for thread in _threads_of_children())


def seconds_of_children() -> float:
    """CPU seconds that the threads of child processes have run so far, those that ended apart."""
    return sum(_nanoseconds_of_children()) / 1e9


def wait_for_children() -> None:
    """Return when no thread of a child process has run for 5 ms, or waits for a core."""
    before = _nanoseconds_of_children()
    while True:
        time.sleep(0.005)
        now = _nanoseconds_of_children()
        if now == before and not _has_runnable_children():
            return
        before = now


def build_model(shape: Shape, precision: str, device: torch.device = CPU) -> Decoder:
    """The model, made where it trains: a host takes minutes to draw billions of weights."""
    with device:
        model = Decoder(shape)
    return model.to(torch.bfloat16) if precision == "bf16-true" else model


# Contestants. Each trains until `turns` ends and returns the module, for its weights.


def run_loop(turns: Turns, shape: Shape, precision: str, clip: float, *, fused: bool) -> nn.Module:
    """Plain PyTorch; with bf16 weights, fp32 masters kept by hand, as mixed-precision loops write it."""
    model = build_model(shape, precision)
    params = list(model.parameters())
    masters = params if precision == "32-true" else [nn.Parameter(p.detach().float()) for p in params]
    optimizer = torch.optim.AdamW(masters, fused=fused or None, **ADAMW)
    for ids in turns:
        loss = model.loss(ids)
        loss.backward()
        if masters is not params:
            for param, master in zip(params, masters, strict=True):
                master.grad = None if param.grad is None else param.grad.float()
                param.grad = None
        if clip:
            nn.utils.clip_grad_norm_(masters, turns.bound)
        optimizer.step()
        optimizer.zero_grad()
        if masters is not params:
            with torch.no_grad():
                for param, master in zip(params, masters, strict=True):
                    param.copy_(master)
        turns.record(loss)
    return model


def run_passes(turns: Turns, shape: Shape, precision: str, clip: float) -> nn.Module:
    """Forward and backward without any optimizer: what every step costs at least."""
    turns.begin()
    model = build_model(shape, precision, turns.device)
    for ids in turns:
        loss = model.loss(ids)
        loss.backward()
        for param in model.parameters():
            param.grad = None
        turns.record(loss)
    return model


def settle_offload(turns: Turns, assembly: Any) -> None:
    """Let `--settle` wait for our host steps too: they would run in the next contestant's turn."""

    def settle() -> None:
        for engine in assembly.engines.values():
            engine.quiesce()
        synchronize()

    if turns.settle is not None:
        synchronize, turns.settle = turns.settle, settle


def watch_offload(turns: Turns, assembly: Any) -> None:
    """Count what goes over the link."""
    link = assembly.link

    def start_counting() -> None:
        turns.facts["d2h"], turns.facts["h2d"] = -link.bytes.d2h, -link.bytes.h2d

    def stop_counting() -> None:
        turns.facts["d2h"] += link.bytes.d2h
        turns.facts["h2d"] += link.bytes.h2d
        plan = assembly.plan()
        turns.facts["host_bytes"], turns.facts["device_bytes"] = plan.host_bytes, plan.device_bytes
        turns.facts["reasons"] = list(plan.reasons)

    turns.on_warm = start_counting
    turns.on_end = stop_counting


def watch(turns: Turns, assembly: Any) -> None:
    """Settle and count what one of ours does, or record it."""
    if assembly.link is not None:
        settle_offload(turns, assembly)
    if turns.records_steps:
        record_steps(turns, assembly.settings.timeline)
        return
    if assembly.link is not None:
        watch_offload(turns, assembly)
    if not assembly.mesh.is_single:
        turns.facts["num_units"] = assembly.plan().num_units
        turns.on_warm = assembly.mesh.counts.clear
        # Of steps alone: ranks meet once more when training ends.
        turns.on_end = lambda: turns.facts.update(calls=dict(assembly.mesh.counts.calls))


def note_clip(turns: Turns, assembly: Any) -> None:
    """Count whether the last step of the run's first optimizer was clipped.

    Nothing is asked where nothing is clipped: the norm is then known when the host has stepped, and asking would wait.
    """
    if not turns.bound:
        return
    engine = None if assembly is None or not assembly.engines else next(iter(assembly.engines.values()))
    norm = None if engine is None else engine.last_norm().norm  # known where the step needed it
    if norm is not None:
        turns.facts["normed_steps"] = turns.facts.get("normed_steps", 0) + 1
        turns.facts["clipped_steps"] = turns.facts.get("clipped_steps", 0) + (norm > turns.bound_before)


def record_steps(turns: Turns, timeline: Any) -> None:
    """Record when our optimizers run, in every second turn.

    "optimizer_seconds" of the facts are those in which any did; None of turns that recorded nothing. Recording gives
    uploads a thread of their own, which takes a core from the others: wall and CPU time are those of the other turns.
    """
    found: list[float | None] = []
    turns.facts["optimizer_seconds"] = found

    def next_turn() -> None:
        if not timeline.is_open:
            found.append(None)
            timeline.open()
            return
        spans = [span for span in timeline.close() if span.lane in ("host optimizer", "device optimizer")]
        found.append(covered_seconds([(span.start, span.end) for span in spans]))

    turns.on_turn, turns.on_end = next_turn, timeline.close


def covered_seconds(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds that are in any of these spans of time, which may overlap."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def run_trainer(
    turns: Turns,
    shape: Shape,
    precision: str,
    clip: float,
    *,
    fused: bool,
    strategy: Callable[[], Any],
    configure_model: Callable[[Any], None] | None = None,
    dtypes: Mapping[str, str] | None = None,
) -> nn.Module:
    """Under Lightning's Trainer.

    Args:
        configure_model: the module's hook, for strategies that want one.
        dtypes: options of our precision plugin, for states that are not fp32.
    """
    import lightning as L

    chosen = strategy()
    turns.begin()

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = build_model(shape, "32-true", turns.device)

        def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
            note_clip(turns, getattr(self.trainer.strategy, "assembly", None))
            if clip:
                self.trainer.gradient_clip_val = turns.bound
            loss = self.model.loss(ids)
            turns.record(loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), fused=fused or None, **ADAMW)

        def on_train_start(self) -> None:
            assembly = getattr(self.trainer.strategy, "assembly", None)
            if assembly is None:
                return
            watch(turns, assembly)
            shards = assembly.settings.zero.stage == 3 and not assembly.mesh.is_single
            if shards and not any(isinstance(p, DTensor) for p in self.parameters()):
                raise RuntimeError("zero3 is not in this version: every rank holds whole weights")

    class Configured(Module):
        def configure_model(self) -> None:
            assert configure_model is not None
            configure_model(self)

    module = Module() if configure_model is None else Configured()
    how: dict[str, Any] = {"precision": precision}
    if dtypes is not None:
        from lightning_superscale import SuperScalePrecision

        how = {"plugins": [SuperScalePrecision(precision, **dtypes)]}  # type: ignore[arg-type]
    trainer = L.Trainer(
        strategy=chosen,
        accelerator="cpu" if turns.device.type == "cpu" else "gpu",
        devices=int(os.environ.get("WORLD_SIZE", "1")),
        **how,
        max_epochs=1,
        gradient_clip_val=clip or None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, turns)
    return module.model


def ours(**settings: Any) -> Callable[[], Any]:
    def build() -> Any:
        from lightning_superscale.plugins.pytorch import SuperScaleStrategy

        return SuperScaleStrategy(**settings)

    return build


def zenflow(**more: Any) -> dict[str, Any]:
    """Our `OffloadConfig` of ZenFlow."""
    return {"engine": "zenflow", "zenflow": {**ZENFLOW, **more}}


class WithLoss(nn.Module):
    """The model with its loss as forward: what DeepSpeed and FSDP2 hook into."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model.loss(ids)


@contextmanager
def optimizer_threads() -> Iterator[None]:
    """Around a step on the host: where forward and backward have one thread, it may have more, as nothing else runs."""
    passes = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("BENCH_OPTIMIZER_THREADS", passes)))
    try:
        yield
    finally:
        torch.set_num_threads(passes)


def train_module(turns: Turns, model: nn.Module, optimizer: torch.optim.Optimizer, clip: float = 0.0) -> nn.Module:
    """Train a model whose forward is its loss in a loop of plain PyTorch; returns it."""
    for ids in turns:
        loss = model(ids)
        loss.backward()
        with optimizer_threads():
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), turns.bound)
            optimizer.step()
        optimizer.zero_grad()
        turns.record(loss)
    return model


def run_fsdp2(turns: Turns, shape: Shape, precision: str, clip: float) -> nn.Module:
    """Plain FSDP2: every block is a group, and the rest is one."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    model = WithLoss(build_model(shape, precision))
    for block in model.model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return train_module(turns, model, torch.optim.AdamW(model.parameters(), fused=True, **ADAMW), clip)


def run_deepspeed(turns: Turns, shape: Shape, precision: str, clip: float, *, zero: Mapping[str, Any]) -> nn.Module:
    """DeepSpeed with `zero_optimization` as given; with offload it steps by its own CPUAdam."""
    import deepspeed

    turns.begin()
    model = WithLoss(build_model(shape, precision, turns.device))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": shape.batch,
        "gradient_clipping": clip,  # its default is 1.0
        "zero_optimization": dict(zero),
    }
    if precision == "bf16-true":
        config["bf16"] = {"enabled": True}
    optimizer = None
    if "offload_optimizer" in zero:
        config["optimizer"] = {"type": "AdamW", "params": ADAMW}
    else:
        config["zero_allow_untested_optimizer"] = True
        optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
    engine, inner, _, _ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), optimizer=optimizer, config=config
    )
    turns.facts["optimizer"] = type(getattr(inner, "optimizer", inner)).__name__
    turns.facts["deepspeed"] = deepspeed.__version__
    if zero.get("zenflow", {}).get("overlap_step"):  # the optimizer is in a process of its own
        turns.worker_seconds = seconds_of_children
        turns.settle = None if turns.settle is None else wait_for_children
    for ids in turns:
        loss = engine(ids)
        engine.backward(loss)
        if clip:
            inner.clip_grad = turns.bound
        with optimizer_threads():
            engine.step()
        turns.record(loss)
    return model


def deepspeed_zenflow(*, overlap: bool) -> dict[str, Any]:
    """DeepSpeed's settings that mean what `ZENFLOW` does. Its own defaults give NaN."""
    return {
        "topk_ratio": ZENFLOW["topk"],
        "update_interval": ZENFLOW["update_interval"],
        "select_strategy": "step",
        "select_interval": ZENFLOW["select_interval"],
        "full_warm_up_rounds": 0,
        "overlap_step": overlap,
    }


def _zero(stage: int, **more: Any) -> dict[str, Any]:
    """DeepSpeed's settings on a CPU, where nothing overlaps."""
    return {"stage": stage, "overlap_comm": False, "reduce_bucket_size": 5_000_000, **more}


def _on_host(**more: Any) -> dict[str, Any]:
    return _zero(2, offload_optimizer={"device": "cpu", "pin_memory": False}, **more)


Runner = Callable[[Turns, Shape, str, float], nn.Module]

CONTESTANTS: dict[str, Runner] = {
    "loop-fused": lambda *a: run_loop(*a, fused=True),
    "loop-default": lambda *a: run_loop(*a, fused=False),
    "auto-fused": lambda *a: run_trainer(*a, fused=True, strategy=lambda: "auto"),
    "auto-default": lambda *a: run_trainer(*a, fused=False, strategy=lambda: "auto"),
    "resident-fused": lambda *a: run_trainer(*a, fused=True, strategy=ours()),
    "resident-default": lambda *a: run_trainer(*a, fused=False, strategy=ours()),
    "superoffload": lambda *a: run_trainer(*a, fused=True, strategy=ours(offload="superoffload")),
    "cpu": lambda *a: run_trainer(*a, fused=True, strategy=ours(offload="cpu")),
    "superoffload-all-bf16": lambda *a: run_trainer(
        *a, fused=True, strategy=ours(offload="superoffload"), dtypes=ALL_BF16
    ),
    "cpu-all-bf16": lambda *a: run_trainer(*a, fused=True, strategy=ours(offload="cpu"), dtypes=ALL_BF16),
    "deepspeed-z1": lambda *a: run_deepspeed(*a, zero=_zero(1)),
    "zenflow": lambda *a: run_trainer(*a, fused=True, strategy=ours(offload=zenflow())),
    "zenflow-on-device": lambda *a: run_trainer(*a, fused=True, strategy=ours(offload=zenflow(accumulate_on="device"))),
    "zenflow-synchronous": lambda *a: run_trainer(*a, fused=True, strategy=ours(offload=zenflow(overlap=False))),
    "deepspeed-z2-offload": lambda *a: run_deepspeed(*a, zero=_on_host()),
    "deepspeed-zenflow": lambda *a: run_deepspeed(*a, zero=_on_host(zenflow=deepspeed_zenflow(overlap=True))),
    "deepspeed-zenflow-synchronous": lambda *a: run_deepspeed(
        *a, zero=_on_host(zenflow=deepspeed_zenflow(overlap=False))
    ),
    "ddp": lambda *a: run_trainer(*a, fused=True, strategy=lambda: "ddp"),
    "zero1": lambda *a: run_trainer(*a, fused=True, strategy=ours(zero=1)),
    "zero2": lambda *a: run_trainer(*a, fused=True, strategy=ours(zero=2)),
    "zero3": lambda *a: run_trainer(*a, fused=True, strategy=ours(zero=3)),
    "fsdp2": run_fsdp2,
    "passes": run_passes,
    "deepspeed-z2": lambda *a: run_deepspeed(*a, zero=_zero(2)),
    "deepspeed-z3": lambda *a: run_deepspeed(*a, zero=_zero(3)),
}


def digest(module: nn.Module) -> str:
    """Of every bit of the weights; of those that this rank holds, where a model is sharded."""
    sha = hashlib.sha1()
    for _, param in sorted(module.named_parameters()):
        local = param.to_local() if isinstance(param, DTensor) else param
        sha.update(local.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy())
    return sha.hexdigest()[:16]


def main(contestants: Mapping[str, Runner] = CONTESTANTS) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=contestants)
    parser.add_argument("--size", choices=SHAPES, required=True)
    parser.add_argument("--precision", choices=("32-true", "bf16-true"), default="32-true")
    parser.add_argument("--clip", type=float, default=0.0)
    parser.add_argument("--clip-every", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch; 0 leaves them as they are")
    parser.add_argument("--record", action="store_true", help="of ours: the seconds in which optimizers run")
    parser.add_argument("--settle", action="store_true", help="a turn ends when nothing is under way any more")
    options = parser.parse_args()
    # Libraries print what they like; the controller reads JSON only.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if options.threads:
        torch.set_num_threads(options.threads)
    shape = SHAPES[options.size]
    clipping = {"clip": options.clip, "clip_every": options.clip_every}
    turns = Turns(shape, options.warmup, answers, options.device, **clipping)
    turns.records_steps = options.record
    if options.settle:
        turns.settle = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    turns.facts.update(torch=torch.__version__, python=platform.python_version())
    try:
        module = contestants[options.name](turns, shape, options.precision, options.clip)
    except Exception as error:
        if "not in this version" not in str(error):
            raise
        turns.say(absent=str(error))
        return 0
    if options.name.startswith(("resident", "superoffload", "cpu", "flow", "zero", "zenflow")):
        from lightning_superscale.ops.cpu import adamw

        turns.facts["kernel"] = adamw.kernel_name()
    if options.device == "cuda":
        turns.facts["peak_device_mib"] = torch.cuda.max_memory_allocated() // 2**20
    turns.say(
        digest=digest(module),
        num_params=num_params(module),
        peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        facts=turns.facts,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
