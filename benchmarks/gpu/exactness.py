"""Whole training steps against states that stay on the device, bit for bit: a worker of `make gpu-check`.

Reads a JSON list of cases from standard input and answers each with `{"start": name}` and then a row. Algorithms are
deterministic, or two runs of one program would differ. With a seed, random delays are put into the compute stream and
into both streams of the link: they change no bit, unless something is not ordered.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only so

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu.exact_cases import EVALUATE, PEAK, RESIDENT, RESUME, TRACE, WAYS, Case
from lightning_superscale import OffloadConfig, SuperScaleStrategy, UniversalCheckpointIO
from lightning_superscale.offload.link.link import CudaLink
from lightning_superscale.run.report.recorder import FOLDER_VARIABLE, STEP_VARIABLE

FEATURES, CLASSES = 64, 8
CLIP_NORM = 0.05
# Clock ticks of the device: nothing, about as long as a launch, a copy, several copies.
DELAYS = (0, 0, 20_000, 400_000, 3_000_000)


@dataclass(frozen=True)
class Size:
    """How large the runs are.

    Attributes:
        steps: optimizer steps; states move to the device after the first, where "auto" moves them.
        bucket_mb: small, so that there are several buckets.
        peak_width: width of the model whose peak memory is taken.
    """

    device: str
    width: int = 512
    layers: int = 6
    batch: int = 256
    steps: int = 6
    bucket_mb: int = 1
    peak_width: int = 4096


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class Model(L.LightningModule):
    """Blocks with two parameter groups, trained on batches that the step alone decides."""

    def __init__(self, size: Size, remat: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(FEATURES, size.width)
        self.blocks = nn.ModuleList(Block(size.width) for _ in range(size.layers))
        self.last = nn.Linear(size.width, CLASSES)
        self._remat, self._batch = remat, size.batch
        self.losses: list[Tensor] = []
        self.seen: set[torch.dtype] = set()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        self.seen.add(h.dtype)
        for block in self.blocks:
            h = checkpoint(block, h, use_reentrant=False) if self._remat and self.training else block(h)
        return self.last(h)

    def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
        place = batch_idx % self.trainer.accumulate_grad_batches
        generator = torch.Generator().manual_seed(1000 * self.trainer.global_step + place)
        # With "bf16-true" the default dtype is bf16 in here.
        x = torch.randn(self._batch, FEATURES, generator=generator, dtype=torch.float32).to(self.first.weight)
        y = torch.randn(self._batch, CLASSES, generator=generator, dtype=torch.float32).to(x.device)
        loss = functional.mse_loss(self(x).float(), y)
        self.losses.append(loss.detach().cpu())
        return loss

    def validation_step(self, ids: Tensor, batch_idx: int) -> Tensor:
        return self(torch.ones(2, FEATURES, device=self.device))

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        decayed = [p for p in self.parameters() if p.ndim > 1]
        rest = [p for p in self.parameters() if p.ndim == 1]
        return torch.optim.AdamW([{"params": decayed}, {"params": rest, "weight_decay": 0.0}], lr=1e-3)


class Delays:
    """Random waits on the device before and after each copy, and so between the kernels of the model."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def _wait(self) -> None:
        torch.cuda._sleep(self._random.choice(DELAYS))  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def everywhere(self) -> Iterator[None]:
        """While open, both directions of every link are delayed."""
        d2h, h2d = CudaLink.d2h, CudaLink.h2d

        def slow_d2h(link: Any, dst: Tensor, src: Tensor) -> Any:
            self._wait()
            with torch.cuda.stream(link._d2h_stream):
                self._wait()
            return d2h(link, dst, src)

        def slow_h2d(link: Any, dst: Tensor, src: Tensor, after: Any = None) -> Any:
            with torch.cuda.stream(link._h2d_stream):
                self._wait()
            return h2d(link, dst, src, after)

        CudaLink.d2h, CudaLink.h2d = slow_d2h, slow_h2d  # type: ignore[method-assign]
        try:
            yield
        finally:
            CudaLink.d2h, CudaLink.h2d = d2h, h2d  # type: ignore[method-assign]


@dataclass(frozen=True)
class Result:
    """What a run left: losses and weights on the host, and the device's peak in bytes."""

    losses: list[Tensor]
    weights: list[Tensor]
    peak_bytes: int

    def differing(self, other: Result) -> dict[str, int]:
        """How many losses and parameters have other bits."""
        losses = sum(not torch.equal(a, b) for a, b in zip(self.losses, other.losses, strict=True))
        weights = sum(not torch.equal(a, b) for a, b in zip(self.weights, other.weights, strict=True))
        return {"differing_losses": losses, "differing_weights": weights}


@dataclass
class Checker:
    """Runs cases, and keeps the references that several are compared with.

    Attributes:
        trace_path: where the trace goes; None for nowhere.
    """

    size: Size
    trace_path: Path | None = None
    references: dict[Case, Result] = field(default_factory=dict)

    def strategy(self, way: str) -> SuperScaleStrategy:
        if way == RESIDENT:
            return SuperScaleStrategy()
        return SuperScaleStrategy(offload=OffloadConfig(bucket_mb=self.size.bucket_mb, **WAYS[way]))

    def trainer(self, case: Case, way: str, steps: int) -> L.Trainer:
        return L.Trainer(
            accelerator="gpu" if self.size.device == "cuda" else "cpu",
            devices=1,
            strategy=self.strategy(way),
            plugins=[UniversalCheckpointIO()],
            precision=case.precision,  # type: ignore[arg-type]
            max_steps=steps,
            gradient_clip_val=CLIP_NORM if case.clip else None,
            accumulate_grad_batches=case.accumulate,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    def loader(self, case: Case) -> torch.utils.data.DataLoader[Any]:
        return torch.utils.data.DataLoader(range(self.size.steps * case.accumulate))  # type: ignore[arg-type]

    def fit(self, case: Case, way: str) -> Result:
        model, trainer = Model(self.size, case.remat), self.trainer(case, way, self.size.steps)
        self._reset_peak()
        trainer.fit(model, self.loader(case))
        return self._result(model)

    def _reset_peak(self) -> None:
        gc.collect()
        if self.size.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _result(self, model: Model) -> Result:
        peak = torch.cuda.max_memory_allocated() if self.size.device == "cuda" else 0
        return Result(model.losses, [p.detach().cpu().clone() for p in model.parameters()], peak)

    def reference(self, case: Case) -> Result:
        if case.reference not in self.references:
            self.references[case.reference] = self.fit(case.reference, RESIDENT)
        return self.references[case.reference]

    def compare(self, case: Case) -> dict[str, Any]:
        """One of WAYS against the run with states on the device."""
        reference = self.reference(case)
        slow = contextlib.nullcontext() if case.delay_seed is None else Delays(case.delay_seed).everywhere()
        with slow:
            found = self.fit(case, case.way)
        return self._verdict(found, reference)

    def _verdict(self, found: Result, reference: Result) -> dict[str, Any]:
        differing = found.differing(reference)
        return {
            "ok": not any(differing.values()) and len(reference.losses) > 0,
            **differing,
            "loss": float(found.losses[-1]),
            "reference_loss": float(reference.losses[-1]),
            "peak_device_mib": found.peak_bytes // 2**20,
            "reference_peak_device_mib": reference.peak_bytes // 2**20,
        }

    def resume(self, case: Case) -> dict[str, Any]:
        """Half of a run, a checkpoint, and the rest by another trainer, against the run without a stop."""
        way, half = case.way.removeprefix(f"{RESUME} "), self.size.steps // 2
        whole = self.fit(case, way)
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "half.ckpt")
            first, trainer = Model(self.size), self.trainer(case, way, half)
            trainer.fit(first, self.loader(case))
            trainer.save_checkpoint(path)
            again = Model(self.size)
            self.trainer(case, way, self.size.steps).fit(again, self.loader(case), ckpt_path=path)
        again.losses[:0] = first.losses
        return self._verdict(self._result(again), whole)

    def evaluate(self, case: Case) -> dict[str, Any]:
        """validate, test and predict without fit compute in the dtype that fit does."""
        seen: dict[str, list[str]] = {}
        for name in ("validate", "test", "predict"):
            model, trainer = Model(self.size), self.trainer(case, "superoffload", 1)
            run: Callable[..., Any] = getattr(trainer, name)
            run(model, self.loader(case), **({} if name == "predict" else {"verbose": False}))
            seen[name] = sorted(map(str, model.seen))
        return {"ok": all(dtypes == ["torch.bfloat16"] for dtypes in seen.values()), "seen": seen}

    def peak(self, case: Case) -> dict[str, Any]:
        """With all states on the host, the device holds weights and a few buckets, not weights and all gradients."""
        if self.size.device != "cuda":
            return {"ok": True, "why": "a CPU does not tell its peak"}
        size = Size(self.size.device, width=self.size.peak_width, batch=64)
        found = Checker(size).fit(case, "superoffload")
        weights = sum(weight.nbytes for weight in found.weights)
        share = found.peak_bytes / weights
        return {"ok": share < 1.5, "peak_over_weights": round(share, 3), "weights_mib": weights // 2**20}

    def trace(self, case: Case) -> dict[str, Any]:
        """Draw one step with all states on the host."""
        with tempfile.TemporaryDirectory() as folder:
            os.environ |= {FOLDER_VARIABLE: folder, STEP_VARIABLE: "2"}
            try:
                self.fit(case, "superoffload")
            finally:
                del os.environ[FOLDER_VARIABLE], os.environ[STEP_VARIABLE]
            traced = Path(folder) / "trace-rank0.json"
            events = len(json.loads(traced.read_text())["traceEvents"])
            if self.trace_path is not None:
                shutil.copyfile(traced, self.trace_path)
        return {"ok": events > 0, "events": events}

    def check(self, case: Case) -> dict[str, Any]:
        singles = {EVALUATE: self.evaluate, PEAK: self.peak, TRACE: self.trace}
        if case.way in singles:
            return singles[case.way](case)
        return self.compare(case) if case.way in WAYS else self.resume(case)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--trace", type=Path, help="file for the trace of one step, for chrome://tracing")
    return parser.parse_args()


def main() -> int:
    options = parse()
    answers = os.fdopen(os.dup(1), "w")  # libraries print what they like
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.use_deterministic_algorithms(True)
    size = Size(options.device, width=32, layers=2, batch=4, steps=4) if options.tiny else Size(options.device)
    checker = Checker(size, options.trace)
    for fields in json.load(sys.stdin):
        case = Case(**fields)
        print(json.dumps({"start": case.name}), file=answers, flush=True)
        try:
            found = checker.check(case)
        except Exception as error:  # the other cases are still wanted
            found = {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}
        print(json.dumps({"row": f"exact: {case.name}", **found}), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
