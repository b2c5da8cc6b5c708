"""The whole of CARD on a tiny model: what it leaves, resumption at every stage, and corpora at the edge."""

import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from palate import artifacts
from palate.card import contrast, features, heads, pairs, stages
from palate.card.adaptation import AdaptConfig
from palate.card.contrast import ContrastConfig
from palate.card.fitting import fit_vector
from palate.card.heads import PreferConfig
from palate.card.stages import CardConfig, ClusterConfig, PromptConfig
from palate.corpora import schema
from palate.corpora.worlds import personas
from palate.models.causal_lm import load_causal_lm
from palate.serving.answers import sample_answers
from palate.training.parallel import World


def config(corpus, out, **changes) -> CardConfig:
    settings = CardConfig(
        corpus=str(corpus),
        out=str(out),
        model="tiny",
        cluster=ClusterConfig(clusters=2),
        prompt=PromptConfig(max_prompt_tokens=200, max_answer_tokens=12),
        adapt=AdaptConfig(rank=2, epochs=1, batch=8),
        contrast=ContrastConfig(people_per_shard=3, top_k=10, cluster_texts=1, other_texts=1),
        prefer=PreferConfig(width=4, head_epochs=2, head_precision=(60.0,), vector_deviation=(1.0,)),
    )
    return replace(settings, **changes)


def run(settings: CardConfig, sampler=sample_answers) -> None:
    stages.pipeline(settings, World(), sampler=sampler)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("corpus") / "personas"
    return personas.prepare(personas.PersonasConfig(out=str(out), people=8, items=6, questions=1)).url


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    run(config(corpus, out))
    return out


def shards(out) -> list[artifacts.Artifact]:
    found = sorted((out / "contrast").glob("shard-*"))
    return [artifacts.open_artifact(folder, stages.SHARD) for folder in found]


def make_corpus(folder, rows) -> str:
    def produce(writer: artifacts.Writer) -> None:
        (writer.folder / "items").mkdir()
        table = pa.Table.from_pylist(rows, schema=schema.ITEMS)
        pq.write_table(table, writer.folder / "items" / "part-0.parquet")
        task = {"name": "notes", "metric": "text", "labels": [], "title_template": "{output}"}
        writer.write_json("task.json", task)

    return artifacts.ensure(folder, produce, kind=schema.TEXT_CORPUS, config={}).url


def item(user, order, output, source="about things") -> dict:
    source = f"{source} {order}"
    row = {"user_id": user, "item_id": f"{user}-{order}", "order": order, "source": source, "input": source}
    return {**row, "output": output, "date": None}


def test_everybody_has_a_cluster_and_a_vector_and_peft_loads_the_adapters(corpus, finished):
    people = {row.user_id for row in schema.read_items(artifacts.open_artifact(corpus))}
    vectors = stages.read_vectors(artifacts.open_artifact(finished / "head", stages.HEAD))
    assignment = stages.read_assignment(artifacts.open_artifact(finished / "clusters", stages.CLUSTERS))
    assert vectors.keys() == people == assignment.keys()
    trained = artifacts.open_artifact(finished / "adapters", stages.ADAPTERS)
    folders = stages.adapter_folders(trained)
    assert len(folders) == 2
    for folder in folders:
        peft = PeftModel.from_pretrained(load_causal_lm("tiny").model, folder)
        assert any(p.abs().max() > 0 for name, p in peft.named_parameters() if "lora_B" in name)


def test_no_adapter_learned_from_what_vectors_are_fitted_to(corpus, finished):
    people = stages.read_people(artifacts.open_artifact(corpus))
    fitted = {text.item_id for text in contrast.read(shards(finished))[0] if text.kind == pairs.OWN}
    learned = {one.item_id for one in people.for_adapters(0.5)}
    assert fitted
    assert learned
    assert not fitted & learned
    assert len(fitted) + len(learned) == sum(map(len, people.histories.values()))


def test_a_stored_vector_is_the_exact_fit_of_stored_positions(finished):
    texts, standardized = contrast.read(shards(finished))
    loaded = load_causal_lm("tiny")
    artifact = artifacts.open_artifact(finished / "head", stages.HEAD)
    head, prior = heads.load_head(artifact, stages.output_embeddings(loaded))
    statistics = stages.read_feature_map(artifacts.open_artifact(finished / "contrast" / "statistics"))
    # The head's feature map on the same hidden states: standardized features, shifted and reshaped.
    shift = ((head.features.mean_Ld - statistics.mean_Ld) * statistics.scale_Ld).mean(0)
    reshaped = (standardized.features_Nd - shift) @ head.features.whitening_dd
    user, vector = next(iter(stages.read_vectors(artifact).items()))
    own = torch.tensor([text.user_id == user and text.kind == pairs.OWN for text in texts])[standardized.text_N]
    fit = fit_vector(replace(standardized, features_Nd=reshaped).select(own), head, prior)
    torch.testing.assert_close(fit.vector_J, vector, atol=1e-3, rtol=1e-3)


def test_negatives_of_other_people_are_of_the_same_cluster(finished):
    assignment = stages.read_assignment(artifacts.open_artifact(finished / "clusters"))
    texts, _ = contrast.read(shards(finished))
    others = [text for text in texts if text.kind == pairs.OTHER]
    assert others
    assert all(text.author_id != text.user_id for text in others)
    assert all(assignment[text.author_id] == assignment[text.user_id] for text in others)


def test_a_second_run_does_nothing_and_another_setting_is_refused(corpus, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("manifest.json")}
    run(config(corpus, finished))
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("manifest.json")}
    with pytest.raises(artifacts.ArtifactMismatch, match="'rank' was 2, is now 4"):
        run(config(corpus, finished, adapt=AdaptConfig(rank=4, epochs=1, batch=8)))
    run(config(corpus, finished, adapt=AdaptConfig(rank=2, epochs=1, batch=8, micro_batch=1)))  # scale only


def test_fresh_makes_everything_anew(corpus, tmp_path):
    first = config(corpus, tmp_path / "run")
    run(first)
    upstream = {"adapt": replace(first.adapt, learning_rate=1e-2), "contrast": replace(first.contrast, top_p=0.5)}
    for name, changes in (
        ("head", {"prefer": replace(first.prefer, head_precision=(2000.0,))}),
        ("all", upstream),
    ):
        again = replace(first, fresh=True, **changes)
        stages.start_over(again)
        run(again)
        run(replace(first, out=str(tmp_path / name), **changes))
        made = [artifacts.open_artifact(tmp_path / out / "head") for out in ("run", name)]
        assert made[0].digest == made[1].digest  # as in a new folder


def test_fresh_with_settings_that_cannot_work_discards_nothing(corpus, finished):
    before = sorted(finished.rglob("*"))
    with pytest.raises(ValueError, match="--epochs must be at least 1"):
        stages.start_over(config(corpus, finished, fresh=True, adapt=AdaptConfig(epochs=0)))
    assert sorted(finished.rglob("*")) == before


@pytest.mark.parametrize("damaged", ["adapters/cluster-001/adapter_model.safetensors", "contrast/shard-00001*/texts*"])
def test_damaged_bytes_of_an_earlier_stage_are_refused(corpus, finished, tmp_path, damaged):
    shutil.copytree(finished, tmp_path / "run")
    artifacts.discard(tmp_path / "run" / "head")
    (file,) = (tmp_path / "run").glob(damaged)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(artifacts.ArtifactCorrupt, match=file.name):
        run(config(corpus, tmp_path / "run"))


@pytest.mark.parametrize(
    ("part", "values", "match"),
    [
        ("contrast", {"contrast_share": float("nan")}, "--contrast-share must be above 0"),
        ("contrast", {"contrast_share": 0.0}, "--contrast-share must be above 0"),
        ("contrast", {"contrast_items": 0}, "--contrast-items must be at least 1, got 0"),
        ("contrast", {"top_k": 1000}, "--top-k 1000: tiny knows 300 tokens"),
        ("cluster", {"clusters": 0}, "--clusters must be at least 1, got 0"),
        ("adapt", {"rank": 0}, "--rank must be at least 1"),
        ("prefer", {"head_precision": ()}, "--head-precision needs numbers above 0"),
        ("prefer", {"reward": "additive"}, "--reward additive learns from pairs alone"),
        ("contrast", {"top_p": 0.0}, "--top-p must be above 0"),
        ("adapt", {"learning_rate": float("nan")}, "--learning-rate must be a number above 0, got nan"),
        ("prefer", {"cluster_weight": float("nan")}, "--cluster-weight must be a number not below 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_trained(corpus, tmp_path, part, values, match):
    settings = config(corpus, tmp_path / "run")
    with pytest.raises(ValueError, match=match):
        run(replace(settings, **{part: replace(getattr(settings, part), **values)}))
    assert not (tmp_path / "run" / "adapters").exists()


def test_the_corpus_is_no_place_for_a_run(corpus):
    with pytest.raises(ValueError, match="is the corpus itself"):
        run(config(corpus, f"{corpus}/"))


def test_histories_of_one_text_are_refused_before_anything_is_trained(tmp_path):
    corpus = make_corpus(tmp_path / "corpus", [item(user, 0, "just one") for user in ("ann", "bob")])
    with pytest.raises(ValueError, match="the longest history that is learned from has 1 items"):
        run(config(corpus, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_that_dies_in_a_shard_keeps_the_finished_ones(corpus, finished, tmp_path):
    calls = []

    def dies_at_the_second(*args, **keywords):
        calls.append(len(args[2]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample_answers(*args, **keywords)

    with pytest.raises(KeyboardInterrupt):
        run(config(corpus, tmp_path / "run"), dies_at_the_second)
    kept = next((tmp_path / "run" / "contrast").glob("shard-00000*")) / "manifest.json"
    first = kept.stat().st_mtime_ns
    run(config(corpus, tmp_path / "run"))
    assert kept.stat().st_mtime_ns == first
    resumed = [shard.digest for shard in shards(tmp_path / "run")]
    assert resumed == [shard.digest for shard in shards(finished)]
    heads_made = [artifacts.open_artifact(out / "head").digest for out in (tmp_path / "run", finished)]
    assert heads_made[0] == heads_made[1]  # bit for bit


def test_people_who_are_not_learned_from_are_met_as_new(corpus, tmp_path):
    run(config(corpus, tmp_path / "run", learn_from="development"))
    people = stages.read_people(artifacts.open_artifact(corpus), "development")
    new = people.histories.keys() - people.learned_from
    assert new
    texts, _ = contrast.read(shards(tmp_path / "run"))
    for user in new:  # all of their items go into the vector
        own = [text for text in texts if text.user_id == user and text.kind == pairs.OWN]
        assert len(own) == len(people.histories[user])
    assert {text.author_id for text in texts if text.kind == pairs.OTHER} <= people.learned_from
    assert new <= stages.read_vectors(artifacts.open_artifact(tmp_path / "run" / "head")).keys()


def test_one_person_alone_and_more_clusters_than_people(tmp_path, capsys):
    corpus = make_corpus(tmp_path / "corpus", [item("ann", n, f"text {n} of mine!") for n in range(6)])
    run(config(corpus, tmp_path / "run", cluster=ClusterConfig(clusters=5)))
    assert "only 1 clusters" in capsys.readouterr().out
    vectors = stages.read_vectors(artifacts.open_artifact(tmp_path / "run" / "head"))
    assert vectors.keys() == {"ann"}
    assert np.isfinite(vectors["ann"].numpy()).all()


def test_scripts_that_are_not_latin(tmp_path):
    texts = {"кир": "Отличный чайник, спасибо", "漢": "とても良い品です。", "عر": "منتج ممتاز جدا", "em": "🙂🙂👍"}
    rows = [item(user, n, f"{text} {n}", source="о вещах 关于") for user, text in texts.items() for n in range(4)]
    run(config(make_corpus(tmp_path / "corpus", rows), tmp_path / "run"))
    assert stages.read_vectors(artifacts.open_artifact(tmp_path / "run" / "head")).keys() == texts.keys()


def test_a_person_with_one_text_gets_the_prior_mean(tmp_path):
    rows = [item("ann", n, f"text {n} of mine!") for n in range(6)] + [item("bob", 0, "just one")]
    alone = ContrastConfig(
        people_per_shard=1, top_k=10, cluster_texts=1, other_texts=1
    )  # so that there is a shard without a text
    run(
        config(
            make_corpus(tmp_path / "corpus", rows), tmp_path / "run", cluster=ClusterConfig(clusters=1), contrast=alone
        )
    )
    artifact = artifacts.open_artifact(tmp_path / "run" / "head")
    _, prior = heads.load_head(artifact, stages.output_embeddings(load_causal_lm("tiny")))
    assert torch.equal(stages.read_vectors(artifact)["bob"], prior.mean_J)


def test_an_empty_corpus_is_refused(tmp_path):
    with pytest.raises(ValueError, match="none to learn from"):
        run(config(make_corpus(tmp_path / "corpus", []), tmp_path / "run"))


def test_a_head_for_another_base_model_is_refused(finished):
    artifact = artifacts.open_artifact(finished / "head")
    with pytest.raises(ValueError, match="check --model"):
        heads.load_head(artifact, torch.zeros(300, 32))


def test_shards_keep_text_numbers_apart(finished):
    texts, positions = contrast.read(shards(finished))
    assert positions.texts == len(texts)
    one = shards(finished)[1]
    alone = features.load_positions(one.local(contrast.POSITIONS))
    first = pq.read_table(shards(finished)[0].local(contrast.TEXTS)).num_rows
    here = positions.select(positions.text_N == first)
    assert torch.equal(here.candidates_Nk, alone.select(alone.text_N == 0).candidates_Nk)


def test_adapters_made_elsewhere_become_the_clusters(corpus, finished, tmp_path):
    made = sorted(str(folder) for folder in (finished / "adapters").glob("cluster-*"))
    settings = config(corpus, tmp_path / "run", adapt=AdaptConfig(adapters_from=tuple(reversed(made))))
    run(settings)
    weights = [load_file(f"{folder}/adapter_model.safetensors") for folder in made]
    taken = load_file(tmp_path / "run" / "adapters" / "cluster-000" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in taken.items())
    run(settings)  # finished
    with pytest.raises(ValueError, match="names 1 adapters, but there are 2 clusters"):
        run(config(corpus, tmp_path / "other", adapt=AdaptConfig(adapters_from=tuple(made[:1]))))


def test_retrieved_history_goes_into_every_prompt(corpus, finished, tmp_path):
    prompt = PromptConfig(history_k=2, max_prompt_tokens=300, max_answer_tokens=12)
    people = stages.read_people(artifacts.open_artifact(corpus))
    loaded = load_causal_lm("tiny")
    history = next(iter(people.histories.values()))
    plain = stages.item_prompts(config(corpus, tmp_path), people, history, loaded)
    quoted = stages.item_prompts(config(corpus, tmp_path, prompt=prompt), people, history, loaded)
    assert quoted[0] == plain[0]  # nothing was written before the first
    assert history[0].output.split()[0] in loaded.tokenizer.decode(quoted[-1])
    assert all(len(q) > len(p) for q, p in zip(quoted[1:], plain[1:], strict=True))
    run(config(corpus, tmp_path / "run", prompt=prompt))
    first, other = (contrast.read(shards(out))[1] for out in (tmp_path / "run", finished))
    assert first.features_Nd.shape[1] == other.features_Nd.shape[1]
    assert not torch.equal(first.target_log_prob_N[:12], other.target_log_prob_N[:12])
