"""Tests of packed batches: padding behind the last sequence, and offsets that nobody has checked."""

import pytest
import torch

import drpo_kernels as dk
from drpo_kernels.tokens import Sequences
from problems import BACKENDS, random_problem

TOKENS, USED = 12, 9
OFFSETS = torch.tensor([0, 4, 4, 9])
every_backend = pytest.mark.parametrize("backend", BACKENDS)
REDUCTIONS = ["token-mean", "seq-mean-token-mean"]


def batch(device):
    """Return a batch whose last three tokens are padding. They are in no sequence, and may hold anything."""
    made = random_problem(5, (1, TOKENS), 8, 19)
    tensors = [made.hidden[0], made.weight, made.targets[0], made.old_logprobs[0]]
    hidden, weight, targets, old = (x.clone().to(device) for x in tensors)
    hidden[USED:], old[USED:], targets[USED:] = torch.nan, torch.nan, -100
    return hidden, weight, targets, old


@every_backend
@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
@pytest.mark.parametrize("objective", [dk.DRPO(0.2), dk.GSPO()])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_masked_padding_is_in_no_sequence(reduction, objective, dtype, validate, backend, device):
    hidden, weight, targets, old = batch(device)
    advantages = torch.tensor([1.0, 3.0, -2.0], device=device)
    mask = torch.arange(TOKENS, device=device) < USED
    options = {"objective": objective, "reduction": reduction, "backend": backend, "validate": validate}
    options["cu_seqlens"] = OFFSETS.to(device, dtype)

    def gradients(rows, mask):
        leaf, head = hidden[:rows].clone().requires_grad_(), weight.clone().requires_grad_()
        out = dk.linear_policy_loss(leaf, head, targets[:rows], old[:rows], advantages, mask, **options)
        out.loss.backward()
        return out.loss, leaf.grad[:USED], head.grad, leaf.grad[USED:]

    *want, _ = gradients(USED, None)
    *got, beyond = gradients(TOKENS, mask)
    assert all(map(torch.equal, got, want))
    assert (beyond == 0).all()


@every_backend
@pytest.mark.parametrize("objective", [dk.DRPO(0.2), dk.GSPO()])
@pytest.mark.parametrize("per_sequence", [True, False])
def test_a_token_of_the_mask_must_be_in_a_sequence(per_sequence, objective, backend, device):
    hidden, weight, targets, old = batch(device)
    mask = torch.arange(TOKENS, device=device) < USED + 1
    hidden[USED], old[USED], targets[USED] = 0.0, -1.0, 3
    advantages = torch.ones(3 if per_sequence else TOKENS, device=device)
    options = {"objective": objective, "backend": backend, "cu_seqlens": OFFSETS.to(device)}
    arguments = hidden, weight, targets, old, advantages, mask
    with pytest.raises(ValueError, match="cu_seqlens must cover every token in the mask, got its end 9 and a token"):
        dk.linear_policy_loss(*arguments, validate=True, **options)
    assert dk.linear_policy_loss(*arguments, validate=False, **options).loss.isnan(), "where values are not read"


BAD = [[0, 4, 3, 9], [0, 4, 10**7], [-3, 4, 9], [0, -(2**40), 9], [2**40, 2**41], [5, 9], [9, 0]]


@every_backend
@pytest.mark.parametrize("offsets", BAD, ids=str)
def test_bad_offsets_reach_no_other_memory(offsets, backend, device):
    """With the check, bad offsets are an error. Without it, the call gives some number that depends on these tokens
    alone.
    """
    made = random_problem(6, (1, 9), 8, 19)
    hidden, weight = made.hidden[0].to(device), made.weight.to(device)
    targets, old = made.targets[0].to(device), made.old_logprobs[0].to(device)
    offsets = torch.tensor(offsets, device=device)
    advantages = torch.ones(len(offsets) - 1, device=device)
    options = {"objective": dk.GSPO(), "reduction": "seq-mean-token-mean", "backend": backend, "cu_seqlens": offsets}
    with pytest.raises(ValueError, match="cu_seqlens must"):
        dk.linear_policy_loss(hidden, weight, targets, old, advantages, validate=True, **options)
    leaf = hidden.clone().requires_grad_()
    dk.linear_policy_loss(leaf, weight, targets, old, advantages, validate=False, **options).loss.backward()
    assert leaf.grad.shape == hidden.shape
    sequences = Sequences(targets.shape, offsets)
    assert (sequences.ids >= 0).all()
    assert (sequences.ids <= sequences.count).all()


def test_sums_over_sequences_have_their_gradient(device):
    """The gradient is right also where tokens are in no sequence, and where a sequence is empty."""
    sequences = Sequences(torch.Size([12]), OFFSETS.to(device))
    values = torch.randn(12, dtype=torch.float64, device=device).requires_grad_()

    def of_sequences(values):
        sums = sequences.sum(values.square())
        return sums, sequences.expand(sums.sin())[:USED]

    assert torch.autograd.gradcheck(of_sequences, values)
    assert torch.autograd.gradgradcheck(of_sequences, values)
    assert sequences.expand(values[:3].detach())[USED:].isnan().all()
