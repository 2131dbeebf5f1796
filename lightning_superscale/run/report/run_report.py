"""The report of a run: asked of its parts while they exist, and noted as text and numbers before they go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from lightning_superscale.comm.mesh import DataMesh
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.optim.clipping import LastNorm
from lightning_superscale.optim.engine import OptimizerEngine
from lightning_superscale.run.assemble import Assembly
from lightning_superscale.run.report.exposure import exposure_of
from lightning_superscale.run.report.phases import PhaseSeconds
from lightning_superscale.run.report.plan import ParallelPlan
from lightning_superscale.run.report.reasons import device_share

_Noted = TypeVar("_Noted")


def plan_of(assembly: Assembly, phases: PhaseSeconds) -> ParallelPlan:
    """The plan of a run as it is now, with the exposed time among its reasons. Any rank may ask by itself."""
    plan = assembly.plan()
    return replace(plan, bytes=tuple(plan.bytes), reasons=(*plan.reasons, *exposure_of(assembly, phases)))


def facts_of_trace(assembly: Assembly) -> dict[str, Any]:
    """The facts that a trace says of its run. Any rank may ask by itself."""
    plan, engine = assembly.plan(), assembly.settings.engine
    return {
        "device": plan.device,
        "engine": plan.engine,
        "num_params": plan.num_trainable,
        "is_deferred": engine is not None and engine.weights_arrive == "next forward",
        "device_share": device_share(assembly.engines.values()),
    }


@dataclass(frozen=True, slots=True)
class _Unknown:
    """A value that could not be noted.

    Attributes:
        why: the reason, in words.
    """

    why: str


class RunReport:
    """Plan, exposed time and gradient norms of one `fit()` as they were at its end; holds no part of the run.

    A rank makes it by itself while the run is torn down, perhaps because of an error. So it issues no collective and
    never raises: a value that could not be noted is an error once it is asked for.
    """

    def __init__(self, assembly: Assembly, phases: PhaseSeconds) -> None:
        self._plan = _noted(lambda: plan_of(assembly, phases))
        self._exposure = _noted(lambda: tuple(exposure_of(assembly, phases)))
        self._norms = [_noted(partial(_norm_of, assembly, engine)) for engine in assembly.engines.values()]

    @property
    def plan(self) -> ParallelPlan:
        """The plan as it was at the end of the run.

        Raises:
            SuperScaleError: the plan could not be noted.
        """
        return _known(self._plan, "plan")

    @property
    def exposure(self) -> list[str]:
        """Sentences on the exposed time as it was at the end of the run.

        Raises:
            SuperScaleError: the exposed time could not be noted.
        """
        return list(_known(self._exposure, "exposed time"))

    def grad_norm(self, optimizer_index: int, mesh: DataMesh) -> Tensor:
        """Global 2-norm of one optimizer's gradients at its last step; fp32 scalar, CPU.

        Every rank calls it, where states were sharded.

        Raises:
            SuperScaleError: the norm could not be noted, or no step had been taken.
        """
        return _known(self._norms[optimizer_index], "gradient norm").over(mesh)


def _norm_of(assembly: Assembly, engine: OptimizerEngine) -> LastNorm:
    mesh, device = assembly.mesh, assembly.settings.device
    if not assembly.is_abandoned or mesh.is_single:
        return engine.last_norm()
    if device.type != "cpu":
        # Reading it would wait for the device, where a collective may wait for a rank that is gone.
        raise SuperScaleError("the run was interrupted, and this device may still wait for other ranks")
    last = engine.last_norm()
    if last.norm is None and last.sumsq is not None and mesh.num_shares > 1:
        raise SuperScaleError("the run was interrupted before ranks had added up their parts of it")
    return last


def _noted(ask: Callable[[], _Noted]) -> _Noted | _Unknown:
    try:
        return ask()
    except Exception as error:  # the user must see the error that ended the run, not this one
        return _Unknown(str(error) or type(error).__name__)


def _known(noted: _Noted | _Unknown, what: str) -> _Noted:
    if isinstance(noted, _Unknown):
        raise SuperScaleError(
            f"the {what} of the last fit() could not be noted when it ended: {noted.why}. Ask for it while "
            "trainer.fit() runs, such as in on_train_batch_end."
        )
    return noted
