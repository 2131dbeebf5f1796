"""What is measured in a race of contestants that step on the host."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import offload_race


def test_exposed_is_the_median_over_rounds_of_what_lies_beyond_forward_and_backward() -> None:
    passes = Namespace(wall=[[1.0, 3.0], [4.0, 4.0], [1.0, 1.0]])
    run = Namespace(wall=[[2.0, 4.0], [5.0, 5.5], [9.0, 9.0]])
    assert offload_race.exposed(run, passes) == 1.25
    assert offload_race.wall_ratio(run, passes) == 1.5


def test_a_step_takes_its_median_turns_time_and_none_of_one_that_cannot_run() -> None:
    assert offload_race.median_turn(Namespace(absent=None, wall=[[1.0, 3.0], [9.0, 9.0], [1.0, 1.0]])) == 2.0
    assert offload_race.median_turn(Namespace(absent="not in this version", wall=[])) == 0.0


def test_a_contestant_has_as_many_processes_as_memory_holds() -> None:
    names = [offload_race.PASSES, "superoffload", "cpu"]
    assert offload_race.num_processes(names, "5M", 3, 20 * 2**30) == 3
    assert offload_race.num_processes(names, "120M", 3, 20 * 2**30) == 2
    assert offload_race.num_processes(names, "120M", 3, 2**30) == 1
