"""The page of a roll-out: self-contained, and readable whatever the answers hold."""

from torchrelay.gate import RolloutSummary, rollout_report


def summary(passed: bool = False, stages: tuple[str, ...] = ("shadow", "5 %")) -> RolloutSummary:
    return RolloutSummary(
        component="tiny",
        perimeter="production",
        version="8",
        live_version="7",
        passed=passed,
        reason="Rule errors is broken: 9 of 10 requests failed.",
        stages=stages,
        figures={"requests": 10.0, "errors_rate": 0.9},
    )


def disagreement(**changes: object) -> dict[str, object]:
    known = {"id": "r-1", "kind": "class", "live": {"output": {"class": 1}}, "candidate": {"output": {"class": 2}}}
    return {**known, **changes}


def test_it_says_how_it_ended_why_and_where_the_two_disagreed() -> None:
    page = rollout_report(summary(), [disagreement()])
    for word in ("Reverted", "version 8", "version 7", "9 of 10", "shadow", "r-1", "class"):
        assert word in page
    assert "Rolled out" in rollout_report(summary(passed=True), [])


def test_it_needs_nothing_from_elsewhere_and_escapes_what_answers_hold() -> None:
    page = rollout_report(summary(stages=()), [disagreement(id="<script>alert(1)</script>", instances=["x" * 9000])])
    assert "<script>" not in page
    assert "http" not in page
    assert len(page) < 20_000
