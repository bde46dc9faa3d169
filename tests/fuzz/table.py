"""The table of what came of what."""

from collections import Counter
from collections.abc import Mapping, Sequence


def print_table(
    found: Mapping[str, Counter[str]], fine: Sequence[str], of: str, totals: Mapping[str, Counter[str]]
) -> int:
    """Print, for each row of ``found``, the ``totals`` and how often what came of it; return the number of faults."""
    counts = {**found, "all": sum(found.values(), Counter())}
    kinds = [*fine, *sorted({*counts["all"]} - {*fine})]
    print(f"| {' | '.join([of, *totals, *kinds])} |")
    print("|---" * (1 + len(totals) + len(kinds)) + "|")
    for name, row in counts.items():
        each = [total.total() if name == "all" else total[name] for total in totals.values()]
        print(f"| {' | '.join(map(str, [name, *each, *(row[kind] for kind in kinds)]))} |")
    return sum(counts["all"][kind] for kind in kinds if kind not in fine)
