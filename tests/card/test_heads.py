"""The head and the priors: the loss against plain arithmetic, the joint optimum against the exact fit, storage."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from palate import artifacts
from palate.artifacts import ArtifactMismatch
from palate.card import heads, pairs
from palate.card.correction import FeatureMap
from palate.card.fitting import fit_vector
from palate.card.preferences import Positions

VOCABULARY, EMBEDDING, FEATURES, TOP_K, LENGTH = 30, 12, 8, 6, 5
STATISTICS = FeatureMap((1, 2), torch.zeros(2, FEATURES), torch.ones(2, FEATURES), torch.eye(FEATURES))


def embeddings(seed: int = 5) -> heads.Whitened:
    generator = torch.Generator().manual_seed(seed)
    return heads.whiten_embeddings(torch.randn(VOCABULARY, EMBEDDING, generator=generator), 0.0)


def world(people: int = 6, texts_each: int = 12, seed: int = 0) -> tuple[list[pairs.Text], Positions]:
    """People who each prefer some directions of the embedding, whatever the context; each own text has a negative, by
    the next person."""
    generator = torch.Generator().manual_seed(seed)
    taste_UV = torch.randn(people, EMBEDDING, generator=generator) @ embeddings().embeddings_Ve.t() * 3
    texts, logits, written = [], [], []
    for person in range(people):
        for number in range(texts_each):
            for kind, author in ((pairs.OWN, person), (pairs.OTHER, (person + 1) % people)):
                texts.append(pairs.Text(f"u{person}", f"i{number}", kind, f"u{author}", ""))
                base_NV = torch.randn(LENGTH, VOCABULARY, generator=generator)
                logits.append(base_NV)
                chosen = (base_NV + taste_UV[author]).softmax(-1)
                written.append(torch.multinomial(chosen, 1, generator=generator).squeeze(1))
    log_probs_NV = torch.cat(logits).log_softmax(-1)
    target = torch.cat(written)
    log_probs_Nk, candidates_Nk = log_probs_NV.topk(TOP_K, dim=-1)
    matches = candidates_Nk == target[:, None]
    positions = Positions(
        features_Nd=torch.randn(len(target), FEATURES, generator=generator),
        candidates_Nk=candidates_Nk,
        log_probs_Nk=log_probs_Nk,
        target_N=torch.where(matches.any(1), matches.int().argmax(1), -1),
        target_log_prob_N=log_probs_NV.gather(1, target[:, None]).squeeze(1),
        text_N=torch.arange(len(texts)).repeat_interleave(LENGTH),
    )
    return texts, positions


ROWS = {f"u{person}": person for person in range(6)}
QUICK = heads.PreferConfig(width=6, head_epochs=60, head_batch=16, head_learning_rate=1e-2)
STRENGTH = heads.Strength(head_precision=3.0, vector_deviation=1.0)


def trained(tmp_path, config=QUICK, strength=STRENGTH):
    texts, positions = world()
    samples = heads.own_texts(texts, ROWS)
    model = heads.train_head(samples, positions, embeddings(), 6, config, strength, str(tmp_path))
    return texts, positions, samples, model


def test_own_texts_carry_their_negatives_and_leave_out_others():
    texts, _ = world(people=3, texts_each=2)
    texts.insert(2, pairs.Text("u0", "i0", pairs.CLUSTER, "", "answer"))
    samples = heads.own_texts(texts, {"u0": 0, "u2": 1})
    assert [sample.person for sample in samples] == [0, 0, 1, 1]
    assert samples[0] == heads.OwnText(0, 0, cluster_texts=(2,), other_texts=(1,))


def test_at_the_joint_optimum_a_trained_vector_is_the_exact_fit(tmp_path):
    _, positions, samples, model = trained(tmp_path)
    head, prior = model.head(STATISTICS, TOP_K), heads.prior(QUICK, STRENGTH)
    for person in range(6):
        own = [sample.text for sample in samples if sample.person == person]
        fit = fit_vector(positions.select(torch.isin(positions.text_N, torch.tensor(own))), head, prior)
        difference = (model.vectors[person] - fit.vector_J).norm() / (fit.vector_J - 1).norm()
        assert difference < 0.1


def test_own_vectors_predict_unseen_texts_better_than_others(tmp_path):
    _, positions = world()
    samples = heads.own_texts(world()[0], ROWS)
    seen, unseen = [s for s in samples if s.text % 8], [s for s in samples if not s.text % 8]
    model = heads.train_head(seen, positions, embeddings(), 6, QUICK, STRENGTH, str(tmp_path / "part"))
    own, _ = heads.held_out_gain(model, unseen, positions)
    model.vectors.copy_(model.vectors.roll(1, 0))
    permuted, _ = heads.held_out_gain(model, unseen, positions)
    assert own > permuted + 0.05
    assert own > 0.05


@pytest.mark.parametrize("reward", ["normalized", "additive"])
def test_the_loss_is_that_of_plain_softmaxes(reward):
    texts, positions = world(people=2, texts_each=2)
    config = replace(QUICK, reward=reward, other_weight=0.3)
    model = heads.HeadModel(FEATURES, embeddings(), 2, config, seed=0)
    torch.nn.init.normal_(model.output, generator=torch.Generator().manual_seed(1))
    samples = heads.own_texts(texts, ROWS)
    totals = {"head": 4.0 * LENGTH, "other pairs": 4.0, "cluster pairs": 0.0}
    found = heads._loss(model, samples, positions, heads._Spans(positions), config, totals)
    expected = torch.zeros(())
    for sample in samples:
        rewards = []
        for text in (sample.text, *sample.other_texts):
            here = positions.select(positions.text_N == text)
            gates = (here.features_Nd @ model.project + model.bias) * model.vectors[sample.person]
            delta = (model.embeddings.embeddings_Ve[here.candidates_Nk] @ model.output * gates[:, None, :]).sum(-1)
            present = here.target_N >= 0
            chosen = torch.where(present, delta[torch.arange(LENGTH), here.target_N.clamp(min=0)], 0.0)
            if reward == "additive":
                rewards.append(chosen.mean())
            else:
                rest = 1 - here.log_probs_Nk.exp().sum(1)
                rewards.append((chosen - ((here.log_probs_Nk + delta).exp().sum(1) + rest).log()).sum())
        if reward == "normalized":
            expected = expected - rewards[0] / totals["head"]
        expected = expected - 0.3 * F.logsigmoid(rewards[0] - rewards[1]) / totals["other pairs"]
    torch.testing.assert_close(found.loss, expected, atol=1e-5, rtol=1e-4)


def test_the_priors_are_chosen_by_unseen_texts(tmp_path):
    texts, positions = world()
    config = replace(QUICK, head_epochs=30, head_precision=(3.0, 1e6), vector_deviation=(1.0,))
    samples = heads.own_texts(texts, ROWS)
    chosen, tried = heads.choose_strength(samples, positions, embeddings(), 6, config, str(tmp_path))
    assert chosen == heads.Strength(3.0, 1.0)  # with 1e6 nothing is learned
    assert abs(tried[1]["own"]) < 1e-2 < tried[0]["own"]


@pytest.mark.parametrize("output", ["tied", "free"])
def test_a_stored_head_corrects_as_the_trained_one(tmp_path, output):
    config = replace(QUICK, output=output, head_epochs=2)
    _, _, _, model = trained(tmp_path / "training", config)
    raw = torch.randn(VOCABULARY, EMBEDDING, generator=torch.Generator().manual_seed(5))
    prior = heads.prior(config, STRENGTH)

    def produce(writer: artifacts.Writer) -> None:
        heads.save_head(model, STATISTICS, TOP_K, prior, writer.folder)

    stored = artifacts.ensure(tmp_path / "head", produce, kind="head", config={})
    head, prior_back = heads.load_head(stored, raw)
    expected = model.head(STATISTICS, TOP_K)
    torch.testing.assert_close(head.output_VJ, expected.output_VJ, atol=1e-5, rtol=1e-4)
    assert torch.equal(head.project_dJ, expected.project_dJ)
    assert torch.equal(prior_back.precision_J, prior.precision_J)
    with pytest.raises(ValueError, match="--model"):
        heads.load_head(stored, raw[:-1, :-1])


def test_reshaping_a_spectrum():
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(5000, 4, generator=generator) @ torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0])) + 3
    for power, ratio in [(0.0, 1.0), (0.5, 64.0), (1.0, 64.0**2)]:
        mean, matrix = heads.reshape_spectrum(rows, power)
        reshaped = (rows - mean) @ matrix
        values = torch.linalg.eigvalsh(reshaped.t() @ reshaped / len(rows))
        assert float(values[-1] / values[0]) == pytest.approx(ratio, rel=0.15)
        assert float(reshaped.square().mean()) == pytest.approx(1.0, rel=1e-3)


def test_final_features_are_what_the_feature_map_gives():
    generator = torch.Generator().manual_seed(4)
    states = [torch.randn(200, FEATURES, generator=generator) * 3 + 1 for _ in range(2)]
    statistics = replace(STATISTICS, mean_Ld=torch.randn(2, FEATURES), scale_Ld=torch.rand(2, FEATURES) + 0.5)
    _, positions = world(people=5, texts_each=4)
    positions = replace(positions, features_Nd=statistics(states))
    final, moved = heads.final_features(statistics, positions, torch.arange(200) < 150, 0.75)
    torch.testing.assert_close(moved.features_Nd, final(states), atol=1e-4, rtol=1e-3)


def test_another_head_does_not_go_on_from_this_ones_checkpoints(tmp_path):
    trained(tmp_path)
    for changes in ({"strength": replace(STRENGTH, head_precision=7.0)}, {"config": replace(QUICK, other_weight=0.3)}):
        with pytest.raises(ArtifactMismatch, match=r"head_precision' was|other_weight' was"):
            trained(tmp_path, **changes)


def test_nobody_to_learn_from_is_an_error(tmp_path):
    _, positions = world(people=2, texts_each=2)
    with pytest.raises(ValueError, match="--contrast-share"):
        heads.train_head([], positions, embeddings(), 0, QUICK, STRENGTH, str(tmp_path))
