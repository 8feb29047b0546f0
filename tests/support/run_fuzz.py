"""Run many fuzz cases over all cores: `python tests/support/run_fuzz.py --cases 20000 --seed 0`, or `make fuzz`.

Cases run in chunks, each its own hypothesis run whose seed follows from --seed and the chunk's number: the same seed
gives the same cases on any number of cores. A failing case is shrunk and printed with the command that reruns it. The
last line is a summary in JSON: cases, seed, duration, failures; the exit status is 1 if there are any.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # before the package is imported, in the workers too

SUPPORT = Path(__file__).resolve().parent
sys.path[:0] = [str(SUPPORT.parents[1]), str(SUPPORT)]
CHUNK = 100


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=int(time.time()) // 86_400, help="default: the number of today")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--rerun", metavar="CASE", help="one case, as a failure printed it")
    options = parser.parse_args(argv)
    if options.rerun:
        return _rerun(options.rerun)
    start, count, failures = time.monotonic(), 0, []
    chunks = [(options.seed, number) for number in range(-(-options.cases // CHUNK))]
    with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=40) as pool:
        for done, failure in _progress(pool.imap_unordered(run_chunk, chunks), len(chunks)):
            count += done
            if failure is not None:
                failures.append(failure)
                print(f"\n{failure}\n", flush=True)
    seconds = round(time.monotonic() - start, 1)
    summary = {"cases": count, "seed": options.seed, "seconds": seconds, "failures": len(failures)}
    print(json.dumps(summary))
    return int(bool(failures))


def _progress(results, total: int):
    try:
        from tqdm import tqdm
    except ImportError:
        return results
    return tqdm(results, total=total, unit=f" x {CHUNK} cases", mininterval=5)


def run_chunk(chunk: tuple[int, int]) -> tuple[int, str | None]:
    """Run a chunk, and return (number of cases, what to print of the first failure or None)."""
    import torch
    from hypothesis import HealthCheck, Phase, given, seed, settings

    from fuzz import check
    from fuzz_cases import CASES

    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy warns in the interpreter when poison overflows
    count, last = 0, None

    @seed(chunk[0] * 1_000_000 + chunk[1])
    @settings(
        max_examples=CHUNK, database=None, deadline=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink], report_multiple_bugs=False,
    )  # fmt: skip
    @given(CASES)
    def cases(case):
        nonlocal count, last
        count += last is None
        try:
            check(case)
        except BaseException as error:
            last = case, error
            raise

    try:
        cases()
    except BaseException as error:
        # `pytest.raises` reports a missing error by a BaseException, which would end the worker: the pool would hang
        if last is None or isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        case, error = last  # hypothesis runs the smallest one last
        again = "'" + str(case).replace("'", '"') + "'"
        rerun = f"python tests/support/run_fuzz.py --rerun {again}"
        return count, f"FAILED {type(error).__name__}: {error}\n  rerun: {rerun}"
    return count, None


def _rerun(text: str) -> int:
    from fuzz import check
    from fuzz_cases import Case

    check(eval(text, {"Case": Case}))
    print("passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
