"""Equal parameters on every rank after several steps under DistributedDataParallel."""

import os
import subprocess
import sys

WORKER = """
import os, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from ssl_bench.optim import LAMB, LARS, TVLARS

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
for make in (LARS, LAMB, TVLARS, lambda p, lr: TVLARS(p, lr=lr, variant="released")):
    torch.manual_seed(rank)  # DDP broadcasts the first rank's parameters
    module = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    model = DistributedDataParallel(module)
    optimizer = make(module.parameters(), lr=0.1)
    start = torch.cat([p.detach().flatten() for p in module.parameters()])
    for k in range(5):
        optimizer.zero_grad()
        data = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * k + rank))  # each rank its own
        (model(data) - 1).square().mean().backward()
        optimizer.step()
    mine = torch.cat([p.detach().flatten() for p in module.parameters()])
    seen = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(seen, mine)
    assert torch.equal(*seen), make
    assert not torch.equal(mine, start), make
dist.barrier()
print("equal", flush=True)
os._exit(0)  # gloo's threads now and then abort an ordinary exit ("terminate called without an active exception")
"""


def test_ranks_hold_equal_parameters(tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path / "rendezvous")],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in ranks]
    for process, (out, err) in zip(ranks, outputs, strict=True):
        assert process.returncode == 0, err
        assert out.strip() == "equal"
