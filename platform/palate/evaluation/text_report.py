"""The report of a text comparison: all systems under all metrics, examples, words, cost, and what was noted."""

import dataclasses
import random
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from palate import artifacts, progress
from palate import config as configs
from palate.artifacts import Artifact, Writer
from palate.card.words import Words, words
from palate.corpora.schema import Item
from palate.corpora.worlds import personas
from palate.evaluation import authorship, judge, report, text
from palate.evaluation.comparison import Comparison, digest
from palate.evaluation.statistics import Scores
from palate.evaluation.systems import Spec, averaged, comparisons, likelihood_scores, vector_rewards

OWN_TEXTS = "own-texts"  # a row of the report: what the people wrote themselves, the ceiling of authorship

Answers = Mapping[str, list[dict[str, str]]]  # by system, a mapping of question ids to texts for each draw


def make_report(comparison: Comparison) -> Artifact:
    """The report at OUT/report, with everything that it needs made first.

    A report of other systems or settings is replaced: it is made of the artifacts beside it, which are kept.
    """
    config = comparison.config
    if config.fresh:
        comparison.discard()
    made = comparison.make()

    def produce(writer: Writer) -> None:
        _write(comparison, writer)

    url, kind = artifacts.join(config.out, "report"), "text-report"
    inputs = {"corpus": comparison.corpus, **made}
    replaced = False
    if artifacts.exists(url):
        before = artifacts.open_artifact(url, kind)
        try:
            artifacts.finished(before.url, kind=kind, config=config, inputs=inputs)
        except artifacts.ArtifactMismatch:
            replaced = True
    return artifacts.ensure(url, produce, kind=kind, config=config, inputs=inputs, fresh=replaced)


def _write(comparison: Comparison, writer: Writer) -> None:
    config, cases = comparison.config, comparison.cases
    golds = {case.question.question_id: case.gold for case in cases}
    users = {case.question.question_id: case.question.user_id for case in cases}
    answers: Answers = {spec.name: comparison.answers(spec) for spec in comparison.specs}
    generated = [answer for draws in answers.values() for draw in draws for answer in draw.values()]
    notes: list[str] = []
    style = _classifier(comparison, [*golds.values(), *generated])
    systems = []
    for spec in progress.track(comparison.specs, "scoring"):
        drawn = [_text_scores(comparison, draw, golds, users, style, notes) for draw in answers[spec.name]]
        scores = averaged(drawn) | likelihood_metrics(comparison, spec)
        systems.append(report.System(spec.name, spec.label, scores, spec.kind))
    if isinstance(style, authorship.Classifier):
        own = authorship.score(style, golds, users)
        systems.append(report.System(OWN_TEXTS, "The people's own answers", own, "control"))
    _judge(comparison, systems, answers, notes)
    names = {system.name for system in systems}
    shown = report.compare(
        f"CARD on {comparison.task.name}, {config.users} users",
        systems,
        [pair for pair in comparisons(config.retrieval_k) if set(pair) <= names],
        _stated(comparison),
        notes=[*_standing_notes(comparison), *notes],
        sections=_sections(comparison, answers, writer),
        resamples=config.resamples,
        seed=config.seed,
    )
    report.write(shown, writer.folder)
    for cell in shown.cells:
        if (cell.system, cell.minus) == ("card", "card-permuted") and cell.estimate is not None:
            writer.summary[cell.name] = [cell.estimate.value, cell.estimate.low, cell.estimate.high]


def _classifier(comparison: Comparison, scored: Iterable[str]) -> authorship.Classifier | str | None:
    """The classifier of authors, or why there is none; None where answers are labels or numbers."""
    if comparison.task.metric != "text":
        return None
    try:
        return authorship.train(comparison.items, scored, comparison.config.seed)
    except ValueError as error:
        return f"not computed: {error}"


def _text_scores(
    comparison: Comparison,
    answers: Mapping[str, str],
    golds: Mapping[str, str],
    users: Mapping[str, str],
    style: authorship.Classifier | str | None,
    notes: list[str],
) -> dict[str, Scores | str]:
    evaluated = text.evaluate(comparison.task, answers, {question: golds[question] for question in answers}, users)
    notes.extend(note for note in evaluated.notes if note not in notes)
    scores = dict(evaluated.metrics)
    if comparison.task.name == "personas":
        scores["trait accuracy"] = _trait_accuracy(comparison, answers)
    if isinstance(style, authorship.Classifier):
        scores |= authorship.score(style, answers, users)
    elif style is not None:
        scores["authorship"] = style
    return scores


def _trait_accuracy(comparison: Comparison, answers: Mapping[str, str]) -> Scores:
    """Share of its writer's personal traits that an answer shows: the known truth of the persona corpus."""
    truth = personas.read_personas(comparison.corpus)
    asked = [case.question for case in comparison.cases if case.question.question_id in answers]
    values = [
        personas.trait_accuracy([personas.trait_scores(answers[q.question_id], truth[q.user_id], q.source)])
        for q in asked
    ]
    return Scores(tuple(q.question_id for q in asked), tuple(q.user_id for q in asked), np.array(values))


def likelihood_metrics(comparison: Comparison, spec: Spec) -> dict[str, Scores | str]:
    """What a system makes of the people's own texts, without an answer drawn: bits per token and pair accuracies."""
    table = comparison.table(spec.passes)
    if spec.vectors != "none":
        positions, head = comparison.positions(spec.passes), comparison.subject.head
        drawn = []
        for draw in range(comparison.config.draws if spec.drawn else 1):
            rewards = vector_rewards(head, positions, table, comparison.vectors(spec, draw), comparison.beta)
            drawn.append(likelihood_scores(table.with_log_probs(table.log_probs + rewards), rewards))
        return averaged(drawn)
    if spec.reference is None:
        return dict(likelihood_scores(table, None))
    other = comparison.table(comparison.systems[spec.reference].passes)
    row = {key: index for index, key in enumerate(zip(other.questions, other.numbers, strict=True))}
    rows = [row[key] for key in zip(table.questions, table.numbers, strict=True)]
    return dict(likelihood_scores(table, table.log_probs - other.log_probs[rows]))


def _judge(comparison: Comparison, systems: list[report.System], answers: Answers, notes: list[str]) -> None:
    """Add the judge's verdicts on CARD against others to CARD's metrics, where a judge is given."""
    index = next((index for index, system in enumerate(systems) if system.name == "card"), None)
    if comparison.config.judge_url is None or index is None:
        return
    found: dict[str, Scores | str] = {}
    for other in ("card-permuted", "cluster"):
        if other in answers:
            judgement = _judgement(comparison, other, answers["card"][0], answers[other][0])
            found[f"judged better than {other}"] = judgement.scores
            notes.append(f"Against {other}: {judgement.note}.")
    systems[index] = dataclasses.replace(systems[index], metrics={**systems[index].metrics, **found})


def _judgement(
    comparison: Comparison, other: str, first: Mapping[str, str], second: Mapping[str, str]
) -> judge.Judgement:
    config = comparison.config
    asked = judge.Judge(config.judge_url or "", config.judge_model)
    histories: dict[str, list[Item]] = {user: [] for user in comparison.users}
    for item in comparison.items:
        if item.user_id in histories:
            histories[item.user_id].append(item)
    examples = {user: history[-5:] for user, history in histories.items()}

    def produce(writer: Writer) -> None:
        questions = [case.question for case in comparison.cases]
        writer.write_json("judgement.json", judge.compare(asked, questions, first, second, examples).to_json())

    made = artifacts.ensure(
        artifacts.join(config.out, "judgements", other),
        produce,
        kind="judgement",
        config={"model": asked.model, "answers": digest([dict(first), dict(second)])},
        inputs={"corpus": comparison.corpus},
    )
    return judge.Judgement.from_json(made.read_json("judgement.json"))


def _stated(comparison: Comparison) -> dict[str, Any]:
    """What the report says about its own making."""
    return {
        **configs.to_dict(comparison.config),
        "decoding_beta": comparison.beta,
        "model": comparison.subject.model,
        "corpus_digest": comparison.corpus.digest,
        "run_digests": {role: artifact.digest for role, artifact in comparison.subject.inputs.items()},
        "code_version": artifacts.code_version(),
        "sampled_users": comparison.sampled,
    }


def _standing_notes(comparison: Comparison) -> list[str]:
    config = comparison.config
    cut = {
        spec.label: sum(comparison.generations(spec, draw).summary["cut"] for draw in comparison.draws(spec))
        for spec in comparison.specs
    }
    notes = [
        f"{len(comparison.cases)} questions of {len(comparison.users)} {config.users} users; one LoRA per user: "
        f"{len(comparison.sampled)} users.",
        "Bits per token: of the person's own answers, the end token included. Pair accuracy: the own answer against "
        f"up to {config.negatives} texts of other people that could answer the same input, matched by topic, by the "
        "implicit reward: the log-ratio of the system to what it starts from (CARD: its cluster's adapter; one LoRA "
        f"per user: {config.per_user_start}; others: the base model). Policy accuracy: the same pairs by "
        "log-probability a token.",
        f"Permuted and random vectors: averages over {config.draws} draws (answers: {config.generation_draws}); "
        "permuted within a cluster.",
        "The adapters of the run learn from a part of each history, its vectors from the rest; the shared and per-user "
        "adapters learn from all of it.",
    ]
    if comparison.without_history:
        notes.append(
            f"{comparison.without_history} questions of the corpus are by people without a history: they have no "
            "vector and are not asked."
        )
    if any(cut.values()):
        notes.append(f"Answers cut off at {config.max_new_tokens} tokens: {cut}.")
    return notes


def _sections(comparison: Comparison, answers: Answers, writer: Writer) -> dict[str, str]:
    sections = {}
    if "card" in answers:
        found = _words(comparison)
        writer.write_json("words.json", {user: dataclasses.asdict(said) for user, said in found.items()})
        sections["What the vectors promote and demote"] = _words_table(found)
    sections["Examples"] = _examples(comparison, answers)
    sections["Cost"] = _cost(comparison)
    return sections


def _words(comparison: Comparison, people: int = 8, contexts: int = 2000) -> dict[str, Words]:
    """What the vectors of some people promote and demote, all in the same contexts: everybody's scored texts."""
    positions = comparison.positions(comparison.systems["card"].passes)
    count = len(positions.target_N)
    mask_N = torch.zeros(count, dtype=torch.bool)
    mask_N[np.random.default_rng(comparison.config.seed).permutation(count)[:contexts]] = True
    here, subject = positions.select(mask_N), comparison.subject
    loaded = comparison.models.base(None)
    return {
        user: words(loaded, subject.head, here, subject.vectors[user], comparison.beta)
        for user in comparison.users[:people]
    }


def _words_table(found: Mapping[str, Words]) -> str:
    rows = ["| person | promoted | demoted |", "|---|---|---|"]
    for user, said in found.items():
        promoted, demoted = (" ".join(_inline(word.text) for word in side) for side in (said.promoted, said.demoted))
        rows.append(f"| {user} | {promoted} | {demoted} |")
    return "\n".join(rows)


def _examples(comparison: Comparison, answers: Answers, count: int = 6) -> str:
    shown = [comparison.systems[n] for n in ("base", "cluster", "card", "card-permuted") if n in answers]
    cases = random.Random(comparison.config.seed).sample(comparison.cases, min(count, len(comparison.cases)))
    blocks = []
    for case in cases:
        source = " ".join((case.question.source or case.question.input).split())
        lines = [f"**{case.question.user_id}**: {source[:300]}{'…' if len(source) > 300 else ''}", ""]
        lines.append(f"- own: {_inline(case.gold)}")
        lines += [f"- {spec.label}: {_inline(answers[spec.name][0][case.question.question_id])}" for spec in shown]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _cost(comparison: Comparison) -> str:
    rows = ["| system | answers | seconds an answer | prompt tokens | answer tokens |", "|---|---|---|---|---|"]
    for spec in comparison.specs:
        made = comparison.generations(spec).summary
        answered = made["answers"]
        rows.append(
            f"| {spec.label} | {answered} | {made['seconds'] / answered:.3f} | "
            f"{made['prompt_tokens'] / answered:.0f} | {made['answer_tokens'] / answered:.1f} |"
        )
    return "\n".join(rows)


def _inline(value: str) -> str:
    return "`" + " ".join(value.split()).replace("`", "'").replace("|", "¦") + "`"
