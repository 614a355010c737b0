"""The works that are measured: which image, what is done with it, who is compared, and what is to be reached."""

from __future__ import annotations

from dataclasses import dataclass

from bench.figures import BEST_PEER, Goal
from bench.rivals import EMPTY, LIMIT, OURS, OWN_PLAIN, PEERS, PLAIN_PATH, QEMU, RAW

RANDOM, SEQUENTIAL, GREP, COPY, FIRST_BYTE = "random", "sequential", "grep", "copy", "first-byte"
FIND, COPY_ALL, FIRST_LIST = "find", "copy-all", "first-list"
INSIDE = (FIND, COPY_ALL, FIRST_LIST)  # works with the files inside an image: bench/trees.py
DIFF = "diff"  # comparing two points byte by byte: bench/blocks.py
REMOTE_RANDOM, REMOTE_SEQUENTIAL = "remote-random", "remote-sequential"  # an image on a server: bench/remotes.py
REMOTES = (REMOTE_RANDOM, REMOTE_SEQUENTIAL)
OBJECT_REQUESTS, OBJECT_BYTES = "object-requests", "object-bytes"  # what one in an object store costs: bench/objects.py
OBJECTS = (OBJECT_REQUESTS, OBJECT_BYTES)
EXPORT = "export"  # writing a point to a file: bench/exports.py
CONVERT = "qemu-img convert"
WITH_STARTS = (FIRST_BYTE, EXPORT)  # works that an image's name alone does not choose
COMPARE, CMP = "qemu-img compare", "cmp -l over the mount"
LOOP, FUSE2FS, GUESTMOUNT = "loop mount of NAME.raw", "fuse2fs", "guestmount"
TITLES = {
    "plain": "plain image",
    "plain2": "plain image with 2 GiB of data",
    "half": "half-sparse image",
    "zlib": "zlib",
    "zstd": "zstd",
    "extended": "extended L2",
    "chain10": "chain of 10",
    "chain40": "chain of 40",
    "snapshots": "an internal snapshot of 50",
    "4tib": "4 TiB virtual",
    "12tib": "12 TiB virtual, 20,480 L2 tables",
    "thousand": "1,000 snapshots",
    "ext4": "ext4",
    "churn": "two snapshots of 4 GiB, 2 % written between them",
    "churn8": "two snapshots of 8 GiB, 2 % written between them",
    "10gib": "ext4 of 10 GiB with 100 MB of small files",
    "1tib": "1 TiB virtual, 1 GiB of data, and its copy",
}
UNITS = {
    **{RANDOM: "reads/s", SEQUENTIAL: "MiB/s", GREP: "s", COPY: "s", FIRST_BYTE: "ms", EXPORT: "s"},
    **{FIND: "s", COPY_ALL: "s", FIRST_LIST: "ms", DIFF: "s"},
    **{REMOTE_RANDOM: "reads/s", REMOTE_SEQUENTIAL: "MiB/s", OBJECT_REQUESTS: "requests", OBJECT_BYTES: "bytes"},
}
EXPORT_MEMORY = 256 << 20  # bytes of an export at its peak
MEMORY_GOAL = 96 << 20  # bytes of the daemon at its peak, over all works


@dataclass(frozen=True)
class Form:
    """What an export is to be.

    Attributes:
        title: for the heading.
        format: "raw" or "qcow2".
        ours, theirs: further options of qcowfs export and qemu-img convert.
        since: an overlay of the older point.
        shared: on a file system that lets files share blocks.
        remark: for below the table.
    """

    title: str
    format: str = "qcow2"
    ours: tuple[str, ...] = ()
    theirs: tuple[str, ...] = ()
    since: bool = False
    shared: bool = False
    remark: str = ""


FORMS = {
    "raw": Form("raw", format="raw"),
    "qcow2": Form("qcow2"),
    "raw-shared": Form("raw, on XFS", format="raw", shared=True),
    "qcow2-shared": Form("qcow2, on XFS", shared=True),
    "zlib": Form("qcow2 -c, zlib", ours=("-c",), theirs=("-c",)),
    "zstd": Form("qcow2 -c, zstd", ours=("--compression", "zstd"), theirs=("-c", "-o", "compression_type=zstd")),
    "since": Form("overlay of the older", since=True, remark="qemu-img convert -B copies all data of the snapshot"),
}


@dataclass(frozen=True)
class Work:
    """One table of figures.

    Attributes:
        kind: RANDOM, SEQUENTIAL, GREP, COPY, FIRST_BYTE, DIFF, EXPORT, or one of INSIDE, REMOTES or OBJECTS.
        image: a recipe's name in bench/images.py.
        goals: what the project promises; empty where a work only shows something.
        references: rivals beside qcowfs and its peers.
        jobs: readers at once.
        most: what the median of qcowfs must not exceed, in the work's unit; 0: nothing is promised.
        form: of an export, a key of FORMS.
        server: of an image that is not on this machine, a key of remotes.SERVERS.
        cold: drop what the kernel keeps of the rival's file before each turn; of an image on a server, measure the
            first reads after the mount rather than the same ones again.
    """

    kind: str
    image: str
    goals: tuple[Goal, ...] = ()
    references: tuple[str, ...] = ()
    jobs: int = 1
    most: float = 0
    form: str = ""
    server: str = ""
    cold: bool = True

    @property
    def title(self) -> str:
        """Return the heading of its table."""
        image = TITLES[self.image]
        jobs = f"{self.jobs} job{'s' if self.jobs > 1 else ''}"
        time = f"{'first' if self.cold else 'second'} time"
        return {
            RANDOM: f"4 KiB random, {jobs}: {image}",
            SEQUENTIAL: f"sequential 1 MiB: {image}",
            GREP: f"loop mount and grep -r of an ext4, {time}",
            COPY: f"cp --sparse=auto: {image}",
            FIRST_BYTE: f"mount to first byte: {image}",
            FIND: f"find -ls of all files inside: {image}",
            COPY_ALL: f"cp -a of all files inside: {image}",
            FIRST_LIST: f"mount to first listing of the files inside: {image}",
            DIFF: f"where two points differ: {image}",
            REMOTE_RANDOM: f"4 KiB random over {self.server}, {time}, {jobs}: {image}",
            REMOTE_SEQUENTIAL: f"sequential 1 MiB over {self.server}, {time}: {image}",
            OBJECT_REQUESTS: f"requests to an object store: {image}",
            OBJECT_BYTES: f"bytes of an object store: {image}",
            EXPORT: f"export as {FORMS[self.form].title}: {image}" if self.form else "",
        }[self.kind]

    @property
    def rivals(self) -> tuple[str, ...]:
        """Return the names of those that are compared."""
        alone = self.kind in (DIFF, EXPORT, *INSIDE, *REMOTES, *OBJECTS)
        return self.references if alone else (OURS, PLAIN_PATH, *PEERS, *self.references)

    def is_asked_for(self, words: list[str]) -> bool:
        """Return whether it fits one of the words: KIND, IMAGE, KIND-IMAGE, "inside"; IMAGE means its reads alone."""
        named = {self.kind, f"{self.kind}-{self.image}"} | ({self.image} if self.kind not in WITH_STARTS else set())
        named |= {"inside"} if self.kind in INSIDE else {"remote", self.server} if self.kind in REMOTES else set()
        named |= {"object"} if self.kind in OBJECTS else set()
        return not words or bool(named & set(words))


def random_reads(image: str, one: tuple[Goal, ...], four: tuple[Goal, ...], reference: str = "") -> list[Work]:
    """Return the two works with one and with four jobs."""
    references = (reference,) if reference else ()
    return [Work(RANDOM, image, goals, references, jobs) for jobs, goals in ((1, one), (4, four))]


def like_plain(image: str, *more: Goal) -> list[Work]:
    """Return the works of an image whose warm reads must cost what they cost on the plain image."""
    goals = (Goal(OWN_PLAIN, 0.8), *more)
    return random_reads(image, goals, goals, OWN_PLAIN)


def peers(times: float) -> tuple[Goal, ...]:
    """Return a goal against the best peer."""
    return (Goal(BEST_PEER, times),)


def export(image: str, form: str, times: float) -> Work:
    """Return the work of an export that is to be `times` as fast as qemu-img convert; 0: nothing is promised."""
    goals = (Goal(CONVERT, times),) if times else ()
    return Work(EXPORT, image, goals, (OURS, CONVERT), form=form)


def remote(server: str) -> list[Work]:
    """Return the works of an image on a server: as fast as QEMU's own driver the first time, and faster the second."""
    asked = ((REMOTE_RANDOM, 1), (REMOTE_RANDOM, 4), (REMOTE_SEQUENTIAL, 1))
    return [
        Work(kind, "plain", peers(1.0 if cold else 3.0), (OURS, QEMU), jobs, server=server, cold=cold)
        for cold in (True, False)
        for kind, jobs in asked
    ]


NEAR_LIMIT = (Goal(LIMIT, 0.9),)
GREP_GOALS = (Goal(BEST_PEER, 1.0), Goal(RAW, 1 / 1.3))
SOON = (Goal(EMPTY, 1 / 1.2),)
WORKS = [
    *random_reads("plain", NEAR_LIMIT, NEAR_LIMIT, LIMIT),
    *like_plain("chain10"),
    *like_plain("chain40", Goal(BEST_PEER, 3.0)),
    *like_plain("snapshots"),
    *like_plain("extended"),
    *like_plain("4tib"),
    *like_plain("12tib"),
    *random_reads("zlib", peers(2.0), peers(2.5)),
    *random_reads("zstd", peers(2.0), peers(2.0)),
    Work(SEQUENTIAL, "plain", NEAR_LIMIT, (LIMIT,)),
    Work(SEQUENTIAL, "zlib", peers(3.0)),
    Work(SEQUENTIAL, "zstd", peers(2.0)),
    Work(GREP, "ext4", GREP_GOALS, (RAW,)),
    Work(GREP, "ext4", GREP_GOALS, (RAW,), cold=False),
    Work(COPY, "half", peers(1.6), (RAW,)),
    *(Work(FIRST_BYTE, image, SOON, (EMPTY,)) for image in ("plain", "thousand", "12tib")),
    *(Work(DIFF, image, (Goal(COMPARE, 20.0), Goal(CMP, 20.0)), (OURS, COMPARE, CMP)) for image in ("churn", "churn8")),
    Work(DIFF, "1tib", references=(OURS, COMPARE), most=2.0),
    *(work for server in ("iSCSI", "NBD", "HTTP") for work in remote(server)),
    *(Work(kind, "10gib") for kind in OBJECTS),
    export("plain2", "raw", 1.5),
    export("plain2", "qcow2", 1.5),
    export("plain", "raw-shared", 1.5),
    export("plain", "qcow2-shared", 1.5),
    export("zlib", "raw", 2.0),
    export("zstd", "raw", 2.0),
    export("zlib", "zlib", 0),
    export("zlib", "zstd", 0),
    export("churn", "since", 1.5),
    *(Work(kind, "ext4", references=(OURS, LOOP, FUSE2FS, GUESTMOUNT)) for kind in INSIDE),
]
