"""Keyed noise."""

import pytest
import torch

from dllm.core.noise import _GAMMA, _hash, _long, _mix, _signed, keyed_hash, keyed_uniform, token_hash


@pytest.mark.parametrize("counters", [(torch.arange(20_000),), (3, torch.arange(20_000)), (torch.arange(20_000), 5)])
def test_noise_is_uniform(counters):
    u = keyed_uniform(1, *counters).double().sort().values
    n = len(u)
    grid = torch.arange(n + 1).double() / n
    distance = torch.maximum((u - grid[:-1]).abs(), (u - grid[1:]).abs()).max().item()
    assert distance < 1.95 / n**0.5  # Kolmogorov-Smirnov, p = 0.001
    assert u[0] >= 0 and u[-1] < 1


def test_neighbouring_counters_are_uncorrelated():
    u = keyed_uniform(0, torch.arange(300)[:, None], torch.arange(300)).double() - 0.5
    for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1]), (u, u.T)):
        pairs = a.triu(1), b.triu(1)  # each pair once, and not the diagonal of the transpose
        n = (pairs[0] != 0).sum().item()
        assert abs((pairs[0] * pairs[1]).sum().item() * 12 / n**0.5) < 4


def test_noise_does_not_depend_on_the_shape_it_stands_in():
    keys, positions = torch.tensor([5, -7, 2**40]), torch.arange(11)
    table = keyed_uniform(keys[:, None], positions, 4)
    assert table.shape == (3, 11) and table.dtype == torch.float32
    for row, key in enumerate(keys.tolist()):
        for position in (0, 3, 10):
            assert keyed_uniform(key, position, 4) == table[row, position]


def test_numbers_made_on_the_host_are_those_of_torch():
    keys, counter = torch.tensor([[3], [-8], [2**62], [-(2**63)]]), torch.tensor([0, -1, 7, 2**40])
    for key, given in ((keys, counter), (-5, counter), (2**63 - 1, 4), (keys, -1)):
        plain = _hash([_long(key), _long(given)], _signed(_GAMMA), _mix)
        assert torch.equal(keyed_hash(key, given), plain)


def test_the_order_of_key_and_counters_matters():
    values = {keyed_hash(*key).item() for key in [(0, 1), (1, 0), (0, 0), (1, 1), (2, 2), (0,), (0, 0, 0), (0, 1, 0)]}
    assert len(values) == 8


def test_a_token_hash_ignores_padding_and_knows_positions():
    rows = torch.tensor([[4, 5, 9, 9], [5, 4, 9, 9], [4, 5, 0, 0]])
    where = torch.tensor([True, True, False, False]).expand(3, -1)
    hashed = token_hash(rows, where)
    assert hashed[0] == hashed[2] == token_hash(torch.tensor([4, 5]))
    assert hashed[0] != hashed[1]
    assert token_hash(torch.tensor([], dtype=torch.long)).shape == ()
