"""What training does to low-bit weights and activations.

Of weights: their levels, and which still change. A weight that no longer changes its sign or level
has stopped learning; the S3 paper calls the first "sign freezing". Of activations: how many values
the form's range clips, and how many channels are dead.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from shiftnet import quantizers, tables
from shiftnet.quantizers import LowBitWeight
from shiftnet.training.mesh import replicated
from shiftnet.training.step import Program

# With more levels than these, neighbours are counted together: 256 numbers of every layer of 8 bits
# would be most of a run's log.
MOST_LEVELS = 32
Shares = dict[str, tuple[jax.Array, jax.Array]]
Codes = dict[str, jax.Array]  # uint8 of each weight's shape, by layer; see `QuantizedWeight`


class LevelWatch:
    """Compares the levels of a network's low-bit weights from one epoch to the next.

    Args:
      program: what trains the network.
      runs: how many of them are trained at once; several have a first axis on each array.

    Attributes:
      codes: `codes(params, stats)`, the weights' levels by layer, replicated over the mesh.
    """

    def __init__(self, program: Program, runs: int = 1):
        def low_bit(params: nnx.State, stats: nnx.State) -> dict[str, LowBitWeight]:
            network = nnx.merge(program.graphdef, params, stats)
            found = quantizers.of_layers(network)
            return {n: w for n, w in found.items() if isinstance(w, LowBitWeight)}

        def codes(params: nnx.State, stats: nnx.State) -> Codes:
            found = low_bit(params, stats)
            return {name: weight.quantized().codes for name, weight in found.items()}

        abstract = jax.eval_shape(program.draw, np.uint32(0))
        found = low_bit(abstract.params, abstract.stats)
        self._levels = {name: weight.levels for name, weight in found.items()}
        everywhere = replicated(program.mesh)
        self.codes = jax.jit(codes if runs == 1 else jax.vmap(codes), out_shardings=everywhere)
        self._compare = jax.jit(self._count_changes, out_shardings=everywhere)

        def shares(params: nnx.State, stats: nnx.State) -> Shares:
            network = nnx.merge(program.graphdef, params, stats)
            found = quantizers.activations_of_layers(network)
            return {name: (form.clipped[...], form.dead()) for name, form in found.items()}

        network = nnx.merge(program.graphdef, abstract.params, abstract.stats)
        self._has_activations = bool(quantizers.activations_of_layers(network))
        self._shares = jax.jit(shares, out_shardings=everywhere)

    def __bool__(self) -> bool:
        """Whether there is any low-bit weight."""
        return bool(self._levels)

    def metrics(self, before: Codes, now: Codes) -> dict[str, Any]:
        """What became of the weights between two epochs' codes.

        Returns:
          For each layer, and for `"all"` of them together, fractions of its weights: `"zeros"`,
          `"levels"` (by level, as text; of more than `MOST_LEVELS`, by the highest of neighbours),
          `"level_changed"`, and `"sign_changed"`, from plus to minus or back.
        """
        counts = jax.device_get(self._compare(before, now))
        result = {}
        for name, levels in self._levels.items():
            result[name] = _fractions(levels, *counts[name])
        every = sorted({level for levels in self._levels.values() for level in levels})
        total = dict.fromkeys(every, 0)
        for name, levels in self._levels.items():
            for level, count in zip(levels, counts[name][0].tolist(), strict=True):
                total[level] += count
        changed = [sum(int(count[i]) for count in counts.values()) for i in (1, 2)]
        return {"all": _fractions(every, np.array(list(total.values())), *changed), **result}

    def activations(self, params: nnx.State, stats: nnx.State) -> dict[str, dict[str, float]]:
        """What became of the inputs of layers that quantize them, in a run's last batches.

        Returns:
          For each layer, and for `"all"` of them together: `"clipped"`, the share of values beyond
          the form's range (the mean over layers), and `"dead"`, the share of channels that hardly
          ever change their code. Nothing where no layer quantizes its input.
        """
        if not self._has_activations:
            return {}
        shares = jax.device_get(self._shares(params, stats))
        clipped, dead = zip(*shares.values(), strict=True)
        every = {"clipped": float(np.mean(clipped)), "dead": float(np.concatenate(dead).mean())}
        return {"all": every} | {
            name: {"clipped": float(share), "dead": float(channels.mean())}
            for name, (share, channels) in shares.items()
        }

    def _count_changes(self, before: Codes, now: Codes) -> dict[str, tuple[jax.Array, ...]]:
        counts: dict[str, tuple[jax.Array, ...]] = {}
        for name, levels in self._levels.items():
            signs = jnp.sign(jnp.asarray(levels, jnp.int32))
            codes = jnp.arange(len(levels), dtype=jnp.uint8)
            histogram = jax.vmap(lambda code, codes=now[name]: (codes == code).sum())(codes)
            opposite = signs[now[name]] * signs[before[name]] < 0
            counts[name] = histogram, (now[name] != before[name]).sum(), opposite.sum()
        return counts


def _fractions(levels, histogram, level_changed, sign_changed) -> dict[str, Any]:
    size = int(histogram.sum())
    zeros = sum(int(count) for level, count in zip(levels, histogram, strict=True) if level == 0)
    width = -(-len(levels) // MOST_LEVELS)
    groups = range(0, len(levels), width)
    shares = {
        str(levels[start : start + width][-1]): int(histogram[start : start + width].sum()) / size
        for start in groups
    }
    return {
        "zeros": zeros / size,
        "level_changed": int(level_changed) / size,
        "sign_changed": int(sign_changed) / size,
        "levels": shares,
    }


def table(network: nnx.Module, zeros: Mapping[str, float]) -> str:
    """A network's weights, layer by layer: shape, bits, zeros, bytes in float32 and packed.

    Args:
      network: with numbers or without.
      zeros: the fraction of zeros of each low-bit layer.
    """
    rows: list[tuple[object, ...]] = [
        ("layer", "shape", "bits", "zeros", "float32 bytes", "packed bytes")
    ]
    found = quantizers.of_layers(network)
    for name, weight in found.items():
        share = f"{zeros[name]:.1%}" if name in zeros else ""
        shape = "x".join(map(str, weight.shape))
        rows.append((name, shape, weight.bits, share, 4 * weight.size, weight.packed_bytes))
    floats = sum(4 * weight.size for weight in found.values())
    packed = sum(weight.packed_bytes for weight in found.values())
    rows.append(("all weights", "", "", "", floats, packed))
    return tables.aligned(rows)
