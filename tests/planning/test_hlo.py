"""Programs read as text: what they send to other devices, and what they move to and from memory."""

import pytest

from shiftnet.planning import hlo

# As XLA writes it: a loop of four trips, asynchronous pairs, a fusion, arrays in the chip's own
# memory (S(1)), operands with their index in comments, and the forms of replica_groups.
PROGRAM = """
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8,4]{1,0})->f32[8]{0}}

FileNames
1 "step.py"

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %wide = f32[8,4]{1,0} multiply(%p, %p)
}

%body (state: (s32[], f32[6])) -> (s32[], f32[6]) {
  %state = (s32[], f32[6]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[6]{0} get-tuple-element(%state), index=1
  %mean = f32[6]{0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %next = (s32[], f32[6]{0}) tuple(%i, %mean)
}

%condition (state.1: (s32[], f32[6])) -> pred[] {
  %state.1 = (s32[], f32[6]{0}) parameter(0)
  ROOT %more = pred[] constant(true)
}

ENTRY %main (x.1: f32[8,4], y.1: bf16[10]) -> f32[6] {
  %x.1 = f32[8,4]{1,0:T(8,128)} parameter(0), metadata={op_name="all-reduce(%no)"}
  %y.1 = bf16[10]{0:T(128)(2,1)} parameter(1)
  %square = f32[8,4]{1,0:T(8,128)} fusion(%x.1), kind=kLoop, calls=%fused
  %near = (f32[8,4]{1,0:T(8,128)S(1)}, f32[8,4]{1,0}, u32[]{:S(2)}) copy-start(%square)
  %nearby = f32[8,4]{1,0:T(8,128)S(1)} copy-done(%near)
  %cut = ((f32[8,4]{1,0}), f32[2,4]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%square), slice={[0:2], [0:4]}
  %piece = f32[2,4]{1,0:S(1)} slice-done(%cut)
  %both = (f32[8,4]{1,0}, bf16[10]{0}) all-reduce(%nearby, /*index=1*/%y.1), replica_groups=mesh['data'=4] {'data'}, to_apply=%add
  %gather = (bf16[10]{0}, bf16[40]{0}) all-gather-start(%y.1), replica_groups=[1,4]<=[4], dimensions={0}
  %whole = bf16[40]{0} all-gather-done(%gather)
  %part = f32[2,4]{1,0} reduce-scatter(%square), replica_groups={}, to_apply=%add
  %turn = f32[2,4]{1,0} collective-permute(%part), source_target_pairs={{0,1},{1,0}}
  %swap = f32[2,4]{1,0} all-to-all(%turn), replica_groups={{0,1,2,3}}
  %set = f32[8,4]{1,0} dynamic-update-slice(%square, %swap, %zero, %zero)
  %zero = s32[] constant(0)
  %six = f32[6]{0} custom-call(%swap), custom_call_target="tpu_custom_call"
  %first = (s32[], f32[6]{0}) tuple(%zero, %six)
  %loop = (s32[], f32[6]{0}) while(%first), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"4"}}
  ROOT %out = f32[6]{0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501

# As the TPU compiler hides collectives in fusions: one that several carry on, and a reduce-scatter.
FUSED = """
%start (p: f32[2]) -> (f32[2], f32[8]) {
  %p = f32[2]{0} parameter(0)
  %begun = f32[8]{0} all-gather(%p), channel_id=3, replica_groups=mesh['data'=4] {'data'}
  ROOT %carried = (f32[2]{0}, f32[8]{0}) tuple(%p, %begun)
}

%done (p.1: f32[2], p.2: f32[8]) -> f32[8] {
  %p.1 = f32[2]{0} parameter(0)
  ROOT %whole = f32[8]{0} all-gather(%p.1), channel_id=3, replica_groups=mesh['data'=4] {'data'}
}

%all-reduce-scatter.1 (p.3: f32[8]) -> f32[2] {
  %p.3 = f32[8]{0} parameter(0)
  %sum = f32[8]{0} all-reduce(%p.3), channel_id=4, replica_groups=mesh['data'=4] {'data'}
  %mine = u32[] partition-id()
  ROOT %part = f32[2]{0} dynamic-slice(%sum, %mine), dynamic_slice_sizes={2}
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2]{0} parameter(0)
  %first = (f32[2]{0}, f32[8]{0}) fusion(%x), kind=kCustom, calls=%start
  %one = f32[2]{0} get-tuple-element(%first), index=0
  %two = f32[8]{0} get-tuple-element(%first), index=1
  %last = f32[8]{0} fusion(%one, %two), kind=kCustom, calls=%done
  %a = f32[8]{0} all-reduce(%last), channel_id=1, replica_groups=mesh['data'=4] {'data'}
  %b = f32[8]{0} all-reduce(%a), channel_id=1, replica_groups=mesh['data'=4] {'data'}
  ROOT %out = f32[2]{0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
}
"""

SENT = {
    "all-reduce": 2 * 3 / 4 * (128 + 20) + 4 * 2 * 1 / 2 * 24,
    "all-gather": 3 / 4 * 80,
    "reduce-scatter": 3 / 4 * 128,
    "collective-permute": 32,
    "all-to-all": 3 / 4 * 32,
}


TILED = """
ENTRY %main (x: f32[4,32,32,16]) -> bf16[32,32,16,4] {
  %x = f32[4,32,32,16]{3,2,1,0:T(8,128)} parameter(0)
  %y = bf16[32,32,16,4]{3,2,1,0:T(8,128)(2,1)} fusion(%x), kind=kLoop, calls=%fused
  ROOT %z = bf16[32,32,16,4]{2,3,1,0:T(8,128)(2,1)S(1)} copy(%y)
}
"""


def test_padding_of_tiles_is_counted_where_it_is_asked_for():
    values = 4 * 32 * 32 * 16
    assert hlo.memory_traffic(TILED) == (4 + 2 + 2) * values
    # 16 channels, and then 4 images, are 128 lanes; 32 and 16 are whole sublanes.
    assert hlo.memory_traffic(TILED, padded=True) == 8 * 4 * values + 32 * (2 + 2) * values


def test_every_kind_of_collective_is_found_with_its_bytes_and_trips():
    found = hlo.collectives(PROGRAM, 4)
    assert hlo.by_kind(found) == {
        "all-reduce": (1 + 4, 128 + 20 + 4 * 24),
        "all-gather": (1, 80),
        "reduce-scatter": (1, 128),
        "collective-permute": (1, 32),
        "all-to-all": (1, 32),
    }
    assert [one.group for one in found if one.kind == "all-reduce"] == [4, 2]


def test_collectives_within_fusions_are_found_once():
    assert hlo.by_kind(hlo.collectives(FUSED, 4)) == {
        "all-gather": (1, 32),
        "all-reduce": (2, 64),
        "reduce-scatter": (1, 32),
    }


@pytest.mark.parametrize("kind", SENT)
def test_what_a_ring_sends(kind):
    sent = sum(one.sent for one in hlo.collectives(PROGRAM, 4) if one.kind == kind)
    assert sent == pytest.approx(SENT[kind])


def test_one_device_sends_nothing():
    (alone,) = hlo.collectives(
        "ENTRY %main (x: f32[6]) -> f32[6] {\n"
        "  %x = f32[6]{0} parameter(0)\n"
        "  ROOT %y = f32[6]{0} all-reduce(%x), replica_groups={}\n}\n",
        1,
    )
    assert alone == ("all-reduce", 1, 24, 1)
    assert alone.sent == 0


def test_memory_traffic_is_each_operand_and_result_outside_the_chip_once():
    assert hlo.memory_traffic(PROGRAM) == sum(
        (
            128 + 128,  # the fusion, and nothing inside of it
            128,  # the copy reads it; what it writes stays in the chip
            32,  # the slice reads its part
            20 + 128 + 20,  # the first all-reduce: one operand is in the chip, no result
            20 + 80,
            128 + 32,
            32 + 32,
            32 + 32,
            32 + 32,  # the update in place
            32 + 24,  # a kernel
            4 * (24 + 24),  # the loop
        )
    )
