"""The commands."""

import importlib.util

if importlib.util.find_spec("tyro") is None:
    raise SystemExit("the commands of gmn_lopt need more packages: pip install 'gmn_lopt[train]'")
