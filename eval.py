"""``gmn-eval`` in a checkout, see gmn_lopt/cli/eval.py."""

from gmn_commands import evaluate

if __name__ == "__main__":
    raise SystemExit(evaluate())
