"""Which heads each rank computes when ranks trade parts of the sequence for heads: pure arithmetic.

Query heads go to ranks in blocks of equal size; the last ranks have fewer where the heads don't divide, and compute
heads of zeros beside them, which are dropped. A rank needs the key-value heads that its query heads read (grouped and
multi-query attention share one among several): with fewer of them than ranks a head goes to several ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_superscale.errors import SequenceParallelError


@dataclass(frozen=True)
class Exchange:
    """The heads that each rank gets in one exchange, by rank.

    Attributes:
        queries: numbers of query heads, equally many for each rank; None for one of zeros.
        keys: numbers of key-value heads, equally many for each rank; the last ones may repeat another.
        readers: for each of the rank's query heads, the place in `keys` of the head that it reads.
    """

    queries: tuple[tuple[int | None, ...], ...]
    keys: tuple[tuple[int, ...], ...]
    readers: tuple[tuple[int, ...], ...]

    @property
    def is_grouped(self) -> bool:
        """Whether on every rank equally many neighbouring query heads read each key-value head, in order."""
        num_q, num_kv = len(self.queries[0]), len(self.keys[0])
        return num_q % num_kv == 0 and all(
            reads == tuple(at // (num_q // num_kv) for at in range(num_q)) for reads in self.readers
        )


@dataclass(frozen=True)
class HeadPlan:
    """The exchanges of one attention, one per chunk of heads.

    Attributes:
        num_queries, num_keys: number of query heads and of key-value heads.
        exchanges: every query head is in one of them.
    """

    num_queries: int
    num_keys: int
    exchanges: tuple[Exchange, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """Where each query head is among the heads of all exchanges, one exchange after the other, rank by rank."""
        heads = [head for one in self.exchanges for of_rank in one.queries for head in of_rank]
        place = {head: at for at, head in enumerate(heads)}
        return tuple(place[head] for head in range(self.num_queries))

    @property
    def num_padded(self) -> int:
        """Number of heads of zeros that ranks compute."""
        return sum(head is None for one in self.exchanges for of_rank in one.queries for head in of_rank)

    def numel_sent(self, numel: int) -> int:
        """Elements that one rank hands to all-to-alls in forward; backward hands over as many.

        Args:
            numel: elements of one head on one rank: batch x tokens x head dim.
        """
        return numel * sum(
            len(one.queries) * (2 * len(one.queries[0]) + 2 * len(one.keys[0])) for one in self.exchanges
        )


@functools.lru_cache(maxsize=256)
def plan_heads(num_queries: int, num_keys: int, size: int, num_chunks: int = 1) -> HeadPlan:
    """Share heads among ranks.

    Args:
        size: number of ranks.
        num_chunks: exchanges that follow one another, so that at most that part of the heads is whole at a time; fewer
            where a rank has fewer heads.

    Raises:
        SequenceParallelError: query heads that key-value heads can't share equally.
    """
    if num_keys < 1 or num_queries % num_keys:
        raise SequenceParallelError(
            f"attention has {num_queries} query heads and {num_keys} key-value heads; expected a multiple, so that "
            "equally many query heads read each key-value head"
        )
    per_rank = -(-num_queries // size)
    per_chunk = -(-per_rank // max(1, min(num_chunks, per_rank)))
    chunks = []
    for begin in range(0, per_rank, per_chunk):
        chosen = [
            [rank * per_rank + at for at in range(begin, min(begin + per_chunk, per_rank))] for rank in range(size)
        ]
        chunks.append(_exchange(chosen, num_queries, num_queries // num_keys))
    return HeadPlan(num_queries, num_keys, tuple(chunks))


def _exchange(chosen: Sequence[Sequence[int]], num_queries: int, per_key: int) -> Exchange:
    """The exchange of these query heads, of which those from `num_queries` on are not there."""
    needed = [sorted({head // per_key for head in heads if head < num_queries}) or [0] for heads in chosen]
    most = max(map(len, needed))
    keys = [(*heads, *[heads[-1]] * (most - len(heads))) for heads in needed]
    readers = [
        tuple(own.index(head // per_key) if head < num_queries else most - 1 for head in heads)
        for heads, own in zip(chosen, keys, strict=True)
    ]
    queries = [tuple(head if head < num_queries else None for head in heads) for heads in chosen]
    return Exchange(tuple(queries), tuple(keys), tuple(readers))
