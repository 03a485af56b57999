"""Training with a CPU's one-pass kernels follows the curve of torch's operations."""

import pytest
from conftest import PICO_VOCABULARY, run_ranks
from families import family_batches, family_config


def curve(config, one_pass):
    """Losses and gradient norms of 4 steps, and how often each kernel ran."""
    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.engine.engine import Engine
    from lag_megatron.kernels import softmax
    from lag_megatron.kernels.cpu import activation_cpu, attention_cpu, softmax_cpu
    from lag_megatron.model import attention

    attention.prefers_matmul_attention = lambda query: True
    calls = {}
    for module in (activation_cpu, attention_cpu, softmax_cpu):
        module.load_library = counted(module.load_library, calls)
    if not one_pass:
        for module in (activation_cpu, attention_cpu, softmax):
            module.builds_for_cpu = lambda: False
    world = start_world(tensor=config.parallel.tensor)
    engine = Engine(config, world, num_layers=config.model.num_layers, vocab_size=PICO_VOCABULARY)
    same = family_batches(config, world, 0)
    results = [engine.train_step(same, step=i, lr=1e-2) for i in range(4)]
    stop_world()
    return [r.loss for r in results], [r.grad_norm for r in results], calls


def counted(library, calls):
    def looked_up(source):
        calls[source.stem] = calls.get(source.stem, 0) + 1
        return library(source)

    return looked_up


ALL = {"activation_cpu", "attention_cpu", "softmax_cpu"}


@pytest.mark.parametrize(
    ("family", "world", "stage", "parallel"),
    [
        ("gpt2", 1, 1, {"precision": "fp32"}),
        ("gpt2", 1, 2, {"precision": "bf16"}),
        ("gpt2", 2, 1, {"tensor": 2, "sequence_parallel": True}),
        ("llama", 2, 1, {"tensor": 2, "recompute": "layers"}),
        ("llama", 1, 3, {"precision": "bf16"}),
        ("bert-pre", 1, 1, {"recompute": "layers"}),
        ("bert-post", 1, 1, {"precision": "bf16"}),
    ],
)
def test_training_follows_the_same_curve(family, world, stage, parallel):
    config = family_config(family, zero_stage=stage, parallel=parallel)
    (losses, norms, calls), (right, right_norms, others) = (
        run_ranks(curve, world, config, one_pass)[0] for one_pass in (True, False)
    )
    missing = set() if config.model.activation != "gelu_exact" else {"activation_cpu"}
    assert ALL - missing <= calls.keys()
    assert not others
    close = 1e-5 if config.parallel.precision == "fp32" else 1e-2
    assert losses == pytest.approx(right, rel=close)
    assert norms == pytest.approx(right_norms, rel=10 * close)
    assert losses[-1] < losses[0]
