#!/usr/bin/env bash
# Five empty steps, each a process that leaves a file.
set -eu
mkdir -p work
for step in a b c d e; do touch "work/$step"; done
