"""Packed LoRA against PEFT: forward, gradient, 100 AdamW steps, export and import."""

import copy
import json

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model

from palate.card import adapters
from toy_llama import toy_llama

CONFIG = adapters.LoraConfig(rank=4, alpha=8.0)
CLUSTERS = 3


def packed_model(randomize: bool = True):
    model = toy_llama(97)
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
    peft = PeftModel.from_pretrained(toy_llama(97), folder / "0", adapter_name="0", is_trainable=True)
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
    assert (found - toy_llama(97)(input_ids=TOKENS).logits)[0].abs().max() > 1e-3  # the adapters do something


@pytest.mark.parametrize("limit", [0, 10_000])
@pytest.mark.parametrize("targets", [adapters.ALL_LINEAR, adapters.ATTENTION, ("k_proj", "up_proj")])
def test_both_products_without_gradients_equal_the_one_with(monkeypatch, limit, targets):
    monkeypatch.setattr(adapters, "MASKED_UP_TO", limit)
    model = toy_llama(97)
    rows = adapters.pack(model, CLUSTERS, adapters.LoraConfig(rank=4, alpha=8.0, targets=targets))
    for _, layer in adapters.packed_layers(model):
        assert layer.readers.masked == (limit > 0)
        for B in layer.B:
            torch.nn.init.normal_(B, std=0.1)
    base_logits = toy_llama(97)(input_ids=TOKENS).logits
    for chosen in (ROWS, ROWS.flip(0), torch.zeros(5, dtype=torch.long)):
        rows.set(chosen)
        expected = model(input_ids=TOKENS).logits.detach()
        with torch.no_grad():
            found = model(input_ids=TOKENS).logits
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
        assert torch.equal(found[chosen == -1], base_logits[chosen == -1])
        assert (found - base_logits)[chosen != -1].abs().amax(dim=(1, 2)).min() > 1e-3


def test_projections_of_one_input_share_a_product(monkeypatch):
    model, rows = packed_model()
    products = []
    multiply = adapters.Readers._multiply
    monkeypatch.setattr(
        adapters.Readers, "_multiply", lambda self, *rest: products.append(len(self.layers)) or multiply(self, *rest)
    )
    rows.set(ROWS)
    with torch.no_grad():
        model(input_ids=TOKENS)
        assert products == [3, 1, 2, 1] * 2  # q k v, o, gate up, down
        # The same tensor object with other rows is another product.
        layer = dict(adapters.packed_layers(model))["model.layers.0.self_attn.q_proj"]
        x = torch.randn(5, 2, 32)
        rows.set(torch.zeros(5, dtype=torch.long))
        first = layer(x)
        rows.set(torch.ones(5, dtype=torch.long))
        assert not torch.equal(layer(x), first)


@pytest.mark.parametrize("limit", [0, 10_000])
def test_decoding_sees_weights_that_were_trained_or_loaded_since(monkeypatch, limit):
    monkeypatch.setattr(adapters, "MASKED_UP_TO", limit)
    model, rows = packed_model()
    rows.set(ROWS)

    def decode():
        with torch.no_grad():
            return model(input_ids=TOKENS).logits

    before = decode()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=TOKENS).logits.square().mean().backward()
    optimizer.step()
    trained = decode()
    assert not torch.equal(trained, before)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fresh, fresh_rows = packed_model()
    fresh_rows.set(ROWS)
    with torch.no_grad():
        assert torch.equal(fresh(input_ids=TOKENS).logits, before)
        fresh.load_state_dict(state)
        assert torch.equal(fresh(input_ids=TOKENS).logits, trained)


def test_a_bfloat16_base_keeps_float32_adapters():
    model, rows = packed_model()
    rows.set(ROWS)
    with torch.no_grad():
        expected = model(input_ids=TOKENS).logits
        for _, layer in adapters.packed_layers(model):
            layer.base.to(torch.bfloat16)
        model.model.embed_tokens.to(torch.bfloat16)
        model.model.norm.to(torch.bfloat16)
        for layer in model.model.layers:
            layer.input_layernorm.to(torch.bfloat16)
            layer.post_attention_layernorm.to(torch.bfloat16)
        model.lm_head.to(torch.bfloat16)
        found = model(input_ids=TOKENS).logits
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0.05)


def test_a_base_row_has_the_base_models_logits():
    model, rows = packed_model()
    rows.set(torch.full((5,), adapters.BASE))
    with torch.no_grad():
        assert torch.equal(model(input_ids=TOKENS).logits, toy_llama(97)(input_ids=TOKENS).logits)


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
    wide = toy_llama(97)
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
    peft = get_peft_model(toy_llama(97), settings).eval()
    peft.save_pretrained(tmp_path)
    model = toy_llama(97)
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
        adapters.pack(toy_llama(97), 2, adapters.LoraConfig(targets=("wqkv",)))
    _, rows = packed_model()
    with pytest.raises(ValueError, match=r"-1\.\.2"):
        rows.set(torch.tensor([0, 3]))
