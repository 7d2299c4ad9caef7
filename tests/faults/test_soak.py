"""The soak finds faults that are planted in the code; its trials are decided by seed and number."""

import contextlib

import pytest

from tests.faults import plants, soak
from tests.faults.soak import CONFIGURATIONS, Soak, Trial, draw, table
from tests.faults.strikes import FAULTS, Failure, faults_of, possible


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("plant", "configuration", "fault", "reason"),
    [
        (plants.rename_early, "one rank", "kill all", "a final name is not whole"),
        (plants.keep_the_lock, "one rank", "kill all", "status 2(.|\n)*another run is writing|does not continue"),
        (plants.wait_for_ever, "TP 2", "freeze", "not ended after"),
        (plants.train_twice, "one rank", "SIGTERM", "the steps are"),
        (plants.leave_a_process, "one rank", "SIGTERM", "processes are left"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_planted_fault_is_found(plant, configuration, fault, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "DEADLINE", 45.0)
    with contextlib.ExitStack() as stack:
        trials = Soak(tmp_path, stack, f"{plants.__name__}:{plant.__name__}")
        with pytest.raises(Failure, match=reason):
            for number, moment in enumerate([0.5, 0.6, 0.7, 0.8, 0.9, 0.55, 0.65, 0.75]):
                trials.run(Trial(0, number, configuration, fault, moment, 1))


def test_a_trial_is_decided_by_its_seed_and_number():
    assert draw(3, 17) == draw(3, 17) != draw(3, 18)
    trials = [draw(0, number) for number in range(1000)]
    every = {(name, fault) for name, kind in CONFIGURATIONS.items() for fault in faults_of(kind)}
    assert {(trial.configuration, trial.fault) for trial in trials} == every
    assert all(isinstance(possible(fault, CONFIGURATIONS[name]), bool) for name, fault in every)
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table(trials).splitlines()]
    assert sum(int(cell) for row in rows if row and row[0] in FAULTS for cell in row[1:4]) == 1000
