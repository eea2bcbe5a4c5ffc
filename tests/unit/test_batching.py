"""What a start makes of the slots that a checkpoint has."""

import pytest

from train.classify import ClassifySettings
from train.engine.batching import plan_batching
from train.engine.errors import UsageError


def plan(processes, saved_slots=None, **settings):
    return plan_batching(ClassifySettings(batch_size=64, **settings), processes, saved_slots)


def test_a_start_on_other_processes_keeps_the_slots():
    assert [plan(processes, 4).accumulation for processes in (1, 2, 4)] == [4, 2, 1]


@pytest.mark.parametrize("settings", [{"slots": 4}, {"micro_batch_size": 16}, {"slots": 4, "micro_batch_size": 16}])
def test_a_command_that_says_what_the_checkpoint_has_is_no_change(settings):
    assert plan(2, 4, **settings).slots == 4


@pytest.mark.parametrize("settings", [{"slots": 2}, {"micro_batch_size": 32}])
def test_another_cut_of_the_batch_is_not_left_out_in_silence(settings):
    (name,) = settings
    with pytest.raises(UsageError, match=f"4 slot.* --{name} .*passes of 16 samples.*--allow_changes slots"):
        plan(1, 4, **settings)
    assert plan(1, 4, allow_changes=("slots",), **settings).slots == 2


def test_processes_that_do_not_divide_the_slots_are_refused():
    with pytest.raises(UsageError, match="a number of processes that divides 4, or add --allow_changes slots"):
        plan(3, 4)
