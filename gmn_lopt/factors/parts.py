"""Where a set consists of parts: the uses of a kernel, one after the other, of which some do without the bias."""

from gmn_lopt.factors.structure import GradientStructure


def set_parts(structure: GradientStructure) -> tuple[tuple[int, ...], ...]:
    """Of each factor, activations first, where its parts begin and where the last one ends; empty if all are whole.

    Which rows read the bias is known by their place in the set: sets of several micro-batches, or devices, have to be
    joined part by part. Where no layer has such uses, any order will do.
    """
    if not any(layer.unbiased for layer in structure.layers):
        return ()
    first, sizes = len(structure.activation_shapes), [*structure.activation_shapes, *structure.tangent_shapes]
    cuts = [{0, size} for size, _ in sizes]
    # What is read together has its elements in one order; images of a convolution differ in size.
    pairs = [(layer.activation, first + layer.tangent) for layer in structure.layers]
    sites = [(site.activation, site.tangent) for site in structure.sites]
    pairs += [(a, first + g) for a, g in sites if a is not None and g is not None]
    pairs = [(a, g) for a, g in pairs if sizes[a][0] == sizes[g][0]]
    for layer in structure.layers:
        if (layer.activation, first + layer.tangent) in pairs:
            cuts[layer.activation].update(*layer.unbiased)
    while any(cuts[a] != cuts[g] for a, g in pairs):
        for a, g in pairs:
            cuts[a] = cuts[g] = cuts[a] | cuts[g]
    return tuple(tuple(sorted(of)) for of in cuts)
