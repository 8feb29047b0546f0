"""`python -m benchmarks.cpu`: forward and backward of the DRPO loss on the CPU, float32, one JSON line per measurement.

For each workload: gradients first (a wrong method gets no time), then the peak memory of each method in a process of
its own, then the times of all methods interleaved in this process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.exact import agrees, exact_result, gradient_errors
from benchmarks.memory import peak_in_fresh_process
from benchmarks.methods import METHODS, OBJECTIVE, Case, Method, Step
from benchmarks.provenance import ROOT, provenance
from benchmarks.timing import interleaved_seconds
from benchmarks.workloads import KINDS, Inputs, Shape, make_inputs

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

RESULTS = ROOT / "bench_results" / "cpu.jsonl"
FULL, QUICK = Shape(2048, 512, 32_768), Shape(64, 16, 512)
CASES = (*(Case(name) for name in METHODS), Case("linear_policy_loss", active_share=0.25))
# what a ratio is taken to, where it was measured in the same run
TIME_BASELINES = ("gemms", "eager", "trl", "linear_policy_loss")
Record = dict[str, object]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write, print; 1 if one of the repository's own methods has no time."""
    options = _parser().parse_args(argv)
    shape, rounds = (QUICK, 2) if options.quick else (FULL, options.rounds)
    cases = [case for case in CASES if case.method in options.methods]
    source = provenance(_command(options))
    records: list[Record] = []
    out = options.out or (None if options.quick else RESULTS)
    progress = Progress(len(options.workloads) * len(cases) * (rounds + 3))
    for kind in options.workloads:
        records += [{**record, **source} for record in measure_workload(kind, shape, cases, rounds, progress)]
        if out is not None:  # after each workload: an interrupted run leaves what it has measured
            _write(out, records)
    progress.close()
    print("\n".join(_summary(records)))
    return int(any(record["status"] != "ok" and _runs_everywhere(METHODS[record["method"]]) for record in records))


def _runs_everywhere(method: Method) -> bool:
    return method.package is None and not method.gpu


def _write(out: Path, records: Sequence[Record]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def measure_workload(
    kind: str, shape: Shape, cases: Sequence[Case], rounds: int, progress: Progress
) -> Iterator[Record]:
    """A record per case, without its provenance."""
    progress.say(f"{kind}: inputs and exact gradients")
    inputs = make_inputs(kind, shape)
    by_share = {share: inputs.with_active_share(share) for share in {case.active_share for case in cases}}
    checked = _checked(cases, by_share, progress)
    steps = {case: step for case, (step, _) in checked.items() if step is not None}
    progress.say(f"{kind}: memory")
    peaks = _peaks(steps, by_share, progress)
    progress.say(f"{kind}: times")
    by_label = {case.label: step for case, step in steps.items()}
    seconds = interleaved_seconds(by_label, rounds, after_each=progress.advance)
    common = {"benchmark": "cpu", "workload": kind, "shape": vars(shape), "dtype": "float32"}
    common |= {"objective": str(OBJECTIVE), "entropy_nats": round(inputs.entropy, 3)}
    gradient_bytes = inputs.hidden.nbytes + inputs.weight.nbytes
    for case, (_, verdict) in checked.items():
        record = {**common, "method": case.method, "label": case.label, "active_share": case.active_share, **verdict}
        yield record | _times(case.label, seconds) | _memory(case.label, peaks, gradient_bytes)


def _checked(
    cases: Sequence[Case], by_share: dict[float, Inputs], progress: Progress
) -> dict[Case, tuple[Step | None, Record]]:
    """For each case its step, or None where it must not be timed, and {"status", "gradient_error"}."""
    exact = {share: exact_result(inputs) for share, inputs in by_share.items()}
    checked = {}
    for case in cases:
        method = METHODS[case.method]
        step, verdict = None, {"status": "ok", "gradient_error": None}
        if method.gpu:
            checked[case] = None, verdict | {"status": "needs a GPU"}
            progress.advance()
            continue
        try:
            step = method.prepare(by_share[case.active_share])
            found = step()
            if not method.floor:
                verdict["gradient_error"] = gradient_errors(found, exact[case.active_share])
                if not agrees(verdict["gradient_error"]):
                    step, verdict["status"] = None, "wrong gradients"
        except Exception as error:  # a peer's failure is a row, not the end of the run
            step, verdict["status"] = None, _status(method, error)
        checked[case] = step, verdict
        progress.advance()
    return checked


def _status(method: Method, error: Exception) -> str:
    """In a word: messages name paths of this machine."""
    if method.package and isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == method.package:
        return f"{method.package} not installed"
    traceback.print_exception(error)
    return f"failed: {type(error).__name__}"


def _peaks(steps: dict[Case, Step], by_share: dict[float, Inputs], progress: Progress) -> dict[str, int | None]:
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = {share: Path(folder, f"{share}.pt") for share in by_share}
        for share, inputs in by_share.items():
            inputs.save(paths[share])
        for case in steps:
            if not METHODS[case.method].floor:
                peaks[case.label] = peak_in_fresh_process(paths[case.active_share], case.method)
            progress.advance()
    return peaks


def _times(label: str, seconds: dict[str, list[float]]) -> Record:
    medians = {name: statistics.median(samples) for name, samples in seconds.items()}
    samples = seconds.get(label)
    if samples is None:
        return {"seconds": None, "median_s": None, "min_s": None, "max_s": None, "time_ratio": None}
    return {
        "seconds": [round(sample, 6) for sample in samples],
        "median_s": medians[label],
        "min_s": min(samples),
        "max_s": max(samples),
        "time_ratio": {name: medians[label] / medians[name] for name in TIME_BASELINES if name in medians},
    }


def _memory(label: str, peaks: dict[str, int | None], gradient_bytes: int) -> Record:
    """The peak over the state before the call, and the same less the gradients that the call hands back."""
    peak, eager = peaks.get(label), peaks.get("eager")
    return {
        "peak_extra_bytes": peak,
        "peak_beyond_gradients_bytes": None if peak is None else peak - gradient_bytes,
        "memory_ratio": {"eager": peak / eager} if peak is not None and eager else None,
    }


def _summary(records: Sequence[Record]) -> Iterator[str]:
    for record in records:
        median, peak = record["median_s"], record["peak_extra_bytes"]
        time = record["status"] if median is None else f"{median * 1e3:.1f} ms"
        memory = "" if peak is None else f"{peak / 2**20:.0f} MiB"
        yield f"{record['workload']:<8}  {record['label']:<42}  {time:>20}  {memory:>10}"


class Progress:
    """A tqdm bar where there is one, lines on stderr where not."""

    def __init__(self, total: int):
        self._bar = tqdm(total=total, leave=False) if tqdm else None
        self.advance: Callable[[], object] = self._bar.update if self._bar else lambda: None
        self.close: Callable[[], None] = self._bar.close if self._bar else lambda: None

    def say(self, what: str) -> None:
        if self._bar:
            self._bar.set_description(what)
        else:
            print(what, file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two rounds; written only where --out says")
    parser.add_argument("--out", type=Path, help=f"JSON lines; default {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each method (default 5)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--workloads", nargs="+", choices=KINDS, default=list(KINDS))
    return parser


def _command(options: argparse.Namespace) -> str:
    """The command that repeats this run, without the place of its output."""
    words = ["python -m benchmarks.cpu"]
    defaults = _parser().parse_args([])
    for name in ("rounds", "methods", "workloads"):
        value = getattr(options, name)
        if value != getattr(defaults, name):
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return " ".join(words + (["--quick"] if options.quick else []))


if __name__ == "__main__":
    sys.exit(main())
