"""The op table is complete, and every path of every op is tested."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from lightning_superscale.ops import reference
from lightning_superscale.ops.catalog import OPS
from lightning_superscale.ops.cpu import adamw, flat
from lightning_superscale.ops.native import loader
from tests.ops.paths import FALLBACK, PATHS

ROOT = Path(__file__).resolve().parents[2]
NOT_OPS = {"scaled_grad", "kernel_name", "philox", "random_halves", "round_stochastic"}  # helpers and reports


def public_functions(module) -> dict[str, object]:
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__ == module.__name__
        and not name.startswith("_")
        and name not in NOT_OPS
    }


def test_every_compute_symbol_is_in_the_table():
    header = (ROOT / "csrc" / "include" / "lss.h").read_text()
    symbols = set(re.findall(r"/\* op\b.*?\*/\s*LSS_API int32_t (lss_\w+)\(", header, flags=re.DOTALL))
    assert symbols == {op.symbol for op in OPS.values() if op.symbol is not None}
    # A function that takes `how` and a ticket is work, so it must carry the comment "op".
    takes_work = re.findall(r"LSS_API int32_t (lss_\w+)\([^;]*const lss_submit \*how", header)
    assert set(takes_work) == symbols


def test_every_exported_symbol_is_bound():
    header = (ROOT / "csrc" / "include" / "lss.h").read_text()
    elsewhere = {"lss_install_root"}  # bound in ops/native/torch_root.py
    assert set(re.findall(r"LSS_API [\w \*]*?\*?(lss_\w+)\(", header)) - elsewhere == set(loader._SIGNATURES)


def test_every_public_function_is_in_the_table():
    known = {f for op in OPS.values() for f in (op.native, op.submit) if f is not None}
    assert set(public_functions(adamw).values()) | set(public_functions(flat).values()) == known
    references = public_functions(reference)
    assert set(references.values()) == {op.reference for op in OPS.values()}
    assert set(references) == set(OPS)


def test_every_entry_point_has_the_references_parameters():
    for op in OPS.values():
        wanted = list(inspect.signature(op.reference).parameters.values())
        for entry in (op.native, op.submit):
            if entry is None:
                continue
            found = inspect.signature(entry).parameters
            for parameter in wanted:
                assert parameter.name in found, (op.name, parameter.name)
                assert found[parameter.name].kind == parameter.kind, (op.name, parameter.name)
                assert found[parameter.name].default == parameter.default, (op.name, parameter.name)


def test_every_op_has_an_implementation():
    assert all(op.native or op.submit or op.cuda or op.triton for op in OPS.values())


def test_every_implementation_has_a_test_on_every_path():
    """A parametrised test over PATHS (or over NATIVE and the fallback) names each entry point.

    The GPU entry points have their own such test in gpu/test_gpu_catalog.py.
    """
    text = "".join(
        path.read_text() for path in sorted((ROOT / "tests" / "ops").rglob("test_*.py")) if path != Path(__file__)
    )
    for op in OPS.values():
        for entry in (op.native, op.submit):
            assert entry is None or re.search(rf"\b{entry.__name__}\b", text), f"{entry.__name__} has no test"
    assert FALLBACK in PATHS
