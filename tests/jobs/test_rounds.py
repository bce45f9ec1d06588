"""When rounds of several ways agree on the fastest."""

import pytest

from jobs.rounds import Rounds, agree, least

WAYS = ((0, 1), (2,))


def test_a_way_takes_the_least_of_each_of_its_calls() -> None:
    assert least([[3, 5, 9], [4, 1, 7]], WAYS) == [4, 7]


@pytest.mark.parametrize(
    ("rounds", "agreed"),
    [
        pytest.param([[1, 1, 5], [1, 1, 6]], True, id="the same is the fastest"),
        pytest.param([[1, 1, 5], [4, 4, 5]], False, id="another is the fastest by one half"),
        pytest.param([[1, 1, 2.04], [1, 1.02, 2]], True, id="both are near"),
        pytest.param([[1, 1, 5], [4, 4, 5], [9, 9, 9], [1, 1, 9]], True, id="a burst that one round met is forgotten"),
        pytest.param([[1, 1, 2.2], [1, 1.2, 2]], False, id="the second half's choice is far by the first"),
    ],
)
def test_two_halves_agree_when_each_takes_what_is_near_the_fastest_of_the_other(rounds: Rounds, agreed: bool) -> None:
    assert agree(rounds, WAYS) is agreed
