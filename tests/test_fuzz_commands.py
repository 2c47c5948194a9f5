"""What `fuzz_commands.py` starts from, and a few of the cases that `make fuzz` runs."""

import pytest

from shiftnet import cli
from tests import fuzz_commands
from tests.fuzz_commands import GOOD_NOTE, LINES, RECIPE, Case

pytestmark = pytest.mark.slow  # in a process that ran many tests, tracing memory takes minutes


def test_every_subcommand_is_fuzzed_from_lines_that_it_accepts():
    assert cli.COMMANDS.keys() <= LINES.keys()
    lines = [(name, line.split()) for name in cli.COMMANDS for line in LINES[name]]
    cases = (Case(name, words, RECIPE, GOOD_NOTE) for name, words in lines)
    outcomes, failures, _ = fuzz_commands.run(enumerate(cases))
    assert not failures
    met = {outcome.partition(" ")[0] for outcome in outcomes if outcome.endswith(" accepted")}
    assert met == cli.COMMANDS.keys()


def test_no_damaged_line_ends_in_a_traceback():
    outcomes, failures, _ = fuzz_commands.run((n, fuzz_commands.case(n)) for n in range(60))
    assert not failures
    assert len(outcomes) > 20
