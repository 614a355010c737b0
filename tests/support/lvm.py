"""LVM2's own tools on loop devices, without device-mapper: what makes volume groups for tests, and judges."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.support.disks import attached, run

__all__ = ["Lvm", "lvm_on"]


class Lvm:
    """Runs LVM's commands so that they see `devices` and nothing else of this machine."""

    def __init__(self, devices: Sequence[str], directory: Path) -> None:
        self.devices = devices
        accept = ",".join(f'"a|^{device}$|"' for device in devices)
        self._config = (
            f'devices {{ scan=["/dev"] use_devicesfile=0 filter=[{accept},"r|.*|"] obtain_device_list_from_udev=0'
            ' external_device_info_source="none" }'
            f' global {{ activation=0 locking_dir="{directory}" use_lvmlockd=0 use_lvmpolld=0 }}'
            " activation { udev_sync=0 udev_rules=0 monitoring=0 } backup { backup=0 archive=0 }"
        )

    def __call__(self, *words: str | Path) -> str:
        return run("lvm", words[0], "--config", self._config, *words[1:])

    def create(self, group: str, name: str, *words: str) -> None:
        """Create a logical volume, on the devices that `words` end with, and leave what is on them as it is."""
        self("lvcreate", "-an", "-Zn", "-Wn", "-n", name, group, *words)

    def segments(self) -> list[dict[str, Any]]:
        """Return what `lvs --segments` reports, sizes in bytes."""
        columns = "vg_name,lv_name,lv_uuid,lv_size,segtype,seg_start,seg_size,seg_pe_ranges"
        said = self("lvs", "--segments", "--units", "b", "--nosuffix", "--reportformat", "json", "-o", columns)
        found: list[dict[str, Any]] = json.loads(said)["report"][0]["seg"]
        return found

    def physical(self) -> dict[str, dict[str, Any]]:
        """Return what `pvs` reports of each device, sizes in bytes."""
        columns = "pv_name,pv_uuid,pe_start,vg_extent_size"
        said = self("pvs", "--units", "b", "--nosuffix", "--reportformat", "json", "-o", columns)
        return {one["pv_name"]: one for one in json.loads(said)["report"][0]["pv"]}


@contextmanager
def lvm_on(paths: Sequence[Path], directory: Path) -> Iterator[Lvm]:
    """Yield LVM for loop devices over `paths`."""
    with ExitStack() as stack:
        yield Lvm([stack.enter_context(attached(path)) for path in paths], directory)
