"""Plans: figures by hand, memory against what autograd keeps, prices, caps, and the example that is checked in."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from palate import config as configs
from palate.unihetero import plan as plans
from palate.unihetero.plan import EXAMPLE_PRICES, PlanConfig, PlanRefused, markdown, plan

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def test_the_example_is_what_the_code_says(tmp_path: Path) -> None:
    plans.write_examples(tmp_path)
    for suffix in ("json", "md"):
        name = f"{plans.EXAMPLE_FILE}.{suffix}"
        again = "from palate.unihetero.plan import write_examples; write_examples('docs/examples')"
        assert (EXAMPLES / name).read_text() == (tmp_path / name).read_text(), f'write it again: python -c "{again}"'


def test_time_and_cost_by_hand() -> None:
    config = PlanConfig(samples=1_000_000, batch=1000, accelerators=8, samples_per_second=50, lost=0.2, micro_batch=25)
    found = plan(config)
    assert found.steps == 1000
    assert found.accumulation == 5
    assert found.samples_per_second == 400
    assert found.seconds_per_step == 2.5
    assert found.hours == pytest.approx(2500 / 3600 / 0.8)
    assert found.read_gb_per_second == pytest.approx(400 * 35e-6)
    assert found.storage.shards == pytest.approx(35)
    assert found.checkpoints.interval_steps == 720
    assert found.checkpoints.count == 2
    assert found.checkpoints.gigabytes == pytest.approx(12e-9 * found.trained_parameters)
    assert found.costs.accelerators == pytest.approx(8 * found.hours * 2.5)
    assert found.utilization == pytest.approx(400 * found.flops.total / (8 * 989e12))
    assert found.total_flops == pytest.approx(1e6 * found.flops.total)


def test_assumed_utilization_is_of_all_that_is_computed() -> None:
    plain, again = plan(PlanConfig()), plan(PlanConfig(checkpoint_activations=True))
    assert plain.utilization == plain.hardware_utilization == pytest.approx(0.4)
    assert again.hardware_utilization == pytest.approx(0.4)
    assert again.utilization < 0.35
    assert again.hours / plain.hours == pytest.approx(again.flops.hardware / plain.flops.hardware)
    assert again.memory.activations < plain.memory.activations / 5


def test_the_sizes_of_known_models() -> None:
    small, large = plans.EXAMPLES.values()
    assert plan(replace(small, arm="understanding")).trained_parameters == pytest.approx(134.5e6 + 0.77e6, rel=0.002)
    assert plan(replace(large, arm="understanding")).trained_parameters == pytest.approx(1.2358e9 + 5.8e6, rel=0.002)
    # 6 N a token of the matmuls alone, about: attention and the frozen encoder are what is above.
    found = plan(small)
    layers = found.flops.by_part["language layers"].total
    assert layers == pytest.approx(6 * 30 * 3_538_944 * 322 + 12 * 30 * 322**2 * 576)


def test_what_the_arms_cost() -> None:
    ratios = plan(PlanConfig()).relative_flops
    assert ratios["understanding"] == 1
    assert 1 < ratios["encoder"] < ratios["embedding"] < 1.05
    assert ratios["capacity"] == ratios["shuffled"] == ratios["embedding"]
    assert ratios["isolated"] > 1.1
    assert ratios["pixel"] > 1.1


def test_latents_are_stored_for_pixels_only() -> None:
    assert plan(PlanConfig()).storage.latents == 0
    # Cached KL-16 posteriors: 16 KB an image, 3.3 TB for 200M.
    cached, made = plan(PlanConfig(arm="decoder", cache_latents=True)), plan(PlanConfig(arm="decoder"))
    assert cached.storage.latents == pytest.approx(3277, rel=0.001)
    assert made.storage.latents == 0
    assert made.flops.total - cached.flops.total == pytest.approx(137e9)
    assert plan(PlanConfig()).flops.total == plan(PlanConfig(cache_latents=True)).flops.total


def test_sharding_divides_weights_gradients_and_moments() -> None:
    whole = plan(PlanConfig(shard=False)).memory
    parts = plan(PlanConfig(shard=True)).memory
    assert parts.moments == pytest.approx(whole.moments / 64)
    assert parts.weights == pytest.approx(whole.weights / 64)
    assert parts.gathered < whole.gathered
    assert whole.moments == pytest.approx(2 * whole.gradients)
    assert parts.activations == whole.activations


def test_activations_against_what_autograd_keeps() -> None:
    torch.manual_seed(0)
    layers = 4
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8, hidden_size=96, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=6,
            num_key_value_heads=2,
        )
    ).bfloat16()  # fmt: skip
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    held = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held.append(network(input_ids=torch.zeros(2, 50, dtype=torch.long)).logits)
    config = PlanConfig(
        layers=layers, width=96, intermediate=256, heads=6, kv_heads=2, vocabulary=8, arm="understanding",
        text_tokens=50 - 2 - 16, image_tokens=16, micro_batch=2, branch_from=2,
    )  # fmt: skip
    estimate = plans.memory_of(config, plans.shape(config)).activations * 1e9
    assert estimate == pytest.approx(sum(kept.values()), rel=0.1)


def table(**changes: Any) -> str:
    return json.dumps({**EXAMPLE_PRICES, **changes})


def test_prices_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prices.json"
    path.write_text(table(accelerator_hour={"h100": 4.0}, currency="EUR", written_gb=0.5, source="a contract"))
    found = plan(PlanConfig(prices=str(path), accelerator="h100"))
    assert found.costs.accelerators == pytest.approx(found.accelerator_hours * 4)
    assert found.costs.traffic == pytest.approx(found.checkpoints.written_gigabytes * 0.5)
    assert "EUR" in markdown(found)
    assert "a contract" in markdown(found)
    with pytest.raises(PlanRefused, match=r"--accelerator a100: the price table has \['h100'\]"):
        plan(PlanConfig(prices=str(path), accelerator="a100"))
    path.write_text('{"currency": "EUR"}')
    with pytest.raises(PlanRefused, match=r"lacks \['accelerator_hour', 'date'"):
        plan(PlanConfig(prices=str(path)))
    path.write_text("{")
    with pytest.raises(PlanRefused, match="not JSON"):
        plan(PlanConfig(prices=str(path)))
    with pytest.raises(PlanRefused, match="there is no such file"):
        plan(PlanConfig(prices=str(tmp_path / "none.json")))


def test_a_cap_refuses_with_the_numbers() -> None:
    cost = plan(PlanConfig()).costs.total
    plan(PlanConfig(max_cost=cost * 1.01))
    with pytest.raises(PlanRefused, match=rf"costs {cost:,.0f} USD .*example.*more than --max-cost 100: take fewer"):
        plan(PlanConfig(max_cost=100))


def test_warnings_say_what_to_change() -> None:
    assert plan(PlanConfig()).warnings == ()
    heavy = plan(PlanConfig(micro_batch=512, batch=512 * 64))
    assert "lower --micro-batch" in heavy.warnings[0]
    assert "**Warning:**" in markdown(heavy)
    slow = plan(PlanConfig(cores=4))
    assert "decoding needs 4.0 of 4 cores" in slow.warnings[0]
    assert slow.samples_per_second == 64 * 4 * 200
    assert slow.utilization < 0.4
    assert "no multiple of 64 accelerators" in plan(PlanConfig(batch=2000)).warnings[0]
    assert "more than there is" in plan(PlanConfig(samples_per_second=1e5)).warnings[0]


def test_the_command_line() -> None:
    parsed = configs.parse(PlanConfig, arguments=["--samples", "1000", "--arm", "isolated", "--max-cost", "5"])
    assert (parsed.samples, parsed.arm, parsed.max_cost) == (1000, "isolated", 5)
    assert configs.from_dict(PlanConfig, configs.to_dict(parsed)) == parsed
    for wrong in ({"samples": 0}, {"lost": 1.0}, {"assumed_utilization": 1.5}, {"samples_per_second": 0.0}):
        name = next(iter(wrong)).replace("_", "-")
        with pytest.raises(ValueError, match=f"--{name}"):
            PlanConfig(**wrong)
    with pytest.raises(ValueError, match="--branch-from is from 1 to 29"):
        PlanConfig(arm="isolated", branch_from=30)


def test_plans_are_json(tmp_path: Path) -> None:
    values = plans.to_dict(plan(PlanConfig()))
    assert json.loads(json.dumps(values)) == values
    assert values["costs"]["total"] == pytest.approx(
        values["costs"]["accelerators"] + values["costs"]["storage"], rel=1e-5
    )
    assert set(values["flops"]["by_part"]) >= {"language layers", "vision encoder", "text head", "semantic head"}
