"""How a gradient structure prints."""

from gmn_lopt.structure import GradientStructure, Parameter


def table(structure: GradientStructure) -> str:
    """Layers, spaces, sites, and every parameter whose factors do not give its whole gradient, with the reason."""
    names = [parameter.name for parameter in structure.parameters]
    lines = [f"{len(structure.layers)} layers"]
    for layer in structure.layers:
        bias = "" if layer.bias is None else f" + {names[layer.bias]}"
        reads = next(i for i, site in enumerate(structure.sites) if site.activation == layer.activation)
        writes = next(i for i, site in enumerate(structure.sites) if site.tangent == layer.tangent)
        shape = "x".join(map(str, structure.parameters[layer.kernel].shape))
        lines.append(f"  {names[layer.kernel]} [{shape}]{bias}: site {reads} -> site {writes}")

    lines.append(f"{len(structure.spaces)} neuron spaces")
    for i, space in enumerate(structure.spaces):
        users = [parameter.name for parameter in structure.parameters if i in parameter.spaces]
        kind = "permutable" if space.permutable else "fixed"
        lines.append(f"  {i}: {space.size} neurons, {kind}, in {_shorten(users)}")

    lines.append(f"{len(structure.sites)} sites")
    for i, site in enumerate(structure.sites):
        has = {"input": "activation", "output": "tangent", "inner": "activation and tangent"}[site.kind]
        spaces = " x ".join(map(str, site.spaces)) or "(one neuron)"
        lines.append(f"  {i}: {site.size} neurons of space {spaces}, set of {site.set_size}, {has}")

    odd = [parameter for parameter in structure.parameters if parameter.status != "factored"]
    lines.append(f"{len(structure.parameters) - len(odd)} of {len(structure.parameters)} parameters factored")
    lines += [f"  {describe(parameter)}" for parameter in odd]
    return "\n".join(lines)


def describe(parameter: Parameter) -> str:
    """One line on a parameter that is not factored."""
    return f"{parameter.name} is {parameter.status}: {parameter.reason}"


def _shorten(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
