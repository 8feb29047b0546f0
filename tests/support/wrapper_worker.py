"""Every process of test_wrappers.py runs this: the cases of wrapper_cases.py or zero3_cases.py, in one launch.

    torchrun --nproc-per-node N tests/support/wrapper_worker.py MODULE REPORT [CASE ...]

Rank 0 writes {case: error or null} to REPORT.
"""

import datetime
import importlib
import json
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from distributed_harness import CASES, World, leave


def main(module, report, *names):
    torch.set_num_threads(1)
    # This is longer than any case and shorter than a launch may last, so that a rank that waits in vain says where.
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    importlib.import_module(module)
    world = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), torch.device("cpu"))
    errors = {}
    for name in names or CASES:
        try:
            CASES[name](world)
            error = None
        except Exception:
            error = traceback.format_exc()
        found = [(i, e) for i, e in enumerate(world.everyone(error)) if e]
        errors[name] = None if not found else f"rank {found[0][0]}: {found[0][1]}"
    if world.rank == 0:
        Path(report).write_text(json.dumps(errors))


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
