"""What the tests of staged training's operator share: its plans, places of layers, whole shapes."""

from lag_megatron.growth.plan import GrowthPlan

SOURCE = 4
VARIANTS = {
    "identity": {},
    "identity on top": {"placement": "append"},
    "copies": {"matrices": "copy"},
}


def plan_of(*, operator="staged", source=SOURCE, moments="auto", **options):
    return GrowthPlan(
        operator=operator, options=options, source_layers=source, target_layers=2 * source,
        moments=moments,
    )  # fmt: skip


def places(plan):
    """Grown layer of each old one, and numbers of the new layers."""
    new = sorted(plan.new_layers)
    return [i for i in range(plan.target_layers) if i not in new], new


def grown_name(name, plan):
    if ".layers." not in name:
        return name
    layer = int(name.split(".")[2])
    return name.replace(f".{layer}.", f".{places(plan)[0][layer]}.", 1)


def groups_of(layers, *, hidden, ffn, groups, heads, gated, bias):
    """Whole shapes of a model: matrices, then vectors."""
    rows = (heads + 2 * groups) * (hidden // heads)
    matrices = {"embedding.word_embeddings.weight": (8, hidden)}
    vectors = {}
    for layer in range(layers):
        at = f"decoder.layers.{layer}."
        vectors[at + "input_layernorm.weight"] = (hidden,)
        matrices[at + "self_attention.linear_proj.weight"] = (hidden, hidden)
        matrices[at + "self_attention.linear_qkv.weight"] = (rows, hidden)
        vectors[at + "pre_mlp_layernorm.weight"] = (hidden,)
        matrices[at + "mlp.linear_fc1.weight"] = (ffn * (2 if gated else 1), hidden)
        matrices[at + "mlp.linear_fc2.weight"] = (hidden, ffn)
        if bias:
            vectors[at + "input_layernorm.bias"] = (hidden,)
            vectors[at + "self_attention.linear_qkv.bias"] = (rows,)
            vectors[at + "self_attention.q_layernorm.weight"] = (hidden // heads,)
            vectors[at + "mlp.linear_fc2.bias"] = (hidden,)
    return [matrices, vectors]
