"""From what a caller passes to what the sweeps take: flattened rows, packed inputs, and a source of logits."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from drpo_kernels import validation, value_checks
from drpo_kernels.aggregation import TokenCoefficients, reduction_coefficients
from drpo_kernels.autograd import KeptLogits, LinearLogprobs, LinearPolicyLoss, ReadyLogprobs, ReadyPolicyLoss
from drpo_kernels.backends import choose_backend
from drpo_kernels.backends.row_loss import recordable
from drpo_kernels.backends.rows import FIELDS, Field, RowKind, Terms, Transform
from drpo_kernels.backends.spec import Execution, Spec, op_spec
from drpo_kernels.graphs import check_not_exported, positions
from drpo_kernels.options import LogprobOptions, PolicyOptions
from drpo_kernels.tokens import Sequences, scorable

Options = TypeVar("Options", bound=LogprobOptions)

# These fields of an `Execution` are options of the same name.
EXECUTION_OPTIONS = (
    "logits_dtype", "workspace_bytes", "vocab_shard", "head_dtype", "batch_invariant", "sparse_grad",
)  # fmt: skip


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype autocast casts matrix products to on this device, or None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


class LinearSource:
    """The logits hidden [..., H] @ weight [V, H].T + bias. `main_grad` and `loss_scale` are the options so named."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        main_grad: Tensor | None = None,
        loss_scale: float = 1.0,
    ):
        autocast = autocast_dtype(hidden.device) if isinstance(hidden, Tensor) and not hidden.is_meta else None
        validation.check_head(hidden, weight, bias, autocast)
        self.tensor, self.weight, self.bias = hidden, weight, bias
        self.lead, self.vocab = hidden.shape[:-1], weight.shape[0]
        self.compute_dtype = autocast if autocast and hidden.dtype != torch.float64 else hidden.dtype
        with_gradient = torch.is_grad_enabled()
        self.needs_grad = [with_gradient and x is not None and x.requires_grad for x in (hidden, weight, bias)]
        validation.check_main_grad(main_grad, loss_scale, weight, self.compute_dtype, self.needs_grad[1])
        self.main_grad, self.loss_scale = main_grad, loss_scale

    def fused_loss(self, inputs: "PolicyInputs") -> Callable[[], tuple[Tensor, Tensor]]:
        """The fused route to (loss, outcome [len(Outcome), N]), to be called."""
        spec = inputs.problem.spec(inputs.terms, inputs.every_row)
        return partial(
            LinearPolicyLoss.apply, self.tensor, self.weight, self.bias, inputs.problem.flat_targets, inputs.rows,
            self.main_grad, float(self.loss_scale), op_spec(spec, self.tensor), self.needs_grad,
            bool(spec.execution.sparse_grad),
        )  # fmt: skip

    def logprobs(self, targets: Tensor, rows: Tensor, spec: Spec) -> tuple[Tensor, Tensor, Tensor]:
        inputs = self.tensor, self.weight, self.bias, targets, rows, self.main_grad
        return LinearLogprobs.apply(*inputs, op_spec(spec, self.tensor), self.needs_grad)

    def kept_logits(self, ids: Tensor, spec: Spec) -> Tensor:
        """The differentiable logits [N, K] of ids [N, K] int64. Where an id is below 0, a logit is a finite number."""
        if spec.execution.backend == "reference":
            index = positions((ids >= 0).any(1))  # the other rows may carry anything
            with torch.autocast(ids.device.type, enabled=False):
                x = self.selected_logits(index, spec.vocab, statistics_dtype(self.compute_dtype))
            x = x.gather(1, ids[index].clamp(min=0))
            return x.new_zeros(ids.shape).index_put((index,), x)
        return KeptLogits.apply(self.tensor, self.weight, self.bias, ids, op_spec(spec, self.tensor), self.needs_grad)

    def selected_logits(self, index: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
        """Compute the logits of the indexed rows in the naive way, for the reference backend."""
        from drpo_kernels.reference import head_logits, rounded

        hidden, weight, bias = self.tensor.reshape(-1, self.tensor.shape[-1]), self.weight, self.bias
        if self.compute_dtype != hidden.dtype or self.compute_dtype != weight.dtype:
            hidden, weight = (rounded(x, self.compute_dtype, dtype) for x in (hidden, weight))
        return head_logits(hidden[index], weight[:vocab], None if bias is None else bias[:vocab], dtype)


class ReadySource:
    """A source whose logits [..., V] exist already."""

    def __init__(self, logits: Tensor, inplace: bool = False):
        validation.check_logits(logits)
        self.tensor, self.inplace = logits, inplace
        self.lead, self.vocab, self.compute_dtype = logits.shape[:-1], logits.shape[-1], logits.dtype

    def fused_loss(self, inputs: "PolicyInputs") -> Callable[[], tuple[Tensor, Tensor]]:
        """The fused route to (loss, outcome [len(Outcome), N]), to be called."""
        with_gradient = torch.is_grad_enabled() and self.tensor.requires_grad
        # `inplace` only permits it. Strided rows do without, and so does a graph, whose ops may not write to inputs.
        inplace = self.inplace and self.tensor.is_contiguous() and not torch.compiler.is_compiling()
        spec = op_spec(inputs.problem.spec(inputs.terms, inputs.every_row), self.tensor)
        targets, rows = inputs.problem.flat_targets, inputs.rows
        return partial(ReadyPolicyLoss.apply, self.tensor, targets, rows, spec, with_gradient, inplace)

    def logprobs(self, targets: Tensor, rows: Tensor, spec: Spec) -> tuple[Tensor, Tensor, Tensor]:
        return ReadyLogprobs.apply(self.tensor, targets, rows, op_spec(spec, self.tensor))

    def kept_logits(self, ids: Tensor, spec: Spec) -> Tensor:
        at = ids.clamp(min=0).view(*self.lead, ids.shape[1])
        x = self.tensor.gather(-1, at).view(ids.shape).to(statistics_dtype(self.compute_dtype))
        return x.masked_fill(ids < 0, 0)

    def selected_logits(self, index: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
        return self.tensor.reshape(-1, self.vocab)[index, :vocab].to(dtype)


Source = LinearSource | ReadySource


@dataclass(frozen=True)
class Problem(Generic[Options]):
    """A validated call: the source of its logits, its tokens, and its options."""

    source: Source
    targets: Tensor
    mask: Tensor | None
    options: Options
    unmasked: Tensor  # bool, shaped like targets
    sequences: Sequences | None  # how the tokens are grouped; None if they are not
    backend: str
    vocab: int  # the number of real entries, of all shards together

    @staticmethod
    def checked(source: Source, targets: Tensor, mask: Tensor | None, options: Options) -> "Problem[Options]":
        check_not_exported()
        shard = options.vocab_shard
        if shard is not None:
            assert isinstance(source, LinearSource)
            validation.check_vocab_shard(shard, source.weight, options.backend)
        vocab = source.vocab if shard is None else shard.total
        validation.check_tensor("targets", targets, floating=False)
        targets = validation.comparable(targets)
        validation.check_logprob_options(options, targets, source.lead, source.tensor, vocab)
        validation.check_mask(mask, targets)
        cu_seqlens = getattr(options, "cu_seqlens", None)
        grouped = cu_seqlens is not None or targets.dim() > 1
        sequences = Sequences(targets.shape, cu_seqlens) if grouped else None
        device = source.tensor.device
        backend = choose_backend(options.backend, device, source.compute_dtype, options.batch_invariant).name
        unmasked, vocab = _unmasked(mask, targets), options.vocab_size or vocab
        return Problem(source, targets, mask, options, unmasked, sequences, backend, vocab)

    @property
    def wants_values(self) -> bool:
        return value_checks.wants_values(self.options, self.targets)

    def check_values(self, valid: Tensor) -> None:
        """Check the values of every input but the policy's own, at the tokens in `valid` (shaped like targets)."""
        value_checks.check_mask_values(self.mask)
        cu_seqlens = getattr(self.options, "cu_seqlens", None)
        if cu_seqlens is not None:
            value_checks.check_packing_values(cu_seqlens, valid)
        from_logits = isinstance(self.source, ReadySource)
        value_checks.check_logprob_values(self.targets, self.temperature, valid, self.vocab, from_logits)

    @property
    def temperature(self) -> Tensor | None:
        """The temperature of each token, shaped like targets, or None if the option is a number."""
        given = self.options.temperature
        return _per_token(given, self.targets.shape, self.sequences) if isinstance(given, Tensor) else None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of statistics and losses: float32, or float64 for float64 inputs."""
        return statistics_dtype(self.source.compute_dtype)

    @property
    def flat_targets(self) -> Tensor:
        """The targets as a contiguous tensor [N] int64."""
        return recordable(self.targets.reshape(-1).to(torch.int64).contiguous())

    def spec(self, terms: Terms | None = None, every_row: bool = False) -> Spec:
        options, shard = self.options, self.options.vocab_shard
        shared = {name: getattr(options, name) for name in EXECUTION_OPTIONS if hasattr(options, name)}
        execution = Execution(self.backend, self.source.compute_dtype, every_row, **shared)
        local_vocab = self.vocab if shard is None else shard.real_rows(self.vocab)
        return Spec(local_vocab, Transform(options.logit_scale, options.softcap), execution, terms)

    def constant(self, valid: Tensor, value: float) -> Tensor:
        """A tensor [N] of one value, in the statistics dtype."""
        if torch.compiler.is_compiling():  # `full` would compile again for each new value
            return torch.ones(valid.shape, dtype=self.dtype, device=valid.device) * value
        return torch.full(valid.shape, value, dtype=self.dtype, device=valid.device)

    def flat(self, values: Tensor, valid: Tensor, otherwise: Tensor) -> Tensor:
        """Per-token values as [N] in the statistics dtype. Masked positions may carry anything and get `otherwise`."""
        return torch.where(valid, values.detach().reshape(-1).to(self.dtype), otherwise)

    def inv_temperature(self, valid: Tensor) -> Tensor:
        """1 / temperature, [N]."""
        if self.temperature is None:
            assert not isinstance(self.options.temperature, Tensor)
            return self.constant(valid, 1.0 / self.options.temperature)
        return 1 / self.flat(self.temperature, valid, self.constant(valid, 1.0))

    def logprob_rows(self) -> Tensor:
        """Check the values of a log-prob call and pack its rows, [len(Field), N]. Every unmasked row has a gradient."""
        if self.wants_values:
            self.check_values(self.unmasked)
        valid = self.unmasked.reshape(-1)
        fields = {
            Field.INV_TEMPERATURE: self.inv_temperature(valid),
            Field.KIND: valid.to(self.dtype) * RowKind.ACTIVE.value,
        }
        zeros = torch.zeros_like(fields[Field.KIND])
        return torch.stack([fields.get(row, zeros) for row in FIELDS])


@dataclass(frozen=True)
class PolicyInputs:
    """The inputs of a policy loss that each token has, flattened to [N]. `rows` holds nothing of masked positions."""

    problem: Problem[PolicyOptions]
    terms: Terms
    rows: Tensor
    valid: Tensor  # tokens in the mask that are scorable
    unscorable: Tensor  # tokens in the mask that have no old log-prob
    given: Tensor | None  # the old log-probs as the caller gave them, [N]; None if on-policy
    sequences: Sequences | None

    @property
    def every_row(self) -> bool:
        """Whether SKIPPED rows are swept too, so that no count is read back from the device."""
        return self.problem.options.compact == "none"

    @property
    def computed(self) -> Tensor:
        return self.rows[Field.KIND] > RowKind.SKIPPED.value


def policy_inputs(problem: Problem[PolicyOptions], old_logprobs: Tensor | None, advantages: Tensor) -> PolicyInputs:
    """Check the inputs of a policy loss, flatten them from the targets' shape and pack them as rows [len(Field), N]."""
    options = problem.options
    validation.check_policy_options(options, problem.targets, old_logprobs, advantages)
    sequences, unmasked = problem.sequences, problem.unmasked
    valid = unmasked if old_logprobs is None else unmasked & scorable(old_logprobs)
    advantages = _per_token(advantages, problem.targets.shape, sequences)
    if problem.wants_values:
        problem.check_values(valid)
        value_checks.check_policy_values(options, old_logprobs, valid)
        value_checks.check_advantage_values(advantages, valid)
    valid, unscorable = valid.reshape(-1), (unmasked ^ valid).reshape(-1)
    given = None if old_logprobs is None else old_logprobs.detach().reshape(-1)
    zeros = problem.constant(valid, 0.0)
    fields = _coefficients(problem, valid, sequences, zeros)
    fields[Field.OLD_LOGPROB] = (
        problem.constant(valid, torch.nan) if old_logprobs is None else problem.flat(old_logprobs, valid, zeros)
    )
    fields[Field.ADVANTAGE] = problem.flat(advantages, valid, zeros)
    ref = options.ref_logprobs
    fields[Field.REF_LOGPROB] = zeros if ref is None else problem.flat(ref, valid, zeros)
    fields[Field.INV_TEMPERATURE] = problem.inv_temperature(valid)
    fields[Field.KIND] = _kinds(options, fields, valid, sequences)
    if sequences is not None and sequences.offsets is not None:
        # A token in the mask but in no sequence is an error. If values are not checked, it makes the loss NaN.
        stray = valid & (sequences.ids == sequences.count)
        fields[Field.POLICY] = fields[Field.POLICY].masked_fill(stray, torch.nan)
        fields[Field.KIND] = fields[Field.KIND].masked_fill(stray, RowKind.ACTIVE.value)
    rows = torch.stack([fields[row] for row in FIELDS])
    kl_estimator = options.kl_estimator if options.kl_coef else None
    cap = math.inf if options.kl_cap is None else options.kl_cap
    flags = {"entropy_bonus": options.entropy_coef != 0, "z_loss": options.z_loss_coef != 0}
    terms = Terms(options.objective, kl_estimator, options.kl_importance, kl_cap=cap, **flags)
    return PolicyInputs(problem, terms, rows, valid, unscorable, given, sequences)


def _unmasked(mask: Tensor | None, targets: Tensor) -> Tensor:
    """Which tokens the mask leaves, bool and shaped like targets. A NaN in the mask counts as masked."""
    if mask is None:
        return torch.ones_like(targets, dtype=torch.bool)
    if not mask.dtype.is_floating_point:
        return mask.to(torch.bool)
    return (mask != 0) & (mask == mask)


def _per_token(values: Tensor, shape: torch.Size, sequences: Sequences | None) -> Tensor:
    """Expand values to the targets' shape. They are per token, [B], [B, 1], per packed sequence, or 0-d."""
    if values.shape == shape:
        return values
    if sequences is not None and sequences.offsets is not None and values.shape == (sequences.count,):
        return sequences.expand(values).reshape(shape)
    if values.dim() and values.dim() == len(shape) - 1:
        values = values.unsqueeze(-1)
    return values.expand(shape)


def _coefficients(
    problem: Problem[PolicyOptions], valid: Tensor, sequences: Sequences | None, zeros: Tensor
) -> dict[Field, Tensor]:
    """The coefficients of the policy, KL, entropy and z-loss terms, [N] each. They are 0 where masked."""
    options = problem.options
    if isinstance(options.reduction, TokenCoefficients):
        policy = problem.flat(options.reduction.policy, valid, zeros)
        others = [policy if c is None else problem.flat(c, valid, zeros) for c in options.reduction[1:]]
    else:
        normalizer = options.normalizer
        if isinstance(normalizer, Tensor):
            normalizer = normalizer.detach().to(device=valid.device, dtype=problem.dtype)
        policy = reduction_coefficients(options.reduction, valid, sequences, normalizer, options.horizon, problem.dtype)
        others = [policy] * 3
    if options.token_weights is not None:
        policy = policy * problem.flat(options.token_weights, valid, zeros)
    scales = options.kl_coef, options.entropy_coef, options.z_loss_coef
    others = [scale * values if scale else zeros for scale, values in zip(scales, others, strict=True)]
    return dict(zip((Field.POLICY, Field.KL, Field.ENTROPY, Field.Z_LOSS), (policy, *others), strict=True))


def _kinds(options: PolicyOptions, fields: dict[Field, Tensor], valid: Tensor, sequences: Sequences | None) -> Tensor:
    """The RowKind of each row, [N]."""
    contributes = valid
    if options.objective.zero_if_no_advantage and options.compact != "none":
        contributes = needed = fields[Field.ADVANTAGE] != 0  # the advantage is 0 where a row is not valid
        if options.objective.sequence_level:
            assert sequences is not None
            # One token's advantage keeps its whole sequence, because its ratio is made of all tokens.
            needed = sequences.expand(sequences.sum(needed.to(torch.int64))) > 0
        scales = {Field.KL: options.kl_coef, Field.ENTROPY: options.entropy_coef, Field.Z_LOSS: options.z_loss_coef}
        for term, scale in scales.items():
            if scale:
                needed = needed | (fields[term] != 0)
        if needed is not contributes:
            contributes = valid & needed
    kinds = contributes.to(fields[Field.ADVANTAGE].dtype)
    return kinds + valid if options.compact == "mask" else RowKind.ACTIVE.value * kinds
