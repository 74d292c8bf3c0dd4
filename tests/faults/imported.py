"""What the fork server of ``killing`` imports before it forks: all that a warm server of the product imports."""

from prefopt.processes.warm_server import load

load()
