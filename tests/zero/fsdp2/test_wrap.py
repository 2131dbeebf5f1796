"""Which modules become groups, decided without processes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.zero.fsdp2.wrap import plan_groups, wrap_plan
from tests.helpers.fsdp_models import Adapted, Block, MixedTrainable, Stack, Whole


def names(root: nn.Module, wrap=None, **how) -> list[str]:
    fqn_of = {module: fqn for fqn, module in root.named_modules()}
    return [fqn_of[m] for m in wrap_plan(root, wrap, **how)]


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)

    def forward(self, x):
        return self.up(x)


class MoeBlock(nn.Module):
    """Experts inside a block: a rank's batch runs some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(3))
        self.router = nn.Linear(4, 3)

    def forward(self, x):
        return sum(expert(x) for expert in self.experts)


class LlamaLike(nn.Module):
    _no_split_modules = ("MoeBlock",)

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(MoeBlock(), MoeBlock()) for _ in range(2))


def test_repeated_blocks_come_innermost_first_and_the_root_last():
    assert names(Stack()) == ["blocks.0", "blocks.1", "blocks.2", ""]


def test_without_the_root_its_outermost_callables_come_last():
    assert names(Whole(Stack()), include_root=False) == ["net.blocks.0", "net.blocks.1", "net.blocks.2", "net"]
    lists = nn.Module()
    lists.parts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 3)])
    assert names(lists, include_root=False) == ["parts.0", "parts.1"]


def test_a_class_that_only_keeps_networks_is_no_group():
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision, self.text = Stack(), nn.Linear(2, 2)

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.towers = Towers()

    assert names(Root(), wrap=[], include_root=False) == ["towers.vision", "towers.text"]


def test_experts_stay_with_the_block_that_calls_them():
    assert names(nn.ModuleList([MoeBlock(), MoeBlock()])) == ["0", "1", ""]


def test_a_list_of_unlike_modules_is_not_repeated():
    assert names(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Tanh(), nn.Linear(3, 2))) == [""]


def test_hugging_face_names_are_finer_than_repetition():
    model = LlamaLike()
    assert names(model) == ["stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1", ""]
    wrapped = Whole(model)  # as PEFT nests it
    assert names(wrapped)[:4] == ["net.stages.0.0", "net.stages.0.1", "net.stages.1.0", "net.stages.1.1"]


@pytest.mark.parametrize(
    "wrap", [{Block}, {"Block"}, {"blocks.0", "blocks.1", "blocks.2"}], ids=["class", "name", "paths"]
)
def test_named_groups(wrap):
    assert names(Stack(), wrap) == ["blocks.0", "blocks.1", "blocks.2", ""]


def test_name_that_matches_nothing_is_refused_with_a_suggestion():
    with pytest.raises(SuperScaleError, match="wrap='Blok' matches no module of Stack; did you mean 'Block'"):
        wrap_plan(Stack(), {"Blok"})
    with pytest.raises(SuperScaleError, match="wrap='Conv2d' matches no module of Stack"):
        wrap_plan(Stack(), {nn.Conv2d})


def test_container_without_forward_is_refused():
    with pytest.raises(SuperScaleError, match="wrap='blocks' names a ModuleList, which has no forward"):
        wrap_plan(Stack(), {"blocks"})


def test_tied_modules_are_gathered_with_what_is_around_both():
    model = Stack(is_tied=True)
    assert names(model, {"first", "head", Block}) == ["blocks.0", "blocks.1", "blocks.2", ""]
    shared = Stack()
    shared.blocks[1].up.weight = shared.blocks[0].up.weight
    assert names(shared) == ["blocks.2", ""]


def test_one_block_used_thrice_is_one_group():
    block = Block()
    assert names(nn.Sequential(block, block, Block())) == ["0", "2", ""]


def test_every_parameter_is_in_one_group():
    root = Whole(Stack(is_tied=True))
    for include_root in (True, False):
        plans = plan_groups(root, wrap_plan(root, include_root=include_root))
        found = [p for plan in plans for p in plan.params.values()]
        assert len(found) == len(set(found))
        missing = {fqn for fqn, p in root.named_parameters() if not any(p is q for q in found)}
        assert missing == (set() if include_root else {"scale"})


def test_what_fsdp2_cannot_take_is_left_out_with_a_reason():
    root = Whole(MixedTrainable())
    root.net.turned = nn.Parameter(torch.randn(4, 3).T)
    root.net.none = nn.Parameter(torch.empty(0, 3))
    (plan,) = plan_groups(root, [root])
    reasons = {fqn: plan.left_out[p] for fqn, p in plan.params.items() if p in plan.left_out}
    assert reasons == {
        "scale": "it is a scalar",
        "net.turned": "it is not contiguous",
        "net.none": "it is empty",
        "net.scale": "it is torch.float32 in a group of trainable torch.bfloat16",
    }


def test_frozen_parameters_of_another_dtype_stay_in_their_group():
    (plan,) = plan_groups(root := Adapted(), [root])
    assert not plan.left_out


def test_networks_that_share_a_parameter_leave_it_whole():
    root = nn.Module()
    root.a, root.b = nn.Linear(3, 3), nn.Linear(3, 3)
    root.b.weight = root.a.weight
    plans = plan_groups(root, wrap_plan(root, include_root=False))
    assert [plan.fqn for plan in plans] == ["a", "b"]
    assert plans[0].left_out == {root.a.weight: "it is shared by networks that are gathered apart"}


def test_a_network_that_is_also_a_part_of_another_comes_first():
    root = nn.Module()
    root.net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    root.backbone = root.net[0]
    assert wrap_plan(root, include_root=False) == [root.backbone, root.net]
