"""The story that qcowfs is for, on a real virtual machine: a file is deleted, and read back from before its deletion.

`make demo` prints it as a transcript; tests/e2e/test_story.py holds the same story to QEMU's and the kernel's answers.
One thread. Whatever goes wrong, mounts, QEMU and files are gone afterwards; `--keep` leaves the mount to play with.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from demo.transcript import StoryFailed, Transcript
from tests.support.bootimage import BootImageError
from tests.support.mounts import Person, force_unmount, interpreter, me, nobody, remove_copies
from tests.support.vm import Machine, MachineError

DATA1_MIB = 100
DATA2_MIB = 20
SNAPSHOT = "after-the-deletion"
MONITOR = "vm.qmp"  # relative: the path of a Unix socket has room for 107 characters
DEVICE = "disk0"


class Story:
    """The story in five acts, to be called in order, in a directory of its own.

    Attributes:
        checksum: SHA-256 of data1.dat as the guest printed it.
        points: the directory on which the image is mounted.
    """

    def __init__(self, directory: Path, transcript: Transcript) -> None:
        self.checksum = ""
        self.points = directory / "points"
        self._directory = directory
        self._tell = transcript

    def make_images(self) -> None:
        """Act 1: a virtual machine writes, is snapshotted while it runs, deletes, and stops."""
        tell = self._tell
        tell.say("A virtual machine gets a disk: data.qcow2.")
        tell.host("qemu-img", "create", "-f", "qcow2", "data.qcow2", "1G")
        monitor = ("-qmp", f"unix:{MONITOR},server=on,wait=off")
        with Machine(["data.qcow2"], directory=self._directory, more=monitor) as machine:
            tell.show("$", f"{machine.shown_command} &")
            self._write_data1(machine)
            self._snapshot_outside()
            self._delete_data1(machine)
            self._look_at_running_machine()
            tell.show("guest#", "poweroff")
            machine.poweroff()
        tell.say("The machine is off. One more snapshot, this time inside the image.")
        tell.host("qemu-img", "snapshot", "-c", SNAPSHOT, "snapshot_test.img")

    def mount(self, person: Person) -> None:
        """Act 2: every point in time that the image and its backing file hold becomes a file, and a directory."""
        tell = self._tell
        tell.become(person)
        if person.uid != 0:
            tell.say(f"All that follows is done by the ordinary user {person.name}.")
        tell.say("Neither root nor a loop device is needed from here on.")
        tell.say("Which points in time does the image hold, and what is inside them?")
        tell.host("qcowfs", "list", "-v", "snapshot_test.img")
        tell.say("Mount it: NAME.raw is the disk as it was at that time, and NAME has the files inside.")
        tell.host("qcowfs", "mount", "snapshot_test.img", self.points.name)
        tell.host("ls", "-l", self.points.name)

    def restore(self) -> None:
        """Act 3: read the deleted file from the time before, with cp."""
        tell = self._tell
        tell.say(
            "data is the disk as it was when the snapshot was taken. The guest had it mounted then, so its journal was "
            "replayed in memory, as the guest's next boot would do it; data.qcow2 is as it was."
        )
        tell.host("ls", "-l", f"{self.points.name}/data")
        tell.host("cp", f"{self.points.name}/data/data1.dat", "restored.dat")
        restored = _checksum(tell.host("sha256sum", "restored.dat"))
        if restored != self.checksum:
            raise StoryFailed(f"the guest wrote {self.checksum} and {restored} came back")
        tell.say("The same checksum as in the guest, before it deleted the file.")

    def compare(self) -> None:
        """Act 4: what other tools say of the points."""
        tell = self._tell
        tell.say("Any tool that knows files can compare points, and any tool that reads raw disks; QEMU agrees.")
        tell.host("diff", "-rq", f"{self.points.name}/data", f"{self.points.name}/current", status=1)
        tell.host("cmp", f"{self.points.name}/current.raw", f"{self.points.name}/{SNAPSHOT}.raw")
        tell.host("qemu-img", "compare", "-f", "raw", "-F", "qcow2", f"{self.points.name}/data.raw", "data.qcow2")

    def unmount(self) -> None:
        """Act 5: nothing is left mounted, and files can be looked at all the same."""
        tell = self._tell
        tell.host("qcowfs", "umount", self.points.name)
        tell.say("Without a mount:")
        tell.host("qcowfs", "ls", "-l", "snapshot_test.img", "data")
        tell.shell("qcowfs cat snapshot_test.img data:data1.dat | cmp - restored.dat")

    def clean_up(self) -> None:
        """Unmount what a story that broke off has left mounted."""
        force_unmount(self.points)

    def _write_data1(self, machine: Machine) -> None:
        tell = self._tell
        tell.say(f"The guest formats its disk and writes {DATA1_MIB} MiB.")
        tell.guest(machine, "mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt")
        tell.guest(machine, f"dd if=/dev/urandom of=/mnt/data1.dat bs=1M count={DATA1_MIB}")
        self.checksum = _checksum(tell.guest(machine, "sha256sum /mnt/data1.dat && sync"))

    def _snapshot_outside(self) -> None:
        tell = self._tell
        tell.say("The machine runs on. Its monitor tells which disks it has.")
        tell.host("qcowfs", "mount", "--qmp", MONITOR)
        tell.say("QEMU is told to put what comes from now on into a new image, snapshot_test.img.")
        tell.host("qcowfs", "snapshot", "--qmp", MONITOR, DEVICE, "snapshot_test.img")

    def _delete_data1(self, machine: Machine) -> None:
        tell = self._tell
        tell.say("Then the guest deletes the file, and writes another.")
        tell.guest(machine, f"rm /mnt/data1.dat && dd if=/dev/urandom of=/mnt/data2.dat bs=1M count={DATA2_MIB}")
        tell.guest(machine, "sync && ls -l /mnt")

    def _look_at_running_machine(self) -> None:
        tell = self._tell
        tell.say("Nobody has to wait for the machine to end: the disk of before is there already, and the file in it.")
        tell.host("mkdir", self.points.name)
        tell.host("qcowfs", "mount", "--qmp", f"{MONITOR}:{DEVICE}", self.points.name)
        tell.host("ls", "-l", self.points.name, f"{self.points.name}/data")
        tell.host("qcowfs", "umount", self.points.name)


def _checksum(output: str) -> str:
    return output.split()[0]


def _who_mounts(keep: bool) -> Person:
    """Return an ordinary user if there is one. What is kept is for whoever runs this: only who mounted gets in."""
    person = me() if keep or os.geteuid() != 0 else nobody()
    return person if interpreter(person) else me()


def _tell_all(story: Story, keep: bool) -> None:
    story.make_images()
    story.mount(_who_mounts(keep))
    story.restore()
    story.compare()
    if not keep:
        story.unmount()


def _stop(number: int, frame: object) -> None:
    sys.exit(128 + number)


def main() -> int:
    """Tell the story; return 0 only if everything was as it says."""
    parser = argparse.ArgumentParser(prog="make demo", description="qcowfs on a real virtual machine")
    parser.add_argument("--keep", action="store_true", help="leave the mount, to play with")
    keep = parser.parse_args().keep
    signal.signal(signal.SIGTERM, _stop)
    with ExitStack() as cleaning:
        directory = Path(tempfile.mkdtemp(prefix="qcowfs-demo-"))
        cleaning.callback(shutil.rmtree, directory)
        cleaning.callback(remove_copies)
        transcript = Transcript(directory)
        story = Story(directory, transcript)
        cleaning.callback(story.clean_up)
        transcript.show("$", f"cd {directory}")
        try:
            _tell_all(story, keep)
        except (StoryFailed, MachineError, BootImageError, subprocess.SubprocessError) as error:
            print(f"\ndemo: FAILED: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
        if keep:
            cleaning.pop_all()
            _say_how_to_end(directory)
    return 0


def _say_how_to_end(directory: Path) -> None:
    print(f"\n# Still mounted: {directory}/points.")
    print(f"# To end it: .venv/bin/qcowfs umount {directory}/points && rm -r {directory}")


if __name__ == "__main__":
    sys.exit(main())
