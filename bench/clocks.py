"""The clocks that measurements can be taken with."""

import time
from collections.abc import Callable

Clock = Callable[[], float]

CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "processor": time.process_time}
"""Seconds of the wall clock; or of processor time, summed over cores, for a machine that other work runs on."""
