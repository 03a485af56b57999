"""A model computes everything where its batch is: nothing stays on the host.

Torch's ``meta`` device stands for a GPU: it computes shapes alone, and refuses operands of others.
"""

import pytest
import torch
from conftest import PICO_VOCABULARY, pico_config, run_ranks

ROWS, LENGTH, PREDICTED = 3, 8, 2
BERT = {"family": "bert", "token_types": 2}
MODELS = {
    "gpt": {},
    "smoothed": {"label_smoothing": 0.1, "z_loss": 1e-2},
    "prefix": {},
    "llama": {"llama": True},
    "llama_prefix": {"llama": True},
    "bert": BERT,
    "bert_padded": {**BERT, "norm_position": "post", "activation": "gelu_exact"},
    "bert_sentences": {**BERT, "sentence_head": True},
}


def batch_of(name):
    whole, there = (ROWS, LENGTH), {"dtype": torch.int64, "device": "meta"}
    labels = (ROWS, PREDICTED) if "bert" in name else whole
    batch = {
        "tokens": torch.empty(whole, **there),
        "position_ids": torch.empty(whole, **there),
        "labels": torch.empty(labels, **there),
        "loss_mask": torch.empty(labels, device="meta"),
    }
    if "bert" in name:
        batch["token_types"] = torch.empty(whole, **there)
        batch["masked_positions"] = torch.empty(labels, **there)
    if "prefix" in name:
        batch["prefix_length"] = torch.empty(2, **there)
    if "padded" in name:
        batch["padding_mask"] = torch.empty(whole, dtype=torch.bool, device="meta")
    if "sentences" in name:
        batch["sentence_labels"] = torch.empty(ROWS, **there)
    return batch


def without_values(monkeypatch):
    """The kernels of the loss, which read addresses, and Megatron's question for the device."""
    from lag_megatron.model import linear_cross_entropy as loss

    def statistics(logits, place, is_mine, *, with_sum):
        assert {t.device.type for t in (logits, place, is_mine)} == {"meta"}
        return logits.new_empty(len(logits)).float(), logits.new_empty(3, len(logits)).float()

    def to_gradient(*tensors):
        assert {t.device.type for t in tensors} == {"meta"}

    monkeypatch.setattr(loss, "has_kernel", lambda *given: True)
    monkeypatch.setattr(loss, "row_statistics", statistics)
    monkeypatch.setattr(loss, "logits_to_gradient", to_gradient)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))


def gradients(precision):
    """By model: the loss's device, and parameters whose gradient is missing or elsewhere."""
    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.model import build_model, loss_sums

    start_world(tensor=1)
    found = {}
    for name, options in MODELS.items():
        config = pico_config(precision=precision, **options)
        model = build_model(
            config.model, config.parallel, num_layers=2, vocab_size=PICO_VOCABULARY
        ).to("meta")
        if precision == "bf16":
            model.bfloat16()
        with pytest.MonkeyPatch.context() as patch:
            without_values(patch)
            sums = loss_sums(model, batch_of(name))
            sums.sum().backward()
        astray = [
            n for n, p in model.named_parameters() if p.grad is None or p.grad.device != p.device
        ]
        found[name] = sums.device.type, astray
    stop_world()
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_is_computed_where_its_batch_is(precision):
    (found,) = run_ranks(gradients, 1, precision)
    assert found == dict.fromkeys(MODELS, ("meta", []))
