"""The table of forms against forms is what the sweep wrote and what the counting counts."""

import json

import pytest

from benchmarks import combinations
from shiftnet.errors import UserError

RECIPE = "configs/shiftresnet20_c100.py:expansion=1"


def trial(weights, activations, accuracy, state="complete"):
    params = {"model.weights": weights, "model.activations": activations}
    return {"params": params, "state": state, "validation_accuracy": accuracy}


def test_a_line_for_each_finished_trial_with_what_it_costs(tmp_path):
    file = tmp_path / "trials.json"
    found = [
        trial("float", "float", 0.3),
        trial("sign", "sign", 0.1),
        trial("s3", "int8", None, "fail"),
    ]
    file.write_text(json.dumps(found))
    *_, best, worst = combinations.table(RECIPE, combinations.trials(file)).splitlines()
    assert best.startswith("| float | float | 30.00 |")
    assert worst.startswith("| sign | sign | 10.00 |")
    sizes, energies = (
        [float(line.split("|")[column].replace(",", "")) for line in (best, worst)]
        for column in (4, 6)
    )
    assert sizes[0] > 2 * sizes[1]
    assert energies[0] > 2 * energies[1]


@pytest.mark.parametrize("text", ["[]", "{", '[{"state": "complete"}]', '{"state": 1}'])
def test_a_file_of_something_else_is_refused_by_name(text, tmp_path):
    file = tmp_path / "trials.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"trials.json: expected a sweep's finished trials"):
        combinations.trials(file)
