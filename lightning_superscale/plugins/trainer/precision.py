"""The Trainer's precision plugin: the hooks of backward and step that Lightning calls; the step belongs to the run.

[Note: Two namespaces] Lightning ships twice, as `lightning.pytorch` and as `pytorch_lightning`, with
unrelated class trees. All logic lives in mixins that import neither; `plugins/pytorch.py` and
`plugins/pytorch_lightning.py` bind them to real bases.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Union

from torch import Tensor
from torch.optim import Optimizer

from lightning_superscale.optim.clipping import ClipByNorm, ClipByValue
from lightning_superscale.plugins.lightning_private import plain_optimizer, wrapped_closure
from lightning_superscale.plugins.precision import PrecisionMixin
from lightning_superscale.run.checks import check_clip_value

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.plugins.precision import Precision as _Base
else:
    _Base = object


class SuperScalePrecisionMixin(PrecisionMixin, _Base):
    __doc__ = PrecisionMixin.__doc__

    # Scaled losses

    def pre_backward(self, tensor: Tensor, module: LightningModule) -> Tensor:  # type: ignore[override]
        return super().pre_backward(self.scaled(tensor), module)

    def post_backward(self, tensor: Tensor, module: LightningModule) -> Tensor:  # type: ignore[override]
        if self.run is not None:
            self.run.after_backward()  # before on_after_backward, in which user code may look at weights and gradients
        return super().post_backward(tensor, module)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the loss scale of a checkpoint that was saved under Lightning's own MixedPrecision."""
        if type(self).__qualname__ not in checkpoint and checkpoint.get("MixedPrecision"):
            self.load_state_dict(checkpoint["MixedPrecision"])

    # The step

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Optimizer, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Let the run step the optimizer, after Lightning's hooks before a step, which the closure calls."""
        if self.run is None:
            return super().optimizer_step(optimizer, model, closure, **kwargs)
        return self.run.step(optimizer, wrapped_closure(self, model, optimizer, closure), **kwargs)

    # Clipping

    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: Union[int, float] = 0.0,
        gradient_clip_algorithm: Any = "norm",
    ) -> None:
        """Ask for clipping; the engine applies it inside the step, where it costs no pass of its own."""
        check_clip_value("clip_val", clip_val)
        if clip_val == 0:
            return
        limit = float(clip_val)
        request = ClipByValue(limit) if gradient_clip_algorithm == "value" else ClipByNorm(limit)
        if self.run is None or not self.run.clip(plain_optimizer(optimizer), request):
            super().clip_gradients(optimizer, clip_val, gradient_clip_algorithm)
