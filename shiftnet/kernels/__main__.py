"""The process in which `selftest` runs a GPU's kernels: `python -m shiftnet.kernels gpu PLACE ...`.

A place is `module:operation`. Prints a line of JSON for each: its name, why its kernels are not to
be used or null, and whether that lasts.
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
