"""Modules that torch.compile compiled, when tokens meet them.

[Note: Capture whole, run the part] Dynamo captures a module's forward with stand-ins of the shapes that user code sees,
those of all tokens (`stand_ins.py`), and guards what it captured as ever. The graph is made of functions of torch, so
it is run by the rules, as eager code is, while the user's own compiler backend traces what they compute with this
rank's part: that graph, with its collectives, is what is compiled, forward and backward, once for each kind of inputs.
So a module has to be one graph: one in which Dynamo finds a reason to break runs as it is, by the rules, and its user
is warned.
"""

from __future__ import annotations

import functools
import logging
import operator
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn

from lightning_superscale.comm.in_graph import AxisLink, note_traced, traced
from lightning_superscale.errors import SequenceParallelError
from lightning_superscale.sequence.hugging_face import attend_shared
from lightning_superscale.sequence.stand_ins import StandIns
from lightning_superscale.sequence.tokens.layout import Layout, Sharing
from lightning_superscale.sequence.tokens.tensor import TokenTensor, layout_of, plain, sharded_in, with_layout
from lightning_superscale.sequence.tokens.traced import RuledGraph, is_tensor
from lightning_superscale.sequence.whole import are_whole
from lightning_superscale.torch_private import (
    Compilation,
    behind_compile,
    capture_errors,
    checkpointed_region,
    compilation_of,
    is_of_tracer,
    name_of_higher_order,
    set_compiled_call,
)

_log = logging.getLogger(__name__)

# Operators of captured graphs that run code past the rules, and what the user wrote.
_REFUSED = {
    "register_hook": "registers a hook on",
    "autograd_function_apply": "applies an autograd function to",
}
# Kinds of inputs of one module from which on its user is told that each is compiled for.
_MANY = 8


class CompiledModules:
    """From `install` to `remove`, the compiled modules of a run compute with tokens that ranks share."""

    def __init__(self) -> None:
        self._installed: list[tuple[nn.Module, Any, bool, CompiledForward]] = []

    def install(self, root: nn.Module, sharing: Sharing) -> None:
        """Let all that torch.compile compiled of a module, modules one by one, take tensors with layouts."""
        for name, module in root.named_modules():
            compilation = compilation_of(module)
            if compilation is None:
                continue
            torch.compiler.allow_in_graph(attend_shared)  # type: ignore[no-untyped-call]
            inner = compilation.module
            had_own = "forward" in vars(inner)
            forward = CompiledForward(inner.forward, compilation, sharing, name or type(inner).__name__)
            self._installed.append((module, set_compiled_call(module, inner._call_impl), had_own, forward))
            inner.forward = forward

    def reasons(self) -> list[str]:
        """One sentence on what runs compiled, and one on each module that does not."""
        forwards = [forward for _, _, _, forward in self._installed]
        compiled = [forward for forward in forwards if forward.num_kinds]
        modules = f"{len(compiled)} module{'s' if len(compiled) > 1 else ''}"
        num_graphs = sum(forward.num_kinds for forward in compiled)
        graphs = f"{num_graphs} graph{'s' if num_graphs > 1 else ''}"
        lines = [f"compiled, with shared tokens: {modules}, {graphs}"] if compiled else []
        return [*lines, *(f"{one.name} runs uncompiled: {one.why_not}" for one in forwards if one.why_not)]

    def remove(self) -> None:
        """Put back what `install` replaced."""
        while self._installed:
            module, call, had_own, forward = self._installed.pop()
            set_compiled_call(module, call)
            inner = behind_compile(module)
            del inner.forward
            if had_own:
                inner.forward = forward.plainly


class CompiledForward:
    """The forward of a compiled module, for tensors with and without tokens.

    Args:
        forward: the module's own.
        compilation: how its user had it compiled.
        name: of the module, for errors.

    Attributes:
        plainly: the module's own forward.
        num_kinds: kinds of inputs that it was compiled for.
        why_not: why torch can't capture it; "" where it can.
    """

    def __init__(self, forward: Callable[..., Any], compilation: Compilation, sharing: Sharing, name: str) -> None:
        functools.update_wrapper(self, forward)  # for code that asks for its arguments
        self.plainly = forward
        self._sharing = sharing
        self.name = name
        self._compilation = compilation
        self.num_kinds = 0
        self.why_not = ""
        self._present = StandIns(name)  # of the call under way
        self._without_tokens = compilation.compiled(forward)
        self._with_tokens = torch.compile(
            _with_code_of_its_own(forward, name), backend=self._capture, fullgraph=True, dynamic=compilation.dynamic
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() or are_whole() or self.why_not:
            return self.plainly(*args, **kwargs)
        given, present = (args, kwargs), StandIns(self.name)
        replaced = present.replace(given)
        if replaced is given:
            return self._without_tokens(*args, **kwargs)
        outer, self._present = self._present, present
        try:
            result = present.restore(self._with_tokens(*replaced[0], **replaced[1]))
            present.write_back()
        except capture_errors() as error:
            why = error.__cause__ if str(error).startswith("Hard failure") and error.__cause__ else error
            self.why_not = str(why).strip().partition("\n")[0]
            _log.warning(
                "%s runs uncompiled: ranks share its tokens, for which torch has to capture its forward as one graph "
                "for each kind of inputs, and it does not. Compile smaller modules, or give it fewer kinds. %s",
                self.name,
                why,
            )
            return self.plainly(*args, **kwargs)
        finally:
            self._present = outer
        del replaced
        present.end()
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        """A copy of the module, such as an average of its weights, has its own forward, uncompiled."""
        copied = memo[id(self._compilation.module)]
        return types.MethodType(type(copied).forward, copied)

    def _capture(self, graph: fx.GraphModule, stand_ins: Sequence[Any]) -> Callable[..., Any]:
        """A graph that Dynamo captured, as it calls it: a backend of torch.compile."""
        programs: list[tuple[list[Any], _Program]] = []
        numbers = _take_numbers(graph)

        def run(*given: Any) -> Any:
            inputs = [x.item() if i in numbers else self._present.behind(x) for i, x in enumerate(given)]
            kinds = [_kind(x) for x in inputs]
            program = next((program for known, program in programs if known == kinds), None)
            if program is None:
                program = self._compile(graph, inputs)
                programs.append((kinds, program))
            return program(inputs)

        return run

    def _compile(self, graph: fx.GraphModule, inputs: list[Any]) -> _Program:
        self.num_kinds += 1
        if self.num_kinds == _MANY:
            _log.warning(
                "%s was compiled for %d kinds of inputs, such as lengths of sequences, and is for each new one. Pad "
                "sequences to few lengths.",
                self.name,
                _MANY,
            )
        try:
            return _Program(graph, inputs, self._sharing, self._compilation)
        except SequenceParallelError:
            raise
        except Exception as error:
            raise SequenceParallelError(
                f"{self.name} is compiled, and what ranks compute of it with their tokens could not be: "
                f"{type(error).__name__}: {error}\nCompile smaller modules, or not this one."
            ) from error


def _take_numbers(graph: fx.GraphModule) -> frozenset[int]:
    """Let a graph be given numbers where Dynamo gives it tensors that hold one; which of its inputs these are.

    That is how Dynamo passes a `float` that changes, or any one where a user asks for dynamic shapes. A compiler that
    traces can't read the number of a tensor, so graphs are compiled for each.
    """
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    found = []
    for i, node in enumerate(inputs):
        if node.users and all(user.op == "call_method" and user.target == "item" for user in node.users):
            found.append(i)
            for user in list(node.users):
                user.replace_all_uses_with(node)
                graph.graph.erase_node(user)
    graph.recompile()
    return frozenset(found)


def _with_code_of_its_own(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The same function by another code object, named after the module whose forward it is.

    Dynamo keeps graphs by code object, at most `recompile_limit` (8) of them, and modules of one class share their
    forward's. Each module has a backend of its own here, hence graphs of its own: a ninth block would be one too many.
    Shapes that Dynamo found to change are known by the code's name.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_name=name)
    return call


def _laid_out(parts: Iterable[Any], layouts: Iterable[Layout | None]) -> tuple[Any, ...]:
    """This rank's parts, each with its layout, if it has one."""
    return tuple(x if at is None else with_layout(x, at) for x, at in zip(parts, layouts, strict=True))


def _example(x: Any) -> Any:
    """What a compiler is shown of an input: a tracer asks a view's base all that no rule answers of tokens."""
    part = plain(x)
    if is_tensor(part) and type(part._base) is TokenTensor:  # what sharded modules return, see outputs.py
        return part.detach().requires_grad_(part.requires_grad)
    return part


def _kind(x: Any) -> Any:
    """What a graph is compiled for, of one input; equal where the same graph is right."""
    if not is_tensor(x):
        return x
    part = plain(x)
    return (layout_of(x), part.shape, part.stride(), part.dtype, part.device, part.requires_grad)


class _Rules:
    """A captured graph as a function of this rank's parts, for a compiler that traces it.

    Attributes:
        outputs: the layouts of what it returned last.
        sent: the collectives of its forward, kinds and bytes, that a tracer met.
        sent_again: those of checkpoints in it, which backward computes again.
        num_entries: tensors of which this rank takes its part in it.
    """

    def __init__(self, graph: fx.GraphModule, layouts: Sequence[Layout | None], sharing: Sharing, kind: str) -> None:
        self._graph = graph
        self._kind = kind
        self._layouts = layouts
        self._sharing = sharing
        self.outputs: list[Layout | None] = []
        self.sent: list[tuple[str, int]] = []
        self.sent_again: list[tuple[str, int]] = []
        self.num_entries = 0

    def __call__(self, *parts: Any) -> tuple[Any, ...]:
        given = _laid_out(parts, self._layouts)
        seen, is_traced = self._sharing.seen, any(is_tensor(x) and is_of_tracer(x) for x in parts)
        before = seen.num_entries
        with traced() as sent:
            interpreter = _Checkpointing(self._graph, self._sharing, self._kind)
            found = interpreter.run(*given)
        if is_traced:
            self.sent, self.sent_again = sent, interpreter.sent_again
            self.num_entries, seen.num_entries = seen.num_entries - before, before
        self.outputs = [layout_of(x) for x in found]
        return tuple(plain(x) for x in found)

    def as_graph(self) -> fx.GraphModule:
        """A graph of one call of it, as backends of torch.compile take it."""
        graph = fx.Graph()
        made = graph.call_function(self, tuple(graph.placeholder(f"x{i}") for i in range(len(self._layouts))))
        [output] = [node for node in self._graph.graph.nodes if node.op == "output"]
        graph.output(tuple(graph.call_function(operator.getitem, (made, i)) for i in range(len(output.args[0]))))
        return fx.GraphModule(nn.Module(), graph)

    @property
    def __name__(self) -> str:
        """By which code generated from the graph calls it."""
        return "rules"


class _Checkpointing(RuledGraph):
    """Runs a captured graph by rules, and lets the compiler compute the regions of checkpoints again in backward."""

    def __init__(self, graph: fx.GraphModule, sharing: Sharing, kind: str) -> None:
        super().__init__(graph, kind)
        self._sharing = sharing
        self.sent_again: list[tuple[str, int]] = []

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        does = _REFUSED.get(name_of_higher_order(target))
        if does is not None and sharded_in((args, kwargs)):
            raise SequenceParallelError(
                f"{self.kind} is compiled, and {does} a tensor of tokens, for which torch captures code that computes "
                f"with this rank's tokens alone at {self.place(())[1]}. Do not compile this module."
            )
        if target is not checkpointed_region():
            return super().call_function(target, args, kwargs)
        region, *given = args
        rules = _Rules(region, [layout_of(x) for x in given], self._sharing, self.kind)
        graph = rules.as_graph()
        graph.meta.update(region.meta)
        found = target(graph, *(plain(x) for x in given), **kwargs)
        note_traced(rules.sent)
        self.sent_again += rules.sent
        return _laid_out(found, rules.outputs)


class _Program:
    """A captured graph, compiled for one kind of inputs."""

    def __init__(self, graph: fx.GraphModule, inputs: list[Any], sharing: Sharing, compilation: Compilation) -> None:
        self._sharing = sharing
        kind = type(compilation.module).__name__
        self._rules = _Rules(graph, [layout_of(x) for x in inputs], sharing, kind)
        with traced() as returned:  # forward's collectives are met within a `traced` of its own
            self._compiled = compilation.backend(self._rules.as_graph(), [_example(x) for x in inputs])
        self._returned = [*self._rules.sent_again, *returned]

    def __call__(self, inputs: list[Any]) -> tuple[Any, ...]:
        link: AxisLink = self._sharing.link
        link.note_all(self._rules.sent)
        self._sharing.seen.num_entries += self._rules.num_entries
        found = self._compiled(*(plain(x) for x in inputs))
        backward = next((x.grad_fn for x in found if is_tensor(x) and x.grad_fn is not None), None)
        if self._returned and backward is not None:
            backward.register_prehook(lambda grads: link.note_all(self._returned))
        return _laid_out(found, self._rules.outputs)
