"""Weights of transformers' models under Megatron's names, written down simply, by hand.

``from hf_weights import hf_model, megatron_weights, load_part``.  Nothing of the library's own maps
is used, so that a mistake there cannot hide itself.
"""

import re

import torch

VOCABULARY, HIDDEN, FFN, HEADS, LAYERS, LENGTH = 64, 16, 24, 4, 2, 12
LLAMA_GROUPS = 2


def hf_model(kind):
    """A small BertForMaskedLM, GPT2LMHeadModel or LlamaForCausalLM; no 1-D parameter is trivial."""
    import transformers as hf

    torch.manual_seed(5)
    shape = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS}
    shape |= {"num_attention_heads": HEADS, "max_position_embeddings": LENGTH}
    shape |= {"intermediate_size": FFN, "attn_implementation": "eager"}
    if kind == "bert":
        model = hf.BertForMaskedLM(hf.BertConfig(**shape, type_vocab_size=2, layer_norm_eps=1e-5))
    elif kind == "gpt2":
        config = hf.GPT2Config(
            vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=LENGTH,
            n_inner=FFN, attn_implementation="eager",
        )  # fmt: skip
        model = hf.GPT2LMHeadModel(config)
    else:
        config = hf.LlamaConfig(**shape, num_key_value_heads=LLAMA_GROUPS, rms_norm_eps=1e-5)
        model = hf.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() == 1 else 0.2
            parameter.add_(torch.randn_like(parameter) * scale)
    return model.eval()


def megatron_weights(kind, model):
    """{Megatron's name: whole tensor}."""
    state = {name: p.detach() for name, p in model.named_parameters()}
    weights = {"bert": _bert, "gpt2": _gpt2, "llama": _llama}[kind](state)
    assert not state, sorted(state)  # all were taken
    return weights


def load_part(model, weights, *, rank, size, gated):
    """Fill one tensor-parallel rank's part of a model of ours."""
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(weights)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(_part(name, weights[name], rank, size, gated))


def _part(name, whole, rank, size, gated):
    if gated and "linear_fc1" in name:
        return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
    if re.search(r"(word_embeddings|output_layer|linear_qkv|linear_fc1)\.(weight|bias)$", name):
        return whole.chunk(size)[rank]
    if re.search(r"(linear_proj|linear_fc2)\.weight$", name):
        return whole.chunk(size, dim=1)[rank]
    return whole


def _qkv(query, key, value, groups):
    parts = [t.reshape(groups, -1, *t.shape[1:]) for t in (query, key, value)]
    return torch.cat(parts, 1).flatten(0, 1)


def _bert(state):
    ours = {}

    def take(our, their):
        for kind in ("weight", "bias"):
            if f"{their}.{kind}" in state:
                ours[f"{our}.{kind}"] = state.pop(f"{their}.{kind}")

    for part in ("word", "position", "token_type"):
        take(f"embedding.{part.replace('_', '')}_embeddings", f"bert.embeddings.{part}_embeddings")
    take("embedding.embedding_dropout.layernorm", "bert.embeddings.LayerNorm")
    for layer in range(LAYERS):
        our, their = f"encoder.layers.{layer}", f"bert.encoder.layer.{layer}"
        for kind in ("weight", "bias"):
            parts = [state.pop(f"{their}.attention.self.{x}.{kind}")
                     for x in ("query", "key", "value")]  # fmt: skip
            ours[f"{our}.self_attention.linear_qkv.{kind}"] = _qkv(*parts, HEADS)
        take(f"{our}.self_attention.linear_proj", f"{their}.attention.output.dense")
        take(f"{our}.post_attn_layernorm", f"{their}.attention.output.LayerNorm")
        take(f"{our}.mlp.linear_fc1", f"{their}.intermediate.dense")
        take(f"{our}.mlp.linear_fc2", f"{their}.output.dense")
        take(f"{our}.post_mlp_layernorm", f"{their}.output.LayerNorm")
    take("lm_head.dense", "cls.predictions.transform.dense")
    take("lm_head.layer_norm", "cls.predictions.transform.LayerNorm")
    ours["output_layer.bias"] = state.pop("cls.predictions.bias")
    return ours


def _gpt2(state):
    ours = {
        "embedding.word_embeddings.weight": state.pop("transformer.wte.weight"),
        "embedding.position_embeddings.weight": state.pop("transformer.wpe.weight"),
    }
    for layer in range(LAYERS):
        our, their = f"decoder.layers.{layer}", f"transformer.h.{layer}"
        for kind in ("weight", "bias"):
            qkv = state.pop(f"{their}.attn.c_attn.{kind}").t()
            ours[f"{our}.self_attention.linear_qkv.{kind}"] = _qkv(*qkv.chunk(3), HEADS)
            for name, there in (
                ("self_attention.linear_proj", "attn.c_proj"),
                ("mlp.linear_fc1", "mlp.c_fc"),
                ("mlp.linear_fc2", "mlp.c_proj"),
            ):
                ours[f"{our}.{name}.{kind}"] = state.pop(f"{their}.{there}.{kind}").t()
            for name, there in (("input_layernorm", "ln_1"), ("pre_mlp_layernorm", "ln_2")):
                ours[f"{our}.{name}.{kind}"] = state.pop(f"{their}.{there}.{kind}")
    for kind in ("weight", "bias"):
        ours[f"decoder.final_layernorm.{kind}"] = state.pop(f"transformer.ln_f.{kind}")
    return ours


def _llama(state):
    ours = {
        "embedding.word_embeddings.weight": state.pop("model.embed_tokens.weight"),
        "decoder.final_layernorm.weight": state.pop("model.norm.weight"),
        "output_layer.weight": state.pop("lm_head.weight"),
    }
    for layer in range(LAYERS):
        our, their = f"decoder.layers.{layer}", f"model.layers.{layer}"
        parts = [state.pop(f"{their}.self_attn.{x}_proj.weight") for x in "qkv"]
        halves = [state.pop(f"{their}.mlp.{x}_proj.weight") for x in ("gate", "up")]
        ours |= {
            f"{our}.self_attention.linear_qkv.weight": _qkv(*parts, LLAMA_GROUPS),
            f"{our}.mlp.linear_fc1.weight": torch.cat(halves),
        }
        for name, there in (
            ("input_layernorm", "input_layernorm"),
            ("self_attention.linear_proj", "self_attn.o_proj"),
            ("pre_mlp_layernorm", "post_attention_layernorm"),
            ("mlp.linear_fc2", "mlp.down_proj"),
        ):
            ours[f"{our}.{name}.weight"] = state.pop(f"{their}.{there}.weight")
    return ours
