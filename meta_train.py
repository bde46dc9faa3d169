"""``gmn-meta-train`` in a checkout, see gmn_lopt/cli/meta_train.py."""

from gmn_commands import meta_train

if __name__ == "__main__":
    raise SystemExit(meta_train())
