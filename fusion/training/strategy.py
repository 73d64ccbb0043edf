"""Where training runs: one device, several devices of this machine, or several machines.

A strategy is made from its settings before the model, and the model is built in its `scope()`. The processes of a
cluster (`multi_worker`, `parameter_server`) run the same program; TF_CONFIG tells each its place.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import Field

from fusion.compat import tf
from fusion.config import Settings
from fusion.errors import ConfigError
from fusion.training.cluster import Place, find_place, meet, serve
from fusion.training.precision import Precision, precision_scope
from fusion.types import RunOptions

Kind = Literal["default", "mirrored", "multi_worker", "parameter_server", "tpu"]


class StrategySettings(Settings):
    """Which devices share the work."""

    kind: Kind = "default"
    """default: one device; mirrored: a copy on each device, gradients summed; multi_worker: the same over processes;
    parameter_server: workers take weights from servers and send gradients, each at its own pace; tpu: Cloud TPU."""
    devices: list[str] = Field(default_factory=list)
    """Devices for mirrored, such as [GPU:0, GPU:1] or [CPU:0, CPU:1]; empty means all GPUs, or the CPU."""
    placement: dict[str, str] = Field(default_factory=dict)
    """default: by member the device that holds what is trained of it and takes its steps, as in {text: GPU:1, image:
    GPU:0}; the other members are where TensorFlow puts them."""
    start_seconds: float = Field(default=300.0, gt=0)
    """How long the processes of a cluster wait for each other at the start."""
    min_shard_bytes: int = Field(default=256 << 10, ge=1)
    """parameter_server: a table is cut over the servers into parts of at least so many bytes."""
    tpu: str = ""
    """Name or address of the TPU, for tpu; empty: the one of this virtual machine."""

    @pydantic.field_validator("devices")
    @classmethod
    def _known_form(cls, devices: list[str]) -> list[str]:
        _check_form(devices)
        if len(set(devices)) != len(devices):
            raise ValueError(f"each device must stand once; received {devices}")
        return devices

    @pydantic.field_validator("placement")
    @classmethod
    def _known_places(cls, placement: dict[str, str]) -> dict[str, str]:
        _check_form(placement.values())
        return placement

    @pydantic.model_validator(mode="after")
    def _devices_only_mirrored(self) -> StrategySettings:
        if self.devices and self.kind != "mirrored":
            raise ValueError(f"the key devices must go with kind mirrored; received kind {self.kind}")
        if self.placement and self.kind != "default":
            raise ValueError(
                f"the key placement must go with kind default, because {self.kind} has devices of its own for every "
                f"member; received kind {self.kind}"
            )
        return self


def _check_form(devices: Iterable[str]) -> None:
    for device in devices:
        if not re.fullmatch(r"(CPU|GPU):\d+", device):
            raise ValueError(f"a device must be named like CPU:0 or GPU:1; received '{device}'")


def replicas(settings: StrategySettings) -> int:
    """Copies of the model that share a batch. Looks at hardware and TF_CONFIG without starting anything."""
    local = max(1, len(tf.config.list_physical_devices("GPU")))
    if settings.kind == "mirrored":
        return len(settings.devices) or local
    if settings.kind == "multi_worker":
        place = find_place()
        return local * (place.trainers if place else 1)
    return 1


def check_batch(batch_size: int, settings: StrategySettings, accumulate: int = 1) -> None:
    """Raises ConfigError when the batch cannot be shared evenly; needs neither data nor devices."""
    check_divisible(batch_size, replicas(settings), accumulate)


def check_divisible(batch_size: int, count: int, accumulate: int = 1) -> None:
    """Raises ConfigError unless each of `count` replicas gets as many rows, in `accumulate` equal parts."""
    shares = count * accumulate
    if batch_size % shares:
        below, above = batch_size // shares * shares, (batch_size // shares + 1) * shares
        parts = f", times the {accumulate} parts of training.accumulate" if accumulate > 1 else ""
        raise ConfigError(
            f"batch_size must be a multiple of the {count} devices of the strategy{parts}; received {batch_size}. "
            f"Take {f'{below} or ' if below else ''}{above}."
        )


def check_training(training: Any, accelerations: Sequence[str], settings: StrategySettings) -> None:
    """Raises ConfigError for keys of LoopSettings that the model (`accelerations` names those it takes) or the strategy
    cannot do."""
    asked = {
        "precision": training.precision != "float32",
        "xla": training.xla,
        "accumulate": training.accumulate > 1,
    }
    for key, wanted in asked.items():
        if wanted and key not in accelerations:
            raise ConfigError(
                f"training.{key} must be left as it is here, where "
                f"{' and '.join(accelerations) or 'none of precision, xla and accumulate'} can be set; received "
                f"{getattr(training, key)}."
            )
    if training.xla and settings.kind != "default":
        raise ConfigError(f"training.xla must go with strategy.kind default; received {settings.kind}.")
    if training.average.kind != "none" and settings.kind == "parameter_server":
        raise ConfigError(
            "training.average must be left out with strategy.kind parameter_server, whose workers take their steps "
            f"each at its own pace; received {training.average.kind}."
        )
    if training.precision == "mixed_float16" and settings.kind in ("parameter_server", "tpu"):
        raise ConfigError(
            f"training.precision must be float32 or mixed_bfloat16 with strategy.kind {settings.kind}, which cannot "
            "scale losses; received mixed_float16."
        )


def logical_cpus(count: int) -> None:
    """Makes the CPU appear as `count` devices, to mirror without GPUs.

    Does nothing when they are there already. Raises ConfigError when TensorFlow has opened the CPU with fewer,
    because it cannot be divided after that.
    """
    cpu = tf.config.list_physical_devices("CPU")[0]
    configured = tf.config.get_logical_device_configuration(cpu) or []
    if max(1, len(configured)) >= count:
        return
    try:
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
    except RuntimeError as error:
        raise ConfigError(
            f"the CPU must be divided into {count} devices before TensorFlow first uses it; it is in use already. "
            "Make the strategy first, in a new process."
        ) from error


def check_strategy(settings: StrategySettings) -> None:
    """Raises ConfigError when this machine does not have the devices. Of clusters it looks at TF_CONFIG alone."""
    if settings.kind in ("multi_worker", "parameter_server"):
        find_place()
    else:
        make_strategy(settings)


def make_strategy(settings: StrategySettings, topic: str = "") -> tf.distribute.Strategy:
    """The strategy that the settings ask for; of all but the default one there is one a process, made when first asked.

    Args:
        settings: which.
        topic: what the processes of a cluster must agree on to have met, such as the hash of the experiment.

    Raises:
        ConfigError: this machine does not have the devices, or TF_CONFIG does not fit the settings.
        MachineError: a process of the cluster did not come within `settings.start_seconds`.
    """
    _let_gpu_memory_grow()
    if settings.kind == "mirrored":
        return _mirrored(settings)
    if settings.kind == "default":
        _check_there(settings.placement.values(), "placement")
        return tf.distribute.get_strategy()
    if settings.kind not in _made:
        _made[settings.kind] = _MAKERS[settings.kind](settings, topic)
    return _made[settings.kind]


def strategy_of(settings: StrategySettings, member: str) -> tf.distribute.Strategy:
    """The strategy that trains one member: that of all of them, or the one device where `placement` has it.

    Raises as `make_strategy` does.
    """
    strategy = make_strategy(settings)
    device = settings.placement.get(member)
    return tf.distribute.OneDeviceStrategy(f"/{device}") if device else strategy


# Several MirroredStrategy objects in one process abort each other's collective operations, so there is one.
_mirrored_strategy: dict[tuple[str, ...], tf.distribute.MirroredStrategy] = {}

_made: dict[Kind, tf.distribute.Strategy] = {}
"""Strategies over processes, of which a process can join one only."""


@contextlib.contextmanager
def scope(options: RunOptions, precision: Precision = "float32") -> Iterator[None]:
    """The scope in which the models of a run are built: its strategy owns their variables, and layers that are built
    here reckon in `precision`."""
    with (options.strategy or tf.distribute.get_strategy()).scope(), precision_scope(precision):
        yield


def place_in(settings: StrategySettings) -> Place:
    """The place of this process in the cluster that the settings ask for. Raises ConfigError when it has none."""
    place = find_place()
    if place is None:
        raise ConfigError(
            f"strategy.kind {settings.kind} needs several processes, each with its place in TF_CONFIG, which is not "
            "set. Start them with tools/launch.py CONFIG --workers 2, or use mirrored on one machine."
        )
    wanted = ("chief", "worker", "ps") if settings.kind == "parameter_server" else ("worker",)
    strange = set(place.jobs) - {*wanted, "chief"}
    missing = [job for job in wanted if not place.jobs.get(job)]
    if missing or strange:
        raise ConfigError(
            f"strategy.kind {settings.kind} needs the jobs {', '.join(wanted)}; TF_CONFIG has "
            f"{', '.join(place.jobs)}. Start the processes with tools/launch.py, or mend TF_CONFIG."
        )
    return place


def own_folder(settings: StrategySettings, root: Path) -> Path:
    """Where this process writes: `root`, or a folder of its own below it where another one leads."""
    place = find_place() if settings.kind == "multi_worker" else None
    return root / ".workers" / str(place.rank) if place and place.rank else root


def leads(settings: StrategySettings) -> bool:
    """Whether this process tells how the experiment went."""
    return own_folder(settings, Path()) == Path()


def served(settings: StrategySettings, topic: str) -> bool:
    """Works for the coordinator until it has gone, where TF_CONFIG makes this process its worker or server.

    Returns False at once in all other processes, and True at the end. Raises as `make_strategy` does.
    """
    if settings.kind != "parameter_server" or place_in(settings).job == "chief":
        return False
    meet(place_in(settings), topic, settings.start_seconds)
    serve(place_in(settings), settings.start_seconds)
    return True


def _multi_worker(settings: StrategySettings, topic: str) -> tf.distribute.Strategy:
    place = place_in(settings)
    meet(place, topic, settings.start_seconds)
    return tf.distribute.MultiWorkerMirroredStrategy()


def _parameter_server(settings: StrategySettings, topic: str) -> tf.distribute.Strategy:
    place = place_in(settings)
    meet(place, topic, settings.start_seconds)
    partitioner = tf.distribute.experimental.partitioners.MinSizePartitioner(
        settings.min_shard_bytes, max_shards=len(place.jobs["ps"])
    )
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    return tf.distribute.ParameterServerStrategy(resolver, variable_partitioner=partitioner)


def _tpu(settings: StrategySettings, topic: str) -> tf.distribute.Strategy:
    """As TensorFlow's guide has it; no TPU was there to run it on."""
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver.connect(settings.tpu)
    except (ValueError, tf.errors.OpError, OSError) as error:
        raise ConfigError(
            "strategy.kind tpu needs a TPU that this machine can reach; none was found. Use default or mirrored here."
        ) from error
    return tf.distribute.TPUStrategy(resolver)


_MAKERS = {"multi_worker": _multi_worker, "parameter_server": _parameter_server, "tpu": _tpu}


def all_replicas(rows: tf.Tensor) -> tf.Tensor:
    """`[b, ...]` of this replica -> `[replicas * b, ...]` of all, its own first; gradients find their way back.

    For losses that take negatives from the batch: with it they see those of the whole batch, so that what is learned
    does not depend on how many devices share the work. Call it in a replica, with as many rows in each.
    """
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return rows
    return tf.roll(context.all_gather(rows, axis=0), -context.replica_id_in_sync_group * tf.shape(rows)[0], axis=0)


def _mirrored(settings: StrategySettings) -> tf.distribute.MirroredStrategy:
    devices = tuple(settings.devices or _gpus() or ["CPU:0"])
    if devices in _mirrored_strategy:
        return _mirrored_strategy[devices]
    if _mirrored_strategy:
        raise ConfigError(
            f"a process can mirror over one set of devices; received {', '.join(devices)} after "
            f"{', '.join(next(iter(_mirrored_strategy)))}. Start a new process for other devices."
        )
    _check_there(devices, "devices")
    # On CPUs there is no NCCL to gain from, and a sum on one device is made in a fixed order.
    cpus = any(device.startswith("CPU:") for device in devices)
    operations = tf.distribute.ReductionToOneDevice() if cpus else None
    _mirrored_strategy[devices] = tf.distribute.MirroredStrategy(list(devices), cross_device_ops=operations)
    return _mirrored_strategy[devices]


def _gpus() -> list[str]:
    return [f"GPU:{number}" for number in range(len(tf.config.list_physical_devices("GPU")))]


def _check_there(devices: Iterable[str], key: str) -> None:
    """Divides the CPU into as many devices as are named, and raises ConfigError for GPUs that are not there."""
    devices, gpus = list(devices), _gpus()
    cpus = [int(device.removeprefix("CPU:")) for device in devices if device.startswith("CPU:")]
    if cpus:
        logical_cpus(max(cpus) + 1)
    missing = [device for device in devices if device.startswith("GPU:") and device not in gpus]
    if missing:
        raise ConfigError(
            f"strategy.{key} must be on this machine; {', '.join(missing)} is not. "
            f"It has {', '.join(gpus) or 'no GPU'}."
        )


def _let_gpu_memory_grow() -> None:
    """Takes GPU memory as it is needed, so that two processes can share a card."""
    for gpu in tf.config.list_physical_devices("GPU"):
        # A GPU that is open already keeps its way of taking memory; no number depends on it.
        with contextlib.suppress(RuntimeError):
            tf.config.experimental.set_memory_growth(gpu, True)
