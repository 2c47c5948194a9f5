"""The examples of the documentation run as they stand there."""

import re
from pathlib import Path

import jax

ROOT = Path(__file__).parents[1]


def blocks(page):
    """The Python code on a page, block by block."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_an_own_network_is_trained_by_the_loop_on_its_page(tmp_path, monkeypatch, capsys):
    network, loop, quantize = blocks("docs/own_networks.md")
    (tmp_path / "my_net.py").write_text(network)
    monkeypatch.syspath_prepend(tmp_path)
    with jax.numpy_dtype_promotion("standard"):  # the tests are strict, users are not
        exec(compile(loop, "own_networks.md", "exec"), {"__name__": "example"})
    *_, last = capsys.readouterr().out.splitlines()
    loss, accuracy = last.split()
    assert float(loss) < 2.1  # ln 10 is 2.30
    assert float(accuracy.rstrip("%")) > 20
    exec(compile(quantize, "own_networks.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out == "['head']\n"
