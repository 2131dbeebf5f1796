"""DeepSpeed on two gloo ranks: trains a tiny model, writes its checkpoints, loads ours, and says what it then holds.

Runs in the environment that `benchmarks/peers.sh` makes. What DeepSpeed holds is asked of the running engine, never of
its files, so that it can judge whoever reads them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WORLD = 2
NUM_STEPS = 3
GROUPS = ({"lr": 1e-2, "weight_decay": 0.1}, {"lr": 3e-3, "weight_decay": 0.0})


class Tiny(nn.Module):
    """Odd sizes, so that ranks' parts are padded; a tied, a frozen and a 0-d weight; float and integer buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.inner = nn.Linear(5, 7)
        self.frozen = nn.Linear(7, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("running", torch.zeros(3))
        self.register_buffer("counter", torch.tensor(0, dtype=torch.int64))
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.frozen.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        self.running.add_(hidden.detach().mean().to(self.running.dtype))
        self.counter.add_(1)
        hidden = self.norm(hidden + self.frozen(torch.relu(self.inner(hidden))))
        return nn.functional.cross_entropy(self.head(hidden).float().flatten(0, 1), ids.roll(-1, 1).flatten())


def groups(model: nn.Module, rate: float = 1.0) -> list[dict[str, Any]]:
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    rest = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    options = [{"lr": rate * group["lr"], "weight_decay": rate * group["weight_decay"]} for group in GROUPS]
    return [{"params": params, **own} for params, own in zip((decayed, rest), options, strict=True)]


def make_engine(
    stage: int,
    *,
    bf16: bool,
    universal: bool = False,
    seed: int = 0,
    rate: float = 1.0,
    cpu_adam: bool = False,
    zero: dict[str, Any] | None = None,
    accumulate: str | None = None,
) -> Any:
    """An engine of DeepSpeed around a fresh model, of weights by `seed`, lr and weight decay by `rate`.

    Every rank calls it.
    """
    import deepspeed

    torch.manual_seed(seed)
    model = Tiny()
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "overlap_comm": False, "reduce_bucket_size": 1000, **(zero or {})},
        "checkpoint": {"load_universal": universal},
    }
    if bf16:
        config["bf16"] = {"enabled": True}
    if accumulate:
        config["data_types"] = {"grad_accum_dtype": accumulate}
    if cpu_adam:
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3}}
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        engine, *_ = deepspeed.initialize(model=model, model_parameters=groups(model, rate), config=config)
    else:
        optimizer = torch.optim.AdamW(groups(model, rate), foreach=False)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def train(engine: Any, num_steps: int) -> None:
    for step in range(num_steps):
        generator = torch.Generator().manual_seed(100 * step + torch.distributed.get_rank())
        loss = engine(torch.randint(0, 11, (2, 6), generator=generator))
        engine.backward(loss)
        engine.step()


def held(engine: Any) -> dict[str, Tensor]:
    """What the engine holds, by `<kind>/<name>`. Every rank calls it."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        # DeepSpeed links states after the first group's first step, when the others have none yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found: dict[str, Tensor] = {}
    params = dict(engine.module.named_parameters())
    for name, param in params.items():
        with deepspeed.zero.GatheredParameters([param], enabled=hasattr(param, "ds_id")):
            found[f"model/{name}"] = param.detach().clone()
        if param.requires_grad:
            found[f"master/{name}"] = safe_get_full_fp32_param(param).clone().view(found[f"model/{name}"].shape)
            for key in ("exp_avg", "exp_avg_sq"):
                state = safe_get_full_optimizer_state(param, key)
                found[f"{key}/{name}"] = state.clone().view(found[f"model/{name}"].shape)
    persistent = engine.module.state_dict()
    found.update({f"buffer/{n}": b.clone() for n, b in engine.module.named_buffers() if n in persistent})
    inner = engine.optimizer.optimizer
    for index, group in enumerate(inner.param_groups):
        for key in ("lr", "weight_decay"):
            found[f"group/{index}/{key}"] = torch.tensor(group[key], dtype=torch.float64)
    steps = {float(state["step"]) for state in inner.state.values() if "step" in state}
    (step,) = steps
    found["step"] = torch.tensor(step)
    return found


def write(rank: int, folder: str, tag: str, case: dict[str, Any], client: dict[str, Any]) -> None:
    """Train, save natively into `folder`, and record what was held in `folder`/truth.safetensors.

    Args:
        case: arguments of `make_engine`.
        client: what the client adds, which is how Lightning's DeepSpeedStrategy saves the rest of its checkpoint.
    """
    from safetensors.torch import save_file

    engine = make_engine(**case)
    train(engine, NUM_STEPS)
    truth = held(engine)
    engine.save_checkpoint(folder, client_state=client, tag=tag)
    if rank == 0:
        save_file({key: value.contiguous() for key, value in truth.items()}, Path(folder, "truth.safetensors"))
        for script in Path(folder).glob("*.py"):  # of DeepSpeed, into every checkpoint
            script.unlink()


def convert(folder: str) -> None:
    """DeepSpeed's own converter, on its native checkpoint in `folder`; one process calls it."""
    from deepspeed.checkpoint import ds_to_universal

    tag = Path(folder, "latest").read_text().strip()
    argv = sys.argv
    try:
        sys.argv = ["x", "--input_folder", f"{folder}/{tag}", "--output_folder", f"{folder}/universal",
                    "--inject_missing_state", "--num_extract_workers", "1", "--num_merge_workers", "1"]  # fmt: skip
        ds_to_universal.main(ds_to_universal.parse_arguments())
    finally:
        sys.argv = argv


def load(rank: int, folder: str, case: dict[str, Any], out: str) -> None:
    """Load `folder` (its latest tag) into an engine of other weights, and write what it then holds."""
    from safetensors.torch import save_file

    engine = make_engine(**case, seed=1, rate=0.5)
    path, _ = engine.load_checkpoint(folder)
    if path is None:
        raise AssertionError(f"DeepSpeed loaded nothing from {folder}")
    found = held(engine)
    if rank == 0:
        save_file({key: value.contiguous() for key, value in found.items()}, out)


def _rank(rank: int, store: str, function: Any, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT="0",
        LOCAL_SIZE=str(WORLD),
    )  # fmt: skip
    import deepspeed

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(store, WORLD), rank=rank, world_size=WORLD
    )
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    function(rank, *args)
    torch.distributed.destroy_process_group()


def on_ranks(store: str, function: Any, *args: Any) -> None:
    """Run `function(rank, *args)` on two ranks; `store` is a path where no file is."""
    torch.multiprocessing.spawn(_rank, (store, function, args), nprocs=WORLD)
