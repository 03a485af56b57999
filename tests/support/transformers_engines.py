"""Models of transformers under DeepSpeed: ``from transformers_engines import build, llama``."""

import torch
from plain_program import STEPS, VOCABULARY


def llama(layers):
    """A Llama of transformers with tied heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 12, "intermediate_size": 20, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(
        LlamaConfig(num_hidden_layers=layers, tie_word_embeddings=True, **sizes, **heads)
    )


def bert(layers):
    """A BERT of transformers, whose decoder is tied."""
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 12, "intermediate_size": 20, "vocab_size": VOCABULARY}
    return BertForMaskedLM(
        BertConfig(
            num_hidden_layers=layers, num_attention_heads=2, max_position_embeddings=8, **sizes
        )
    )


def build(at, layers, *, make_model, torch_adam):
    """A model of transformers, whose optimizer and scheduler DeepSpeed makes."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    torch.manual_seed(layers)
    model = make_model(layers)
    adam = {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": torch_adam}
    warmup = {"warmup_max_lr": 1e-2, "warmup_num_steps": 8}
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config=at.config()
        | {"optimizer": {"type": "AdamW", "params": adam}}
        | {"scheduler": {"type": "WarmupLR", "params": warmup}},
    )
    expected = torch.optim.AdamW if torch_adam else deepspeed.ops.adam.FusedAdam
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    assert isinstance(inner, expected)
    return engine


def train(engine, steps):
    """The losses of some steps; every rank has a text of its own."""
    losses = []
    for step in steps:
        torch.manual_seed(10 * step + engine.global_rank)  # dropout's too
        text = torch.randint(0, VOCABULARY, (2, 6))
        loss = engine(input_ids=text, labels=text).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def save(at, folder, build):
    """On each rank: a checkpoint of two layers."""
    engine = build(at, 2)
    train(engine, range(STEPS))
    engine.save_checkpoint(str(folder), "source")
    engine.destroy()
