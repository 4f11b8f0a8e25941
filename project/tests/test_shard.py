from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cwdm.errors import InputError
from cwdm.shard import share


@given(st.lists(st.integers()), st.integers(1, 9))
def test_shares_are_disjoint_and_together_everything(items: list[int], count: int) -> None:
    shares = [share(items, f"{index}/{count}") for index in range(count)]
    assert sorted(chain(*shares)) == sorted(items)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("shard", ["2/2", "-1/2", "1", "a/b", "0/0", "", "1/2/3", "٠/٢"])
def test_what_is_no_shard_is_refused(shard: str) -> None:
    with pytest.raises(InputError, match="--shard"):
        share([1], shard)


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_NTASKS": "1"},
        {"SLURM_PROCID": "1", "SLURM_NTASKS": "3", "SLURM_STEP_NUM_TASKS": "3"},
        {"SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_MAX": "7"}
        | {"SLURM_ARRAY_TASK_COUNT": "3"},
        {"JOB_COMPLETION_INDEX": "1", "JOB_COMPLETIONS": "3"},
    ],
)
def test_a_schedulers_place_is_found(environment: dict[str, str]) -> None:
    assert share("abcdefg", "auto", environment) == ["b", "e"]


def test_the_tasks_of_each_job_of_an_array_share_its_cases() -> None:
    shares = [
        share(
            range(20),
            "auto",
            {"SLURM_ARRAY_TASK_ID": str(job), "SLURM_ARRAY_TASK_MIN": "1"}
            | {
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_PROCID": str(task),
                "SLURM_NTASKS": "2",
                "SLURM_STEP_NUM_TASKS": "2",
            },
        )
        for job in (1, 2, 3)
        for task in (0, 1)
    ]
    assert sorted(chain(*shares)) == list(range(20))


def test_an_array_with_gaps_is_refused() -> None:
    array = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "8"}
    with pytest.raises(InputError, match="without gaps"):
        share([1], "auto", array | {"SLURM_ARRAY_TASK_COUNT": "5"})


def test_a_job_of_several_tasks_that_are_not_started_is_refused() -> None:
    with pytest.raises(InputError, match="srun"):
        share([1], "auto", {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"})
    shell_of_salloc = {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}
    with pytest.raises(InputError, match="srun"):
        share([1], "auto", {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", **shell_of_salloc})


def test_auto_without_a_scheduler_is_refused() -> None:
    with pytest.raises(InputError, match="give i/n"):
        share([1], "auto", {"JOB_COMPLETION_INDEX": "1"})
