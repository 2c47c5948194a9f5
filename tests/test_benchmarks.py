"""What the benchmarks compute besides time: floors, errors, verdicts. Nothing here is timed."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks import kernel_rows, kernels, networks, our_kernels, ours
from benchmarks.kernel_rows import Ceilings, ImageRow, MatrixRow
from benchmarks.protocol import duration
from shiftnet import models
from shiftnet.kernels.shift import channel_offsets

MIB = 1 << 20
ONE_OF_EACH_KIND = list({row.kind: row for row in kernel_rows.rows(1, (256, 128))}.values())


def block(operation="shift_block", variant="inference", **changes):
    fields = {"expansion": 9, "batch": 128, "size": 32, "inputs": 16, "outputs": 16, "stride": 1}
    return ImageRow(operation, variant, **(fields | changes))


def test_a_fused_operation_is_held_to_reading_and_writing_each_byte_once():
    # 128 images of 32x32x144 in, 32x32x16 out, bfloat16.
    bytes_moved = block("shift_pointwise", "alone").moved_bytes("bfloat16")
    assert bytes_moved == 36 * MIB + 144 * 16 * 2 + 4 * MIB


def test_a_block_is_held_to_never_writing_its_expanded_tensor():
    weights = 144 * (16 + 1 + 16) + 16
    assert block().moved_bytes("bfloat16") == 2 * 4 * MIB + 2 * weights


def test_with_a_stride_only_the_values_that_are_used_count():
    strided = block("shift_pointwise", "alone", outputs=32, stride=2)
    assert strided.out_pixels == 128 * 16 * 16
    assert strided.moved_bytes("float32") == 4 * (strided.out_pixels * (288 + 32) + 288 * 32)
    assert strided.operations() == 2 * strided.out_pixels * 288 * 32
    # The block's own input is needed everywhere, and its shortcut is another tensor.
    whole = block(outputs=32, stride=2)
    weights = 288 * (16 + 1 + 32) + 32
    assert whole.moved_bytes("float32") == 4 * (whole.pixels * 16 + whole.out_pixels * 64 + weights)


def test_a_packed_matrix_counts_at_the_bits_of_its_weights():
    row = MatrixRow("large", 4, 4096, 8192, 3)
    assert row.moved_bytes("bfloat16") == 12 * MIB + 4 * 8192 + 2 * 4 * (4096 + 8192)


def test_the_floor_is_whatever_takes_longer():
    row = block()
    memory = Ceilings(1e9, 1e30)
    assert row.floor(memory, "float32") == (row.moved_bytes("float32") / 1e9, "memory")
    arithmetic = Ceilings(1e30, 1e9)
    assert row.floor(arithmetic, "float32") == (row.operations() / 1e9, "arithmetic")


def test_rows_are_told_apart_by_their_names():
    rows = kernel_rows.rows(128, (4096, 8192))
    assert len({row.key for row in rows}) == len(rows)
    assert all(kernel_rows.from_json(kernel_rows.to_json(row)) == row for row in rows)


@pytest.mark.parametrize("row", ONE_OF_EACH_KIND, ids=lambda row: row.key)
def test_every_program_takes_the_arrays_of_its_row(row):
    plan = our_kernels.plan(row=kernel_rows.to_json(row), dtype="float32")
    assert "xla" in plan["programs"]
    shapes = {}
    for name in plan["programs"]:
        operands = our_kernels.operands(row, name, "float32")
        found = jax.eval_shape(our_kernels.programs(row)[name], **operands)
        shapes[name] = [leaf.shape for leaf in jax.tree.leaves(found)]
    assert all(found == shapes["xla"] for found in shapes.values())


def test_one_wrong_value_is_an_error_and_a_missing_one_an_infinite_error():
    row, values = block("shift", ""), np.arange(1.0, 11.0)
    assert kernel_rows.error(row, [values], [values]) == 0
    wrong = values.copy()
    wrong[3] += 1
    assert kernel_rows.error(row, [values], [wrong]) > row.tolerance("bfloat16")
    wrong[3] = math.nan
    assert kernel_rows.error(row, [values], [wrong]) == math.inf


def test_the_sides_compare_the_same_places_of_the_same_values():
    row = block(batch=1, size=8)
    one, other = dict(kernel_rows.arrays(row)), None
    kernel_rows.arrays.cache_clear()
    other = kernel_rows.arrays(row)
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert kernel_rows.sample(np.zeros(3)) == [0.0] * kernel_rows.SAMPLES


@pytest.mark.parametrize("channels", [16, 48, 144])
def test_channels_are_put_where_the_grouped_order_moves_them_alike(channels):
    order = our_kernels.grouped(channels)
    assert sorted(order) == list(range(channels))
    interleaved = channel_offsets(channels)
    for one, other in zip(
        interleaved, channel_offsets(channels, channel_order="grouped"), strict=True
    ):
        assert np.array_equal(one[order], other)


def result(error=0.0, seconds=1.0, xla_error=0.0):
    return {
        "key": "shift_block/inference/x",
        "programs": {
            "xla": {"seconds": 2.0, "error": xla_error},
            "ours": {"seconds": seconds, "error": error},
        },
    }


def test_a_wrong_result_gets_no_ratio():
    row = block()
    right, wrong, not_a_number = result(), result(error=1.0), result(error=math.inf)
    for judged in (right, wrong, not_a_number):
        kernels.judge(row, judged, Ceilings(1e12, 1e12), "bfloat16")
    assert right["ratios"] == {"xla": 2.0}
    assert "failed" not in right
    for judged in (wrong, not_a_number):
        assert "ours is off" in judged["failed"]
        assert "ratios" not in judged
        assert "reached" not in judged


def test_a_comparison_that_fails_takes_only_its_own_ratio():
    judged = result()
    judged["programs"] = {"copy": {"failed": "out of memory"}, **judged["programs"]}
    kernels.judge(block(), judged, Ceilings(1e12, 1e12), "bfloat16")
    assert judged["ratios"] == {"xla": 2.0}
    assert judged["lost"] == {"copy": "out of memory"}


def test_a_target_is_met_by_all_of_its_rows_on_a_hopper_gpu_or_not_at_all():
    target = kernels.Target("something", "shift_block/", "xla", 1.5)

    def verdict(*rows, device="NVIDIA H200", skipped=()):
        for row in rows:
            kernels.judge(block(), row, Ceilings(1e12, 1e12), "bfloat16")
        numbered = [{**row, "key": f"{row['key']}{number}"} for number, row in enumerate(rows)]
        report = {"rows": numbered, "skipped": list(skipped), "ours": {"device": device}}
        return target.verdict(report)

    assert ": met, " in verdict(result())
    assert ": met, " in verdict(result(), device="NVIDIA H100 80GB HBM3")
    assert "MISSED, in 1 of 2 rows" in verdict(result(), result(seconds=1.9))
    assert "met so far" in verdict(result(), result(error=1.0))
    assert "met so far" in verdict(result(), skipped=["shift_block/inference/y"])
    assert "unmeasured" in verdict(result(), device="cpu")
    assert "unmeasured" in verdict()


def test_a_budget_is_read_in_minutes_or_seconds():
    assert [duration(text) for text in ("8m", "90s", "480")] == [480, 90, 480]
    with pytest.raises(ValueError, match="eight"):
        duration("eight")


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_every_row_names_a_network_that_there_is(name):
    net = networks.NETWORKS[name].net
    config = ours.recipe(net, 1, "float32")
    nnx.eval_shape(lambda: models.build(config.model, net["num_classes"], rngs=nnx.Rngs(0)))


def test_rows_are_selected_by_patterns_or_refused():
    assert [str(row) for row in networks.rows(["resnet20/*", "nothing"])] == [
        f"resnet20/{task}" for task in networks.TASKS
    ]
    with pytest.raises(networks.Refused, match="no row matches nothing"):
        networks.rows(["nothing"])
