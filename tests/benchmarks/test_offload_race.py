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
