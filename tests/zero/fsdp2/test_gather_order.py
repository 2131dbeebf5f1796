"""The order of gathers, ranks being threads over one store."""

from __future__ import annotations

import threading

import pytest
import torch.distributed as dist

from lightning_superscale.zero.fsdp2.gather_order import STEP, GatherOrder, OrderDeparted

WAIT_S = 20


def together(*programs, patience_s=5.0):
    """Run one program per rank; what each raised or returned."""
    store = dist.HashStore()
    results: list[object] = [None] * len(programs)

    def body(rank: int, program) -> None:
        order = GatherOrder(store, rank, len(programs), patience_s=patience_s)
        try:
            results[rank] = program(order)
        except OrderDeparted as error:
            results[rank] = error

    threads = [threading.Thread(target=body, args=item, daemon=True) for item in enumerate(programs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert not any(thread.is_alive() for thread in threads)
    return results


def step(*names, num_ranks=1):
    agreement = threading.Barrier(num_ranks)

    def run(order: GatherOrder) -> str:
        for name in names:
            order.enter(name)
        order.enter_step()
        digest = order.digest()
        agreement.wait(WAIT_S)
        order.step_agreed()
        return digest

    return run


def test_equal_orders_pass_and_have_equal_digests():
    first, second, third = together(*[step("a", "b", "b", "a", num_ranks=3)] * 3)
    assert first == second == third


def test_other_module_is_refused_on_all_ranks_by_name():
    for error in together(step("a", "b"), step("a", "c"), step("a", "b")):
        assert isinstance(error, OrderDeparted)
        assert "'b'" in str(error)
        assert "'c'" in str(error)
        assert "ZeRO-2, which allows it" in str(error)


def test_rank_that_steps_while_another_gathers_is_named():
    def at_the_step(order):
        order.enter("a")
        order.enter_step()  # in a run the agreement follows, which the other never joins
        return order.digest()

    results = together(at_the_step, step("a", "b"))
    errors = [r for r in results if isinstance(r, OrderDeparted)]
    assert errors
    assert all(STEP in str(error) for error in errors)


def test_rank_that_never_comes_ends_the_wait():
    def late(order):
        return "elsewhere"

    error, other = together(step("a"), late, patience_s=0.2)
    assert other == "elsewhere"
    assert "did not gather anything" in str(error)


def test_known_gathers_touch_no_store():
    class Counting:
        def __init__(self) -> None:
            self.store, self.calls = dist.HashStore(), 0

        def __getattr__(self, name):
            self.calls += 1
            return getattr(self.store, name)

    store = Counting()
    order = GatherOrder(store, 0, 1)
    step("a", "b", "c")(order)
    before = store.calls
    for name in ("a", "b", "c"):
        order.enter(name)
    assert store.calls == before
    order.enter_step()
    order.step_agreed()
    assert store.store.num_keys() == 0, "announcements are forgotten once a step is agreed"


def test_a_gather_that_waits_finds_out_that_it_waits_in_vain():
    same = step("a", "b", num_ranks=2)

    def known_way(order):
        for _ in range(2):
            same(order)
        order.enter("a")  # known: issued at once, and now it waits in the collective

        def wait() -> None:
            for _ in range(2000):
                order.look("a")
                threading.Event().wait(0.005)

        with pytest.raises(OrderDeparted, match="rank 1 is at module 'x'"):
            wait()
        return "found out"

    def other_way(order):
        for _ in range(2):
            same(order)
        order.enter("x")

    found, error = together(known_way, other_way)
    assert found == "found out"
    assert isinstance(error, OrderDeparted)


def test_many_batches_between_steps_repeat_one_chain():
    order = GatherOrder(None, 0, 1)
    for _ in range(1000):
        order.begin_pass("net", is_inference=True)
        order.enter("net")
        order.enter("block")
    assert len(order._known) < 10
