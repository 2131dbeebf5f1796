"""Frozen settings that the user fills in, from Python or YAML, and their validation.

Wherever a config object is taken, a mapping with the same keys is too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Optional, TypeVar, Union

from lightning_superscale.errors import SuperScaleError, did_you_mean

ENGINES = ("cpu", "superoffload")
WEIGHTS = ("auto", "stationary", "flow")
LINK_DTYPES = ("auto", "weights", "fp32")
PLANNED_ENGINES = ("zenflow",)

_C = TypeVar("_C")


def _check_positive_int(owner: str, key: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SuperScaleError(f"{owner}.{key} must be a whole number of at least 1, found {value!r}.")


def _check_share(owner: str, key: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
        raise SuperScaleError(f"{owner}.{key} must be a number from 0 to 1 or 'auto', found {value!r}.")


@dataclass(frozen=True)
class ZeroConfig:
    """What is sharded over the data-parallel ranks (Rajbhandari et al. 2020, arXiv:1910.02054).

    Args:
        stage: 0 replicates everything, as DDP does. 1 shards master weights and optimizer states, 2
            gradients too, 3 weights too.
        bucket_mb: MiB of weights that are reduced, stepped and gathered together.
        shard_size: ranks that share one copy of what is sharded; None for all. Fewer than all replicate
            the shards over the rest (HSDP).
        no_sync: micro-batches before the last of a step accumulate whole gradients on every rank, so that
            ranks reduce once per step. "auto": in stage 1, not in stages 2 and 3, whose ranks then keep
            only their share.
        wrap: stage 3: class names of the modules that are gathered as a whole; None finds the repeated blocks.
        assume_elementwise: let an optimizer that this package does not know step on rows of each
            parameter. Right only if it treats every element by itself, as Adam and SGD do.
        tensor_parallel: stage 3: neighbouring ranks that compute each batch together, on modules that
            configure_model() parallelizes over self.device_mesh["tensor_parallel"].
    """

    stage: int = 0
    bucket_mb: int = 64
    shard_size: Optional[int] = None
    no_sync: Union[bool, Literal["auto"]] = "auto"
    wrap: Optional[list[str]] = None
    assume_elementwise: bool = False
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3) or isinstance(self.stage, bool):
            raise SuperScaleError(f"ZeroConfig.stage must be 0, 1, 2 or 3, found {self.stage!r}.")
        _check_positive_int("ZeroConfig", "bucket_mb", self.bucket_mb)
        if self.shard_size is not None:
            _check_positive_int("ZeroConfig", "shard_size", self.shard_size)
        self._check_tensor_parallel()
        if self.no_sync not in (True, False, "auto"):
            raise SuperScaleError(f"ZeroConfig.no_sync must be true, false or 'auto', found {self.no_sync!r}.")
        if self.wrap is not None and self.stage != 3:
            raise SuperScaleError(
                f"ZeroConfig.wrap chooses what stage 3 gathers together; found it with stage {self.stage}. Remove it."
            )

    def _check_tensor_parallel(self) -> None:
        _check_positive_int("ZeroConfig", "tensor_parallel", self.tensor_parallel)
        if self.tensor_parallel == 1:
            return
        if self.stage != 3:
            raise SuperScaleError(
                f"ZeroConfig.tensor_parallel={self.tensor_parallel} works in stage 3 only; found stage {self.stage}. "
                "Use ZeroConfig(stage=3), or remove tensor_parallel."
            )
        if self.shard_size is not None:
            raise SuperScaleError(
                f"ZeroConfig.tensor_parallel={self.tensor_parallel} can't be combined with shard_size="
                f"{self.shard_size}: shards are spread over all data-parallel ranks then. Remove shard_size."
            )

    @property
    def reduces_once(self) -> bool:
        """Whether gradients of all micro-batches of a step are reduced together."""
        return self.stage < 2 if self.no_sync == "auto" else bool(self.no_sync)

    def shard_size_of(self, world_size: int) -> int:
        """Ranks on the shard axis."""
        return 1 if self.stage == 0 else (self.shard_size or world_size // self.tensor_parallel)


@dataclass(frozen=True)
class OffloadConfig:
    """Where optimizer states live and where the optimizer steps.

    Args:
        engine: "cpu" and "superoffload" keep fp32 master weights and optimizer states in host memory
            and step there: "cpu" after the backward pass, "superoffload" during it and the next forward.
        bucket_mb: MiB of weights that move and step together; "auto": at most 64, and fewer where that gives a small
            model about 16 buckets.
        pin_memory: page-lock the host side of transfers, where there is a CUDA device.
        cpu_threads: worker threads of the host optimizer; "auto": as few as step about as fast as all of this rank's
            cores but one, which stays with the launching thread.
        speculate: "superoffload" steps each bucket while backward still runs, before the gradient norm is
            known, and steps again what a clip changes; False waits for the norm, and overlaps with the
            next forward only. The result is the same, bit for bit.
        weights: "stationary" keeps the weights of forward and backward on the device. "flow" keeps them in host
            memory too and streams them through the device block by block, in forward and in backward, so that the
            model need not fit there. "auto" chooses; `explain()` says what and why.
        wrap: with "flow", class names or names of the modules whose weights stream together; None finds the
            repeated blocks.
        gpu_fraction: share of the trainable parameters, from 0 to 1, whose masters and states stay on the device and
            step there: those whose gradients come last in backward, whose step nothing would hide. "auto": as many
            as fit the device memory that the first step left free. The result is the same, bit for bit.
        link_dtype: in which dtype gradients and weights travel between device and host. "weights": in that of the
            weights, and the host's kernel casts. "fp32": in fp32, and the device casts, which takes more of the link
            and of the host's memory and spares its cores the conversions. "auto": "fp32" only where this machine's
            profile says that it is faster. The result is the same, bit for bit.
    """

    engine: str = "superoffload"
    bucket_mb: Union[int, Literal["auto"]] = "auto"
    pin_memory: bool = True
    cpu_threads: Union[int, Literal["auto"]] = "auto"
    speculate: bool = True
    weights: Literal["auto", "stationary", "flow"] = "auto"
    wrap: Optional[list[str]] = None
    gpu_fraction: Union[float, Literal["auto"]] = "auto"
    link_dtype: Literal["auto", "weights", "fp32"] = "auto"

    def __post_init__(self) -> None:
        if self.engine in PLANNED_ENGINES:
            raise SuperScaleError(
                f"offload engine {self.engine!r} is not in this version. Use one of {', '.join(map(repr, ENGINES))}."
            )
        if self.engine not in ENGINES:
            raise SuperScaleError(
                f"unknown offload engine {self.engine!r}: expected one of {', '.join(map(repr, ENGINES))}"
                f"{did_you_mean(str(self.engine), ENGINES)}"
            )
        if self.bucket_mb != "auto":
            _check_positive_int("OffloadConfig", "bucket_mb", self.bucket_mb)
        if not isinstance(self.speculate, bool):
            raise SuperScaleError(f"OffloadConfig.speculate must be true or false, found {self.speculate!r}.")
        if self.weights not in WEIGHTS:
            raise SuperScaleError(
                f"OffloadConfig.weights must be one of {', '.join(map(repr, WEIGHTS))}, found {self.weights!r}"
                f"{did_you_mean(str(self.weights), WEIGHTS)}"
            )
        if self.wrap is not None and self.weights != "flow":
            raise SuperScaleError(
                "OffloadConfig.wrap chooses what weights='flow' streams together; found it with "
                f"weights={self.weights!r}. Remove it."
            )
        if self.gpu_fraction != "auto":
            _check_share("OffloadConfig", "gpu_fraction", self.gpu_fraction)
            if self.gpu_fraction > 0 and self.weights == "flow":
                raise SuperScaleError(
                    "OffloadConfig.weights='flow' keeps weights off the device, and their states with them; found "
                    f"gpu_fraction={self.gpu_fraction}. Use 'auto' or 0, or weights='stationary'."
                )
        if self.cpu_threads != "auto":
            _check_positive_int("OffloadConfig", "cpu_threads", self.cpu_threads)
        self._check_link_dtype()

    def _check_link_dtype(self) -> None:
        if self.link_dtype not in LINK_DTYPES:
            raise SuperScaleError(
                f"OffloadConfig.link_dtype must be one of {', '.join(map(repr, LINK_DTYPES))}, found "
                f"{self.link_dtype!r}{did_you_mean(str(self.link_dtype), LINK_DTYPES)}"
            )
        if self.link_dtype == "fp32" and self.weights == "flow":
            raise SuperScaleError(
                "OffloadConfig.weights='flow' streams weights from host memory in their own dtype; found "
                "link_dtype='fp32'. Use link_dtype='auto' or 'weights', or weights='stationary'."
            )


@dataclass(frozen=True)
class CheckpointConfig:
    """How universal checkpoints are written and read.

    Args:
        asynchronous: training goes on while a snapshot is written; one is in flight at a time, and its errors are
            raised at the next step, by all ranks at the same, or at the end.
        allow: patterns (as of shell globs) of names of weights that a checkpoint may lack, or may have besides.
    """

    asynchronous: bool = False
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.asynchronous, bool):
            raise SuperScaleError(f"CheckpointConfig.asynchronous must be true or false, found {self.asynchronous!r}.")
        patterns: object = self.allow
        if not isinstance(patterns, (list, tuple)) or not all(isinstance(pattern, str) for pattern in patterns):
            raise SuperScaleError(f"CheckpointConfig.allow must be a list of patterns, found {self.allow!r}.")
        object.__setattr__(self, "allow", tuple(self.allow))


def config_from_mapping(config_class: type[_C], values: Mapping[str, Any], where: str) -> _C:
    """Build a config from a mapping, refusing keys that it does not have.

    Raises:
        SuperScaleError: an unknown key (names it, the known ones and the closest).
    """
    known = [f.name for f in fields(config_class)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise SuperScaleError(
                f"{where} has no key {key!r}: expected one of {', '.join(map(repr, known))}"
                f"{did_you_mean(str(key), known)}"
            )
    return config_class(**values)


def resolve_zero(value: Union[int, ZeroConfig, Mapping[str, Any]]) -> ZeroConfig:
    if isinstance(value, ZeroConfig):
        return value
    if isinstance(value, Mapping):
        return config_from_mapping(ZeroConfig, value, "zero")
    if isinstance(value, int) and not isinstance(value, bool):
        return ZeroConfig(stage=value)
    raise SuperScaleError(f"zero takes 0, 1, 2, 3, a ZeroConfig or a mapping, found {value!r}.")


def resolve_offload(value: Union[str, OffloadConfig, Mapping[str, Any], None]) -> OffloadConfig | None:
    if value is None or isinstance(value, OffloadConfig):
        return value
    if isinstance(value, Mapping):
        return config_from_mapping(OffloadConfig, value, "offload")
    if isinstance(value, str):
        return OffloadConfig(engine=value)
    raise SuperScaleError(
        f"offload takes None, {', '.join(map(repr, ENGINES))}, an OffloadConfig or a mapping, found {value!r}."
    )


def resolve_checkpoint(value: Union[CheckpointConfig, Mapping[str, Any], None]) -> CheckpointConfig:
    if value is None:
        return CheckpointConfig()
    if isinstance(value, CheckpointConfig):
        return value
    if isinstance(value, Mapping):
        return config_from_mapping(CheckpointConfig, value, "checkpoint")
    raise SuperScaleError(f"checkpoint takes None, a CheckpointConfig or a mapping, found {value!r}.")
