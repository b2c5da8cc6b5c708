"""Packed LoRA through the train loop is K separate PEFT runs, over 100 AdamW steps."""

import math

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import nn

from palate.card import adapters
from palate.training import loop
from palate.training.logging import read
from palate.training.loop import Group, LoopConfig, LossOutput, train
from palate.training.stream import ListSource, Stream
from toy_llama import toy_llama

STEPS, BATCH, CLUSTERS = 100, 8, 4
LORA = adapters.LoraConfig(rank=4, alpha=8.0)
LEARNING_RATE, DECAY, CLIP, WARMUP = 2e-3, 0.1, 0.3, 0.1
# Cluster 3 has few samples: it is absent from most batches.
SHARES = [0] * 60 + [1] * 25 + [2] * 12 + [3] * 3


def samples() -> list[dict]:
    """Token sequences of several lengths; the answer is the second half."""
    generator = torch.Generator().manual_seed(4)
    found = []
    for cluster in SHARES:
        length = int(torch.randint(4, 12, (), generator=generator))
        tokens = torch.randint(1, 61, (length,), generator=generator)
        found.append({"cluster": cluster, "tokens": tokens, "answer": length // 2})
    return found


def negative_log_likelihoods(model: nn.Module, chosen: list[dict]) -> torch.Tensor:
    """The sum over each sample's answer tokens, shape (B,)."""
    width = max(len(s["tokens"]) for s in chosen)
    tokens_BT = torch.stack([nn.functional.pad(s["tokens"], (0, width - len(s["tokens"]))) for s in chosen])
    log_probs_BTV = model(input_ids=tokens_BT).logits[:, :-1].log_softmax(-1)
    losses_BT = -log_probs_BTV.gather(2, tokens_BT[:, 1:, None]).squeeze(2)
    position = torch.arange(1, width)
    first = torch.tensor([len(s["tokens"]) - s["answer"] for s in chosen])[:, None]
    last = torch.tensor([len(s["tokens"]) for s in chosen])[:, None]
    return (losses_BT * ((position >= first) & (position < last))).sum(dim=1)


def weigh(sample: dict) -> dict[str, float]:
    return {str(sample["cluster"]): sample["answer"]}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The packed run: model, stream, updates per cluster and log."""
    data, model = samples(), toy_llama(61)
    rows = adapters.pack(model, CLUSTERS, LORA, seed=5)
    stream = Stream([ListSource("texts", data, [str(i) for i in range(len(data))])], BATCH, seed=9)
    updates = loop.updates_per_group(stream, weigh, [str(c) for c in range(CLUSTERS)], STEPS)

    def loss(model: nn.Module, chosen: list[dict], totals) -> LossOutput:
        rows.set(torch.tensor([s["cluster"] for s in chosen]))
        totals_B = torch.tensor([totals[str(s["cluster"])] for s in chosen])
        return LossOutput((negative_log_likelihoods(model, chosen) / totals_B).sum())

    groups = [
        Group(str(c), adapters.cluster_parameters(model, c), LEARNING_RATE, DECAY, CLIP, updates[str(c)])
        for c in range(CLUSTERS)
    ]
    config = LoopConfig(STEPS, warmup_ratio=WARMUP, schedule="cosine", micro_batch=3, tensorboard=False)
    folder = tmp_path_factory.mktemp("packed")
    summary = train(model, groups, stream, weigh, loss, config, folder)
    assert summary.updates == updates
    return model, stream, updates, read(folder)


def peft_run(cluster: int, stream: Stream, updates: int) -> tuple[dict[str, torch.Tensor], int]:
    """One cluster's own run with PEFT, torch's AdamW and clipping: dW by layer, and how often it was clipped."""
    start = toy_llama(61)
    adapters.pack(start, CLUSTERS, LORA, seed=5)
    config = PeftConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=list(LORA.targets), lora_dropout=0.0)
    model = get_peft_model(toy_llama(61), config)
    named = dict(model.named_parameters())
    for name, layer in adapters.packed_layers(start):
        named[f"base_model.model.{name}.lora_A.default.weight"].data.copy_(layer.A[cluster].t())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=DECAY)
    data, cursors, update, clipped = samples(), stream.start(), 0, 0
    for _ in range(STEPS):
        units, cursors = stream.plan(cursors)
        chosen = [data[i] for unit in units for i in unit.indices if data[i]["cluster"] == cluster]
        if not chosen:
            continue
        warmup = round(WARMUP * updates)
        factor = (update + 1) / (warmup + 1)
        if update >= warmup:
            factor = 0.5 * (1 + math.cos(math.pi * (update - warmup) / (updates - warmup)))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * factor
        optimizer.zero_grad()
        tokens = sum(s["answer"] for s in chosen)
        (negative_log_likelihoods(model, chosen).sum() / tokens).backward()
        clipped += int(nn.utils.clip_grad_norm_(trained, CLIP) > CLIP)
        optimizer.step()
        update += 1
    assert update == updates
    return {
        name: LORA.alpha
        / LORA.rank
        * (
            named[f"base_model.model.{name}.lora_B.default.weight"]
            @ named[f"base_model.model.{name}.lora_A.default.weight"]
        ).detach()
        for name, _ in adapters.packed_layers(start)
    }, clipped


@pytest.mark.parametrize("cluster", range(CLUSTERS))
def test_each_cluster_equals_its_own_peft_run(packed, cluster):
    model, stream, updates, log = packed
    count = updates[str(cluster)]
    assert count == STEPS if cluster == 0 else 5 < count < STEPS  # the others are absent from some global batches
    expected, clipped = peft_run(cluster, stream, count)
    assert clipped == sum(row["groups"][str(cluster)]["norm"] > CLIP for row in log if str(cluster) in row["groups"])
    assert clipped > 0  # clipping really clips
    for name, layer in adapters.packed_layers(model):
        found = (layer.A[cluster] @ layer.B[cluster]).t().detach() * LORA.alpha / LORA.rank
        assert expected[name].norm() > 1e-3  # it has learned something to compare
        difference = (found - expected[name]).norm() / expected[name].norm()
        assert difference < 1e-4, f"{name}: {difference:.1e}"


def test_the_loss_is_the_sum_of_the_clusters_token_means(packed):
    _, stream, _, log = packed
    (units, _), data, model = stream.plan(stream.start()), samples(), toy_llama(61)
    chosen = [data[i] for unit in units for i in unit.indices]
    with torch.no_grad():  # B starts at 0, so every adapter is the base model in the first step
        losses = negative_log_likelihoods(model, chosen).tolist()
    expected = 0.0
    for cluster in {s["cluster"] for s in chosen}:
        mine = [(loss, s["answer"]) for loss, s in zip(losses, chosen, strict=True) if s["cluster"] == cluster]
        expected += sum(loss for loss, _ in mine) / sum(tokens for _, tokens in mine)
    assert log[0]["loss"] == pytest.approx(expected, rel=1e-5)
