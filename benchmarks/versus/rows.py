"""The rows of `make bench`, from entrants that have run, from `sequence.py` and from `checkpoint.py`.

A row has what was measured of one contestant, or its `error`. `ratios` are of ours over this contestant, in wall time
and in CPU seconds, one for each of ours that is held against it: the median over rounds of the ratio within a round,
the least and the largest. Other work on the same cores stretches wall time; CPU seconds it touches less.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.models import SHAPES
from benchmarks.versus.entrant import Entrant
from benchmarks.versus.techniques import SHARDED, Technique

Row = dict[str, Any]
Pair = tuple[Sequence[float], Sequence[float]]


def summary_of(of_rounds: Sequence[float]) -> Row:
    """Of the ratios of all rounds."""
    least, largest = min(of_rounds), max(of_rounds)
    return {"median": round(statistics.median(of_rounds), 4), "least": round(least, 4), "largest": round(largest, 4)}


def ratio_of(ours: str, *, wall: Pair, cpu: Pair | None = None) -> Row:
    """Of one of ours over one contestant: seconds per round, of ours and of the other."""
    by = {"wall": wall, "cpu": cpu}
    found = {key: summary_of([a / b for a, b in zip(*pair, strict=True)]) for key, pair in by.items() if pair}
    return {"ours": ours, "rounds": len(wall[0]), **found}


def equality_of(entrant: Entrant, oracle: Entrant) -> str:
    """How near losses and weights are to the oracle's: the same bits, or the largest relative distance of a loss."""
    if entrant is oracle:
        return "oracle"
    if entrant.losses == oracle.losses:
        if entrant.name in SHARDED:
            return "same losses"
        if entrant.digests == oracle.digests:
            return "same losses and weights"
    pairs = zip(entrant.losses, oracle.losses, strict=True)
    distance = max(abs(x / y - 1) for mine, other in pairs for x, y in zip(mine, other, strict=True))
    return "same losses, other weights" if distance == 0 else f"losses within {distance:.1e}"


def rows_of(technique: Technique, entrants: Sequence[Entrant]) -> list[Row]:
    """One row per contestant of a heat."""
    by_name = {entrant.name: entrant for entrant in entrants}
    oracle = entrants[0]
    tokens = technique.num_ranks * SHAPES[technique.size].tokens
    rows: list[Row] = []
    for entrant in entrants:
        row: Row = {
            "technique": technique.title,
            "name": entrant.name,
            "label": technique.labels[entrant.name],
            "num_ranks": technique.num_ranks,
        }
        if entrant.error is not None:
            rivals = [name for name, others in technique.rivals.items() if entrant.name in others]
            rows.append(row | {"error": entrant.why, "last_words": entrant.error, "rivals": rivals})
            continue
        wall = statistics.median(entrant.wall)
        row |= {
            "wall_s": round(wall, 4),
            "wall_least_s": round(min(entrant.wall), 4),
            "wall_largest_s": round(max(entrant.wall), 4),
            "cpu_s": round(statistics.median(entrant.cpu), 4),
            "tokens_per_s": round(tokens / wall, 1),
            "peak_mib": entrant.peak_mib,
            "moved_bytes": entrant.moved_bytes,
            "final_loss": statistics.mean(entrant.losses[-1]),
            "equality": "" if oracle.error is not None else equality_of(entrant, oracle),
            "ratios": [
                ratio_of(name, wall=(by_name[name].wall, entrant.wall), cpu=(by_name[name].cpu, entrant.cpu))
                for name, others in technique.rivals.items()
                if entrant.name in others and by_name[name].error is None
            ],
            "wall_of_rounds": [round(one, 5) for one in entrant.wall],
            "cpu_of_rounds": [round(one, 5) for one in entrant.cpu],
            "facts": entrant.facts,
        }
        rows.append(row)
    return rows


def sequence_rows(table: Row) -> list[Row]:
    """Of the heat of one ZeRO stage, as `sequence.table_of` reports it."""
    rows: list[Row] = []
    for given in table["rows"]:
        row: Row = {
            "technique": "sequence parallelism",
            "name": given["name"],
            "label": given["label"].replace("`", "").removesuffix(f", ZeRO-{table['stage']}"),
            "num_ranks": given["num_ranks"],
        }
        if "error" in given:
            rows.append(row | {"error": given["error"], "rivals": given.get("rivals", [])})
            continue
        row |= {
            "wall_s": round(given["ms"] / 1e3, 4),
            "wall_least_s": round(given["ms_least"] / 1e3, 4),
            "wall_largest_s": round(given["ms_largest"] / 1e3, 4),
            "cpu_s": round(given["cpu_s"], 4),
            # All tokens belong to one sequence, which the ranks share.
            "tokens_per_s": round(table["tokens"] / given["ms"] * 1e3, 1),
            "peak_mib": given["peak_mib"] * given["num_ranks"],
            "moved_bytes": None if given["num_ranks"] == 1 else given["sent_bytes"],
            "equality": "oracle" if given["num_ranks"] == 1 else f"gradients within {given['gradient_error']:.1e}",
            "ratios": [ratio_of(**given["seconds_of_rounds"])] if "seconds_of_rounds" in given else [],
            "facts": given["facts"],
        }
        rows.append(row)
    return rows


def checkpoint_rows(runs: dict[str, list[Row]], errors: dict[str, str], ours: str) -> list[Row]:
    """Of checkpoints that 2 ranks save and 3 load.

    Args:
        runs: answers of `checkpoint.py` by label, one per round.
        errors: of those that failed, by label.
        ours: the label that the others are compared with.
    """

    def seconds(run: Row) -> float:
        return float(run["save_seconds"] + run["convert_seconds"] + run["load_seconds"])

    rows: list[Row] = []
    for label, answers in runs.items():
        row: Row = {"technique": "checkpoint, 2 ranks to 3", "name": label, "label": label, "num_ranks": 3}
        if label in errors:
            rows.append(row | {"error": errors[label], "rivals": [ours]})
            continue
        trips = [seconds(answer) for answer in answers]
        row |= {
            "wall_s": round(statistics.median(trips), 4),
            "wall_least_s": round(min(trips), 4),
            "wall_largest_s": round(max(trips), 4),
            "cpu_s": None,
            "tokens_per_s": None,
            "peak_mib": None,
            "moved_bytes": statistics.median(answer["load_bytes"] for answer in answers),
            "equality": "same bits loaded",
            "ratios": [] if "ours" in label else [ratio_of(ours, wall=([seconds(a) for a in runs[ours]], trips))],
            "facts": {key: answers[0][key] for key in ("deepspeed",) if key in answers[0]},
        }
        rows.append(row)
    return rows
