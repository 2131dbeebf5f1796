"""Bytes that autograd keeps between forward and backward of one training step, by option of the long-context kit.

    python benchmarks/long_context.py [--tokens 512] [--features 64] [--classes 8192] [--blocks 4]

Counted, not timed: the numbers are the same on every machine. Each row is one step through the Trainer.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_superscale import SequenceConfig, SuperScaleStrategy
from lightning_superscale.sequence.memory.saved_bytes import SavedBytes

OPTIONS = {
    "plain": {"tile_loss": False},
    "tile_loss": {"tile_loss": True},
    "tile_mlp": {"tile_loss": False, "tile_mlp": 64},
    "checkpoint_blocks": {"tile_loss": False, "checkpoint_blocks": True},
    "offload_activations": {"tile_loss": False, "checkpoint_blocks": True, "offload_activations": True},
    "boundary_bits=8": {"tile_loss": False, "checkpoint_blocks": True, "boundary_bits": 8},
    "all, on the host": {"tile_loss": True, "tile_mlp": 64, "checkpoint_blocks": True, "offload_activations": True},
}


class Attention(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(features, 3 * features), nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (one.unflatten(-1, (4, -1)).transpose(1, 2) for one in self.qkv(x).chunk(3, -1))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(features), Attention(features)
        self.mlp = nn.Sequential(
            nn.LayerNorm(features),
            nn.Linear(features, 4 * features),
            nn.GELU(),
            nn.Linear(4 * features, features),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class Model(L.LightningModule):
    """A language model that knows nothing of the kit, and counts what its forward saves."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(args.classes, args.features), nn.LayerNorm(args.features)
        self.blocks = nn.ModuleList(Block(args.features) for _ in range(args.blocks))
        self.head = nn.Linear(args.features, args.classes, bias=False)
        self.saved = 0

    def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
        with SavedBytes([*self.parameters(), ids]) as saved:
            x = self.embed(ids)
            for block in self.blocks:
                x = block(x)
            logits = self.head(self.norm(x))
            loss = functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
        self.saved = saved.nbytes
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def measured(args: argparse.Namespace, options: dict[str, object]) -> dict[str, object]:
    model = Model(args)
    strategy = SuperScaleStrategy(zero=0, sequence=SequenceConfig(**options))  # type: ignore[arg-type]
    trainer = L.Trainer(
        strategy=strategy, accelerator="cpu", devices=1, max_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    ids = torch.randint(args.classes, (1, args.tokens), generator=torch.Generator().manual_seed(1))
    trainer.fit(model, torch.utils.data.DataLoader(ids, batch_size=1))
    told = [
        line for line in strategy.explain().splitlines() if line.startswith(("- tile", "- check", "- off", "- bound"))
    ]
    return {"bytes_per_token": model.saved / args.tokens, "explain": told}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 512), ("features", 64), ("classes", 8192), ("blocks", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    plain: float | None = None
    for name, options in OPTIONS.items():
        row = measured(args, options)
        plain = plain or float(str(row["bytes_per_token"]))
        # How much longer a sequence the same bytes hold, where a step's activations grow with its tokens.
        row["factor"] = round(plain / float(str(row["bytes_per_token"])), 2)
        print(json.dumps({"option": name, **row}))


if __name__ == "__main__":
    main()
