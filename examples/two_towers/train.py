"""Train a vision and a text encoder in two processes that pass embeddings forward and gradients back.

    python examples/two_towers/train.py --steps 300

Each tower has a Trainer and a strategy of its own and knows nothing of the other one's weights. The vision process
sends embeddings; the text process makes the contrastive loss of them, and sends back the gradient, which enters there
with `embedding.backward(gradient)`. The towers learn to match pictures of words with their spelling.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import warnings
from datetime import timedelta
from pathlib import Path

# torch's threads spin while they wait, which on busy cores slows a step many times over. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))  # runs from a checkout, installed or not

import lightning as L  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from lightning.pytorch.callbacks import TQDMProgressBar  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

import lightning_superscale  # noqa: E402 (registers the strategy names)
from examples.language_model.data import DataError  # noqa: E402
from examples.two_towers.towers import DIM, build_towers, contrastive_loss, similarity  # noqa: E402
from examples.two_towers.words import letters, pictures, read_words, words_of_step  # noqa: E402

VISION, TEXT = 0, 1


class Bridge:
    """The way between the two processes: a group of their own, since each Trainer has a world of its own."""

    def __init__(self, path: str, tower: int) -> None:
        self._other = 1 - tower
        self._group = dist.ProcessGroupGloo(dist.FileStore(path, 2), tower, 2, timedelta(seconds=60))

    def send(self, tensor: Tensor) -> None:
        self._group.send([tensor.detach().cpu().contiguous()], self._other, 0).wait()

    def receive(self, *shape: int) -> Tensor:
        tensor = torch.empty(*shape)
        self._group.recv([tensor], self._other, 0).wait()
        return tensor


class TowerModule(L.LightningModule):
    """What both towers have in common; batches are words, drawn alike in both processes."""

    def __init__(self, tower: nn.Module, bridge: Bridge, options: argparse.Namespace) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.tower, self.bridge, self.options = tower, bridge, options
        self.last: dict[str, dict[str, Tensor]] = {}

    def step(self) -> None:
        optimizer = self.optimizers()
        if self.global_step == self.options.steps - 1:  # kept for the comparison with one process
            named = self.tower.named_parameters()
            self.last["before"] = {name: value.cpu().clone() for name, value in self.tower.state_dict().items()}
            self.last["grads"] = {name: param.grad.cpu().clone() for name, param in named}
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        optimizer.step()
        optimizer.zero_grad()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.options.lr, weight_decay=0.01)


class VisionModule(TowerModule):
    def training_step(self, words: list[str], step: int) -> None:
        embedding = self.tower(pictures(words, seed=step).to(self.device))
        self.bridge.send(embedding)
        gradient = self.bridge.receive(*embedding.shape)
        embedding.backward(gradient.to(self.device))
        self.step()


class TextModule(TowerModule):
    def training_step(self, words: list[str], step: int) -> None:
        embedding = self.tower(letters(words).to(self.device))
        received = self.bridge.receive(len(words), DIM).to(self.device).requires_grad_()
        loss = contrastive_loss(received, embedding, self.tower.log_scale)
        self.manual_backward(loss)
        self.bridge.send(received.grad)
        self.step()
        self.log("loss", loss.detach(), prog_bar=True, batch_size=len(words))


def train_tower(tower: int, options: argparse.Namespace, words: list[str], folder: str) -> None:
    """One process: a tower, its Trainer and its strategy. Leaves what it learnt in the folder."""
    be_quiet()
    torch.set_num_threads(1)
    bridge = Bridge(os.path.join(folder, "bridge"), tower)
    kind = (VisionModule, TextModule)[tower]
    module = kind(build_towers()[tower], bridge, options)
    trainer = L.Trainer(
        strategy=options.strategy,
        devices=1,
        max_steps=options.steps,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=tower == TEXT,
        callbacks=[TQDMProgressBar(refresh_rate=max(1, options.steps // 50))] if tower == TEXT else [],
    )
    batches = [words_of_step(words, step, options.batch_size) for step in range(options.steps)]
    trainer.fit(module, DataLoader(batches, batch_size=None))
    torch.save({**module.last, "after": module.tower.state_dict()}, os.path.join(folder, f"tower-{tower}.pt"))


def largest_difference(saved: list[dict], words: list[str], options: argparse.Namespace) -> float:
    """The last step once more, in this process alone: how far its gradients are from those of the two."""
    towers = build_towers()
    for tower, own in zip(towers, saved, strict=True):
        tower.load_state_dict(own["before"])
    vision, text = towers
    step = options.steps - 1
    batch = words_of_step(words, step, options.batch_size)
    contrastive_loss(vision(pictures(batch, seed=step)), text(letters(batch)), text.log_scale).backward()
    return max(
        float((param.grad - own["grads"][name]).abs().max())
        for tower, own in zip(towers, saved, strict=True)
        for name, param in tower.named_parameters()
    )


@torch.no_grad()
def retrieval_accuracy(saved: list[dict], words: list[str]) -> float:
    """How many pictures are nearest to their own text, among the texts of all these words."""
    vision, text = towers = build_towers()
    for tower, own in zip(towers, saved, strict=True):
        tower.eval().load_state_dict(own["after"])
    found = similarity(vision(pictures(words, seed=1 << 20)), text(letters(words))).argmax(1)
    return float((found == torch.arange(len(words))).float().mean())


def parse_args(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="text file or directory (default: standard library)")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--num_words", type=int, default=6000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--strategy", default="superoffload", choices=("superoffload", "superscale"))
    return parser.parse_args(args)


def be_quiet() -> None:
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def run(options: argparse.Namespace) -> None:
    words, held_out = read_words(options.data, options.num_words)
    if len(words) < options.batch_size or len(held_out) < 2:
        raise DataError(
            f"found {len(words)} words to train on and {len(held_out)} held out; expected at least "
            f"{options.batch_size} (--batch_size) and 2. Pass --data with more text."
        )
    print(f"{len(words)} words to train on, {len(held_out)} held out; one process for pictures, one for letters")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train_tower, (options, words, folder), nprocs=2)
        saved = [torch.load(os.path.join(folder, f"tower-{tower}.pt")) for tower in (VISION, TEXT)]
    torch.set_num_threads(1)  # as in the two processes: sums in the same order
    held_out = held_out[:256]
    print(f"\nRetrieval of {len(held_out)} words that neither tower has seen: a picture finds its spelling")
    print(f"  {retrieval_accuracy(saved, held_out):7.1%}  of the time")
    print(f"  {1 / len(held_out):7.1%}  by chance")
    print("\nGradients of the last step, against one process with both towers and the same batch")
    print(f"  {largest_difference(saved, words, options):.1e}  largest difference")


def main(args: list[str] | None = None) -> int:
    be_quiet()
    try:
        run(parse_args(args))
    except (DataError, lightning_superscale.SuperScaleError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
