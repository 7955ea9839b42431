"""What the commands' exit statuses mean; the overview of `robustft --help` tells them."""

from __future__ import annotations

DONE, OTHER, USER, POWERLESS, UNFINISHED = 0, 1, 2, 3, 4
INTERRUPTED, TERMINATED = 130, 143  # as a shell tells SIGINT and SIGTERM
