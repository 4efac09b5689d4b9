"""Run a supervised program after ending what an earlier start of it left behind.

`python -m torchrelay.serving.alone COMMAND …`. A `kill -9` of a program that has children (MLflow's server is one)
leaves them on its port, and supervisord's next start would fail for ever. systemd ends a whole unit by itself.
"""

import os
import sys
from pathlib import Path

from torchrelay.serving.supervisor import end_strays


def main() -> None:
    """Become the command in the arguments; the supervisor's own variables say which program that is."""
    socket = Path(os.environ["SUPERVISOR_SERVER_URL"].removeprefix("unix://"))
    end_strays(socket, os.environ["SUPERVISOR_PROCESS_NAME"])
    os.execv(sys.argv[1], sys.argv[1:])  # noqa: S606


if __name__ == "__main__":
    main()
