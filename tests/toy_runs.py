"""Small settings of the three trainings, for tests that run them whole."""

from pathlib import Path
from typing import Any

from palate.card.adaptation import AdaptConfig
from palate.card.contrast import ContrastConfig
from palate.card.heads import PreferConfig
from palate.card.stages import CardConfig, ClusterConfig, PromptConfig
from palate.lpo.encoding import EncodeConfig
from palate.lpo.sampling import SampleConfig
from palate.lpo.stages import LpoConfig
from palate.lpo.training import ObjectiveConfig, TuneConfig
from palate.unihetero.stages import TrainConfig
from palate.unihetero.training import PretrainConfig

FORMATS = (".json", ".jsonl", ".parquet", ".safetensors", ".png", ".md", ".tar", ".txt")


def with_objects(*folders: Path | str) -> list[str]:
    """Files that may hold Python's objects: by their suffix (TensorBoard's have none), or as what they begin with says,
    which is a pickle or the zip of ``torch.save``."""
    found = []
    for file in (file for folder in folders for file in Path(folder).rglob("*") if file.is_file()):
        head = file.read_bytes()[:9]
        known = file.suffix in FORMATS or file.name.startswith("events.out.tfevents.")
        tensors = file.suffix == ".safetensors" and head[8:] == b"{"  # behind a number that may begin like a pickle
        if not known or (not tensors and head.startswith((b"\x80", b"PK"))):
            found.append(str(file))
    return found


def card(corpus: str, out: Path) -> CardConfig:
    return CardConfig(
        corpus=corpus,
        out=str(out),
        model="tiny",
        cluster=ClusterConfig(clusters=2),
        prompt=PromptConfig(max_prompt_tokens=200, max_answer_tokens=12),
        adapt=AdaptConfig(rank=2, epochs=1, batch=8),
        contrast=ContrastConfig(people_per_shard=3, top_k=10, cluster_texts=0, other_texts=1),
        prefer=PreferConfig(width=4, head_epochs=2, head_precision=(60.0,), vector_deviation=(1.0,)),
    )


def lpo(lists: str, out: Path, **changes: Any) -> LpoConfig:
    return LpoConfig(
        lists=lists,
        out=str(out),
        encode=EncodeConfig(resolution=16, latent_dtype="float32", encode_batch=32),
        learn=ObjectiveConfig(kl_beta=50.0),
        tune=TuneConfig(steps=3, batch=4, learning_rate=3e-3, checkpoint_every=2),
        sample=SampleConfig(sampler_steps=2),
        grid=2,
        **changes,
    )


def unihetero(parts: Path, out: Path) -> TrainConfig:
    """``parts`` is a folder that ``toy_unihetero.build_parts`` made."""
    return TrainConfig(
        corpus=(f"{parts}/index",),
        out=str(out),
        language=f"{parts}/language",
        vision=f"{parts}/vision",
        vae=f"{parts}/vae",
        arm="decoder",
        cache=f"{parts}/cache",
        train=PretrainConfig(steps=6, batch=6, micro_batch=2, checkpoint_every=2),
    )
