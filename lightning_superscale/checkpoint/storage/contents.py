"""Which files belong to a checkpoint: what a save may replace, and what a removal may delete.

[Note: What may be replaced] Only a checkpoint of a known format is replaced or removed, and only its own files go:
those that our manifest names, or for other formats those with names that the format gives. What lies beside them in a
checkpoint of ours stays, and is moved into the checkpoint that replaces it. A folder of another format with files
beside is not replaced at all, since names alone don't tell a checkpoint from a project that has one. Nothing is lost
with an empty file or folder, so those may be replaced too.

| what is found | its files |
| --- | --- |
| ours | those that the manifest names; with a damaged manifest, and in what is left of a save, those named as ours |
| a file of `torch.save` (Lightning's .ckpt) or of safetensors | itself |
| torch.distributed.checkpoint, with Lightning's meta.pt or without | .metadata, meta.pt, *.distcp |
| DeepSpeed, native or universal | latest, *_states.pt, zero/<parameter>/*.pt, zero_to_fp32.py |
| safetensors in a folder | *.safetensors, *.safetensors.index.json |
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lightning_superscale.checkpoint.format.manifest import MANIFEST_NAME

OWNER = "owner.json"
_GENERATION = r"(?:[0-9a-f]{32}/)?"
_OURS = re.compile(
    r"[0-9a-f]{32}\.owner\.json|"
    + _GENERATION
    + r"(?:rest\.json|data/(?:w\d+-\d+\.safetensors)?|blocks/(?:w\d+-\d+\.xxh)?)|"
    + re.escape(MANIFEST_NAME)
)
_IN_GENERATION = re.compile(r"[0-9a-f]{32}[/.]")
_OUR_DATA = re.compile(_GENERATION + r"data/w\d+-\d+\.safetensors|[0-9a-f]{32}\.owner\.json")
_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*")
_SCHEMA = re.compile(r"lucp/\d+\.\d+")
_SHOWN = 5
# torch.save's number of older files, as the pickle of an int.
_LEGACY_TORCH = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
HEAD_BYTES = 4096


@dataclass(frozen=True, slots=True)
class _Format:
    """A format of a folder: the files that only it has, and all that it has."""

    name: str
    mark: re.Pattern[str]
    files: re.Pattern[str]


_TAG = r"(?:[^/]+/)?"
FOREIGN = (
    _Format(
        "a directory of torch.distributed.checkpoint",
        re.compile(r"\.metadata"),
        re.compile(r"\.metadata|meta\.pt|__\d+_\d+\.distcp"),
    ),
    _Format(
        "a DeepSpeed directory",
        re.compile(_TAG + r"[^/]*(?:model_states\.pt|optim_states\.pt)"),
        re.compile(
            r"latest(?:_universal)?|(?:" + _TAG + r"zero_to_fp32\.py)|" + _TAG + r"[^/]*(?:model|optim)_states\.pt|"
            + _TAG + r"zero/(?:[^/]+/[^/]+\.pt|optimizer_state\.pt|(?:[^/]+/)?)"
        ),
    ),
    _Format(
        "a safetensors directory",
        re.compile(r"[^/]+\.safetensors(?:\.index\.json)?"),
        re.compile(r"[^/]+\.safetensors(?:\.index\.json)?"),
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Contents:
    """What lies at a place.

    Attributes:
        kind: the format of its checkpoint, in words; "" where it has none.
        files: names of the files that belong to the checkpoint, its manifest last; "" for a file by itself.
        others: names of some of what lies beside them.
        why_not: why the place must not be replaced, as the rest of a sentence; "" where it may be.
    """

    kind: str = ""
    files: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    why_not: str = ""


def named_by_manifest(data: bytes | None) -> list[str] | None:
    """The names of the files that a manifest of any version names, and its own last; None where it is no manifest.

    Checksums and versions are not looked at: a damaged or newer checkpoint is one all the same.
    """
    try:
        fields = json.loads(data or b"")
        root, files, schema = fields["root"], fields["files"], fields["schema"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(files, dict) or not isinstance(root, str) or not _SCHEMA.fullmatch(str(schema)):
        return None
    names = [f"{root}/{name}" if root else str(name) for name in files]
    return [*(name for name in names if _NAME.fullmatch(name)), MANIFEST_NAME]


def root_of(data: bytes | None) -> str | None:
    """The folder within a checkpoint that its manifest names; None where it is no manifest."""
    return None if named_by_manifest(data) is None else str(json.loads(data or b"")["root"])


def own_files(names: Iterable[str], manifest: bytes | None) -> list[str]:
    """The files of a checkpoint of ours, or of what is left of one, in the order in which they are deleted.

    Args:
        names: names of all that lies there.
        manifest: content of the manifest; None without one.
    """
    named = named_by_manifest(manifest)
    if named is not None:
        return named
    found = {name for name in names if _OURS.fullmatch(name)}
    return [*sorted(found - {MANIFEST_NAME}), *sorted(found & {MANIFEST_NAME})]


def is_in_generation(name: str) -> bool:
    """Whether a name is that of a file of ours in a generation of an object store, or of the note beside it."""
    return bool(_IN_GENERATION.match(name) and _OURS.fullmatch(name))


def contents_of_folder(top: Iterable[str], below: Iterable[str], manifest: bytes | None) -> Contents:
    """What a folder holds.

    Args:
        top: names at the top of the folder.
        below: names of all that lies in it and below it; it is read only as far as needed.
        manifest: content of its MANIFEST.json; None without one.
    """
    top = set(top)
    if not top:
        return Contents("an empty folder")
    named = named_by_manifest(manifest)
    if named is not None:
        return Contents("a checkpoint of lightning-superscale", tuple(named))
    formats: Mapping[str, re.Pattern[str]] = {form.name: form.files for form in FOREIGN}
    candidates = {
        "a checkpoint of lightning-superscale with a damaged manifest": _OURS,
        **({} if manifest is not None else formats),
    }
    files: list[str] = []
    ours, *_ = candidates
    marks = {ours: _OUR_DATA, **{form.name: form.mark for form in FOREIGN}}
    has_mark = dict.fromkeys(marks, False)
    others: dict[str, list[str]] = {kind: [] for kind in candidates}
    for name in below:
        files.append(name)
        for kind, mark in marks.items():
            has_mark[kind] |= bool(mark.fullmatch(name))
        for kind, pattern in candidates.items():
            if not pattern.fullmatch(name):
                others[kind].append(name)
        if all(len(found) >= _SHOWN for found in others.values()):
            break
    for kind in candidates:
        if not others[kind] and has_mark[kind]:
            return Contents(kind, tuple(own_files(files, manifest) if kind == ours else files))
    marked = next((kind for kind in candidates if has_mark[kind]), "")
    if marked:
        strangers = tuple(others[marked][:_SHOWN])
        return Contents(marked, (), strangers, f"is {marked} with other files beside ({', '.join(strangers)})")
    shown = ", ".join(sorted(top)[:_SHOWN])
    return Contents(
        "", (), tuple(sorted(top)[:_SHOWN]), f"is a folder that is no checkpoint of a known format ({shown})"
    )


def contents_of_file(head: bytes, size: int) -> Contents:
    """What a file is.

    Args:
        head: its first `HEAD_BYTES` bytes.
        size: its size in bytes.
    """
    if size == 0:
        return Contents("an empty file", ("",))
    if _is_torch_file(head):
        return Contents("a file of torch.save", ("",))
    length = int.from_bytes(head[:8], "little")
    if len(head) > 8 and 2 <= length <= size - 8 and re.match(rb'\{\s*("|\})', head[8:]):
        return Contents("a safetensors file", ("",))
    return Contents(why_not="is a file that is no checkpoint of a known format")


def _is_torch_file(head: bytes) -> bool:
    if head[:4] == b"PK\x03\x04":
        # torch writes the pickle first; the archive itself may be cut off.
        return head[30 : 30 + int.from_bytes(head[26:28], "little")].endswith(b"/data.pkl")
    return head[2:].startswith(_LEGACY_TORCH) and head[:1] == b"\x80"
