"""The coin: a function of seed and step alone, even, and another one for another seed."""

from __future__ import annotations

import itertools

from dts_hf.on_policy.coin import coin
from tests.support.launching import launch


def test_it_is_even_and_its_throws_do_not_hang_together():
    throws = [coin(7, step) for step in range(20_000)]
    assert all(0 <= throw < 1 for throw in throws)
    assert abs(sum(throws) / len(throws) - 0.5) < 4 * (1 / 12 / len(throws)) ** 0.5
    below = [throw < 0.3 for throw in throws]
    assert abs(sum(below) / len(below) - 0.3) < 4 * (0.21 / len(below)) ** 0.5
    both = sum(one and next_one for one, next_one in itertools.pairwise(below)) / (len(below) - 1)
    assert abs(both - 0.09) < 4 * (0.09 * 0.91 / len(below)) ** 0.5


def test_it_is_the_same_in_another_process_and_another_one_for_another_seed():
    program = "from dts_hf.on_policy.coin import coin; print([coin(7, step) for step in range(50)])"
    done = launch(("-c", program), env={"PYTHONHASHSEED": "123"})
    throws = [coin(7, step) for step in range(50)]
    assert done.stdout.strip() == str(throws), done.stderr
    assert not {*throws} & {coin(8, step) for step in range(50)}
