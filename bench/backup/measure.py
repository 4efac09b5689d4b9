"""How much of the registry is lost with its file, and how soon it is back.

    .venv/bin/python bench/backup/run

A database of the tests (tests/registry_rig.py) takes a row every few milliseconds while Litestream replicates it, to a
folder first and then to a bucket (gcp-storage-emulator, on this machine). Its files are deleted in the middle of it,
the backup is fetched, checked and put in place, and again. The recovery point is the age of the oldest acknowledged row
that did not come back. With --megabytes the registry has that size to begin with; the emulator
takes no upload of more than 16 MiB.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import report
from bucket_rig import BUCKET, bucket
from checkout import free_base
from registry_rig import Loss, Lost

BAR_POINT_S, BAR_RESTORE_S = 5.0, 60.0


def main() -> None:
    """Measure, and write the result."""
    given = arguments()
    report.await_quiet(given.quiet, given.patience)
    content: dict[str, Any] = {"machine": report.machine(), "megabytes": given.megabytes}
    with tempfile.TemporaryDirectory(prefix="backup-") as name:
        folder = Path(name)
        content["folder"] = figures(losses(folder / "f", str(folder / "backup"), given))
        with bucket(folder / "bucket", free_base()) as url:
            os.environ["STORAGE_EMULATOR_HOST"] = url
            content["bucket"] = figures(losses(folder / "b", f"gs://{BUCKET}/backup", given))
    content["machine"]["load_after"] = round(report.load(), 2)
    report.save(report.results("backup"), content, text_of(content))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", type=int, default=20, help="how often each database is lost (default: 20)")
    parser.add_argument("--seconds", type=float, default=4, help="of writes before each loss (default: 4)")
    parser.add_argument("--megabytes", type=int, default=8, help="size of the registry to begin with (default: 8)")
    parser.add_argument("--quiet", type=float, default=0.6, help="load to wait for before measuring (default: 0.6)")
    parser.add_argument("--patience", type=float, default=0, help="seconds to wait for it at most (default: 0)")
    return parser.parse_args()


def losses(folder: Path, place: str, given: argparse.Namespace) -> list[Loss]:
    """One database, lost so often."""
    folder.mkdir()
    lost = Lost(folder, place, given.megabytes)
    found = []
    for number in range(1, given.losses + 1):
        found.append(lost.lose(given.seconds))
        one = found[-1]
        report.say(f"{place} {number}: lost {one.recovery_point:.2f} s, back in {one.restore:.2f} s, {one.integrity}")
    return found


def figures(found: list[Loss]) -> dict[str, Any]:
    """Medians and worst."""
    points, restores = [one.recovery_point for one in found], [one.restore for one in found]
    return {
        "losses": len(found),
        "rows_acknowledged": sum(one.acknowledged for one in found),
        "whole": all(one.integrity == "ok" for one in found),
        "recovery_point_s": [round(statistics.median(points), 2), round(max(points), 2)],
        "restore_s": [round(statistics.median(restores), 2), round(max(restores), 2)],
    }


def text_of(content: dict[str, Any]) -> str:
    """For people."""
    rows = []
    for what, key, bar in (
        ("recovery point", "recovery_point_s", BAR_POINT_S),
        ("fetched, checked and in place", "restore_s", BAR_RESTORE_S),
    ):
        there = [content[place][key] for place in ("folder", "bucket")]
        cells = [f"{median:.2f} s ({worst:.2f} s)" for median, worst in there]
        rows.append([what, *cells, f"{bar:.0f} s", report.verdict(all(worst <= bar for _, worst in there))])
    whole = [str(content[place]["whole"]).lower() for place in ("folder", "bucket")]
    rows.append(["SQLite finds every one whole", *whole, "true", report.verdict(whole == ["true", "true"])])
    head = ["median (worst)", "to a folder", "to a bucket", "bar", ""]
    count, size = content["folder"]["losses"], content["megabytes"]
    return f"{count} losses each, of {size} MB at first\n\n{report.table(head, rows)}"
