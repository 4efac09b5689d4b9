"""`python -m torchrelay VERB` is the console script, for rules that must not rely on PATH."""

from torchrelay.cli import main

main()
