"""The host's part of steps: an optimizer that works on units whose gradients have arrived, and sends weights back.

[Note: Simulated plans] Every step is taken for one that clips, as `estimate` does, so that no look ahead of the verdict
pays. Then the work of a unit follows the verdict as a whole ("direct"), or a gradient is committed in the time after
its step's looks and before the next verdict, and only the look follows it ("early commit"): see [Note: Three plans] in
offload/planner/forecast.py. A unit that was not committed in time is committed with its look, in one pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_superscale.offload.planner.forecast import HostSchedule
from lightning_superscale.simulation.machine import PortOf, Queue, SharedPorts, Work
from lightning_superscale.simulation.program import Unit


class HostOptimizer:
    """One rank's optimizer on the host, which does one thing at a time ([Note: Simulated plans]).

    Args:
        own: the rank's class.
        units: all units; those with host work are stepped here.
        schedule: with the plan "direct" or "early commit".
    """

    def __init__(self, env: Any, ports: SharedPorts, own: int, units: Sequence[Unit], schedule: HostSchedule) -> None:
        self._env = env
        self._ports = ports
        self._up: Sequence[PortOf] = [(own, "from host")]
        self._down: Sequence[PortOf] = [(own, "to host")]
        self._units = units
        self._plan = schedule.plan
        self._passes = schedule.passes
        self._to_host = Queue(env)
        self._to_device = Queue(env)
        self._looks: dict[int, Any] = {}  # units to step, in order, and the events of their being stepped
        self._has_gradient: set[int] = set()
        self._commits: dict[int, None] = {}
        self._wake: Any = env.event()
        env.process(self._run())

    @property
    def hosted(self) -> list[int]:
        """Units that are stepped here."""
        return [index for index, unit in enumerate(self._units) if unit.host]

    def send(self, index: int) -> Any:
        """Send a unit's gradient to the host; gives the event of its arrival."""
        return self._to_host.submit(self._transfer(self._down, index))

    def step(self, order: Sequence[int], gradients: Mapping[int, Any]) -> Mapping[int, Any]:
        """Step units after the verdict; gives the events of their new weights' arrival.

        Args:
            order: of units; one whose gradient is not there yet is passed by.
            gradients: the events of their gradients' arrival.
        """
        arrived = {}
        for index in order:
            self._looks[index] = self._env.event()
            arrived[index] = self._env.process(self._bring(index, self._looks[index]))
            self._env.process(self._note(index, gradients[index]))
        return arrived

    def _note(self, index: int, gradient: Any) -> Work:
        yield gradient
        self._has_gradient.add(index)
        if not self._wake.triggered:
            self._wake.succeed()

    def _transfer(self, ports: Sequence[PortOf], index: int) -> Work:
        yield self._ports.transfer(ports, self._units[index].link)

    def _bring(self, index: int, stepped: Any) -> Work:
        yield stepped
        yield self._to_device.submit(self._transfer(self._up, index))

    def _run(self) -> Work:
        while True:
            ready = next((index for index in self._looks if index in self._has_gradient), None)
            if ready is not None:
                self._has_gradient.remove(ready)
                stepped = self._looks.pop(ready)
                yield self._env.timeout(self._units[ready].host * self._look_share(ready))
                stepped.succeed()
            elif self._commits and not self._looks:
                index = next(iter(self._commits))
                del self._commits[index]
                yield self._env.timeout(self._units[index].host * self._passes.commit)
            else:
                self._wake = self._env.event()
                yield self._wake

    def _look_share(self, index: int) -> float:
        """The pass after the verdict, relative to one that commits and looks; notes what is left to commit."""
        if self._plan == "direct":
            return self._passes.direct
        is_committed = index not in self._commits
        self._commits.pop(index, None)
        self._commits[index] = None
        return self._passes.look if is_committed else 1.0
