"""What is exported under the originals' names runs in PyTorch, with the originals' logits.

Needs PyTorch, which the project's own environments do not have; skipped without it.
"""

import numpy as np
import pytest

import shiftnet
from shiftnet.cli import convert, export
from tests import oracle
from tests.cli.test_export import saved

torch = pytest.importorskip("torch", reason="needs PyTorch")

FILES = oracle.FOLDER / "checkpoints"


@oracle.needed
@pytest.mark.parametrize(
    ("file", "reference", "network"),
    [
        (
            "shiftresnet20_1.0_cifar100.py2_t10.t7",
            "base_shiftresnet20_1.0_cifar100.npz",
            "shiftresnet",
        ),
        ("wrn_train_ckpt.pth.tar", "wrn_train_ckpt_expected.npz", "wrn"),
        ("s3_cifar8.pth.tar", "s3_cifar8_expected.npz", "s3_resnet"),
    ],
)
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_state_dict_gives_the_originals_logits_in_pytorch(
    file, reference, network, ending, tmp_path
):
    from tests import torch_nets

    assert convert.main([str(FILES / file), "--out", str(tmp_path / "ckpt")]) == 0
    out = tmp_path / f"net.{ending}"
    assert export.main([str(tmp_path / "ckpt"), str(out)]) == 0
    if ending == "pth":
        state = torch.load(out, weights_only=True)["state_dict"]
    else:
        import safetensors.torch

        state = safetensors.torch.load_file(out)
    state = {n: a.double() if a.is_floating_point() else a for n, a in state.items()}
    stored = np.load(FILES / reference)
    with torch.no_grad():
        x = torch.from_numpy(stored["x"]).double()
        logits = getattr(torch_nets, network)(state, x).numpy()
    oracle.assert_near({"logits": logits}, {"logits": stored["eval/logits"]}, 1e-9)
    # Names and shapes are those of the file that came in.
    names = {name for name in stored.files if name.startswith("sd/")}
    if names:
        theirs = {name.removeprefix("sd/").removeprefix("module.") for name in names}
        assert set(state) == theirs
        for name in names:
            key = name.removeprefix("sd/").removeprefix("module.")
            assert tuple(state[key].shape) == stored[name].shape


def test_a_low_bit_network_comes_back_from_pytorchs_own_files(tmp_path):
    ckpt = saved(tmp_path, weights="sign")
    for option in ([], ["--integers"]):
        out, back = tmp_path / f"net{len(option)}.pth", tmp_path / f"back{len(option)}"
        assert export.main([str(ckpt), str(out), *option]) == 0
        assert convert.main([str(out), "--out", str(back)]) == 0
        before, after = shiftnet.load(ckpt), shiftnet.load(back)
        assert after.config == before.config
        x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
        np.testing.assert_array_equal(after(x), before(x))
