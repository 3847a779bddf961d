"""What a device brings to a run: its name, data of its own, and what stands for its speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedspine.config import RunConfig
from fedspine.errors import ConfigError, FederationError

MEASURE = "measure"
"""In place of a device profile: the clock of the machine itself."""


@dataclass(frozen=True)
class Node:
    """The node configuration of a SuperNode (`fedspine join`)."""

    identity: int | str
    """`partition-id`, the number of the device; or its `name`: the server numbers the names in their order."""
    data: str = ""
    """Its own rows, a file or folder on this machine; empty: its part of the run's data."""
    device: str = ""
    """A device profile for the virtual clock, or `measure`; empty: what the run says."""

    @classmethod
    def of(cls, config: Mapping[str, object]) -> Node:
        """Errors: `FederationError` without a number and a name."""
        identity = config.get("partition-id", config.get("name"))
        if not isinstance(identity, int | str) or isinstance(identity, bool) or identity == "":
            raise FederationError(
                f"a device has partition-id = {identity!r}: start its SuperNode with "
                '--node-config "partition-id=N num-partitions=M", N a whole number from 0, or with `fedspine join`'
            )
        return cls(identity, str(config.get("data", "")), str(config.get("device", "")))

    def settings(self, settings: str) -> str:
        """The run's configuration (JSON) as it holds for this device.

        Errors: `ConfigError` when the run and the device do not agree on the clock.
        """
        if not self.data and not self.device:
            return settings
        config = RunConfig.from_json(settings)
        if self.device and (self.device == MEASURE) != (config.cost == "measured"):
            remedy = "measure" if config.cost == "measured" else "PROFILE"
            raise ConfigError(
                f"device {self.identity!r} joined with --device {self.device}, and the run has cost = '{config.cost}': "
                f"all devices of a run need one kind of clock; join with --device {remedy} or without it"
            )
        if self.device not in ("", MEASURE):
            config = replace(config, population=self.device)
        if self.data:
            config = replace(config, data=self.data, partition="all", public_examples=0, distill_steps=0)
        return config.to_json()
