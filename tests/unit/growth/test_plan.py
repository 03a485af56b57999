"""Growth plans: checked when made, frozen, and the same after JSON."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layer_maps import EVERY_LAG, lag_map

from lag_megatron.errors import PlanError
from lag_megatron.growth.plan import GrowthPlan

LAG = {"index": 4, "block_size": 2, "init": "random"}


def test_plan_is_checked_when_made():
    with pytest.raises(PlanError, match="out of range"):
        GrowthPlan(operator="lag", options={**LAG, "index": 40}, source_layers=12, target_layers=16)
    with pytest.raises(PlanError, match=r"moments 'half' is not a policy\. Allowed: auto, copy"):
        GrowthPlan(operator="last", source_layers=4, target_layers=6, moments="half")


def test_plan_is_frozen():
    plan = GrowthPlan(operator="last", source_layers=4, target_layers=6)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.seed = 1


def test_plan_layer_map():
    plan = GrowthPlan(operator="lag", options=LAG, source_layers=12, target_layers=16)
    assert plan.layer_map == lag_map(12, 16, 4, 2, "random")


@given(
    st.sampled_from(EVERY_LAG),
    st.sampled_from(["duplicate", "random"]),
    st.sampled_from(["auto", "copy", "zero", "borrow"]),
    st.integers(0, 2**63),
    st.floats(1e-6, 1.0),
)
def test_plan_survives_json(lag, init, moments, seed, init_std):
    source, target, index, block_size = lag
    plan = GrowthPlan(
        operator="lag",
        options={"index": index, "block_size": block_size, "init": init},
        source_layers=source,
        target_layers=target,
        moments=moments,
        seed=seed,
        init_std=init_std,
    )
    back = GrowthPlan.from_json(plan.to_json())
    assert back == plan
    assert back.digest == plan.digest


def test_digest_does_not_depend_on_the_order_of_options():
    def plan(options, **values):
        return GrowthPlan(
            operator="lag", options=options, source_layers=12, target_layers=16, **values
        )

    assert plan(LAG).digest == plan(dict(reversed(LAG.items()))).digest
    others = [plan({**LAG, "index": 5}), plan(LAG, seed=1), plan(LAG, moments="zero")]
    assert len({p.digest for p in (plan(LAG), *others)}) == 4
    assert len(plan(LAG).digest) == 16


def test_plan_read_from_a_file(tmp_path):
    plan = GrowthPlan(operator="last", source_layers=4, target_layers=6)
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    assert GrowthPlan.read(path) == plan
    with pytest.raises(PlanError, match=r"none\.json: expected a growth plan.*no such file"):
        GrowthPlan.read(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "plan.json: expected a growth plan, but it cannot be read as JSON"),
        ("[1]", "plan.json: expected a growth plan, but it holds a list"),
        ('{"operators": "last"}', "plan.json: a growth plan has no 'operators'. Its keys are"),
        ('{"operator": "last"}', "plan.json: a growth plan needs 'source_layers'"),
        ('{"seed": 1, "seed": 2}', "plan.json: .*the key 'seed' is given twice"),
        ('{"operator": "last", "source_layers": 4, "target_layers": 9}', "cannot grow 4 layers"),
        ('{"operator": "last", "source_layers": "4", "target_layers": 9}', "plan.json"),
        (
            '{"operator": 3, "source_layers": 4, "target_layers": 6}',
            "plan.json: operator: expected a name",
        ),
        (
            '{"operator": "last", "source_layers": 4, "target_layers": 6, "options": [1]}',
            "plan.json: options: expected a mapping",
        ),
    ],
)
def test_text_that_is_no_plan(text, message):
    with pytest.raises(PlanError, match=message):
        GrowthPlan.from_json(text, source="plan.json")


@pytest.mark.parametrize(
    "entry",
    [
        *('"init_std": NaN', '"init_std": Infinity', '"init_std": -1', '"init_std": 0'),
        *('"init_std": "0.02"', '"init_std": true', '"seed": -1', '"seed": 1.5', '"seed": null'),
        *('"seed": 1e400', f'"seed": {2**70}', '"source_layers": -4', '"target_layers": true'),
        *('"target_layers": 1000000000', '"target_layers": 6.0', '"moments": 3', '"names": 3'),
        *('"options": {"scale": NaN}', '"options": {"scale": -1}', '"operator": null'),
    ],
)
def test_a_plan_with_an_impossible_value_is_refused_with_its_name(entry):
    values = {"operator": '"last"', "source_layers": "4", "target_layers": "6"}
    key, _, value = entry.partition(": ")
    values[key.strip('"')] = value
    text = "{" + ", ".join(f'"{name}": {text}' for name, text in values.items()) + "}"
    name = "scale" if "scale" in entry else key.strip('"')
    with pytest.raises(PlanError, match=f"^plan.json: .*{name}"):
        GrowthPlan.from_json(text, source="plan.json")


def test_a_range_of_layers_that_would_fill_the_memory_is_refused():
    with pytest.raises(PlanError, match="names layer 999,999,999, but models have at most 10,000"):
        GrowthPlan(
            operator="slices",
            options={"layers": "0-999999999"},
            source_layers=4,
            target_layers=6,
        )
