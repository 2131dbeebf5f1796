"""The numbers that optimizers' rules know of their work, for loggers, and as sentences for `explain()`."""

from __future__ import annotations

from dataclasses import replace

from lightning_superscale.optim.step_rule import Figure
from lightning_superscale.run.assemble import Assembly
from lightning_superscale.run.report.plan import format_bytes


def figures_of(assembly: Assembly) -> list[Figure]:
    """The figures of all optimizers, with names of their own. Any rank may ask by itself; the numbers are its own."""
    by_optimizer = {number: engine.rule.figures() for number, engine in enumerate(assembly.engines.values())}
    told = {number: figures for number, figures in by_optimizer.items() if figures}
    if len(told) == 1:
        return list(*told.values())
    return [
        replace(figure, name=f"{figure.name}-{number}", text=f"optimizer {number}: {figure.text}")
        for number, figures in told.items()
        for figure in figures
    ]


def sentence_of(figure: Figure) -> str:
    """A figure in words, with what was expected beside what was measured, as far as either is known."""
    said = [
        f"{_in_words(value, figure.unit)} {how}"
        for value, how in ((figure.expected, "expected"), (figure.measured, "measured"))
        if value is not None
    ]
    return f"{figure.text}: {', '.join(said) or 'not measured yet'}"


def _in_words(value: float, unit: str) -> str:
    if unit == "bytes":
        return "0 B" if value == 0 else format_bytes(value)
    return f"{value:.1%}" if unit == "share" else f"{value:.2f} {unit}"
