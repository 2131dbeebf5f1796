"""Runs `superscale simulate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_superscale.cli.estimate.command import add_model_arguments, model_of, model_options, put_out
from lightning_superscale.cli.simulate.picture import draw
from lightning_superscale.cli.simulate.table import show
from lightning_superscale.config import ZeroConfig
from lightning_superscale.estimation.links import Latencies
from lightning_superscale.simulation.api import simulate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    usual = Latencies()
    add_model_arguments(parser)
    parser.add_argument("--devices", type=int, default=8, help="of each node (default: 8)")
    parser.add_argument("--num-nodes", type=int, nargs="+", default=[1, 2, 16, 125, 1250], metavar="N", help="sizes")
    parser.add_argument("--zero", type=int, default=3, help="the stage (default: 3)")
    parser.add_argument(
        "--shard-size", type=int, metavar="N", help="ranks that share one copy of the states; default: all"
    )
    parser.add_argument("--offload", help="cpu or superoffload")
    parser.add_argument(
        "--slow-rank", type=float, default=1.0, metavar="FACTOR", help="one rank whose passes take so much longer"
    )
    for what, seconds in (("rank", usual.rank), ("node", usual.node)):
        parser.add_argument(
            f"--{what}-latency",
            type=float,
            default=1e6 * seconds,
            metavar="US",
            help=f"microseconds of a round between {what}s (default: {1e6 * seconds:g})",
        )
    parser.add_argument("--json", action="store_true", help="all of it as JSON")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="the step's seconds by size, stacked")


def run(chosen: argparse.Namespace) -> int:
    """Print the simulation that a command line asks for.

    Raises:
        SuperScaleError: an argument that can't be used.
    """
    found = simulate(
        model_of(chosen),
        devices=chosen.devices,
        num_nodes=chosen.num_nodes,
        zero=ZeroConfig(stage=chosen.zero, shard_size=chosen.shard_size),
        offload=chosen.offload,
        slow_rank=chosen.slow_rank,
        latencies=Latencies(rank=1e-6 * chosen.rank_latency, node=1e-6 * chosen.node_latency),
        **model_options(chosen),
    )
    put_out(found, chosen, draw, show)
    return 0
