"""Training with transformers' Trainer under DeepSpeed, on forked ranks."""

import json

import torch
from plain_program import LENGTH, VOCABULARY


class Texts(torch.utils.data.Dataset):
    """Eight fixed texts."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        seed = torch.Generator().manual_seed(index)
        text = torch.randint(0, VOCABULARY, (LENGTH,), generator=seed)
        return {"input_ids": text, "labels": text}


def train(folder, layers, steps, resume=None):
    """On each rank: train a Llama up to a step; the Trainer's log and the model's depth."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    deepspeed = {
        "zero_optimization": {"stage": 2},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
    }
    sizes = {"hidden_size": 12, "intermediate_size": 20, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(3)
    if resume is None:
        config = LlamaConfig(num_hidden_layers=layers, **sizes, **heads)
    else:
        config = LlamaConfig.from_pretrained(resume)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        deepspeed=deepspeed,
    )
    trainer = Trainer(LlamaForCausalLM(config), arguments, train_dataset=Texts())
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer.state.log_history, config.num_hidden_layers


def add_small_files(folder):
    """Beside the tag: a tokenizer and settings, of which the Trainer here has none to save."""
    (folder / "tokenizer.json").write_text(json.dumps({"model": {}}))
    (folder / "notes.md").write_text("mine\n")
