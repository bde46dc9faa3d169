"""Sites: which activations and tangents belong to the same neurons, paired by dependence."""

from dataclasses import dataclass, field

from gmn_lopt.analysis.axes import Axis
from gmn_lopt.analysis.axis_rules import Axes
from gmn_lopt.analysis.layers import LayerUse, Uses, follow
from gmn_lopt.analysis.layout import Arranged, arrange
from gmn_lopt.analysis.program import Program, Value


@dataclass(eq=False)
class Read:
    """An activation: an array that one layer or several read over the same axes."""

    value: Value
    arranged: Arranged
    layers: list[LayerUse] = field(default_factory=list)


@dataclass(eq=False)
class Write:
    """A tangent: the output of a layer, or of several that are only ever summed with one another."""

    arranged: Arranged
    layers: list[LayerUse] = field(default_factory=list)


@dataclass(eq=False)
class FoundSite:
    """A read, a write, or a pair of both."""

    read: Read | None
    write: Write | None

    @property
    def arranged(self) -> Arranged:
        """Layout of either, equal in set and neurons."""
        either = self.write or self.read
        assert either is not None
        return either.arranged

    @property
    def position(self) -> tuple[int, bool]:
        """Place in program order; a read comes before the write of the layer that reads it."""
        if self.write is not None:
            return self.write.layers[0].index, True
        assert self.read is not None
        return self.read.layers[0].index, False


def find_reads(layers: list[LayerUse], axes: dict[Value, Axes]) -> list[Read]:
    """The distinct activations, in program order."""
    reads: dict[tuple[Value, frozenset[int]], Read] = {}
    for layer in layers:
        other = 1 - layer.side
        contract, batch = layer.equation.params["dimension_numbers"]
        neuron_dims = set(contract[other]) | {d for i, d in enumerate(batch[other]) if i not in layer.set_batch}
        key = (layer.activation, frozenset(neuron_dims))
        if key not in reads:
            shape = layer.activation.shape
            reads[key] = Read(layer.activation, arrange(shape, axes[layer.activation], neuron_dims))
        reads[key].layers.append(layer)
    return list(reads.values())


def find_writes(program: Program, layers: list[LayerUse], axes: dict[Value, Axes]) -> list[Write]:
    """The distinct tangents, in program order."""
    consumers = program.consumers()
    writes: dict[tuple[Value, Axis, Axis], Write] = {}
    for layer in layers:
        end = layer.output
        for equation in follow(layer.output, consumers):
            end = equation.outputs[0]
        arranged = arrange_output(layer, axes)
        writes.setdefault((end, arranged.set_atoms, arranged.neuron_atoms), Write(arranged)).layers.append(layer)
    return list(writes.values())


def arrange_output(layer: LayerUse, axes: dict[Value, Axes]) -> Arranged:
    """Lay out a layer's output: its neurons are the dimensions that come from the parameter."""
    contract, batch = layer.equation.params["dimension_numbers"]
    num_batch = len(batch[0])
    free = [len(value.shape) - len(contract[i]) - num_batch for i, value in enumerate(layer.equation.inputs)]
    start = num_batch + (free[0] if layer.side == 1 else 0)
    neurons = set(range(start, start + free[layer.side]))
    neurons |= {i for i in range(num_batch) if i not in layer.set_batch}
    return arrange(layer.output.shape, axes[layer.output], neurons)


def pair(reads: list[Read], writes: list[Write], uses: Uses) -> list[FoundSite]:
    """Pair each read with the latest preceding write of its neurons that it depends on and that no read has taken."""
    taken: set[Write] = set()
    sites = []
    for read in reads:
        ancestors = uses.dependence[read.value].layers
        candidates = [
            write
            for write in writes
            if write not in taken
            and write.arranged.neuron_atoms == read.arranged.neuron_atoms
            and write.arranged.set_atoms == read.arranged.set_atoms
            and any(ancestors >> layer.index & 1 for layer in write.layers)
        ]
        latest = max(candidates, key=lambda write: write.layers[-1].index, default=None)
        if latest is not None:
            taken.add(latest)
        sites.append(FoundSite(read, latest))
    sites += [FoundSite(None, write) for write in writes if write not in taken]
    return sorted(sites, key=lambda site: site.position)
