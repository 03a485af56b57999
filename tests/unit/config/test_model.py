"""What a configuration's model may not be, said before anything starts."""

import dataclasses

import pytest

from lag_megatron.config import ModelConfig, ParallelConfig, RunConfig, StageConfig
from lag_megatron.config.validation.model import model_problems

SHAPE = {
    "num_layers": 2,
    "hidden_size": 16,
    "ffn_hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 4,
    "seq_length": 8,
}
BERT = {"family": "bert", "activation": "gelu_exact"}


def problems(*, objective="causal", pairs="none", parallel=None, **model):
    config = RunConfig(
        model=ModelConfig(**(SHAPE | model)),
        stages=(StageConfig(steps=1),),
        parallel=ParallelConfig(**(parallel or {})),
    )
    mlm = dataclasses.replace(config.data.mlm, sentence_pairs=pairs)
    data = dataclasses.replace(config.data, objective=objective, mlm=mlm)
    return list(model_problems(dataclasses.replace(config, data=data)))


@pytest.mark.parametrize(
    "fine",
    [
        {},
        {"objective": "ul2", "activation": "gelu_exact"},
        {"objective": "mlm", **BERT, "norm_position": "post", "token_types": 2},
        {"objective": "mlm", **BERT, "sentence_head": True, "token_types": 2, "pairs": "next"},
        {"objective": "mlm", **BERT, "tied_embeddings": False, "activation": "gelu"},
        {"parallel": {"tensor": 2, "sequence_parallel": True, "recompute": "layers"}},
    ],
    ids=str,
)
def test_what_fits_passes(fine):
    assert problems(**fine) == []


@pytest.mark.parametrize(
    ("wrong", "path", "part"),
    [
        ({"norm_position": "post"}, "model.norm_position", "'post' is for the family 'bert'"),
        ({"token_types": 2}, "model.token_types", "Take 0, or model.family: bert"),
        ({"sentence_head": True}, "model.sentence_head", "is for the family 'bert'"),
        ({"objective": "mlm"}, "model.family", "Take 'bert', or the objective 'causal' or 'ul2'"),
        ({**BERT}, "data.objective", "the family 'bert' learns by 'mlm' (got 'causal')"),
        ({"objective": "mlm", **BERT, "positions": "rope"}, "model.positions", "got 'rope'"),
        ({"objective": "mlm", **BERT, "norm": "rmsnorm"}, "model.norm", "got 'rmsnorm'"),
        ({"objective": "mlm", **BERT, "activation": "swiglu"}, "model.activation", "got 'swiglu'"),
        ({"objective": "mlm", **BERT, "bias": False}, "model.bias", "got False"),
        (
            {"objective": "mlm", **BERT, "token_types": 1, "pairs": "order"},
            "model.token_types",
            "the two segments of data.mlm.sentence_pairs need 2",
        ),
        ({"objective": "mlm", **BERT, "token_types": -1}, "model.token_types", "not be negative"),
        (
            {"parallel": {"sequence_parallel": True}},
            "parallel.sequence_parallel",
            "parallel.tensor is 1",
        ),
        (
            {"parallel": {"sequence_parallel": True, "tensor": 2}, "seq_length": 9},
            "model.seq_length",
            "9 is not a multiple of parallel.tensor = 2",
        ),
        ({"dropout": 1.0}, "model.dropout", "must be in [0, 1)"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(wrong, path, part):
    (problem,) = problems(**wrong)
    assert problem.startswith(path + ": ")
    assert part in problem
