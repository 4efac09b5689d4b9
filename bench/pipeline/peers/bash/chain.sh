#!/usr/bin/env bash
# The five scripts, one after the other; $PYTHON has mlflow, torch and scikit-learn. Each step's seconds go to stderr.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
for step in data train gate register package; do
  began=$EPOCHREALTIME
  "$PYTHON" "$here/$step.py" >>steps.log 2>&1
  awk -v step="$step" -v from="$began" -v to="$EPOCHREALTIME" 'BEGIN { printf "%s %.3f\n", step, to - from }' >&2
done
