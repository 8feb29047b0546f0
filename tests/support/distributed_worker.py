"""Every process of test_distributed.py runs this: all cases that need a process group, in one launch.

    torchrun --nproc-per-node N tests/support/distributed_worker.py REPORT [nccl]

Rank 0 writes {case: error or null} to REPORT.
"""

import datetime
import json
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

import batch_cases  # noqa: F401, they register themselves
import shard_cases  # noqa: F401
from distributed_harness import CASES, World, leave


def main(report, backend="gloo"):
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    # This is longer than any case and shorter than a launch may last, so that a rank that waits in vain says where.
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=90))
    world, errors = World(rank, size, device), {}
    for name, function in CASES.items():
        try:
            function(world)
            error = None
        except Exception:
            error = traceback.format_exc()
        found = [(i, e) for i, e in enumerate(world.everyone(error)) if e]
        errors[name] = None if not found else f"rank {found[0][0]}: {found[0][1]}"
    if rank == 0:
        Path(report).write_text(json.dumps(errors))


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
