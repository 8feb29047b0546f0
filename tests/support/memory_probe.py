"""`python -m memory_probe CASE` prints how many MiB one forward and backward take at their peak."""

import sys

import torch

import drpo_kernels


def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def reset_peak():
    with open("/proc/self/clear_refs", "w") as control:
        control.write("5")


def tensors(rows, size, vocab, dtype, frozen):
    hidden = torch.randn(rows, size, dtype=dtype).requires_grad_()
    weight = torch.empty(vocab, size, dtype=dtype).normal_().requires_grad_(not frozen)
    return hidden, weight, torch.randint(vocab, (rows,)), torch.full((rows,), -4.0), torch.randn(rows)


def step(case, rows, size, vocab):
    """Return the function to measure, whose inputs exist already."""
    frozen = case.startswith("frozen")
    dtype = torch.bfloat16 if case.endswith("bf16") else torch.float32
    hidden, weight, targets, old, advantages = tensors(rows, size, vocab, dtype, frozen)
    options = {"backend": "torch"}
    if case.endswith(("bf16", "strided")) and not case.startswith("planned"):
        options["workspace_bytes"] = 16 * 2**20
    if case.startswith("main-grad"):
        options["main_grad"] = torch.empty(vocab, size).normal_()  # it is written to, so that its pages exist already
    if case == "sparse":
        options["sparse_grad"] = 0.2
    if case == "gspo":
        options |= {"objective": drpo_kernels.GSPO(), "cu_seqlens": torch.arange(0, rows + 1, rows // 4)}

    def measure():
        if case == "strided":
            sequences = hidden.detach().view(4, rows // 4, size)[:, :-1]
            drpo_kernels.linear_token_logprobs(sequences, weight, targets.view(4, -1)[:, :-1], **options)
        elif case == "logprobs":
            logprobs, entropy = drpo_kernels.linear_token_logprobs(hidden, weight, targets, backend="torch")
            (logprobs.sum() + entropy.sum()).backward()
        else:
            drpo_kernels.linear_policy_loss(hidden, weight, targets, old, advantages, **options).loss.backward()

    return measure


SIZES = {  # rows, hidden size, vocabulary
    "policy": (16_384, 64, 20_000),  # logits of 1.2 GiB
    "logprobs": (4_096, 64, 20_000),  # 0.31 GiB
    "gspo": (4_096, 64, 20_000),
    "frozen-bf16": (64, 512, 131_072),  # a head of 128 MiB
    "main-grad-bf16": (64, 512, 131_072),
    "strided": (16_384, 2048, 1024),  # hidden states of 128 MiB
    "sparse": (262_144, 16, 64),  # logits of 64 MiB, up to 4.5 million entries; dX of 16 MiB
    "planned": (2048, 512, 32_768),
    "planned-bf16": (2048, 512, 32_768),
    "planned-small": (65_536, 64, 1024),
}


def main(case):
    rows, size, vocab = SIZES[case]
    step(case, 64, 8, 64)()  # this loads libraries and starts thread pools
    torch.randn(512, 512) @ torch.randn(512, 512)
    measure = step(case, rows, size, vocab)
    reset_peak()
    before = status("VmRSS")
    measure()
    print(status("VmHWM") - before)


main(sys.argv[1])
