"""``gmn-eval`` in a checkout, see gmn_lopt/cli/eval.py."""

from gmn_lopt.cli.eval import cli

if __name__ == "__main__":
    raise SystemExit(cli())
