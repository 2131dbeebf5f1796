"""Whether a checkpoint fits what is going to be filled, before anything is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from lightning_superscale.checkpoint.state import StateSource, TensorInfo, TensorKey
from lightning_superscale.errors import CheckpointError, did_you_mean

# How many names of one kind a message lists.
_LISTED = 20


def match(
    wanted: Mapping[TensorKey, TensorInfo], source: StateSource, *, allow: Sequence[str] = ()
) -> dict[TensorKey, TensorKey]:
    """Find each wanted tensor in a checkpoint.

    Every problem is reported at once: tensors that one side lacks, and shapes that differ. A tied tensor may have
    another of its names in the checkpoint. dtypes may differ as far as values convert: floating point to floating
    point, other dtypes only to themselves.

    Args:
        wanted: what will be filled. Sections of which it has nothing are not compared, so weights can be read without
            optimizer states.
        allow: patterns (fnmatch) of names that may be missing on either side, such as "head.*", or of whole keys,
            such as "optimizer.0/*"; states of optimizers are matched by the name of their parameter.

    Returns:
        The checkpoint's key of each wanted tensor that it has.

    Raises:
        CheckpointError: lists what is missing, what is unexpected and what has another shape, and how to allow it.
    """
    found = {key: at for key in wanted if (at := _find(key, source)) is not None}
    sections = {key.section for key in wanted}
    used = set(found.values())
    missing = [key for key in wanted if key not in found and not _is_allowed(key, allow)]
    extra = [
        key for key in source.tensors if key.section in sections and key not in used and not _is_allowed(key, allow)
    ]
    problems = []
    if missing:
        problems.append(f"the checkpoint lacks {_listed([_missing(key, source) for key in missing])}")
    if extra:
        problems.append(f"nothing takes {_listed([str(key) for key in extra])}")
    unlike = [_difference(key, wanted[key], source.tensors[at]) for key, at in found.items()]
    if any(unlike):
        problems.append(f"these differ: {_listed([text for text in unlike if text])}")
    if problems:
        hint = ""
        if missing or extra:
            hint = f" To load without the former, allow names, such as allow=[{(missing or extra)[0].name!r}]."
        raise CheckpointError(f"{source.path} does not fit, and nothing was changed: {'; '.join(problems)}.{hint}")
    return found


def _find(key: TensorKey, source: StateSource) -> TensorKey | None:
    """The key of a tensor in the checkpoint, under its own name or one that it is tied to."""
    if key in source.tensors:
        return key
    target = source.aliases.get(key.name, key.name)
    names = [target, *(alias for alias, name in source.aliases.items() if name == target)]
    keys = (TensorKey(key.section, name, key.state) for name in names)
    return next((other for other in keys if other in source.tensors), None)


def _is_allowed(key: TensorKey, allow: Sequence[str]) -> bool:
    return any(fnmatchcase(key.name, pattern) or fnmatchcase(f"{key.section}/{key.name}", pattern) for pattern in allow)


def _missing(key: TensorKey, source: StateSource) -> str:
    names = {other.name for other in source.tensors if (other.section, other.state) == (key.section, key.state)}
    return str(key) + did_you_mean(key.name, sorted(names)).replace("; did", " (did").replace("?", "?)")


def _difference(key: TensorKey, wanted: TensorInfo, found: TensorInfo) -> str | None:
    if wanted.shape != found.shape:
        return f"{key} has shape {wanted.shape} here and {found.shape} in the checkpoint"
    both_float = wanted.dtype.is_floating_point and found.dtype.is_floating_point
    if wanted.dtype != found.dtype and not both_float:
        return f"{key} is {wanted.dtype} here and {found.dtype} in the checkpoint"
    return None


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_LISTED])
    return shown + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
