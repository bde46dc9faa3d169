"""How a gradient structure prints."""

import textwrap

from gmn_lopt.factors.structure import GradientStructure, Layer, Parameter

WIDTH = 120


def table(structure: GradientStructure) -> str:
    """Layers, spaces, sites, and every parameter whose factors do not give its whole gradient, with the reason."""
    lines = [f"{len(structure.layers)} layers"]
    lines += [f"  {_layer(structure, layer)}" for layer in structure.layers]

    lines.append(f"{len(structure.spaces)} neuron spaces")
    for i, space in enumerate(structure.spaces):
        users = [parameter.name for parameter in structure.parameters if i in parameter.spaces]
        kind = "permutable" if space.permutable else "fixed"
        each = f" in each of space {' x '.join(map(str, space.stack))} by itself" if space.stack else ""
        lines.append(f"  {i}: {space.size} neurons, {kind}{each}, in {_shorten(users)}")

    lines.append(f"{len(structure.sites)} sites")
    for i, site in enumerate(structure.sites):
        has = {"input": "activation", "output": "tangent", "inner": "activation and tangent"}[site.kind]
        spaces = " x ".join(map(str, site.spaces)) or "(one neuron)"
        copies = "".join(f", copies along space {site.spaces[d]}" for d in site.copies)
        lines.append(f"  {i}: {site.size} neurons of space {spaces}, set of {site.set_size}, {has}{copies}")

    odd: dict[tuple[str, str], list[str]] = {}
    for parameter in structure.parameters:
        if parameter.status != "factored":
            odd.setdefault((parameter.status, parameter.reason), []).append(parameter.name)
    count = len(structure.parameters)
    lines.append(f"{count - sum(map(len, odd.values()))} of {count} parameters factored")
    for (status, reason), names in odd.items():
        text = f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} {status}: {reason}"
        lines += textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_long_words=False)
    return "\n".join(lines)


def describe(parameter: Parameter) -> str:
    """One line on a parameter that is not factored."""
    return f"{parameter.name} is {parameter.status}: {parameter.reason}"


def _layer(structure: GradientStructure, layer: Layer) -> str:
    kernel = structure.parameters[layer.kernel]
    bias = "" if layer.bias is None else f" + {structure.parameters[layer.bias].name}"
    reads = [f"site {i}" for i, site in enumerate(structure.sites) if site.activation == layer.activation]
    writes = next(i for i, site in enumerate(structure.sites) if site.tangent == layer.tangent)
    read = "token ids" if layer.embedding else reads[0]
    return f"{kernel.name} [{'x'.join(map(str, kernel.shape))}]{bias}: {read} -> site {writes}"


def _shorten(names: list[str], most: int = 2) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
