"""Packing: rows laid end to end and back, positions found again, and nothing that makes the host wait."""

import pytest
import torch

from dllm.core.packing import layout_of, part_of
from tests.synchronisation import forbid_synchronisation

LENGTHS = (4, 0, 1, 6)


def values(width=6):
    return torch.arange(4 * width * 2).view(4, width, 2)


def test_packing_leaves_out_the_padding_and_nothing_else():
    packed = layout_of(LENGTHS).pack(values())
    assert torch.equal(packed, torch.cat([row[:length] for row, length in zip(values(), LENGTHS, strict=True)]))


def test_unpacking_puts_every_row_back_and_fills_the_rest():
    layout = layout_of(LENGTHS, 7)
    back = layout.unpack(layout.pack(values(7)), fill=-1)
    valid = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    assert torch.equal(back, torch.where(valid[..., None], values(7), -1))


def test_a_layout_knows_positions_offsets_and_places():
    layout = layout_of(LENGTHS)
    assert layout.positions.tolist() == [0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 5]
    assert layout.cu_seqlens.tolist() == [0, 4, 4, 5, 11] and layout.cu_seqlens.dtype == torch.int32
    row, position = torch.tensor([3, 0, 2]), torch.tensor([5, 1, 0])
    assert torch.equal(layout.pack(values())[layout.index(row, position)], values()[row, position])
    assert (layout.rows, layout.tokens, layout.width) == (4, 11, 6)


def test_a_part_packs_and_finds_its_own_positions():
    layout = layout_of(LENGTHS)
    part = part_of(layout, (1, 0, 0, 4), (3, 0, 0, 6))
    assert torch.equal(part.pack(values()), torch.cat([values()[0, 1:3], values()[3, 4:6]]))
    assert part.positions.tolist() == [1, 2, 4, 5]
    row, position = torch.tensor([3, 0]), torch.tensor([4, 2])
    assert torch.equal(part.pack(values())[part.index(row, position)], values()[row, position])
    back = part.unpack(part.pack(values()), fill=-1)
    assert torch.equal(back[0, 1:3], values()[0, 1:3]) and (back[0, 3:] == -1).all() and (back[1:3] == -1).all()


def test_gradients_go_through_packing_and_unpacking():
    layout = layout_of(LENGTHS)
    x = torch.randn(4, 6, 2, requires_grad=True)
    layout.unpack(layout.pack(x)).sum().backward()
    assert torch.equal(x.grad[..., 0], (torch.arange(6) < torch.tensor(LENGTHS)[:, None]).float())


def test_a_layout_that_is_on_the_device_keeps_its_plans():
    layout = layout_of(LENGTHS)
    assert layout.to("cpu") is layout and layout.to(torch.device("cpu")) is layout
    assert layout.to("meta").plans is not layout.plans


def test_the_host_never_waits():
    with forbid_synchronisation():
        layout = layout_of(LENGTHS, 8)
        part = part_of(layout, (1, 0, 0, 4), (3, 0, 0, 6))
        for each in (layout, part):
            each.unpack(each.pack(values(8)))
            each.index(torch.tensor([3]), torch.tensor([4]))


def test_the_guard_against_waiting_does_catch_it():
    x = torch.ones(3)
    for waits in (lambda: x.sum().item(), lambda: x[x > 0], lambda: x.nonzero(), lambda: bool(x.any())):
        with pytest.raises(AssertionError, match="wait"), forbid_synchronisation():
            waits()


@pytest.mark.parametrize(
    ("lengths", "width", "message"),
    [
        ((3, 5), 4, r"lengths\[1\] = 5 must lie between 0 and the width of the batch, 4"),
        ((3, -1), None, r"lengths\[1\] = -1 must lie between 0"),
        ((0, 0), 3, "needs at least one token"),
        ((), None, "needs at least one token"),
    ],
)
def test_lengths_that_are_none_are_errors(lengths, width, message):
    with pytest.raises(ValueError, match=message):
        layout_of(lengths, width)


def test_a_part_outside_its_row_is_an_error():
    with pytest.raises(ValueError, match=r"part of row 2 = 0..2 must lie within 0..1"):
        part_of(layout_of(LENGTHS), (0, 0, 0, 0), (1, 0, 2, 3))
