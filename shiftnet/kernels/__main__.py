"""Runs the self-test of a GPU's kernels for `selftest`: `python -m shiftnet.kernels gpu PLACE ...`.

A place is `module:operation`. Prints one line of JSON for each: the operation's name, why its
kernels must not be used (null where they may), and whether another test would give the same answer.
"""

import importlib
import json
import sys

from shiftnet.kernels.operation import OPERATIONS
from shiftnet.kernels.selftest import compare

for place in sys.argv[2:]:
    module, _, name = place.partition(":")
    importlib.import_module(module)
    print(json.dumps([name, *compare(sys.argv[1], OPERATIONS[name])]), flush=True)
