"""The gate: may this run be deployed? A verdict for the pipeline, and a page of it for people."""

from torchrelay.gate.judging import Comparison, Live, Slice, compare, judge, slices
from torchrelay.gate.page import report

__all__ = ["Comparison", "Live", "Slice", "compare", "judge", "report", "slices"]
