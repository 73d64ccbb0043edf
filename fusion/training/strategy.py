"""Where training runs: one device, or one model mirrored over several devices of this machine.

A strategy is made from its settings before the model, and the model is built in its `scope()`.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any, Literal

import pydantic
from pydantic import Field

from fusion.compat import tf
from fusion.config import Settings
from fusion.errors import ConfigError
from fusion.types import RunOptions

Kind = Literal["default", "mirrored", "multi_worker", "parameter_server", "tpu"]


class StrategySettings(Settings):
    """Which devices share the work."""

    kind: Kind = "default"
    """default: one device; mirrored: a copy on each device, gradients summed."""
    devices: list[str] = Field(default_factory=list)
    """Devices for mirrored, such as [GPU:0, GPU:1] or [CPU:0, CPU:1]; empty means all GPUs, or the CPU."""

    @pydantic.field_validator("devices")
    @classmethod
    def _known_form(cls, devices: list[str]) -> list[str]:
        for device in devices:
            if not re.fullmatch(r"(CPU|GPU):\d+", device):
                raise ValueError(f"a device must be named like CPU:0 or GPU:1; received '{device}'")
        if len(set(devices)) != len(devices):
            raise ValueError(f"each device must stand once; received {devices}")
        return devices

    @pydantic.model_validator(mode="after")
    def _devices_only_mirrored(self) -> StrategySettings:
        if self.devices and self.kind != "mirrored":
            raise ValueError(f"the key devices must go with kind mirrored; received kind {self.kind}")
        return self


def replicas(settings: StrategySettings) -> int:
    """Copies of the model that share a batch. Looks at the hardware without starting it."""
    if settings.kind != "mirrored":
        return 1
    return len(settings.devices) or max(1, len(tf.config.list_physical_devices("GPU")))


def check_batch(batch_size: int, settings: StrategySettings) -> None:
    """Raises ConfigError when the batch cannot be shared evenly; needs neither data nor devices."""
    check_divisible(batch_size, replicas(settings))


def check_divisible(batch_size: int, count: int) -> None:
    """Raises ConfigError when `batch_size` is not a multiple of `count` replicas."""
    if batch_size % count:
        below, above = batch_size // count * count, (batch_size // count + 1) * count
        raise ConfigError(
            f"batch_size must be a multiple of the {count} devices of the strategy; received {batch_size}. "
            f"Take {f'{below} or ' if below else ''}{above}."
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


def make_strategy(settings: StrategySettings) -> tf.distribute.Strategy:
    """The strategy that the settings ask for.

    Raises ConfigError when this machine does not have the devices, or the kind is not built yet.
    """
    _let_gpu_memory_grow()
    if settings.kind == "mirrored":
        return _mirrored(settings)
    if settings.kind == "tpu":
        _find_tpu()
    if settings.kind in _NOT_BUILT:
        raise ConfigError(
            f"strategy.kind must be default or mirrored for now; received {settings.kind}, which would need "
            f"{_NOT_BUILT[settings.kind]}. On one machine use mirrored."
        )
    return tf.distribute.get_strategy()


_NOT_BUILT: dict[Kind, str] = {
    "multi_worker": "one process per machine, each with its place in TF_CONFIG and its own share of the data",
    "parameter_server": "a chief, parameter-server and worker processes named in TF_CONFIG",
    "tpu": "programs compiled for fixed shapes on the TPU that was found",
}

# Several MirroredStrategy objects in one process abort each other's collective operations, so there is one.
_mirrored_strategy: dict[tuple[str, ...], tf.distribute.MirroredStrategy] = {}


def scope(options: RunOptions) -> Any:
    """The scope in which the models of a run are built, so that its strategy owns their variables."""
    return (options.strategy or tf.distribute.get_strategy()).scope()


def _mirrored(settings: StrategySettings) -> tf.distribute.MirroredStrategy:
    gpus = [f"GPU:{number}" for number in range(len(tf.config.list_physical_devices("GPU")))]
    devices = tuple(settings.devices or gpus or ["CPU:0"])
    if devices in _mirrored_strategy:
        return _mirrored_strategy[devices]
    if _mirrored_strategy:
        raise ConfigError(
            f"a process can mirror over one set of devices; received {', '.join(devices)} after "
            f"{', '.join(next(iter(_mirrored_strategy)))}. Start a new process for other devices."
        )
    cpus = [int(device.removeprefix("CPU:")) for device in devices if device.startswith("CPU:")]
    if cpus:
        logical_cpus(max(cpus) + 1)
    missing = [device for device in devices if device.startswith("GPU:") and device not in gpus]
    if missing:
        raise ConfigError(
            f"strategy.devices must be on this machine; {', '.join(missing)} is not. "
            f"It has {', '.join(gpus) or 'no GPU'}."
        )
    # On CPUs there is no NCCL to gain from, and a sum on one device is made in a fixed order.
    operations = tf.distribute.ReductionToOneDevice() if cpus else None
    _mirrored_strategy[devices] = tf.distribute.MirroredStrategy(list(devices), cross_device_ops=operations)
    return _mirrored_strategy[devices]


def _let_gpu_memory_grow() -> None:
    """Takes GPU memory as it is needed, so that two processes can share a card."""
    for gpu in tf.config.list_physical_devices("GPU"):
        # A GPU that is open already keeps its way of taking memory; no number depends on it.
        with contextlib.suppress(RuntimeError):
            tf.config.experimental.set_memory_growth(gpu, True)


def _find_tpu() -> None:
    try:
        tf.distribute.cluster_resolver.TPUClusterResolver.connect()
    except (ValueError, tf.errors.OpError, OSError) as error:
        raise ConfigError(
            "strategy.kind tpu needs a TPU that this machine can reach; none was found. Use default or mirrored here."
        ) from error
