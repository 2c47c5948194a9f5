"""Trains a few steps in float64 over all devices there are; run by test_parallel.py.

python -m tests.training.parallel_worker OUT.npz copied|divided [COORDINATOR NUM PROCESS_ID]

With `divided` parameters and the optimiser's state are divided over the devices (FSDP). Under
SLURM's variables the processes find each other.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np

from shiftnet import data
from shiftnet.checkpoint import to_arrays
from shiftnet.data import Split
from shiftnet.training import mesh as parallel
from shiftnet.training.evaluation import make_evaluator
from shiftnet.training.mesh import make_mesh, replicate, replicated
from shiftnet.training.processes import join
from shiftnet.training.step import Program
from tests.training.small import known, recipe


def main(out: str, state_is: str, *job: str) -> None:
    jax.config.update("jax_enable_x64", True)
    coordinator, count, number = job or (None, None, None)
    join(coordinator, count and int(count), number and int(number))
    divided = state_is == "divided"
    parallel.FSDP_SIZE = 64  # the network is small
    config = recipe(batch_size=64, data__flip=True, parallel__fsdp=divided)
    dataset = data.load("digits")
    mesh = make_mesh(config.batch_size)
    steps_per_epoch = len(dataset.train) // config.batch_size
    program = Program(
        config,
        num_classes=10,
        mean=dataset.mean,
        std=dataset.std,
        steps_per_epoch=steps_per_epoch,
        mesh=mesh,
    )
    seed = np.uint32(7)
    widen = jax.jit(
        lambda tree: jax.tree.map(
            lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf, tree
        )
    )
    state = jax.device_put(widen(program.init(seed)), program.shardings)
    whole = [leaf.is_fully_replicated for leaf in jax.tree.leaves(state)]
    assert all(whole) != (divided and jax.device_count() > 1), "the state is not where it should be"
    images, labels = replicate(dataset.train.images, mesh), replicate(dataset.train.labels, mesh)
    # From the second step on, so that the place in the data is not the start of an epoch.
    state = dataclasses.replace(state, step=state.step + 1)
    order = program.order(seed, 0, len(dataset.train))
    losses = []
    for _ in range(4):
        state, loss, _ = program.train(state, seed, images, labels, order, length=1)
        losses.append(np.asarray(loss))
    evaluator = make_evaluator(
        program.graphdef,
        # A number that no device count divides.
        Split(dataset.test.images[:61], dataset.test.labels[:61]),
        config.data,
        mean=dataset.mean,
        std=dataset.std,
        batch_size=25,
        mesh=mesh,
    )
    result = evaluator(state.params, state.stats)
    state = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(state)
    if jax.process_index() == 0:
        arrays = jax.device_get(to_arrays(state.params, state.stats))
        np.savez(
            out,
            losses=np.concatenate(losses),
            predictions=result.predictions,
            test_loss=result.loss,
            devices=jax.device_count(),
            **arrays,
        )


if __name__ == "__main__":
    with known():
        main(*sys.argv[1:])
