from collections.abc import Mapping
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cwdm.errors import InputError
from cwdm.inference.parallel.shard import parse_shard, select_shard

NAMES = [f"BraTS-GLI-{number:05}-000" for number in range(800)]


@given(st.lists(st.text()), st.integers(1, 9))
def test_shares_are_disjoint_and_together_everything(names: list[str], count: int) -> None:
    shares = [select_shard(names, names, f"{index}/{count}") for index in range(count)]
    assert sorted(chain(*shares)) == sorted(names)


def test_a_case_keeps_its_share_whatever_others_come_and_go() -> None:
    before = select_shard(NAMES, NAMES, "1/4")
    assert select_shard(NAMES[7::3], NAMES[7::3], "1/4") == [name for name in NAMES[7::3] if name in before]
    assert select_shard([3], ["BraTS-GLI-00003-000"], "2/8") == [3]  # the same in all versions, on all machines


def test_shares_are_of_much_the_same_size() -> None:
    sizes = [len(select_shard(NAMES, NAMES, f"{index}/8")) for index in range(8)]
    assert max(sizes) < 1.4 * min(sizes)


@pytest.mark.parametrize("shard", ["2/2", "-1/2", "1", "a/b", "0/0", "", "1/2/3", "٠/٢"])
def test_what_is_no_shard_is_refused(shard: str) -> None:
    with pytest.raises(InputError, match="--shard"):
        parse_shard(shard)


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
    assert parse_shard("auto", environment) == (1, 3)


def test_the_tasks_of_each_job_of_an_array_share_its_cases() -> None:
    def environment(job: int, task: int) -> Mapping[str, str]:
        array = {"SLURM_ARRAY_TASK_ID": str(job), "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "3"}
        return array | {"SLURM_PROCID": str(task), "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}

    places = {parse_shard("auto", environment(job, task)) for job in (1, 2, 3) for task in (0, 1)}
    assert places == {(index, 6) for index in range(6)}


def test_an_array_with_gaps_is_refused() -> None:
    array = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "8"}
    with pytest.raises(InputError, match="without gaps"):
        parse_shard("auto", array | {"SLURM_ARRAY_TASK_COUNT": "5"})


def test_a_job_of_several_tasks_that_are_not_started_is_refused() -> None:
    with pytest.raises(InputError, match="srun"):
        parse_shard("auto", {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"})
    shell_of_salloc = {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}
    with pytest.raises(InputError, match="srun"):
        parse_shard("auto", {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", **shell_of_salloc})


def test_auto_without_a_scheduler_is_refused() -> None:
    with pytest.raises(InputError, match="give i/n"):
        parse_shard("auto", {"JOB_COMPLETION_INDEX": "1"})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("SLURM_NTASKS", "abc"),
        ("SLURM_PROCID", "-1"),
        ("SLURM_ARRAY_TASK_COUNT", "1e3"),
        ("SLURM_NNODES", ""),
        ("JOB_COMPLETION_INDEX", ""),
        ("JOB_COMPLETIONS", "9" * 5000),
    ],
)
def test_a_variable_that_is_no_number_is_named(name: str, text: str) -> None:
    slurm = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    kubernetes = {"JOB_COMPLETION_INDEX": "0", "JOB_COMPLETIONS": "2"}
    with pytest.raises(InputError, match=f"the variable {name}: expected a whole number, found '{text}'"):
        parse_shard("auto", {**slurm, **kubernetes, name: text})


@pytest.mark.parametrize("index", ["2", "3"])
def test_an_index_beyond_the_count_is_refused(index: str) -> None:
    with pytest.raises(InputError, match=f"JOB_COMPLETION_INDEX and JOB_COMPLETIONS say {index} of 2"):
        parse_shard("auto", {"JOB_COMPLETION_INDEX": index, "JOB_COMPLETIONS": "2"})
