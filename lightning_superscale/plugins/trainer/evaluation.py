"""The strategy's forwards without training, and where weights are around any forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning_superscale.offload.weight_flow.schedule import WeightFlow
from lightning_superscale.run.assemble import Assembly

if TYPE_CHECKING:
    from lightning.pytorch.strategies import DDPStrategy as _Base
else:
    _Base = object


class EvaluationMixin(_Base):
    """Mixed into the strategies of both Lightning distributions.

    Attributes:
        _assembly: the running parts, or None outside `fit()`.
        _flow: brings weights from the host when they are used, during training and evaluation; None when they stay.
    """

    _assembly: Assembly | None
    _flow: WeightFlow | None

    def _wait_for_weights(self) -> None:
        if self._assembly is not None:
            self._assembly.wait_all_published()

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        self._wait_for_weights()
        if self._flow is None:
            yield
            return
        self._flow.enter()
        try:
            yield
        finally:
            self._rest_weights(are_visible=True)

    def _rest_weights(self, *, are_visible: bool) -> None:
        """After a forward or backward: weights that flow are in host memory, where user code may look at them."""
        if self._flow is not None:
            self._flow.rest()
            if are_visible:
                self._flow.synchronize()

    def on_validation_start(self) -> None:
        super().on_validation_start()
        if self._assembly is not None:
            self._assembly.before_evaluation()
            self._assembly.buffers.sync()

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._evaluating():
            return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._evaluating():
            return super().test_step(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._evaluating():
            return super().predict_step(*args, **kwargs)
