"""Packed LoRA against PEFT: forward, gradient, 100 AdamW steps, export and import."""

import copy
import json

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from palate.card import adapters

CONFIG = adapters.LoraConfig(rank=4, alpha=8.0)
CLUSTERS = 3


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def packed_model(randomize: bool = True):
    model = base_model()
    rows = adapters.pack(model, CLUSTERS, CONFIG)
    if randomize:
        generator = torch.Generator().manual_seed(1)
        for _, layer in adapters.packed_layers(model):
            for B in layer.B:
                B.data.copy_(torch.randn(B.shape, generator=generator) * 0.1)
    return model, rows


def peft_model(folder, model) -> PeftModel:
    for cluster in range(CLUSTERS):
        adapters.export_adapter(model, cluster, CONFIG, folder / str(cluster), "tiny")
    peft = PeftModel.from_pretrained(base_model(), folder / "0", adapter_name="0", is_trainable=True)
    for cluster in range(1, CLUSTERS):
        peft.load_adapter(folder / str(cluster), adapter_name=str(cluster), is_trainable=True)
    return peft


TOKENS = torch.randint(0, 97, (5, 11), generator=torch.Generator().manual_seed(2))
ROWS = torch.tensor([2, 0, -1, 1, 0])


def test_forward_equals_peft_with_adapter_names(tmp_path):
    model, rows = packed_model()
    rows.set(ROWS)
    peft = peft_model(tmp_path, model).eval()
    names = ["__base__" if index == -1 else str(index) for index in ROWS.tolist()]
    with torch.no_grad():
        expected = peft(input_ids=TOKENS, adapter_names=names).logits
        found = model(input_ids=TOKENS).logits
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    assert (found - base_model()(input_ids=TOKENS).logits)[0].abs().max() > 1e-3  # the adapters do something


def test_a_base_row_has_the_base_models_logits():
    model, rows = packed_model()
    rows.set(torch.full((5,), adapters.BASE))
    with torch.no_grad():
        assert torch.equal(model(input_ids=TOKENS).logits, base_model()(input_ids=TOKENS).logits)


def test_gradients_equal_peft_one_adapter_at_a_time(tmp_path):
    model, rows = packed_model()
    peft = peft_model(tmp_path, model)
    rows.set(torch.tensor([1, 1, 0, 0, 0]))
    losses = model(input_ids=TOKENS).logits.square().mean(dim=(1, 2))
    losses.sum().backward()
    for cluster, chosen in [(0, TOKENS[2:]), (1, TOKENS[:2])]:
        peft.set_adapter(str(cluster))
        peft.zero_grad()
        peft(input_ids=chosen).logits.square().mean(dim=(1, 2)).sum().backward()
        reference = dict(peft.named_parameters())
        for name, parameter in adapters.cluster_parameters(model, cluster):
            layer, side, _ = name.rsplit(".", 2)
            expected = reference[f"base_model.model.{layer}.lora_{side}.{cluster}.weight"].grad.t()
            torch.testing.assert_close(parameter.grad, expected, atol=1e-7, rtol=1e-4)


def test_export_then_import_is_exact_and_pads_a_lower_rank(tmp_path):
    model, rows = packed_model()
    adapters.export_adapter(model, 1, CONFIG, tmp_path / "one", "tiny")
    wide = base_model()
    wide_rows = adapters.pack(wide, 2, adapters.LoraConfig(rank=6, alpha=99.0))
    adapters.import_adapter(wide, wide_rows, 0, tmp_path / "one")
    rows.set(torch.ones(5, dtype=torch.long))
    wide_rows.set(torch.zeros(5, dtype=torch.long))
    with torch.no_grad():
        torch.testing.assert_close(wide(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits, atol=1e-6, rtol=1e-5)


def test_an_adapter_that_peft_made_loads_here(tmp_path):
    torch.manual_seed(3)
    settings = PeftConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False, use_rslora=True
    )
    peft = get_peft_model(base_model(), settings).eval()
    peft.save_pretrained(tmp_path)
    model = base_model()
    rows = adapters.load_adapters(model, [tmp_path])
    rows.set(torch.zeros(5, dtype=torch.long))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=TOKENS).logits, peft(input_ids=TOKENS).logits, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "only LORA"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "biases"),
        ({"r": 64}, "--rank 64"),
    ],
)
def test_adapters_that_cannot_be_packed_are_refused(tmp_path, change, message):
    model, rows = packed_model()
    adapters.export_adapter(model, 0, CONFIG, tmp_path, "tiny")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        adapters.import_adapter(model, rows, 0, tmp_path)


def test_an_adapter_for_another_width_or_with_nan_is_refused(tmp_path):
    model, rows = packed_model()
    layers = dict(adapters.packed_layers(model))
    name = next(iter(layers))
    narrow = copy.deepcopy(model)
    layer = dict(adapters.packed_layers(narrow))[name]
    layer.A[0] = torch.nn.Parameter(layer.A[0][:-1])
    adapters.export_adapter(narrow, 0, CONFIG, tmp_path / "narrow", "tiny")
    with pytest.raises(ValueError, match="another base model"):
        adapters.import_adapter(model, rows, 0, tmp_path / "narrow")
    layers[name].A[0].data[0, 0] = float("nan")
    adapters.export_adapter(model, 0, CONFIG, tmp_path / "nan", "tiny")
    with pytest.raises(ValueError, match="NaN"):
        adapters.import_adapter(model, rows, 0, tmp_path / "nan")


def test_unknown_targets_and_rows_are_refused():
    with pytest.raises(ValueError, match="--targets"):
        adapters.pack(base_model(), 2, adapters.LoraConfig(targets=("wqkv",)))
    _, rows = packed_model()
    with pytest.raises(ValueError, match=r"-1\.\.2"):
        rows.set(torch.tensor([0, 3]))
