"""What an operator hears at the start where no update's direction can be looked at."""

import pytest
from fleet import settings_of

from fleetune.broker.jobs.privacy import Privacy
from fleetune.broker.service.measures import Measures, why_unwatched


@pytest.mark.parametrize(
    ("changes", "said", "helps"),
    [
        ({"clients": 4}, "4 clients a round", "--strategy median"),
        ({"clients": 2, "min_clients": 2}, "2 clients a round", "knowing the devices"),
        ({"clients": 8, "secure": "masks"}, "updates are only summed", "knowing the devices"),
        ({"clients": 8, "dp": Privacy(name="central", clip=1.0, noise=1.0)}, "noise of devices", "knowing"),
        ({"clients": 8, "num_elements": 50}, "50 elements", "knowing the devices"),
    ],
)
def test_a_job_in_which_nobody_looks_whither_updates_go_says_so_and_what_helps(changes, said, helps):
    told = why_unwatched(settings_of(**changes))
    assert said in told
    assert helps in told
    assert "the opposite of what it learned counts as any other" in told


@pytest.mark.parametrize(
    "changes", [{"clients": 5}, {"clients": 3, "heading": 0.0}, {"clients": 3, "strategy": "median"}]
)
def test_where_somebody_looks_or_need_not_nothing_is_said(changes):
    assert why_unwatched(settings_of(**changes)) == ""


@pytest.mark.parametrize("clients", [4, 5])
def test_what_is_said_of_the_number_of_clients_is_what_holds(clients):
    settings = settings_of(clients=clients)
    assert bool(Measures(settings)._kept) != bool(why_unwatched(settings))
