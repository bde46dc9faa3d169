"""Meta-train a learned optimizer on a task: gmn_lopt/cli/meta_train.py from a checkout."""

import sys

from gmn_lopt.cli.meta_train import cli

if __name__ == "__main__":
    sys.exit(cli())
