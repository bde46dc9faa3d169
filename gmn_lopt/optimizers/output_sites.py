"""Outputs that GradMetaNet leaves out: logits over a vocabulary would be most of what it reads and keeps."""

import functools
from dataclasses import replace

from gmn_lopt.factors.structure import GradientStructure, Site, SiteRef


@functools.lru_cache(maxsize=64)
def without_large_outputs(structure: GradientStructure, largest: int | None) -> GradientStructure:
    """The structure without the sites of outputs that are too large.

    An output is a site that is only written, and fixed: the logits, but not queries and keys. What lies at such a site
    is described by its other site (a kernel), or not at all (a bias).

    Args:
        structure: the structure of a model.
        largest: the largest number of neurons of an output that stays; None: all stay.

    Returns:
        A structure of the same parameters and factors with fewer sites.
    """
    kept = [i for i, site in enumerate(structure.sites) if not _is_large_output(structure, site, largest)]
    if len(kept) == len(structure.sites):
        return structure
    number = {old: new for new, old in enumerate(kept)}
    parameters = tuple(
        replace(p, sites=tuple(SiteRef(number[ref.site], ref.dims) for ref in p.sites if ref.site in number))
        for p in structure.parameters
    )
    return replace(structure, sites=tuple(structure.sites[i] for i in kept), parameters=parameters)


def _is_large_output(structure: GradientStructure, site: Site, largest: int | None) -> bool:
    is_output = site.kind == "output" and not structure.is_permutable(site)
    return largest is not None and is_output and site.size > largest
