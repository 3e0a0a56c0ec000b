"""A history gives back the reports it took, by place and by slice, and survives a checkpoint's columns."""

from fleetune.device_runtime.training.step_reports import History, StepReport

REPORTS = [StepReport(i, 4, 1.5 / (i + 1), 6 - i, 0.25 * i) for i in range(3)]


def test_it_is_the_list_of_its_reports() -> None:
    history = History(4)
    for report in REPORTS:
        history.append(report)
    assert list(history) == REPORTS
    assert history[-1] == REPORTS[2]
    assert history[-2:] == REPORTS[1:]
    assert len(history) == 3
    assert not History(4)


def test_its_columns_make_the_same_history() -> None:
    history = History(4)
    for report in REPORTS:
        history.append(report)
    assert list(History(4, history.columns())) == REPORTS
    assert history.columns()["active_layers"].tolist() == [6.0, 5.0, 4.0]
