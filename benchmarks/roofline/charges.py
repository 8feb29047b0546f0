"""What a call is charged for besides FLOPs and bytes. When our kernels change, so do their counts in this file."""

from __future__ import annotations

# Seconds for a kernel that does next to nothing. On an H200 the 34 short kernels of a call take 1.7 µs each.
LAUNCH = 2e-6
# Seconds for which the device is idle while compaction reads a count back, if the host has prepared all that follows.
READ_BACK = 10e-6
# Kernels beside products and row kernels, per call and per chunk. They make 38 kernels for one chunk and 50 for five;
# the profiles in docs/gpu.md have 38 and 51.
SMALL_KERNELS, SMALL_KERNELS_OF_A_CHUNK = 33, 1
# Instructions per logit by the bytes of a logit: in the pass that adds up and in the pass that writes. ONE_READ is for
# the kernel that does both in one pass. `python -m drpo_kernels compile` allows binaries for sm_90 no more than these.
TWO_READS = {4: (8.0, 7.5), 2: (9.0, 8.5)}
ONE_READ = 9.0
# Instructions that a multiprocessor issues in a clock at best, four schedulers for 32 threads each, and the share of
# it that is assumed at worst: that of a kernel of 31.5 instructions per logit.
ISSUED, ISSUE_SHARE = 128, 0.48
ISSUE_SOURCE = "an H200 in the kernel on bf16 logits that reads twice, 1664 rows in 0.492 ms (docs/gpu.md)"
