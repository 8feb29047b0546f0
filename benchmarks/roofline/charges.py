"""What a call is charged for besides FLOPs and bytes. The counts of our kernels change here when the kernels do."""

from __future__ import annotations

from benchmarks.roofline.chips import Assumption

# seconds from the start of a kernel that does next to nothing to the start of the next: on an H200 the 34 short ones of
# a call take 1.7 µs each, gaps apart (docs/gpu.md)
LAUNCH = 2e-6
# seconds of an idle device around the one count that compaction reads back, if the host is ready with all that follows
READ_BACK = 10e-6
# beside products and row kernels, of a call and of each of its chunks: with these, 38 kernels of one chunk and 50 of
# five, where the profiles of docs/gpu.md have 38 and 51
SMALL_KERNELS, SMALL_KERNELS_OF_A_CHUNK = 33, 1
# instructions per logit in the first pass, which adds up, and the second, which writes, by the bytes of a logit, and of
# the one pass that does both: the most that `python -m drpo_kernels compile` lets binaries for sm_90 take
TWO_READS = {4: (8.0, 7.5), 2: (9.0, 8.5)}
ONE_READ = 9.0
# of both passes over bf16 logits, in the kernel that ISSUE was measured on
MEASURED = 31.5
# instructions that a multiprocessor issues in a clock, over the threads of a warp: four schedulers, 32 threads each
ISSUED = 128
ISSUE = Assumption(0.48, "an H200 in the kernel on bf16 logits that reads twice, 1664 rows in 0.492 ms (docs/gpu.md)")
