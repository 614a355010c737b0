"""The benchmark's pure parts: ratios, verdicts, offsets, which works are chosen. Evidence: own fixtures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench import figures, reader, report, scattered, trees
from bench.figures import Figures
from bench.works import EXPORT, FORMS, INSIDE, WORKS
from tests.support import need
from tests.support.qemu import qemu

MIB = 1 << 20


def test_a_ratio_is_the_median_of_pairs_and_not_the_ratio_of_medians() -> None:
    ours, theirs = [10.0, 100.0, 30.0], [5.0, 50.0, 10.0]

    assert figures.times_as_fast(ours, theirs, more_is_better=True) == 2.0


def test_less_time_is_faster() -> None:
    assert figures.times_as_fast([1.0], [4.0], more_is_better=False) == 4.0


@pytest.mark.parametrize(("more_is_better", "best"), [(True, "quick"), (False, "slow")])
def test_the_best_peer_is_the_fastest_by_its_median(more_is_better: bool, best: str) -> None:
    found = Figures(more_is_better, samples={"quick": [1.0, 9.0, 9.0], "slow": [8.0, 8.0, 20.0]})

    assert found.best(("quick", "slow", "absent")) == best


def test_a_rival_that_is_left_out_is_no_best_peer() -> None:
    found = Figures(True, samples={"wrong": [9.0]}, memory={"wrong": 1})
    found.leave_out("wrong", "it lies")

    assert found.best(("wrong",)) is None
    assert found.memory == {}
    assert found.notes == ["wrong: it lies"]


def test_a_goal_just_missed_is_not_reached() -> None:
    assert figures.verdict(0.9, 0.9) == "reached"
    assert figures.verdict(0.8999, 0.9).startswith("not reached")


def test_random_offsets_lie_in_the_data_and_reach_its_first_and_last_page() -> None:
    runs = [(4096, 8192), (MIB, 4096)]

    assert set(reader.random_offsets(runs, 100)) == {4096, 8192, MIB}


def test_sequential_offsets_are_whole_blocks_of_data() -> None:
    runs = [(0, 2 * MIB - 1), (8 * MIB, 2 * MIB)]

    assert reader.sequential_offsets(runs) == [0, 8 * MIB, 9 * MIB]


def test_data_runs_end_with_the_last_data(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        os.pwrite(file.fileno(), b"x" * 65536, MIB)
        file.truncate(4 * MIB)

    assert reader.data_runs(path) == [(MIB, 65536)]


@pytest.mark.parametrize(
    ("word", "titles"),
    [
        ("zlib", ["4 KiB random, 1 job: zlib", "4 KiB random, 4 jobs: zlib", "sequential 1 MiB: zlib"]),
        ("first-byte-12tib", ["mount to first byte: 12 TiB virtual, 20,480 L2 tables"]),
        ("copy", ["cp --sparse=auto: half-sparse image"]),
        ("copy-all", ["cp -a of all files inside: ext4"]),
        ("export-zstd", ["export as raw: zstd"]),
        ("zli", []),
    ],
)
def test_works_are_chosen_by_kind_image_or_both(word: str, titles: list[str]) -> None:
    assert titles == [work.title for work in WORKS if work.is_asked_for([word])]


def test_all_works_with_the_files_inside_are_chosen_by_one_word() -> None:
    chosen = [work for work in WORKS if work.is_asked_for(["inside"])]

    assert list(INSIDE) == [work.kind for work in chosen]
    assert {name for work in chosen for name in work.rivals} == trees.RIVALS.keys()


def test_every_form_of_an_export_is_measured() -> None:
    assert {work.form for work in WORKS if work.kind == EXPORT} == FORMS.keys()


def test_a_work_in_which_qcowfs_was_left_out_still_has_its_table() -> None:
    work = next(work for work in WORKS if work.kind in INSIDE)
    found = Figures(False, samples={"fuse2fs": [2.0]})
    found.leave_out("qcowfs", "not yet")

    assert "| fuse2fs | 2.00 | 2.00 | 2.00 |  |  |" in report.table(work, found)
    assert "Left out: qcowfs: not yet." in report.table(work, found)
    assert work.title not in report.summary({work: found})


@pytest.mark.parametrize(("seconds", "outcome"), [(2.0, "reached"), (3.0, "not reached: 1.50 times it")])
def test_a_work_may_promise_a_time(seconds: float, outcome: str) -> None:
    work = next(work for work in WORKS if work.most == 2.0)
    found = Figures(False, samples={"qcowfs": [seconds]})

    assert f"Goal: at most 2.00 s: {outcome}." in report.table(work, found)
    assert f"| {seconds:.2f} s | at most 2.00 s: {outcome} |" in report.summary({work: found})


def test_a_scattered_image_is_what_qemu_reads(tmp_path: Path) -> None:
    need("qemu-img")
    base, top, raw = tmp_path / "base.qcow2", tmp_path / "top.qcow2", tmp_path / "raw"
    size = 3 * scattered.COVERED - 512
    scattered.write(base, size, [0, scattered.COVERED - scattered.CLUSTER])
    scattered.write(top, size, [2 * scattered.COVERED, scattered.CLUSTER], filled=4096, backing=base.name)
    qemu("qemu-img", "check", "-q", base)
    qemu("qemu-img", "check", "-q", top)
    qemu("qemu-img", "convert", "-O", "raw", top, raw)

    starts = [start for start, _ in reader.data_runs(raw)]
    last = scattered.COVERED - scattered.CLUSTER
    assert starts == [0, last, 2 * scattered.COVERED]
    assert size == raw.stat().st_size
