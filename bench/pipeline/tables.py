"""The markdown table of a run: medians, and each case as a ratio to the reference of its own group."""

from typing import Any

import report

# A group's ratios are to the first of these that it holds.
REFERENCES = ("plain bash", "ours, make deploy-dev", "Snakemake as we run it")
# Five empty steps take plain bash no time at all: ratios to that would say nothing.
TOOLS_REFERENCE = "Snakemake as we run it"


def table(found: dict[str, Any]) -> str:
    """All groups of all parts, one table each, under a line that says what they are worth."""
    machine = found["machine"]
    lines = [
        f"{found['rounds']} rounds, medians. {machine['cpu']}, {machine['cores']} cores, "
        f"load {machine['load_before']} before and {machine['load_after']} after."
    ]
    for part in ("chain", "tools", "scale"):
        for group, cases in found.get(part, {}).items():
            if isinstance(cases, dict) and cases:
                lines += ["", f"**{part}: {group}**", "", _rows(part, cases)]
    if steps := found.get("steps"):
        lines += ["", "Seconds of the steps in the last full run: "]
        for name, each in steps.items():
            lines.append(f"- {name}: " + ", ".join(f"{step} {seconds:.1f}" for step, seconds in each.items()))
    lines += [f"- skipped {name}: {reason.splitlines()[0]}" for name, reason in found["skipped"].items()]
    return "\n".join(lines)


def _rows(part: str, cases: dict[str, Any]) -> str:
    wanted = (TOOLS_REFERENCE,) if part == "tools" else REFERENCES
    title = next((name for name in wanted if name in cases), next(iter(cases)))
    reference = cases[title]
    head = ["", "wall s", "CPU s", f"wall ÷ {title}", f"CPU ÷ {title}"]
    rows = []
    for case, one in cases.items():
        ratios = (f"{one[kind] / reference[kind]:.2f}" if reference[kind] else "–" for kind in ("wall", "cpu"))
        rows.append([case, f"{one['wall']:.2f}", f"{one['cpu']:.2f}", *ratios])
    return report.table(head, rows)
