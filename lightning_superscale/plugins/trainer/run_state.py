"""What users ask of a run, and how its state is saved and loaded: the strategy's half that never trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_superscale.comm.communicator import Communicator
from lightning_superscale.comm.dtensor import placed_state, whole_state
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.plugins.checkpoint.io import UniversalCheckpointIOMixin, load_through, save_through
from lightning_superscale.plugins.trainer.evaluation import EvaluationMixin
from lightning_superscale.run.assemble import Assembly
from lightning_superscale.run.environment import RankEnvironment
from lightning_superscale.run.full_params import full_params
from lightning_superscale.run.report.exposure import exposure_of
from lightning_superscale.run.report.phases import PhaseSeconds
from lightning_superscale.run.report.plan import ParallelPlan
from lightning_superscale.run.report.run_report import RunReport, plan_of
from lightning_superscale.run.state.optimizer_states import has_names, load_engine_state, names_of
from lightning_superscale.run.state.restore import fill, fitted, is_lazy, read_whole
from lightning_superscale.zero.meta_init import is_on_meta


class RunStateMixin(EvaluationMixin):
    """Plan, norms and state of the run that is assembled, or was last.

    Attributes:
        _finished: the parts of the run before, while their sharded states can still be saved.
        _report: what the last `fit()` said of itself at its end; None before there is one, and while the next one runs.
        _was_on_meta: whether any part of the module was on the meta device when `setup` began.
        _environment: the other ranks.
    """

    _finished: Assembly | None
    _report: RunReport | None
    phase_seconds: PhaseSeconds
    _was_on_meta: bool
    _environment: RankEnvironment

    # What users ask

    @property
    def plan(self) -> ParallelPlan:
        """The resolved plan; after `fit()` as it was at the end.

        Raises:
            SuperScaleError: before `fit()` has set the strategy up.
        """
        if self._assembly is not None:
            return plan_of(self._assembly, self.phase_seconds)
        if self._report is not None:
            return self._report.plan
        raise SuperScaleError("the plan is known once trainer.fit() has set up the model and its optimizers.")

    def exposure(self) -> list[str]:
        """How much of a step the host optimizer should leave exposed, and does; nothing without offload."""
        if self._assembly is not None:
            return exposure_of(self._assembly, self.phase_seconds)
        return [] if self._report is None else self._report.exposure

    def explain(self) -> str:
        """What lives where, in which dtype, how large, and why. Known from `on_fit_start` on, and after `fit()`."""
        return self.plan.table()

    def grad_norm(self, optimizer_index: int = 0) -> Tensor:
        """Global 2-norm of one optimizer's gradients at its last step, before clipping; fp32 scalar, CPU.

        Every rank calls it, where states are sharded.

        Raises:
            SuperScaleError: no step has been taken yet.
        """
        if self._assembly is not None:
            return list(self._assembly.engines.values())[optimizer_index].grad_norm()
        if self._report is not None:
            return self._report.grad_norm(optimizer_index, self._environment.mesh)
        raise SuperScaleError("grad_norm() is known after an optimizer step.")

    @contextmanager
    def full_params(self, *, writes: bool = False) -> Iterator[dict[str, Tensor]]:
        """Every weight whole, by name, between two steps: `with strategy.full_params() as weights:`.

        Every rank calls it. Weights that every rank has whole are the module's own memory; of sharded ones every rank
        gets copies in host memory, all of them at once.

        Args:
            writes: take rank 0's tensors, which were edited in place, as the new weights on every rank. Masters follow;
                optimizer states stay.

        Raises:
            SuperScaleError: outside `fit()`, or a tensor was edited without `writes`.
        """
        if self._assembly is None:
            raise SuperScaleError(
                "full_params() gives weights while trainer.fit() runs; before and after, they are whole."
            )
        self._wait_for_weights()
        self._rest_weights(are_visible=True)
        with full_params(self._assembly, writes=writes) as weights:
            yield weights

    @property
    def assembly(self) -> Assembly | None:
        """The running parts, or None outside `fit()`."""
        return self._assembly

    @property
    def ranks(self) -> Communicator:
        """The other ranks of the run.

        Raises:
            SuperScaleError: outside `fit()`.
        """
        if self._assembly is None:
            raise SuperScaleError("ranks are known once trainer.fit() has set up the model and its optimizers.")
        return self._assembly.ranks

    # State

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Whether Lightning restores weights after `setup`: what is on the meta device has no memory before."""
        return self._was_on_meta or is_on_meta(self.lightning_module)

    @property
    def _io(self) -> UniversalCheckpointIOMixin | None:
        """The universal checkpoint IO, bound to this run's ranks; None where the Trainer has another one."""
        io = self.checkpoint_io
        if not isinstance(io, UniversalCheckpointIOMixin):
            return None
        io.bind(self._environment.mesh)
        return io

    @property
    def _module(self) -> nn.Module:
        if self.lightning_module is None:
            raise AssertionError("state is that of a module")
        return self.lightning_module

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        io = self._io
        if io is None:
            super().save_checkpoint(checkpoint, filepath, storage_options)
        else:
            save_through(io, self, checkpoint, filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        io = self._io
        if io is None:
            return super().load_checkpoint(checkpoint_path, weights_only=weights_only)
        return load_through(io, self, checkpoint_path)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        self._wait_for_weights()
        self._rest_weights(are_visible=False)  # they are read where they live
        sharded = None if self._assembly is None else self._assembly.sharded
        if self._io is not None:
            return super().lightning_module_state_dict() if sharded is None else sharded.local_state_dict()
        if self._assembly is not None and sharded is not None:
            return sharded.state_dict(self._assembly.ranks)
        return whole_state(self._environment.mesh, super().lightning_module_state_dict())

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        self._wait_for_weights()
        self._rest_weights(are_visible=True)
        weights, io = checkpoint["state_dict"], self._io
        sharded = None if self._assembly is None else self._assembly.sharded
        own = self._module.state_dict() if sharded is None else sharded.local_state_dict()
        if io is not None:
            weights = fitted(self._module, weights, own, strict=strict, allow=io.config.allow)
            strict = strict and not io.config.allow
        if sharded is None:
            whole = read_whole(weights) if is_lazy(weights) else weights
            placed = {**checkpoint, "state_dict": placed_state(self._module, whole)}
            super().load_model_state_dict(placed, strict=strict)
        elif is_lazy(weights):
            fill(own, weights)
        else:
            sharded.load_state_dict(weights, strict=strict)
        if self._assembly is not None:
            for engine in self._assembly.engines.values():
                engine.reload_masters()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        engine = self._engine_of(optimizer)
        if engine is None:
            return super().optimizer_state(optimizer)
        state: dict[str, Any] = (
            engine.state_dict() if self._io is None else engine.local_state_dict(names_of(self._module))
        )
        return state

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        states: Sequence[Mapping[str, Any]] = checkpoint["optimizer_states"]
        if len(states) != len(self.optimizers):
            raise SuperScaleError(
                f"the checkpoint has states of {len(states)} optimizers, configure_optimizers returned "
                f"{len(self.optimizers)}."
            )
        for optimizer, state in zip(self.optimizers, states, strict=True):
            engine = self._engine_of(optimizer)
            if has_names(state) and engine is not None:
                load_engine_state(engine, state, names_of(self._module))
            elif engine is None:
                optimizer.load_state_dict(dict(read_whole(state)))
            else:
                engine.load_state_dict(state)

    def _engine_of(self, optimizer: Any) -> Any:
        assembly = self._assembly or self._finished
        return None if assembly is None else assembly.engines.get(getattr(optimizer, "_optimizer", optimizer))
