"""One contestant of `sequence.py`, or one rank of it, in a process of its own. It steps when told to.

Talks JSON lines: says `{"ready": ...}` once warm; answers a number on standard input with wall seconds, bytes sent and
loss of each of that many steps; answers "end" with what the last step saved for backward, after writing its gradients.

Steps have a learning rate of zero, so that every loss is that of the first weights. The last one steps by plain SGD at
`LEARNING_RATE`: what it changed of the weights, divided by the rate, is the gradient that a contestant trains with,
whoever summed it up and wherever it is kept. The one process, which is the measure, writes what autograd left.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import platform
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contestants import written_bytes
from lightning_superscale.sequence.memory.saved_bytes import SavedBytes
from lightning_superscale.torch_private import storage_id_of

# Large enough that rounding weights does not show: weights of 1 with gradients of 1e-3 at most, the norms', are rounded
# by 2^-24 of 1 + 1, which of a step of 1 is 1.2e-7. A power of two, so that dividing by it rounds nothing.
LEARNING_RATE = 1024.0
IGNORED = -100
Batch = dict[str, Tensor]


class Size(NamedTuple):
    """Of the model and its one sequence per batch.

    Attributes:
        tokens: of a sequence, where `--tokens` does not say otherwise.
        width, inner: of the residual stream, and between the linear layers of a block.
        kv_heads: each is shared by `heads // kv_heads` query heads.
    """

    tokens: int
    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int


SIZES = {
    "tiny": Size(tokens=64, layers=2, width=32, inner=64, heads=4, kv_heads=4, vocabulary=96),
    "5M": Size(tokens=1024, layers=4, width=256, inner=768, heads=8, kv_heads=4, vocabulary=4096),
}


class Activations(SavedBytes):
    """Counts what autograd saves apart from parameters, also from those that are gathered whole only meanwhile."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module

    def _pack(self, saved: Tensor) -> Any:
        local = (p.to_local() if isinstance(p, DTensor) else p for p in self._module.parameters())
        self._ignored = {storage_id_of(p.untyped_storage()) for p in local}
        return super()._pack(saved)


class Steps:
    """The batches of a run, the same on all ranks. Hands one out when told to, and clocks the steps.

    Sized, so that Lightning does not prefetch: it asks for a batch only when the step before it has ended.

    Attributes:
        rank, num_ranks: of this process.
        is_last: whether the step that runs is the last, whose gradients count.
        on_last: called before that step; sets the learning rate.
        saved_bytes: what the last forward saved for backward.
        facts: what else is known of the run.
    """

    def __init__(self, size: Size, tokens: int, warmup: int, out: IO[str]) -> None:
        self.size, self.tokens = size, tokens
        self.rank, self.num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.is_last = False
        self.on_last: Callable[[], None] = lambda: None
        self.saved_bytes = 0
        self.facts: dict[str, Any] = {}
        self._warmup, self._out = warmup, out
        self._losses: list[Tensor] = []
        self._counts: Activations | None = None

    def __len__(self) -> int:
        return 10**9

    def say(self, **answer: Any) -> None:
        self._out.write(json.dumps(answer) + "\n")
        self._out.flush()

    def batch(self, step: int) -> Batch:
        """[1, tokens] each; the first 40 % of the labels are masked, so that ranks count different numbers of them."""
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(self.size.vocabulary, (1, self.tokens), generator=generator)
        labels = ids.clone()
        labels[:, : self.tokens * 2 // 5] = IGNORED
        return {"input_ids": ids, "labels": labels}

    def forward(self, module: nn.Module) -> AbstractContextManager[object]:
        """Around forward and loss: counts in the last step what they save."""
        if not self.is_last:
            return nullcontext()
        self._counts = Activations(module)
        return self._counts

    def record(self, loss: Tensor) -> None:
        self._losses.append(loss.detach().clone())

    def losses(self) -> list[float]:
        """Since the last call."""
        found = [float(loss) for loss in self._losses]
        self._losses.clear()
        return found

    def __iter__(self) -> Iterator[Batch]:
        numbers = itertools.count()
        for _ in range(self._warmup):
            yield self.batch(next(numbers))
        self.losses()
        self.say(ready=self.facts)
        for line in sys.stdin:
            if line.strip() == "end":
                self.is_last = True
                self.on_last()
                yield self.batch(next(numbers))
                return
            walls, cpus, sent = [], [], []
            for _ in range(int(line)):
                start, cpu, before = time.perf_counter(), time.process_time(), written_bytes()
                yield self.batch(next(numbers))
                walls.append(time.perf_counter() - start)
                cpus.append(time.process_time() - cpu)
                sent.append(written_bytes() - before)
            self.say(wall=walls, cpu=cpus, sent=sent, loss=self.losses())

    def finish(self, gradients: Mapping[str, Tensor], target: Path | None) -> None:
        """Say the end, and write gradients where they are asked for."""
        if target is not None and self.rank == 0:
            torch.save(dict(gradients), target)
        if self._counts is not None:
            self.saved_bytes = self._counts.nbytes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        num_params = sum(gradient.numel() for gradient in gradients.values())
        self.say(
            saved_bytes=self.saved_bytes,
            loss=self.losses(),
            peak_mib=peak,
            num_params=num_params,
            facts=self.facts,
        )


def build_model(size: Size, attention: str = "sdpa") -> Any:
    """An unmodified Llama of transformers. The same weights in every process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=2**20,
        use_cache=False,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).train()


def sgd(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.0)


def set_rate(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE


def changes(size: Size, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients by which the last step changed the weights."""
    before = dict(build_model(size).named_parameters())
    return {name: (before[name].detach().double() - w.double()).float() / LEARNING_RATE for name, w in weights.items()}


# Contestants. Each trains until its steps end and returns its gradients, whole, by the model's names.


def run_one_process(steps: Steps) -> dict[str, Tensor]:
    """Plain PyTorch: the measure of the others."""
    model = build_model(steps.size)
    optimizer = sgd(model.parameters())
    for batch in steps:
        optimizer.zero_grad()
        with steps.forward(model):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        steps.record(loss)
    return {name: param.grad for name, param in model.named_parameters()}


def run_ours(steps: Steps, *, mode: str, zero: int, compiles: bool = False) -> dict[str, Tensor]:
    """Ours under the Trainer. Compiled whole, or layer by layer where stage 3 gathers weights for each."""
    import lightning as L

    from lightning_superscale import SequenceConfig, SuperScaleStrategy

    gradients: dict[str, Tensor] = {}

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = build_model(steps.size)
            if compiles and zero < 3:
                self.model.compile()
            for layer in self.model.model.layers if compiles and zero == 3 else ():
                layer.compile()

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            with steps.forward(self):
                loss: Tensor = self.model(**batch).loss
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self.parameters())

        def on_train_start(self) -> None:
            steps.on_last = lambda: set_rate(self.trainer.optimizers[0])

        def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
            steps.record(outputs["loss"])
            if steps.is_last:
                whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in self.model.named_parameters()}
                gradients.update(changes(steps.size, {n: p.detach() for n, p in whole.items()}))

    trainer = L.Trainer(
        strategy=SuperScaleStrategy(zero=zero, sequence=SequenceConfig(size=steps.num_ranks, mode=mode)),  # type: ignore[arg-type]
        accelerator="cpu",
        devices=steps.num_ranks,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), steps)
    return gradients


def start_deepspeed(steps: Steps, model: Any, stage: int, mpu: Any = None, **more: Any) -> tuple[Any, Any]:
    """DeepSpeed's engine around the model, and the optimizer."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "overlap_comm": False, "reduce_bucket_size": 5_000_000},
        **more,
    }
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model,
        model_parameters=list(model.parameters()),
        optimizer=sgd(model.parameters()),
        config=config,
        mpu=mpu,
    )
    steps.facts["deepspeed"] = deepspeed.__version__
    steps.on_last = lambda: set_rate(optimizer)
    return engine, optimizer


def deepspeed_changes(steps: Steps, model: nn.Module, stage: int) -> dict[str, Tensor]:
    import deepspeed

    params = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(params.values()), enabled=stage == 3):
        return changes(steps.size, {name: param.detach().clone() for name, param in params.items()})


def documented_loss(logits: Tensor, shifted: Tensor, model: Any, group: Any) -> Tensor:
    """The loss that DeepSpeed's tutorial on ALST writes: the ranks' means, weighted by their numbers of tokens."""
    from torch.distributed.nn import functional as collectives

    own = model.loss_function(logits=logits, labels=None, shift_labels=shifted, vocab_size=model.config.vocab_size)
    losses = collectives.all_gather(own, group=group)
    counts = collectives.all_gather((shifted != IGNORED).sum(), group=group)
    total = sum(loss * count for loss, count in zip(losses, counts, strict=True) if count > 0)
    return total / max(sum(counts), 1)


def part_of(steps: Steps, batch: Batch) -> Batch:
    """What a rank gets of a batch: its tokens, their places, and the labels that belong to them."""
    shifted = functional.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:]
    places = torch.arange(steps.tokens)[None]
    whole = {"input_ids": batch["input_ids"], "position_ids": places, "shift_labels": shifted}
    return {name: x.chunk(steps.num_ranks, dim=1)[steps.rank].contiguous() for name, x in whole.items()}


def train_on_parts(steps: Steps, model: Any, engine: Any, group: Any) -> None:
    """The loop of that tutorial; None is the group of all ranks."""
    for batch in steps:
        part = part_of(steps, batch)
        shifted = part.pop("shift_labels")
        with steps.forward(model):
            loss = documented_loss(engine(**part, use_cache=False).logits, shifted, model, group)
        engine.backward(loss)
        engine.step()
        steps.record(loss)


def run_alst(steps: Steps, *, zero: int) -> dict[str, Tensor]:
    """DeepSpeed's ALST as its tutorial has it, but for `UlyssesSPDataLoaderAdapter`.

    That gathers lengths of no dims into tensors of one, which gloo refuses; batches are cut as it cuts them.
    """
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    deepspeed.init_distributed(dist_backend="gloo")
    model = build_model(steps.size)
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model,
        core_attn_implementation="sdpa",
        sequence_parallel_size=steps.num_ranks,
        micro_batch_size=1,
        seq_length_is_variable=True,
    )
    engine, _ = start_deepspeed(steps, model, zero, mpu, sequence_parallel_size=steps.num_ranks)
    train_on_parts(steps, model, engine, mpu.get_sequence_parallel_group())
    return deepspeed_changes(steps, model, zero)


def run_distributed_attention(steps: Steps, *, zero: int) -> dict[str, Tensor]:
    """DeepSpeed-Ulysses' attention in the same model; it has no part in batches and losses, which are as ALST's."""
    import deepspeed
    import torch.distributed as dist
    from deepspeed.sequence.layer import DistributedAttention
    from transformers import AttentionInterface, AttentionMaskInterface

    deepspeed.init_distributed(dist_backend="gloo")

    def local(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        by_head = (x.transpose(1, 2) for x in (q, k, v))
        return functional.scaled_dot_product_attention(*by_head, is_causal=True, enable_gqa=True).transpose(1, 2)

    shared = DistributedAttention(local, dist.group.WORLD, scatter_idx=2, gather_idx=1)

    def attention(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        return shared(*(x.transpose(1, 2).contiguous() for x in (q, k, v)), 0), None

    AttentionInterface.register("distributed", attention)
    AttentionMaskInterface.register("distributed", lambda *given, **options: None)
    model = build_model(steps.size, "distributed")
    engine, _ = start_deepspeed(steps, model, zero)

    train_on_parts(steps, model, engine, None)
    return deepspeed_changes(steps, model, zero)


def run_autosp(steps: Steps, *, zero: int) -> dict[str, Tensor]:
    """DeepSpeed's AutoSP: a pass over the compiled model, which has its own loss and whole batches.

    Its backend is what `"compile": {"deepcompile": True, "passes": ["autosp"]}` chooses. The model's forward gets it by
    hand, without the engine's hooks, because with that switch backward builds an extension that needs CUDA.
    """
    import deepspeed
    from deepspeed.compile.init_sp import init_autosp
    from deepspeed.compile.passes.sp_compile import prepare_autosp_inputs

    deepspeed.init_distributed(dist_backend="gloo")
    model = build_model(steps.size)
    engine, _ = start_deepspeed(steps, model, zero, sequence_parallel_size=steps.num_ranks)
    model.forward = torch.compile(model.forward, backend=init_autosp(engine._config), dynamic=True, fullgraph=True)
    for batch in steps:
        ids = batch["input_ids"]
        places, mask = torch.arange(steps.tokens)[None], torch.ones_like(ids)
        ids, labels, places, mask = prepare_autosp_inputs(ids, batch["labels"], places, mask, seq_dim=1)
        with steps.forward(model):
            loss = engine(input_ids=ids, labels=labels, position_ids=places, attention_mask=mask).loss
        engine.backward(loss)
        engine.step()
        steps.record(loss)
    return deepspeed_changes(steps, model, zero)


Runner = Callable[[Steps], dict[str, Tensor]]


def _runner(run: Callable[..., dict[str, Tensor]], **settings: Any) -> Runner:
    return lambda steps: run(steps, **settings)


MODES = ("ulysses", "ring", "allgather")
CONTESTANTS: dict[str, Runner] = {
    "one-process": run_one_process,
    **{f"{mode}-z{stage}": _runner(run_ours, mode=mode, zero=stage) for stage in (0, 1, 2, 3) for mode in MODES},
    **{f"compiled-z{z}": _runner(run_ours, mode="ulysses", zero=z, compiles=True) for z in (0, 1, 2, 3)},
    **{f"deepspeed-alst-z{stage}": _runner(run_alst, zero=stage) for stage in (0, 1, 2, 3)},
    **{f"deepspeed-autosp-z{stage}": _runner(run_autosp, zero=stage) for stage in (0, 1)},
    **{f"deepspeed-attention-z{stage}": _runner(run_distributed_attention, zero=stage) for stage in (0, 3)},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=CONTESTANTS)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--gradients", type=Path, help="rank 0 writes them here")
    options = parser.parse_args()
    # Libraries print what they like; the controller reads JSON only.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    steps = Steps(SIZES[options.size], options.tokens, options.warmup, answers)
    import transformers

    steps.facts |= {"torch": torch.__version__, "python": platform.python_version()}
    steps.facts["transformers"] = transformers.__version__
    gradients = CONTESTANTS[options.name](steps)
    steps.finish(gradients, options.gradients)
    return 0


if __name__ == "__main__":
    sys.exit(main())
