"""Who is who among the processes, by each launcher's names."""

import pytest

from ssl_bench.runtime import peers


def test_sruns_names_serve_and_a_batch_scripts_do_not():
    srun = {
        "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456",
        "SLURM_STEP_NODELIST": "node7,node9",
    }  # fmt: skip
    peers.adopt(srun)
    expected = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node7", "MASTER_PORT": "32956"}
    assert {key: srun[key] for key in expected} == expected
    script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"}
    peers.adopt(script)
    assert "RANK" not in script
    torchrun = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    peers.adopt(torchrun)
    assert (torchrun["RANK"], torchrun["WORLD_SIZE"]) == ("5", "8")  # torchrun under srun, one on each machine
    with pytest.raises(ValueError, match="RANK must be a number from 0 to WORLD_SIZE - 1, got RANK=2 and WORLD_SIZE=2"):
        peers.adopt({"RANK": "2", "WORLD_SIZE": "2"})
