"""`python -m interrupted_calls cpu|guarded` makes calls that a signal strikes at any moment, and compares the settings
after each.

It prints how many calls were struck, and after which of them a setting had changed.
"""

import random
import signal
import sys
import time

import pytest
import torch

import drpo_kernels as dk
from drpo_kernels.backends import matmul
from drpo_kernels.backends.matmul import CUDA_SETTINGS, NARROW_SUMS, PER_BACKEND

EVERY = tuple({setting: None for settings in CUDA_SETTINGS.values() for setting in settings})
LEVELS = [("generic", "all"), ("cuda", "all"), ("cuda", "matmul"), ("mkldnn", "all"), ("mkldnn", "matmul")]


def settings():
    """Return every setting that a product may depend on, and those that a thread has of its own."""
    found = [getattr(torch.backends.cuda.matmul, name) for name in NARROW_SUMS]
    found += [getattr(torch._C, f"_get_cublas_{name}")() for name in NARROW_SUMS]
    found += [torch.is_grad_enabled(), torch.is_inference_mode_enabled()]
    found += [torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutocastCPU)]
    if PER_BACKEND:
        return [*found, *(torch._C._get_fp32_precision_getter(*level) for level in LEVELS)]
    return [*found, torch.get_float32_matmul_precision()]


def allow_everything():
    torch.set_float32_matmul_precision("medium")
    for name in NARROW_SUMS:
        setattr(torch.backends.cuda.matmul, name, True)


def guard_every_product(patch):
    patch.setattr(matmul, "settings_of", lambda *_: EVERY)
    patch.setattr(matmul, "cpu_rounds_float32", lambda: False)


def call(objective=None, rows=24):
    """Compute a loss and log-probs, with products that are large enough for oneDNN to round them."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(rows, 16, generator=generator), torch.randn(37, 16, generator=generator)
    targets, old = torch.randint(37, (rows,), generator=generator), -3 * torch.rand(rows, generator=generator)
    hidden.requires_grad_()
    options = {"backend": "torch", "workspace_bytes": 37 * 4 * 12}
    out = dk.linear_policy_loss(
        hidden, weight.requires_grad_(), targets, old, torch.ones(rows), objective=objective or dk.DRPO(), **options
    )
    out.loss.backward()
    dk.linear_token_logprobs(hidden, weight, targets, **options)
    return out.loss.item()


def interrupted(delay):
    """Return whether a signal has struck a call `delay` seconds after the call began."""
    try:
        signal.setitimer(signal.ITIMER_REAL, delay)
        call()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        return True
    return False


def interrupts(seconds):
    """Return (how many calls a signal has struck, after which of them a setting had changed)."""
    generator, before, count, changed = random.Random(0), settings(), 0, []
    signal.signal(signal.SIGALRM, signal.default_int_handler)  # the handler of SIGINT
    for _ in range(2):  # the first call loads modules
        start = time.monotonic()
        call()
    usual = time.monotonic() - start
    while time.monotonic() < start + seconds:
        count += interrupted(generator.uniform(1e-6, usual))
        if settings() != before:
            changed.append(count)
            torch.set_grad_enabled(True)
            allow_everything()
    return count, changed


if __name__ == "__main__":
    torch.set_num_threads(1)
    allow_everything()
    if sys.argv[1] == "guarded":
        guard_every_product(pytest.MonkeyPatch())
    print(interrupts(seconds=4))
