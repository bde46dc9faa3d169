"""The commands ``gmn-meta-train`` and ``gmn-eval``.

Beside the package, not in it: loading anything of the package loads JAX, which takes seconds in which Ctrl-C shall not
end in a traceback.
"""

import signal


def meta_train() -> int:
    """Meta-train a learned optimizer (gmn_lopt/cli/meta_train.py); returns the exit code."""
    _end_without_words()
    from gmn_lopt.cli.meta_train import cli

    return cli()


def evaluate() -> int:
    """Evaluate optimizers (gmn_lopt/cli/eval.py); returns the exit code."""
    _end_without_words()
    from gmn_lopt.cli.eval import cli

    return cli()


def _end_without_words() -> None:
    """Let Ctrl-C end the process at once, as SIGTERM does, but where a command has something to save or to say."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it may be ignored, as by nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)
