"""The gates: may this run be deployed, may this version go live? Verdicts for the machines, and pages for people."""

from torchrelay.gate.evidence import Check, Disagreement, Evidence, Figure, PromotionVerdict, Replay, policy_hash
from torchrelay.gate.judging import Comparison, Live, Slice, compare, judge, slices
from torchrelay.gate.page import report
from torchrelay.gate.promotion import promote
from torchrelay.gate.promotion_page import promotion_report
from torchrelay.gate.provenance import code_faults, committed, head
from torchrelay.gate.rollout_page import RolloutSummary, rollout_report

__all__ = [
    "Check",
    "Comparison",
    "Disagreement",
    "Evidence",
    "Figure",
    "Live",
    "PromotionVerdict",
    "Replay",
    "RolloutSummary",
    "Slice",
    "code_faults",
    "committed",
    "compare",
    "head",
    "judge",
    "policy_hash",
    "promote",
    "promotion_report",
    "report",
    "rollout_report",
    "slices",
]
