from fleetune.device_runtime.network.interruptions import Evictions, Outage


def test_an_outage_is_told_ever_less_often_and_its_end_once():
    outage = Outage()
    told = [now for now in range(100, 2000) if outage.lasts(float(now))]
    assert told == [105, 150, 600]
    assert outage.ends(700.0) == 600.0
    assert outage.ends(701.0) == 0.0


def test_a_short_outage_is_not_worth_a_word():
    outage = Outage()
    assert [outage.lasts(now) for now in (1.0, 3.0, 5.9)] == [0.0] * 3
    assert outage.ends(5.9) == 0.0


def looks(*connections, is_told=False):
    evictions = Evictions()
    return [
        evictions.look_s(lasted_s=lasted, moved_bytes=moved, is_told=is_told) for lasted, moved in connections
    ]


def test_somebody_else_is_looked_for_at_the_second_short_connection_and_ever_less_often():
    assert looks(*[(1.0, 500)] * 9) == [0.0, 3.0, 0.0, 6.0, 0.0, 0.0, 0.0, 12.0, 0.0]


def test_the_word_of_a_server_is_enough_for_a_look():
    assert looks((900.0, 10**9), is_told=True) == [3.0]


def test_links_that_cut_after_some_time_are_not_taken_for_somebody_else():
    assert looks(*[(20.0, 100)] * 20) == [0.0] * 20
    assert looks((1.0, 100), (30.0, 100), (1.0, 100)) == [0.0] * 3, "a long one in between ends the row"
    assert looks((1.0, 30_000), (30.0, 100), (1.0, 30_000)) == [0.0] * 3


def test_links_that_cut_after_some_bytes_are_looked_at_for_a_moment_and_no_word_is_lost():
    """Two devices of one id in a lively job look the same, where the server tells neither."""
    assert [i for i, look in enumerate(looks(*[(1.0, 30_000)] * 150), 1) if look] == [
        2,
        4,
        8,
        16,
        32,
        64,
        128,
    ]
    assert sum(looks(*[(1.0, 30_000)] * 150)) == 21.0
    evictions = Evictions()
    for _ in range(20):
        evictions.look_s(lasted_s=1.0, moved_bytes=30_000, is_told=False)
    assert evictions.num_in_row == 0
