"""DRPO through TRL: the same file on two CPU processes, on eight GPUs, and on several nodes.

    accelerate launch --config_file two_processes.yaml trl_drpo.py --use_cpu True --ddp_backend gloo --bf16 False
    accelerate launch --config_file fsdp2.yaml trl_drpo.py --model Qwen/Qwen3-8B --data trl-lib/DeepMath-103K

README.md beside this file has the launches in full. Without --model a tiny Qwen3 learns to answer one-digit sums, with
nothing downloaded; every option of DRPOConfig, and so of TRL's GRPOConfig, is an option of this command.
"""

import gc
from dataclasses import dataclass, field

from accelerate import PartialState
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import HfArgumentParser, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed

from drpo_kernels.integrations.trl import DRPOConfig, DRPOTrainer

CHARACTERS = ("<pad>", "<bos>", "<eos>", "<unk>", *"0123456789+=")


@dataclass
class Task:
    """What to train on what; the rest is DRPOConfig."""

    model: str | None = field(default=None, metadata={"help": "A model on the Hub or on disk; without it, a tiny one."})
    data: str = field(
        default="trl-lib/DeepMath-103K", metadata={"help": "With --model: a dataset with 'prompt' and 'solution'."}
    )


@dataclass
class Config(DRPOConfig):
    """DRPOConfig with defaults of this recipe."""

    output_dir: str = "drpo_out"
    objective: str = "DRPO(delta=0.2)"
    num_iterations: int = 2  # the second pass over a batch is off-policy: what DRPO is for
    logging_steps: float = 1
    report_to: str = "none"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate(CHARACTERS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **names)


def tiny_model() -> Qwen3ForCausalLM:
    set_seed(0)  # the same weights on every process
    config = Qwen3Config(
        vocab_size=len(CHARACTERS), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, initializer_range=0.1, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def sums() -> Dataset:
    """Every sum of two numbers below ten whose result has one digit."""
    pairs = [(a, b) for a in range(10) for b in range(10 - a)]
    return Dataset.from_dict({"prompt": [f"{a}+{b}=" for a, b in pairs], "solution": [str(a + b) for a, b in pairs]})


def sum_reward(completions: list[str], solution: list[str], **_) -> list[float]:
    """1 for the right digit first, 0.1 for any digit first."""
    return [1.0 if c.startswith(s) else 0.1 * c[:1].isdigit() for c, s in zip(completions, solution, strict=True)]


def main() -> None:
    task, args = HfArgumentParser((Task, Config)).parse_args_into_dataclasses()
    if task.model is None:
        args.max_completion_length = 2
        parts = {"model": tiny_model(), "processing_class": tiny_tokenizer(), "train_dataset": sums()}
        trainer = DRPOTrainer(reward_funcs=sum_reward, args=args, **parts)
    else:
        from trl.rewards import accuracy_reward

        data = load_dataset(task.data, split="train")
        trainer = DRPOTrainer(task.model, accuracy_reward, args, train_dataset=data)
    trainer.train()
    trainer.save_model(args.output_dir)


if __name__ == "__main__":
    main()
    # PyTorch wants the process group destroyed before Python ends, and DDP, which holds it, gone before that: the last
    # one to let go of the group waits for its threads, and only the group's own object lets them finish meanwhile.
    gc.collect()
    PartialState().destroy_process_group()
