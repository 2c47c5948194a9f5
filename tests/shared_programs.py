"""Runs of one recipe share their compiled programs, as far as one test module goes."""

import contextlib
import json
import zlib
from collections.abc import Iterator
from unittest import mock

import jax

from shiftnet.config import Config
from shiftnet.data import Split
from shiftnet.training import engine, evaluation, low_bit, step

# Settings that no program depends on.
UNUSED = ("log", "eval", "checkpoint", "seed", "patience")


@contextlib.contextmanager
def shared_programs() -> Iterator[None]:
    """Makes what `engine.train` compiles once for all runs of a recipe, and forgets it at the end.

    Most of a small run's time is tracing and compiling. A teacher is told by its path. Programs
    whose methods a test has replaced are made anew.
    """
    kept: dict[object, object] = {}

    def once(key, make):
        if key not in kept:
            kept[key] = make()
        return kept[key]

    def program(config: Config, *, teacher=None, class_weights=None, **options):
        def make():
            return step.Program(config, teacher=teacher, class_weights=class_weights, **options)

        fields = {name: value for name, value in config.to_dict().items() if name not in UNUSED}
        weights = None if class_weights is None else class_weights.tobytes()
        methods = step.Program.update, step.Program._train_batch, step.Program.steps
        key = json.dumps(fields, sort_keys=True), weights, methods, tuple(options.items())
        return once(("program", key), make)

    def stacked(single, runs):
        return once(("stacked", single, runs), lambda: step.StackedProgram(single, runs))

    def watch(single, runs=1):
        return once(("watch", single, runs), lambda: low_bit.LevelWatch(single, runs))

    def evaluator(graphdef, part, data, **options):
        def make():
            return evaluation.make_evaluator(graphdef, part, data, **options)

        if not isinstance(part, Split):
            return make()
        images = zlib.crc32(part.images.tobytes()), zlib.crc32(part.labels.tobytes())
        return once(("evaluator", id(graphdef), images, tuple(options.items())), make)

    replaced = {
        "Program": program,
        "StackedProgram": stacked,
        "LevelWatch": watch,
        "make_evaluator": evaluator,
    }
    with mock.patch.multiple(engine, **replaced):
        yield
    kept.clear()
    jax.clear_caches()
