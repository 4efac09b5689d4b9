"""What rules, verbs, DVC's stages and the two owners of files must agree on."""

import re
from pathlib import Path

import pytest
import yaml

from torchrelay.cli import verbs

ROOT = Path(__file__).resolve().parents[2]
RULES = {
    name: body
    for file in sorted((ROOT / "rules").glob("*.smk"))
    for name, body in re.findall(r"^rule (\w+):\n((?:[ \t]+.*\n|\n)*)", file.read_text(), flags=re.M)
}


def test_there_are_rules() -> None:
    assert "train_model" in RULES


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_calls_the_verb_of_its_name_and_keeps_a_log_and_a_benchmark_under_it(rule: str) -> None:
    body = RULES[rule]
    assert rule.replace("_", "-") in verbs.list_commands(None)  # type: ignore[arg-type]
    assert f"-m torchrelay {rule.replace('_', '-')} " in body
    assert f'"logs/{rule}/' in body
    assert f'"benchmarks/{rule}/' in body


@pytest.mark.parametrize("file", sorted((ROOT / "rules").glob("*.smk")), ids=lambda path: path.name)
def test_a_rule_file_opens_with_what_goes_in_and_out_and_holds_no_program(file: Path) -> None:
    text = file.read_text()
    assert re.match(r"# .+\n# in: .+\n# out: .+\n# config: .+\n", text)
    assert not re.search(r"^\s+(run|script|notebook):", text, flags=re.M)
    assert text.count("\n") <= 80


def test_no_path_is_owned_twice() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    outs = [
        next(iter(out)) if isinstance(out, dict) else out for stage in stages.values() for out in stage["do"]["outs"]
    ]
    assert outs
    assert all(out.startswith("data/${item}/") for out in outs)
    written = re.findall(r"output:\n((?:\s+\S+.*\n)+?)\s+(?:params|log|threads):", "\n".join(RULES.values()))
    assert written
    assert not any('"data/' in block for block in written)


@pytest.mark.parametrize("verb", verbs.list_commands(None))  # type: ignore[arg-type]
def test_every_verb_explains_itself(verb: str) -> None:
    command = verbs.get_command(None, verb)  # type: ignore[arg-type]
    assert command is not None
    assert command.help
    assert command.name == verb
