"""Tables that map Megatron-Core's tensors to those of transformers, and conversion both ways.

An entry names one of Megatron's tensors and those of transformers with the same values; ``{layer}``
stands for a layer's number and ``{part}`` for ``weight`` or ``bias``.  The kinds:

plain       the same values.
vocabulary  rows belong to tokens; Megatron's may be padded at the end.
qkv         by query group: its query heads, its key head, its value head, then the next group;
            transformers has all queries, all keys, all values, joined or as three tensors.
gate_up     the gate's rows, then the up projection's.

``transposed`` matrices are (in, out) in transformers: GPT-2's ``Conv1D``.

Tables are in the order of Megatron-Core's modules, which is that of flat buffers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lag_megatron.checkpoint.families.roles import megatron_role

Kind = Literal["plain", "vocabulary", "qkv", "gate_up"]

LAYER, PART = "{layer}", "{part}"


@dataclass(frozen=True, slots=True)
class TensorMapping:
    """One tensor of Megatron's, and the tensors of transformers that hold its values."""

    megatron: str
    transformers: tuple[str, ...]
    kind: Kind = "plain"
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Heads:
    """Query groups (key-value heads) of the attention, and the size of a head."""

    groups: int
    head_size: int


_ATTENTION, _MLP = "decoder.layers.{layer}.self_attention", "decoder.layers.{layer}.mlp"

GPT2: tuple[TensorMapping, ...] = (
    TensorMapping("embedding.word_embeddings.weight", ("transformer.wte.weight",), "vocabulary"),
    TensorMapping("embedding.position_embeddings.weight", ("transformer.wpe.weight",)),
    TensorMapping(
        "decoder.layers.{layer}.input_layernorm.{part}", ("transformer.h.{layer}.ln_1.{part}",)
    ),
    TensorMapping(
        f"{_ATTENTION}.linear_proj.{PART}",
        ("transformer.h.{layer}.attn.c_proj.{part}",),
        transposed=True,
    ),
    TensorMapping(
        f"{_ATTENTION}.linear_qkv.{PART}",
        ("transformer.h.{layer}.attn.c_attn.{part}",),
        "qkv",
        transposed=True,
    ),
    TensorMapping(
        "decoder.layers.{layer}.pre_mlp_layernorm.{part}", ("transformer.h.{layer}.ln_2.{part}",)
    ),
    TensorMapping(
        f"{_MLP}.linear_fc1.{PART}", ("transformer.h.{layer}.mlp.c_fc.{part}",), transposed=True
    ),
    TensorMapping(
        f"{_MLP}.linear_fc2.{PART}", ("transformer.h.{layer}.mlp.c_proj.{part}",), transposed=True
    ),
    TensorMapping("decoder.final_layernorm.{part}", ("transformer.ln_f.{part}",)),
    TensorMapping("output_layer.weight", ("lm_head.weight",), "vocabulary"),
)

_LLAMA_LAYER = "model.layers.{layer}"
LLAMA: tuple[TensorMapping, ...] = (
    TensorMapping("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocabulary"),
    TensorMapping(
        "decoder.layers.{layer}.input_layernorm.weight",
        (f"{_LLAMA_LAYER}.input_layernorm.weight",),
    ),
    TensorMapping(f"{_ATTENTION}.linear_proj.{PART}", (f"{_LLAMA_LAYER}.self_attn.o_proj.{PART}",)),
    TensorMapping(
        f"{_ATTENTION}.linear_qkv.{PART}",
        tuple(f"{_LLAMA_LAYER}.self_attn.{p}_proj.{PART}" for p in "qkv"),
        "qkv",
    ),
    TensorMapping(
        "decoder.layers.{layer}.pre_mlp_layernorm.weight",
        (f"{_LLAMA_LAYER}.post_attention_layernorm.weight",),
    ),
    TensorMapping(
        f"{_MLP}.linear_fc1.{PART}",
        (f"{_LLAMA_LAYER}.mlp.gate_proj.{PART}", f"{_LLAMA_LAYER}.mlp.up_proj.{PART}"),
        "gate_up",
    ),
    TensorMapping(f"{_MLP}.linear_fc2.{PART}", (f"{_LLAMA_LAYER}.mlp.down_proj.{PART}",)),
    TensorMapping("decoder.final_layernorm.weight", ("model.norm.weight",)),
    TensorMapping("output_layer.weight", ("lm_head.weight",), "vocabulary"),
)

_BERT_LAYER = "bert.encoder.layer.{layer}"
_ENCODER = "encoder.layers.{layer}"
_PREDICTIONS = "cls.predictions"
BERT: tuple[TensorMapping, ...] = (
    TensorMapping(
        "embedding.word_embeddings.weight",
        ("bert.embeddings.word_embeddings.weight",),
        "vocabulary",
    ),
    TensorMapping(
        "embedding.position_embeddings.weight", ("bert.embeddings.position_embeddings.weight",)
    ),
    TensorMapping(
        "embedding.tokentype_embeddings.weight", ("bert.embeddings.token_type_embeddings.weight",)
    ),
    TensorMapping(
        f"embedding.embedding_dropout.layernorm.{PART}", (f"bert.embeddings.LayerNorm.{PART}",)
    ),
    TensorMapping(
        f"{_ENCODER}.self_attention.linear_proj.{PART}",
        (f"{_BERT_LAYER}.attention.output.dense.{PART}",),
    ),
    TensorMapping(
        f"{_ENCODER}.self_attention.linear_qkv.{PART}",
        tuple(f"{_BERT_LAYER}.attention.self.{p}.{PART}" for p in ("query", "key", "value")),
        "qkv",
    ),
    TensorMapping(
        f"{_ENCODER}.mlp.linear_fc1.{PART}", (f"{_BERT_LAYER}.intermediate.dense.{PART}",)
    ),
    TensorMapping(f"{_ENCODER}.mlp.linear_fc2.{PART}", (f"{_BERT_LAYER}.output.dense.{PART}",)),
    TensorMapping(
        f"{_ENCODER}.post_attn_layernorm.{PART}",
        (f"{_BERT_LAYER}.attention.output.LayerNorm.{PART}",),
    ),
    TensorMapping(
        f"{_ENCODER}.post_mlp_layernorm.{PART}", (f"{_BERT_LAYER}.output.LayerNorm.{PART}",)
    ),
    TensorMapping(f"lm_head.dense.{PART}", (f"{_PREDICTIONS}.transform.dense.{PART}",)),
    TensorMapping(f"lm_head.layer_norm.{PART}", (f"{_PREDICTIONS}.transform.LayerNorm.{PART}",)),
    TensorMapping("output_layer.bias", (f"{_PREDICTIONS}.bias",), "vocabulary"),
)


def expand(
    mappings: Sequence[TensorMapping], *, num_layers: int, bias: bool, tied_embeddings: bool
) -> Iterator[TensorMapping]:
    """The mappings of a model, one for each of Megatron's tensors, in the order of the model.

    Args:
        mappings: a table of this module.
        num_layers: of the model.
        bias: whether linear layers have one; norms have one where the table says so.
        tied_embeddings: whether the output layer shares the embedding's weight.
    """
    for layered, group in _layer_runs(mappings):
        for layer in range(num_layers) if layered else (0,):
            for mapping in group:
                if mapping.megatron == "output_layer.weight" and tied_embeddings:
                    continue
                role = megatron_role(mapping.megatron.replace(PART, "weight"))
                has_bias = bias or role == "norm_weight"
                parts = ("weight", "bias") if PART in mapping.megatron else ("",)
                for part in parts if has_bias else parts[:1]:
                    yield _filled(mapping, layer, part)


def transformers_shapes(
    mapping: TensorMapping, shape: tuple[int, ...], heads: Heads
) -> list[tuple[int, ...]]:
    """Shapes of the tensors in transformers, from the shape of Megatron's, padding included."""
    outs = [shape[0]]
    if mapping.kind == "qkv" and len(mapping.transformers) == 3:
        keys = heads.groups * heads.head_size
        outs = [shape[0] - 2 * keys, keys, keys]
    elif mapping.kind == "gate_up":
        outs = [shape[0] // 2] * 2
    shapes = [(out, *shape[1:]) for out in outs]
    return [s[::-1] if mapping.transposed else s for s in shapes]


@dataclass(frozen=True, slots=True)
class RowRun:
    """Rows ``low .. low + count`` of Megatron's tensor: those from ``start`` on of one ``part``."""

    low: int
    count: int
    part: int
    start: int


def row_runs(mapping: TensorMapping, rows: int, heads: Heads) -> list[RowRun]:
    """Where the rows of Megatron's tensor lie in those of transformers, in increasing order.

    In ``transposed`` matrices the rows are transformers' columns.
    """
    if mapping.kind == "gate_up":
        half = rows // 2
        return [RowRun(0, half, 0, 0), RowRun(half, rows - half, 1, 0)]
    if mapping.kind != "qkv":
        return [RowRun(0, rows, 0, 0)]
    size = heads.head_size
    queries, keys = rows - 2 * heads.groups * size, heads.groups * size
    lengths, joined = (queries // heads.groups, size, size), len(mapping.transformers) == 1
    starts = (0, queries, queries + keys) if joined else (0, 0, 0)
    found, low = [], 0
    for group in range(heads.groups):
        for part, (length, start) in enumerate(zip(lengths, starts, strict=True)):
            found.append(RowRun(low, length, 0 if joined else part, start + group * length))
            low += length
    return found


def to_transformers(mapping: TensorMapping, full: Tensor, heads: Heads) -> list[Tensor]:
    """The tensors in transformers from Megatron's full tensor, vocabulary padding included."""
    parts = [
        full.new_empty(shape) for shape in transformers_shapes(mapping, tuple(full.shape), heads)
    ]
    turned = [as_rows(part, mapping) for part in parts]
    for run in row_runs(mapping, len(full), heads):
        turned[run.part][run.start : run.start + run.count] = full[run.low : run.low + run.count]
    return parts


def as_rows(part: Tensor, mapping: TensorMapping) -> Tensor:
    """A view of a tensor of transformers whose rows correspond to Megatron's."""
    return part.t() if mapping.transposed and part.dim() == 2 else part


def _layer_runs(mappings: Sequence[TensorMapping]) -> Iterator[tuple[bool, list[TensorMapping]]]:
    """Runs of mappings that all belong to layers, or all do not."""
    run: list[TensorMapping] = []
    for mapping in mappings:
        if run and (LAYER in mapping.megatron) != (LAYER in run[0].megatron):
            yield LAYER in run[0].megatron, run
            run = []
        run.append(mapping)
    if run:
        yield LAYER in run[0].megatron, run


def _filled(mapping: TensorMapping, layer: int, part: str) -> TensorMapping:
    def fill(name: str) -> str:
        return name.replace(LAYER, str(layer)).replace(PART, part)

    return TensorMapping(
        fill(mapping.megatron),
        tuple(map(fill, mapping.transformers)),
        mapping.kind,
        transposed=mapping.transposed,
    )
