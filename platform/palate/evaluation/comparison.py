"""The evaluation of a CARD run: every system answers the same questions, side by side.

    OUT/adapters-shared, adapters-user   the baselines' adapters, trained here on the same histories
    OUT/likelihoods/<adapters>-<k>       log-probabilities of own texts and matched negatives under one model and prompt
    OUT/generations/<system>             answers in LaMP's file shape; drawn controls have one folder a draw
    OUT/judgements/<system>              verdicts, where a judge is given
    OUT/report                           report.json, report.md, plots, what each vector promotes

Each is an artifact of its own, so adding a system, or a kill, does not redo the others.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from peft import PeftModel
from torch import Tensor

from palate import artifacts
from palate import config as configs
from palate.artifacts import Artifact, Writer
from palate.card import features
from palate.card.adaptation import Sample, group_name, lora, train_adapters
from palate.card.adapters import BASE, RowMask, export_adapter, load_adapters
from palate.card.preferences import Positions
from palate.card.prompts import Retriever, prompt_ids, retrievers
from palate.config import scale
from palate.corpora.schema import Item, Task, read_items, read_questions, read_task
from palate.evaluation import text
from palate.evaluation.cases import Case, Users, sample_people, select_cases
from palate.evaluation.subject import Subject
from palate.evaluation.systems import AdapterSet, Spec, TextTable, assigned_vectors, standard, text_sums
from palate.models.causal_lm import LoadedModel, answer_ids, check_compatible, load_causal_lm
from palate.serving.engine import Engine, Request
from palate.training.checkpoints import Store
from palate.training.parallel import World

TEXTS = pa.schema(
    [
        pa.field("question_id", pa.string(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("number", pa.int32(), nullable=False),  # 0: the person's own text; 1, 2, ...: matched negatives
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("log_prob", pa.float64(), nullable=False),  # summed over the tokens, in nats
    ]
)


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Compare a CARD run with baselines and controls on a text corpus."""

    run: str = scale()
    """Folder or URL of the run that jobs/card.py made."""
    corpus: str = scale()
    """Folder or URL of the corpus."""
    out: str = scale()
    """Folder or URL for the results; the report is in OUT/report."""
    users: Users = "test"
    """Whose questions are asked. Choose options on development users; report on test users, once."""
    systems: tuple[str, ...] = ()
    """Names of the systems to compare; all when empty."""
    max_users: int | None = None
    """At most so many people, drawn at random."""
    max_questions: int | None = None
    """At most so many questions a person, the first by id."""
    retrieval_k: tuple[int, ...] = (1, 4)
    """Retrieved items of the retrieval baselines."""
    negatives: int = 5
    """Matched texts of other people that each own text is compared with."""
    draws: int = 8
    """Derangements, and random vectors, that are averaged in the likelihood metrics."""
    generation_draws: int = 2
    """The same, of generated answers."""
    per_user_sample: int = 8
    """People who get a LoRA of their own, drawn from those asked."""
    per_user_start: Literal["base", "shared"] = "shared"
    """What their LoRA starts from."""
    decoding_beta: float | None = None
    """Strength of the correction; by default the run's."""
    decoding_top_k: int | None = None
    """Likeliest tokens that are corrected; by default, and at most, as many as the run learned with."""
    max_new_tokens: int = 64
    """Longest answer."""
    resamples: int = 10_000
    """Of the bootstrap."""
    seed: int = 0
    """Of samples, draws and the bootstrap."""
    judge_url: str | None = None
    """An OpenAI-compatible endpoint that judges which answer is the person's; its key: $PALATE_JUDGE_API_KEY."""
    judge_model: str = ""
    """The judge's model."""
    slots: int = scale(16)
    """Answers that are decoded at a time."""
    device: str = scale("cpu")
    """Where the models run."""
    fresh: bool = scale(False)
    """Discard what --out holds, adapters, likelihoods and answers too, and begin anew."""


class Comparison:
    """One evaluation: its questions, and the artifacts that every report needs."""

    def __init__(self, config: TextConfig, corpus: Artifact, subject: Subject) -> None:
        """Read the corpus and choose the questions.

        Raises:
            ValueError: no question is left, a system has no such name, or a number is too small.
        """
        for name in ("draws", "generation_draws", "resamples", "max_users", "max_questions", "max_new_tokens"):
            if (value := getattr(config, name)) is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if any(k < 1 for k in config.retrieval_k):
            raise ValueError(f"--retrieval-k needs numbers above 0, got {list(config.retrieval_k)}")
        self.config, self.corpus, self.subject = config, corpus, subject
        self.task: Task = read_task(self.corpus)
        self.items: list[Item] = read_items(self.corpus)
        self.systems = {
            spec.name: spec for spec in standard(subject.history_k, config.retrieval_k, config.per_user_start)
        }
        if unknown := sorted(set(config.systems) - self.systems.keys()):
            raise ValueError(f"--systems {unknown[0]}: there is no such system; there are {sorted(self.systems)}")
        self.specs = [spec for name, spec in self.systems.items() if not config.systems or name in config.systems]
        questions = read_questions(corpus)
        self.without_history = sum(question.user_id not in subject.clusters for question in questions)
        self.cases = select_cases(
            questions,
            self.items,
            subject.clusters,
            config.users,
            negatives=config.negatives,
            max_users=config.max_users,
            max_questions=config.max_questions,
            seed=config.seed,
        )
        self.users = sorted({case.question.user_id for case in self.cases})
        able = {item.user_id for item in self.items} & set(self.users)
        self.sampled = sample_people(able, config.per_user_sample, config.seed)
        self.beta = subject.beta if config.decoding_beta is None else config.decoding_beta
        most = subject.head.top_k
        self.top_k = most if config.decoding_top_k is None else config.decoding_top_k
        if not 1 <= self.top_k <= most:
            raise ValueError(f"--decoding-top-k is 1 to {most}, with which the run learned, got {self.top_k}")
        self.models = _Models(self)

    @cached_property
    def retrievers(self) -> dict[str, Retriever]:
        return retrievers(self.task, self.items)

    def make(self) -> dict[str, Artifact]:
        """Everything that a report reads, by role; one model is in memory at a time."""
        made: dict[str, Artifact] = {}
        for adapters in ("base", "shared", "user", "cluster"):
            needed = {spec.passes for spec in self.specs} | {
                self.systems[spec.reference].passes for spec in self.specs if spec.reference
            }
            for passes in sorted(passes for passes in needed if passes[0] == adapters):
                made[f"likelihoods {passes[0]}-{passes[1]}"] = self.likelihoods(passes)
            for spec in self.specs:
                if spec.adapters == adapters:
                    for draw in self.draws(spec):
                        made[f"answers {self._folder(spec, draw)}"] = self.generations(spec, draw)
        self.models.drop()
        return made

    def discard(self) -> None:
        """Remove all that was made in OUT before."""
        for part in ("likelihoods", "generations", "judgements"):
            for folder in artifacts.folders(self._url(part)):
                artifacts.discard(folder)
        for name in ("adapters-shared", "adapters-user", "report"):
            artifacts.discard(self._url(name))
        for which in ("shared", "user"):
            Store(self._url(f"adapters-{which}.training"), {}, keep=1, world=World()).discard()

    def draws(self, spec: Spec) -> range:
        """The draws of a system's vectors that answers are generated with."""
        return range(self.config.generation_draws if spec.drawn else 1)

    def cases_of(self, adapters: AdapterSet) -> list[Case]:
        """The cases that a system with these adapters answers: all, or those of the sampled people."""
        if adapters != "user":
            return self.cases
        return [case for case in self.cases if case.question.user_id in self.sampled]

    def adapters(self, which: Literal["shared", "user"]) -> Artifact:
        """The adapters of a baseline, trained as the run's own are, but on all items of the histories.

        One adapter for everybody that the run learned from, or one for each sampled person on their items alone.
        """
        people = {user: index for index, user in enumerate(self.sampled)} if which == "user" else {}
        start = self.adapters("shared") if which == "user" and self.config.per_user_start == "shared" else None
        identity = {
            **self._prompts_identity(),
            "adapt": configs.identity(self.subject.adapt),
            "adapter_seed": self.subject.adapter_seed,
            "people": sorted(people or self.subject.learned_from),
        }
        url = self._url(f"adapters-{which}")
        produce = partial(self._train, people=people, start=start, work=f"{url}.training")
        inputs = {"corpus": self.corpus} | ({"start": start} if start else {})
        return artifacts.ensure(url, produce, kind="baseline-adapters", config=identity, inputs=inputs)

    def likelihoods(self, passes: tuple[AdapterSet, int]) -> Artifact:
        """Log-probabilities of own texts and negatives (``TEXTS``), and for cluster adapters the head's positions."""
        adapters, history_k = passes
        texts = [[case.question.question_id, case.gold, *case.negatives] for case in self.cases_of(adapters)]
        return artifacts.ensure(
            self._url(f"likelihoods/{adapters}-{history_k}"),
            partial(self._score_texts, adapters=adapters, history_k=history_k),
            kind="text-likelihoods",
            config={**self._prompts_identity(), "adapters": adapters, "history_k": history_k, "texts": digest(texts)},
            inputs=self._inputs(adapters),
        )

    def generations(self, spec: Spec, draw: int = 0) -> Artifact:
        """The answers of one system, in LaMP's file shape, for one draw of its vectors."""
        identity = {
            **self._prompts_identity(),
            "history_k": spec.history_k,
            "questions": digest([case.question.question_id for case in self.cases_of(spec.adapters)]),
            "vectors": spec.vectors,
            "seed": self.config.seed if spec.drawn else 0,
            "beta": 0.0 if spec.vectors == "none" else self.beta,
            "max_new_tokens": self.config.max_new_tokens,
        }
        if spec.vectors != "none" and self.top_k != self.subject.head.top_k:
            identity["top_k"] = self.top_k
        return artifacts.ensure(
            self._url(f"generations/{self._folder(spec, draw)}"),
            partial(self._generate, spec=spec, draw=draw),
            kind="generations",
            config=identity,
            inputs=self._inputs(spec.adapters),
        )

    def vectors(self, spec: Spec, draw: int) -> dict[str, Tensor]:
        """The vector that each asked person is served with."""
        subject = self.subject
        seed = self.config.seed + draw
        return assigned_vectors(spec.vectors, self.users, subject.vectors, subject.clusters, subject.prior, seed)

    def answers(self, spec: Spec) -> list[dict[str, str]]:
        """Answers by question id, one mapping a draw."""
        made = [self.generations(spec, draw) for draw in self.draws(spec)]
        return [text.read_predictions(str(artifact.local("predictions.json")))[1] for artifact in made]

    def table(self, passes: tuple[AdapterSet, int]) -> TextTable:
        """The scored texts under one model and prompt."""
        rows = pq.read_table(self.likelihoods(passes).local("texts.parquet"), schema=TEXTS).to_pydict()
        return TextTable(
            tuple(rows["question_id"]),
            tuple(rows["user_id"]),
            tuple(rows["number"]),
            np.array(rows["tokens"], dtype=np.float64),
            np.array(rows["log_prob"], dtype=np.float64),
        )

    def positions(self, passes: tuple[AdapterSet, int]) -> Positions:
        """What the head sees of the scored texts, numbered as the rows of ``table``."""
        found = features.load_positions(self.likelihoods(passes).local("positions.safetensors"))
        return found if self.top_k == self.subject.head.top_k else found.likeliest(self.top_k)

    def _folder(self, spec: Spec, draw: int) -> str:
        return f"{spec.name}-{draw}" if spec.drawn else spec.name

    def _url(self, path: str) -> str:
        return artifacts.join(self.config.out, path)

    def _prompts_identity(self) -> dict[str, Any]:
        return {
            "model": dict(self.subject.fingerprint),
            "history_k": self.subject.history_k,
            "max_prompt_tokens": self.subject.max_prompt_tokens,
            "max_answer_tokens": self.subject.max_answer_tokens,
        }

    def _inputs(self, adapters: AdapterSet) -> dict[str, Artifact]:
        match adapters:
            case "base":
                return {"corpus": self.corpus}
            case "cluster":
                return {"corpus": self.corpus, **self.subject.inputs}
            case "shared" | "user":
                return {"corpus": self.corpus, "adapters": self.adapters(adapters)}

    def _adapter_index(self, adapters: AdapterSet, user: str) -> int:
        """Which of the packed adapters a person's request runs on."""
        match adapters:
            case "base":
                return BASE
            case "shared":
                return 0
            case "user":
                return self.sampled.index(user)
            case "cluster":
                return self.subject.clusters[user]

    def _prompts(self, cases: Iterable[Case], history_k: int, loaded: LoadedModel) -> list[list[int]]:
        most, found = self.subject.max_prompt_tokens, []
        for case in cases:
            retriever = self.retrievers.get(case.question.user_id)
            history = retriever.for_question(case.question, history_k) if retriever and history_k else []
            found.append(prompt_ids(loaded, self.task, case.question.input, history, most))
        return found

    def _train(self, writer: Writer, people: Mapping[str, int], start: Artifact | None, work: str) -> None:
        subject = self.subject
        self.models.drop()
        loaded = self.models.base(start.local_folder(group_name(0)) if start else None)
        learned = people or subject.learned_from
        items = [item for item in self.items if item.user_id in learned]
        samples = []
        for item in items:
            history = self.retrievers[item.user_id].for_item(item, subject.history_k) if subject.history_k else []
            prompt = prompt_ids(loaded, self.task, item.input, history, subject.max_prompt_tokens)
            answer = answer_ids(loaded, item.output)[: subject.max_answer_tokens]
            samples.append(Sample(prompt, answer, people.get(item.user_id, 0)))
        count = len(people) or 1
        _, summary = train_adapters(
            loaded,
            count,
            samples,
            [f"{item.user_id}/{item.item_id}" for item in items],
            subject.adapt,
            work,
            World(device=loaded.device),
            seed=subject.adapter_seed,
            identity={"corpus": self.corpus.digest, "start": start.digest if start else "", **self._prompts_identity()},
        )
        for index in range(count):
            folder = writer.folder / group_name(index)
            export_adapter(loaded.model, index, lora(subject.adapt), folder, subject.model)
        writer.summary.update(dataclasses.asdict(summary), people=sorted(people), texts=len(samples))

    def _score_texts(self, writer: Writer, adapters: AdapterSet, history_k: int) -> None:
        loaded, rows = self.models.get(adapters)
        cases, most, head = self.cases_of(adapters), self.subject.max_answer_tokens, self.subject.head
        branches = [
            features.Branches(
                prompt,
                [answer_ids(loaded, answer)[:most] for answer in (case.gold, *case.negatives)],
                self._adapter_index(adapters, case.question.user_id),
            )
            for case, prompt in zip(cases, self._prompts(cases, history_k, loaded), strict=True)
        ]
        label = f"likelihoods, {adapters}, {history_k} retrieved"
        positions = features.extract(loaded, rows, head.features, branches, head.top_k, label)
        answers = [answer for branch in branches for answer in branch.answers]
        sums = text_sums(positions.target_log_prob_N, positions, len(answers))
        numbered = [(case, n) for case, branch in zip(cases, branches, strict=True) for n in range(len(branch.answers))]
        columns = {
            "question_id": [case.question.question_id for case, _ in numbered],
            "user_id": [case.question.user_id for case, _ in numbered],
            "number": [number for _, number in numbered],
            "tokens": [len(answer) for answer in answers],
            "log_prob": sums,
        }
        pq.write_table(pa.table(columns, schema=TEXTS), writer.folder / "texts.parquet")
        if adapters == "cluster":
            features.save_positions(positions, writer.folder / "positions.safetensors")

    def _generate(self, writer: Writer, spec: Spec, draw: int) -> None:
        loaded, rows = self.models.get(spec.adapters)
        cases, most = self.cases_of(spec.adapters), self.config.max_new_tokens
        prompts = self._prompts(cases, spec.history_k, loaded)
        vectors = {} if spec.vectors == "none" else self.vectors(spec, draw)
        requests = [
            Request(
                prompt,
                self._adapter_index(spec.adapters, case.question.user_id),
                vectors.get(case.question.user_id),
                self.beta if vectors else 0.0,
                most,
            )
            for case, prompt in zip(cases, prompts, strict=True)
        ]
        engine = Engine(
            loaded,
            rows,
            dataclasses.replace(self.subject.head, top_k=self.top_k) if vectors else None,
            slots=min(self.config.slots, len(requests)),
            max_length=max(map(len, prompts)) + most,
        )
        started = time.perf_counter()
        completions = engine.generate(requests, spec.label)
        predictions = {
            case.question.question_id: completion.text for case, completion in zip(cases, completions, strict=True)
        }
        text.write_predictions(str(writer.folder / "predictions.json"), self.task.name, predictions)
        writer.summary.update(
            answers=len(completions),
            seconds=time.perf_counter() - started,
            prompt_tokens=sum(map(len, prompts)),
            answer_tokens=sum(len(completion.token_ids) for completion in completions),
            cut=sum(completion.finish_reason == "length" for completion in completions),
        )


class _Models:
    """The base model with one set of adapters, kept until another set is asked for."""

    def __init__(self, comparison: Comparison) -> None:
        self._comparison = comparison
        self._which: AdapterSet | None = None
        self._loaded: tuple[LoadedModel, RowMask | None] | None = None

    def get(self, adapters: AdapterSet) -> tuple[LoadedModel, RowMask | None]:
        """The model with these adapters packed in it, in eval mode."""
        if self._which != adapters or self._loaded is None:
            start, folders = self._folders(adapters)
            self.drop()
            loaded = self.base(start)
            self._loaded = (loaded, load_adapters(loaded.model, folders) if folders else None)
            self._which = adapters
        return self._loaded

    def base(self, start: Path | None) -> LoadedModel:
        """A fresh base model, with the adapter in ``start`` merged into its weights."""
        subject, config = self._comparison.subject, self._comparison.config
        loaded = load_causal_lm(subject.model, device=config.device)
        check_compatible(loaded, subject.fingerprint)
        if start is not None:
            merged = PeftModel.from_pretrained(loaded.model, str(start)).merge_and_unload()
            loaded = dataclasses.replace(loaded, model=merged.eval())
        return loaded

    def drop(self) -> None:
        """Free the memory of what is kept."""
        self._which, self._loaded = None, None

    def _folders(self, adapters: AdapterSet) -> tuple[Path | None, list[Path]]:
        """An adapter to merge into the base model, and the adapters to pack."""
        comparison = self._comparison
        match adapters:
            case "base":
                return None, []
            case "cluster":
                return None, list(comparison.subject.adapters)
            case "shared":
                return None, [comparison.adapters("shared").local_folder(group_name(0))]
            case "user":
                own = comparison.adapters("user")
                start = None
                if comparison.config.per_user_start == "shared":
                    start = comparison.adapters("shared").local_folder(group_name(0))
                return start, [own.local_folder(group_name(index)) for index in range(len(comparison.sampled))]


def digest(value: Sequence[Any]) -> str:
    """A short hash of JSON values, to tell inputs apart."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
