"""How far two sets of predictions lie apart. Standard library only: `prove.py` loads this file in any environment."""

import math
from typing import Any


def largest_difference(expected: Any, found: Any) -> float:
    """The largest absolute difference of any two numbers at the same place; infinite where anything else differs.

    Strings, truth values, nulls, keys and lengths must be equal. Two NaN are no difference, one NaN is infinite.
    """
    if _is_number(expected) and _is_number(found):
        return _distance(float(expected), float(found))
    if isinstance(expected, dict) and isinstance(found, dict) and expected.keys() == found.keys():
        return max((largest_difference(value, found[key]) for key, value in expected.items()), default=0.0)
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        return max(map(largest_difference, expected, found), default=0.0)
    return 0.0 if type(expected) is type(found) and expected == found else math.inf


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _distance(expected: float, found: float) -> float:
    if math.isnan(expected) or math.isnan(found):
        return 0.0 if math.isnan(expected) and math.isnan(found) else math.inf
    return 0.0 if expected == found else abs(expected - found)
