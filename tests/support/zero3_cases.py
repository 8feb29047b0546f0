"""The fused head under DeepSpeed's ZeRO-3, on CPU processes with gloo; this needs deepspeed."""

import copy

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad

from distributed_harness import case
from drpo_kernels.distributed import global_normalizer
from drpo_kernels.integrations.transformers import add_fused_head
from fused_models import make
from wrapper_cases import agree, batches_of, expected, fused_step

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    # A persistence threshold of 0 keeps no parameter whole because it is small.
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,  # the default is 1.0
}


@case("loss")
@case("own", kind="own")
@case("tied", kind="own", tied=True)
@case("router", name="Qwen3Moe")
@case("softcap", name="Gemma3", idle="advantages")
@case("accumulated", steps=2)
def zero3(world, kind="loss", tied=False, name="Qwen3", steps=1, idle="tokens"):
    options = {"output_router_logits": True} if name == "Qwen3Moe" else {}
    model = add_fused_head(make(name, tied=tied, **options))
    want = expected(model, world.size, steps, kind, idle)
    whole = copy.deepcopy(model.state_dict())
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        config={**CONFIG, "gradient_accumulation_steps": steps},
    )  # fmt: skip
    assert engine.module.lm_head.weight.numel() == 0  # the weight is released
    batches = batches_of(world.rank, world.size, steps, idle)
    # DeepSpeed divides by the number of ranks and by the accumulation steps.
    normalizer = global_normalizer([b.mask for b in batches], loss_divisor=steps)
    for batch in batches:
        engine.backward(fused_step(engine, batch, normalizer, kind))
        if batch is not batches[-1]:
            engine.step()
    agree({name: safe_get_full_grad(p) for name, p in model.named_parameters()}, want)
    assert engine.module.lm_head.weight.numel() == 0
    engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), whole[name] - want[name], rtol=1e-5, atol=1e-5)
    engine.destroy()
