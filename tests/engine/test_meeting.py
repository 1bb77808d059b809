"""Where ranks meet: what torchrun and SLURM leave in the environment, and what is made of it when part of it is missing."""

from __future__ import annotations

import pytest

from glmconv.engine.ranks import Meeting, first_node, meeting, ranks_here
from glmconv.errors import UsageError

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "16", "MASTER_ADDR": "node-1", "MASTER_PORT": "12345", "TORCHELASTIC_USE_AGENT_STORE": "True"}
SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_JOB_ID": "4123456", "SLURM_NTASKS": "16"}


def test_torchruns_ranks_meet_at_its_agents_store():
    assert meeting(TORCHRUN) == Meeting("node-1", 12345, 3, 16, agent=True)
    assert not meeting(TORCHRUN | {"RANK": "0"}).hosted


def test_sruns_ranks_meet_at_the_first_node_at_a_port_of_the_jobs_own():
    assert meeting(SRUN) == Meeting("gpu03", 23456, 3, 16, agent=False)
    assert meeting(SRUN | {"SLURM_PROCID": "0"}).hosted
    assert meeting(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"}) == Meeting("10.0.0.1", 7, 3, 16, agent=False)


def test_a_batch_script_by_itself_is_one_process_and_not_rank_0_of_many():
    assert meeting({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_NODELIST": "gpu[03-04]", "SLURM_JOB_ID": "1"}) is None


def test_a_process_without_others_works_alone():
    assert meeting({}) is None
    assert meeting(TORCHRUN | {"WORLD_SIZE": "1"}) is None
    assert meeting({"RANK": "0", "WORLD_SIZE": "2"}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu03", "gpu03"), ("gpu[03-06,9],cpu1", "gpu03"), ("gpu[7]", "gpu7"), ("rack1-[012,044]", "rack1-012"), ("a,b", "a"),
        ("n[1-2].cluster.org", "n1.cluster.org"), ("10.0.0.1,10.0.0.2", "10.0.0.1"), ("cpu1,gpu[03-06]", "cpu1"),
    ],
)  # fmt: skip
def test_the_first_of_slurms_nodes_is_read_from_its_list(nodes, first):
    assert first_node({"SLURM_JOB_NODELIST": nodes}) == first


def test_the_address_that_srun_was_started_at_is_the_last_resort():
    assert first_node({"SLURM_LAUNCH_NODE_IPADDR": "10.1.2.3"}) == "10.1.2.3"


@pytest.mark.parametrize("nodes", ["rack[1-2]-[03-04]", "$(id)", "[1-2]"])
def test_a_list_that_cannot_be_read_is_a_usage_error_that_says_what_to_set(nodes):
    with pytest.raises(UsageError, match="MASTER_ADDR"):
        first_node({"SLURM_JOB_NODELIST": nodes})


@pytest.mark.parametrize("wrong", [{"RANK": "x"}, {"MASTER_PORT": "-1"}, {"WORLD_SIZE": "²"}])
def test_what_is_no_number_is_a_usage_error(wrong):
    with pytest.raises(UsageError, match="is not a number"):
        meeting(TORCHRUN | wrong)


def test_ranks_of_one_machine_share_its_cores():
    assert ranks_here({"LOCAL_WORLD_SIZE": "8"}) == 8
    assert ranks_here({"SLURM_STEP_TASKS_PER_NODE": "8(x2),4"}) == 8
    assert ranks_here({}) == 1
