"""The data stages, which DVC runs one by one: extract, validate, prepare.

    python data.py extract  --params params.yaml --output RAW
    python data.py validate --params params.yaml --input RAW --output VALIDATED
    python data.py prepare  --params params.yaml --input RAW VALIDATED --output PREPARED

An error is three lines on stderr (found, expected, next) and exit code 1. Nothing here knows torch or MLflow.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

FILE = "points.csv"
CLASSES = (0, 1)
LEAST_RECORDS = 40
NEXT = f"mend the source of the data, then: make deploy-dev COMPONENT={Path(__file__).resolve().parent.name}"


class BadDataError(Exception):
    """What was found, what was expected, and what to type next."""

    def __init__(self, found: str, expected: str, next_command: str = NEXT) -> None:
        super().__init__(f"{found}\n  expected: {expected}\n  next:     {next_command}")


# --- extract ---------------------------------------------------------------------------------------------------------


def extract(params: dict[str, Any], output: Path) -> None:
    """Bring the raw data. REPLACE THIS: here they are made up, the same bytes for the same parameters."""
    import pandas as pd

    draw = np.random.default_rng(params["seed"])
    labels = np.arange(params["samples"]) % 2
    angles = draw.uniform(0, np.pi, len(labels))
    upper = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    points = np.where(labels[:, None] == 0, upper, [1.0, 0.5] - upper) + draw.normal(0, params["noise"], upper.shape)
    table = pd.DataFrame({"id": np.arange(len(labels)), "x": points[:, 0], "y": points[:, 1], "label": labels})
    output.mkdir(parents=True, exist_ok=True)
    table.to_csv(output / FILE, index=False, float_format="%.6f")


# --- validate --------------------------------------------------------------------------------------------------------


def validate(raw: Path, output: Path) -> None:
    """Refuse data that breaks a rule, naming file, record, column and rule; write `validation.json` if none does."""
    table = read(raw / FILE)
    breaches = broken_rules(table)
    if breaches:
        raise BadDataError(f"{raw / FILE}: " + "; ".join(breaches[:5]), f"every rule kept; {len(breaches)} broken")
    output.mkdir(parents=True, exist_ok=True)
    report = {"verdict": "accepted", "records": len(table), "sha256": digest(raw / FILE)}
    (output / "validation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"validate: {len(table)} records keep every rule")


def read(path: Path) -> Any:
    """The raw table; a file that is missing, empty or cut off is refused."""
    import pandas as pd

    try:
        return pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise BadDataError(f"{path}: {error}", f"rule whole_file: a CSV file of {', '.join(columns())}") from error


def columns() -> dict[str, Any]:
    """The rules for each column."""
    import pandera.pandas as pa

    number = pa.Check.in_range(-10, 10, error="in_range: from -10 to 10")
    return {
        "id": pa.Column(int, unique=True),
        "x": pa.Column(float, number),
        "y": pa.Column(float, number),
        "label": pa.Column(int, pa.Check.isin(CLASSES, error=f"known_class: one of {CLASSES}")),
    }


def broken_rules(table: Any) -> list[str]:
    """Every breach in words: the record and the column that it stands in, what is there, and the rule."""
    import pandera.pandas as pa

    try:
        pa.DataFrameSchema(columns(), strict=True).validate(table, lazy=True)
    except pa.errors.SchemaErrors as error:
        cases = error.failure_cases[["index", "column", "failure_case", "check"]].itertuples(index=False)
        return [f"record {index}, column {column}: {found!r} (rule {rule})" for index, column, found, rule in cases]
    found = set(table["label"])
    breaches = [
        f"column label: no record of class {label} (rule no_empty_class)" for label in CLASSES if label not in found
    ]
    if len(table) < LEAST_RECORDS:
        breaches.append(f"{len(table)} records (rule enough_records: at least {LEAST_RECORDS})")
    return breaches


def digest(path: Path) -> str:
    """sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- prepare ---------------------------------------------------------------------------------------------------------


def prepare(params: dict[str, Any], raw: Path, validated: Path, output: Path) -> None:
    """Write train.npz, val.npz and test.npz: `instances` float32 (N, 2), `labels` int64 (N,).

    The same input and parameters give the same bytes. test.npz is the frozen test set that the gate judges by.
    """
    report = json.loads((validated / "validation.json").read_text(encoding="utf-8"))
    if report["sha256"] != digest(raw / FILE):
        raise BadDataError(f"{raw / FILE} changed since it was validated", "the validated file")
    table = read(raw / FILE)
    order = np.random.default_rng(params["seed"]).permutation(len(table))
    tests, held = (round(params[name] * len(table)) for name in ("test", "validation"))
    parts = {"test": order[:tests], "val": order[tests : tests + held], "train": order[tests + held :]}
    output.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        part = table.iloc[rows]
        instances, labels = part[["x", "y"]].to_numpy("float32"), part["label"].to_numpy("int64")
        np.savez(output / f"{name}.npz", instances=instances, labels=labels)
        print(f"prepare: {name}.npz has {len(rows)} points")


# --- command line ----------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Run one stage; 0, or 1 with the reason on stderr."""
    import yaml

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("extract", "validate", "prepare"))
    parser.add_argument("--params", type=Path, required=True)
    parser.add_argument("--input", type=Path, nargs="*", default=[])
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    needed = {"extract": 0, "validate": 1, "prepare": 2}[given.stage]
    if len(given.input) != needed:
        parser.error(f"{given.stage} takes {needed} folders as --input")
    params = yaml.safe_load(given.params.read_text(encoding="utf-8"))
    try:
        if given.stage == "extract":
            extract(params, given.output)
        elif given.stage == "validate":
            validate(given.input[0], given.output)
        else:
            prepare(params, given.input[0], given.input[1], given.output)
    except BadDataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
