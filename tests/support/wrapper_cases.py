"""The fused head under DDP, FSDP1, FSDP2, tensor parallelism and DeepSpeed has the gradients of one process on all
data.

The expectation is eager: one process has the model's own logits of every rank's rows, and the loss by autograd is
divided by the number of all their tokens. The two float32 computations of a gradient add in another order, hence 1e-5
of its norm.
"""

import contextlib
import copy
import inspect
from functools import partial

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from distributed_harness import case
from drpo_kernels.distributed import global_normalizer
from drpo_kernels.integrations.transformers import WithAuxiliaryLoss, add_fused_head
from fused_models import V, eager, logprobs_of, loss_of, make, make_batch

BOUND = 1e-5
AUXILIARY = 0.02


# --- data and expectations --------------------------------------------------------------------------------------------


def batches_of(rank, size, steps=1, idle="tokens"):
    """Return a rank's micro-batches, each of its own shape. In the first, one rank has no active row: the last one has
    no valid token ("tokens"), or the first one has no advantage ("advantages").
    """
    rows = 2 + rank % 2
    batches = [
        make_batch(rows, length=8 + rank + step, seed=10 * rank + step, left_padding=(1, 0, 2)[:rows])
        for step in range(steps)
    ]
    if idle == "tokens" and rank == size - 1:
        batches[0].mask[:] = False
    if idle == "advantages" and rank == 0:
        batches[0].advantages[:] = 0
    return batches


def own_loss(logprobs, entropy, batch):
    """This is a loss of the user's own."""
    return -(batch.mask * (batch.advantages[:, None] + 0.3) * logprobs + 0.05 * entropy).sum()


def expected(model, size, steps, kind, idle="tokens"):
    """Return the gradients by name of everybody's micro-batches in one process."""
    model = copy.deepcopy(model)
    batches = [b for rank in range(size) for b in batches_of(rank, size, steps, idle)]
    total = sum(b.mask.sum() for b in batches)
    for batch in batches:
        outputs = model(**batch.inputs)
        loss, logprobs, entropy = eager(outputs.logits, batch)
        loss = (own_loss(logprobs, entropy, batch) if kind == "own" else loss * batch.mask.sum()) / total
        if getattr(outputs, "aux_loss", None) is not None:
            loss = loss + AUXILIARY * outputs.aux_loss / size
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def fused_step(call, batch, normalizer, kind):
    """Return this rank's loss of a micro-batch, through the wrapped model. With "kept ids", `kept_ids` are all ids."""
    head = logprobs_of(batch) if kind == "own" else partial(loss_of(batch), normalizer=normalizer)
    if kind == "kept ids":
        head = partial(head, kept_ids=torch.arange(V).expand(*batch.targets.shape, V))
    result = call(**batch.inputs, fused_head=head)
    auxiliary = 0.0
    if isinstance(result, WithAuxiliaryLoss):
        result, auxiliary = result.result, AUXILIARY * result.aux_loss
    if kind == "own":
        return own_loss(*result, batch) / normalizer + auxiliary
    assert result.computed.sum() <= batch.mask.sum()
    return result.loss + auxiliary


def whole(gradient):
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def agree(got, want):
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    largest = max(g.norm() for g in want.values())
    for name, exact in want.items():
        error = (got[name] - exact).norm() / torch.maximum(exact.norm(), 1e-3 * largest)
        assert error <= BOUND, f"gradient of {name}: {error:.1e} of its norm from one process"


def gradients_of(model):
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


# --- DDP and FSDP -----------------------------------------------------------------------------------------------------


def shard(model, layout, **options):
    """Shard by FSDP2. The root is always a unit, alone for "root", and beside a unit for each layer otherwise. The head
    is a unit with the norm for "head", and by itself for "bare head".
    """
    if layout != "root":
        for layer in model.model.layers:
            fully_shard(layer, **options)
    if layout == "bare head":
        fully_shard(model.lm_head, **options)
    if layout == "head":
        group = [model.model.norm, model.lm_head]
        # FSDP2 wants a shared parameter in one group.
        tied = model.lm_head.weight is model.model.embed_tokens.weight
        fully_shard([model.model.embed_tokens, *group] if tied else group, **options)
    return fully_shard(model, **options)


def synchronised(wrapped, last):
    """Return the context of a micro-batch, of which only the last exchanges gradients."""
    if isinstance(wrapped, DistributedDataParallel):
        return contextlib.nullcontext() if last else wrapped.no_sync()
    wrapped.set_requires_gradient_sync(last)
    return contextlib.nullcontext()


@case("ddp", wrap=DistributedDataParallel, tied=True)
@case("ddp", "idle", wrap=DistributedDataParallel, idle="advantages")
@case("ddp", "accumulated", wrap=DistributedDataParallel, steps=3)
@case("ddp", "unused", wrap=partial(DistributedDataParallel, find_unused_parameters=True), kind="own")
@case("ddp", "kept ids", wrap=DistributedDataParallel, tied=True, kind="kept ids")
@case("ddp", "router", wrap=DistributedDataParallel, name="Qwen3Moe")
@case("root", wrap=partial(shard, layout="root"))
@case("root", "own", wrap=partial(shard, layout="root"), kind="own", tied=True)
@case("layers", wrap=partial(shard, layout="layers"), tied=True)
@case("layers", "accumulated", wrap=partial(shard, layout="layers"), steps=2, kind="own")
@case("layers", "kept", wrap=partial(shard, layout="layers", reshard_after_forward=False), name="Gemma3")
@case("layers", "idle", wrap=partial(shard, layout="layers"), idle="advantages")
@case("layers", "router", wrap=partial(shard, layout="layers"), name="Qwen3Moe")
@case("head", wrap=partial(shard, layout="head"))
@case("head", "own", wrap=partial(shard, layout="head", reshard_after_forward=True), kind="own")
@case("head", "own", "kept", wrap=partial(shard, layout="head", reshard_after_forward=False), kind="own")
@case("bare head", wrap=partial(shard, layout="bare head"))
@case("bare head", "kept ids", wrap=partial(shard, layout="bare head", reshard_after_forward=True), kind="kept ids")
@case("bare head", "own", wrap=partial(shard, layout="bare head"), kind="own", idle="advantages")
@case("head", "tied", wrap=partial(shard, layout="head"), tied=True, kind="own")
@case("head", "accumulated", wrap=partial(shard, layout="head"), steps=2, idle="advantages")
def gradients(world, wrap, name="Qwen3", tied=False, kind="loss", steps=1, idle="tokens"):
    options = {"output_router_logits": True} if name == "Qwen3Moe" else {}
    model = add_fused_head(make(name, tied=tied, **options))
    want = expected(model, world.size, steps, kind, idle)
    wrapped = wrap(model)
    batches = batches_of(world.rank, world.size, steps, idle)
    normalizer = global_normalizer([b.mask for b in batches])
    losses = []
    for i, batch in enumerate(batches):
        with synchronised(wrapped, i == steps - 1):
            losses.append(fused_step(wrapped, batch, normalizer, kind))
            losses[-1].backward()
    got = gradients_of(model)
    agree(got, want)
    if name != "Qwen3Moe" and kind != "own":
        assert (losses[0].item() == 0) == (world.rank == (0 if idle == "advantages" else world.size - 1))


@case("whole", wrap_head=False)
@case("head", wrap_head=True)
def fsdp1(world, wrap_head):
    model = add_fused_head(make("Qwen3"))
    want = expected(model, world.size, 1, "own")
    options = {"device_id": torch.device("cpu"), "use_orig_params": True}
    if wrap_head:
        model.lm_head = FullyShardedDataParallel(model.lm_head, **options)
    wrapped = FullyShardedDataParallel(model, **options)
    (batch,) = batches_of(world.rank, world.size)
    fused_step(wrapped, batch, global_normalizer(batch.mask), "own").backward()
    with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
        got = {name.replace("_fsdp_wrapped_module.", ""): g for name, g in gradients_of(wrapped).items()}
    agree(got, want)


@case()
def mixed_precision(world):
    """Under a bf16 policy hidden states and weight are bf16, and the tensors of a `partial` stay as they were."""
    model = add_fused_head(make("Qwen3"))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    wrapped = shard(model, "bare head", mp_policy=policy)
    (batch,) = batches_of(world.rank, world.size)
    old, seen = batch.old.clone(), {}

    def function(hidden, weight, **options):
        seen.update(hidden=hidden.detach(), weight=weight.detach().clone(), old=options["old_logprobs"])
        return loss_of(batch)(hidden, weight, **options)

    normalizer = global_normalizer(batch.mask)
    out = wrapped(**batch.inputs, fused_head=partial(function, old_logprobs=batch.old, normalizer=normalizer))
    out.loss.backward()
    assert seen["hidden"].dtype == seen["weight"].dtype == torch.bfloat16
    assert seen["old"].dtype == torch.float32 and torch.equal(seen["old"], old)
    assert not torch.equal(old.bfloat16().float(), old)
    logits = seen["hidden"].double() @ seen["weight"].double().T
    _, logprobs, _ = eager(logits, batch)
    assert (out.logprobs - logprobs)[out.computed].abs().sum() <= 1e-4 * out.computed.sum()
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients_of(model).values())


@case()
def adapters(world):
    """LoRA works on a frozen, sharded model."""
    import peft

    model = make("Qwen3")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(add_fused_head(model), lora)
    want = expected(wrapped, world.size, 1, "loss")
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(wrapped)
    (batch,) = batches_of(world.rank, world.size)
    fused_step(wrapped, batch, global_normalizer(batch.mask), "loss").backward()
    agree(gradients_of(wrapped), want)


# --- tensor parallelism -----------------------------------------------------------------------------------------------


def split_head(model, mesh):
    """Apply transformers' tensor parallelism to the head alone; in 5.17 its plan is the model's."""
    plan = {"lm_head.weight": "colwise", "lm_head": "colwise_gather_output"}
    if "tp_plan" in inspect.signature(apply_tensor_parallelism).parameters:
        apply_tensor_parallelism(model, mesh, plan)
    else:
        model.tp_plan = plan
        apply_tensor_parallelism(model, mesh)


@case("transformers", hf=True)
@case("transformers", "own", hf=True, kind="own")
@case("torch", hf=False)
def tensor_parallel(world, hf, kind="loss"):
    """The head is split over its vocabulary on a mesh called "tp", and every process has all tokens."""
    model = add_fused_head(make("Qwen3"))
    mesh = init_device_mesh("cpu", (world.size,), mesh_dim_names=("tp",))
    batch = make_batch()
    loss, logprobs, entropy = eager((reference := copy.deepcopy(model))(**batch.inputs).logits, batch)
    total = batch.mask.sum()
    (loss if kind == "loss" else own_loss(logprobs, entropy, batch) / total).backward()
    want = {name: p.grad for name, p in reference.named_parameters()}
    if hf:
        split_head(model, mesh)
    else:
        parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    assert model.lm_head.weight.to_local().shape[0] < want["lm_head.weight"].shape[0]
    fused_step(model, batch, total, kind).backward()
    agree(gradients_of(model), want)
    with torch.no_grad():
        scored, _ = model(**batch.inputs, fused_head=logprobs_of(batch))
    assert (scored - logprobs).abs().max() <= BOUND
    full = model(**batch.inputs).logits  # the model's own logits still come through the wrapper's hooks
    assert full.shape[-1] == want["lm_head.weight"].shape[0]


@case("root", layout="layers")
@case("head", layout="head", kind="own")
def sharded_tensor_parallel(world, layout, kind="loss"):
    """FSDP2 shards a head that tensor parallelism has split, and half of the processes hold other tokens."""
    if world.size < 4:
        return
    model = add_fused_head(make("Qwen3"))
    mesh = init_device_mesh("cpu", (world.size // 2, 2), mesh_dim_names=("dp", "tp"))
    group = mesh["dp"].get_group()
    want = expected(model, world.size // 2, 1, kind)
    split_head(model, mesh["tp"])
    wrapped = shard(model, layout, mesh=mesh["dp"])
    (batch,) = batches_of(mesh["dp"].get_local_rank(), world.size // 2)
    fused_step(wrapped, batch, global_normalizer(batch.mask, group=group), kind).backward()
    agree(gradients_of(model), want)


@case()
def shards_of_another_kind(world):
    """A DTensor that is not known to be a vocabulary shard is refused, because FSDP's shards look the same."""
    model = add_fused_head(make("Qwen3"))
    mesh = init_device_mesh("cpu", (world.size,), mesh_dim_names=("model",))
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel()})
    batch = make_batch()
    with pytest.raises(TypeError, match=r"got DTensor \(mesh \('model',\)\): .* named 'tp'"):
        model(**batch.inputs, fused_head=loss_of(batch))
