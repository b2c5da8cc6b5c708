"""A finished CARD run in memory, ready to answer: prompts, adapters, head, and the fit of a person's vector."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from palate.card import features, fitting, prompts, styles
from palate.card.adapters import RowMask, load_adapters
from palate.card.correction import Head
from palate.card.preferences import Positions, Prior
from palate.card.runs import Embed, Run, open_run
from palate.card.stages import read_assignment
from palate.card.words import Words, words
from palate.corpora.schema import Item, Task
from palate.models.causal_lm import LoadedModel, answer_ids, check_compatible, load_causal_lm, render_chat
from palate.serving.worker import Job

TOKEN_CHARACTERS = 64  # more than any token has
STYLE_TEXTS, STYLE_CHARACTERS = 256, 20_000  # latest texts, and of each so much, that tell a person's style
SLICE_TOKENS = 192  # of one pass over a person's texts: how long a decode step may have to wait for it


@dataclass(frozen=True)
class Written:
    """One text of a person: what it answers, and the text itself."""

    input: str
    output: str


@dataclass(frozen=True)
class Personal:
    """A person's cluster and fitted vector (J,)."""

    cluster: int
    vector_J: Tensor


@dataclass(frozen=True)
class ServedRun:
    """Everything that requests of one run need.

    Attributes:
        version: what vectors are fitted to; another head's vectors mean nothing here.
        population: cluster and vector of people of whom nothing is known: the largest cluster, and the prior's mean.
        head, fitting_head: on the model's device, and on the CPU, where vectors are fitted.
        most_texts: how many of a person's latest texts are fitted to.
    """

    version: str
    loaded: LoadedModel
    rows: RowMask
    head: Head
    fitting_head: Head
    prior: Prior
    population: Personal
    embed: Embed
    centroids_KE: np.ndarray
    beta: float
    history_k: int
    max_prompt_tokens: int
    max_answer_tokens: int
    most_texts: int
    task: Task
    contexts: Positions | None

    def promoted_and_demoted(self, vector_J: Tensor) -> Words | None:
        """What a vector promotes and demotes at places in other people's texts; None where the run keeps none."""
        if self.contexts is None:
            return None
        return words(self.loaded, self.fitting_head, self.contexts, vector_J, self.beta)


def load_run(url: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> ServedRun:
    """Load the run at ``url`` and its base model.

    Raises:
        ArtifactError: the run is not finished, or damaged.
        ArtifactMismatch: the base model is another one than the run was made with.
        ValueError: the base model cannot be loaded.
    """
    run = open_run(url)
    loaded = load_causal_lm(run.model, device=device, dtype=dtype)
    check_compatible(loaded, run.fingerprint)
    head, prior = run.head(loaded)
    rows = load_adapters(loaded.model, run.folders)
    where = torch.device(device)
    sizes = np.bincount(list(read_assignment(run.clusters).values()), minlength=len(run.folders))
    return ServedRun(
        version=run.version,
        loaded=loaded,
        rows=rows,
        head=_on(head, where),
        fitting_head=head,
        prior=prior,
        population=Personal(int(sizes.argmax()), prior.mean_J),
        embed=run.embedding(),
        centroids_KE=run.centroids(),
        beta=run.beta,
        history_k=run.settings["history_k"],
        max_prompt_tokens=run.settings["max_prompt_tokens"],
        max_answer_tokens=run.settings["max_answer_tokens"],
        most_texts=run.most_texts,
        task=_task(run),
        contexts=run.contexts(),
    )


def chat_prompt(run: ServedRun, turns: Sequence[tuple[str, str]], history: Sequence[Written]) -> list[int]:
    """Token ids of a conversation; where the run was trained with retrieved texts, the last user turn quotes some.

    Raises:
        ValueError: the base model's chat template refuses these turns.
    """
    users = [place for place, (role, _) in enumerate(turns) if role == "user"]
    if not run.history_k or not history or not users:
        return render_chat(run.loaded, turns)
    place = users[-1]
    asked = turns[place][1]
    found = prompts.Retriever(run.task, _items(history)).retrieve(asked, run.history_k)
    if len(turns) == 1:
        return prompts.prompt_ids(run.loaded, run.task, asked, found, run.max_prompt_tokens)
    quoting = (*turns[:place], ("user", prompts.history_prompt(run.task, asked, found)), *turns[place + 1 :])
    return render_chat(run.loaded, quoting)


@dataclass(frozen=True)
class PreparedFit:
    """A person's cluster, and their texts in passes of few tokens."""

    cluster: int
    passes: list[list[features.Branches]]


def prepare_fit(run: ServedRun, texts: Sequence[Written]) -> PreparedFit:
    """The nearest cluster of a person's style, and their latest texts as the cluster's model reads them.

    Nothing here is the engine's: it takes as long as the texts are long, and runs on a thread of its own.
    """
    # What lies far beyond the longest prompt and answer need not be tokenized to be cut off.
    kept = [
        Written(text.input[: run.max_prompt_tokens * TOKEN_CHARACTERS], text.output[:STYLE_CHARACTERS])
        for text in texts[-STYLE_TEXTS:]
    ]
    cluster = int(styles.nearest(run.centroids_KE, run.embed([[text.output for text in kept]]))[0])
    items = _items(kept)
    retriever = prompts.Retriever(run.task, items) if run.history_k else None
    branches = []
    for item in items[-run.most_texts :]:
        quoted = retriever.for_item(item, run.history_k) if retriever else []
        prompt = prompts.prompt_ids(run.loaded, run.task, item.input, quoted, run.max_prompt_tokens)
        answer = answer_ids(run.loaded, item.output)[: run.max_answer_tokens]
        branches.append(features.Branches(prompt, (answer,), cluster))
    return PreparedFit(cluster, _passes(branches))


def fit_person(run: ServedRun, prepared: PreparedFit) -> Job[Personal]:
    """The exact fit of a person's vector: a forward pass over their texts, a slice of it each time it is asked."""
    parts = []
    for texts in prepared.passes:
        parts.append(features.extract(run.loaded, run.rows, run.head.features, texts, run.head.top_k))
        yield
    if not parts:
        return run.population
    fit = fitting.fit_vector(features.concatenate(parts), run.fitting_head, run.prior)
    return Personal(prepared.cluster, fit.vector_J.cpu())


def _passes(branches: Sequence[features.Branches]) -> list[list[features.Branches]]:
    """The texts in groups of few tokens, like lengths together."""
    groups: list[list[features.Branches]] = []
    for branch in sorted(branches, key=lambda one: one.length):
        # The longest of a group comes last, and all are padded to it.
        if groups and (len(groups[-1]) + 1) * branch.length <= SLICE_TOKENS:
            groups[-1].append(branch)
        else:
            groups.append([branch])
    return groups


def _items(texts: Sequence[Written]) -> list[Item]:
    return [Item("", str(place), place, text.input, text.input, text.output) for place, text in enumerate(texts)]


def _on(head: Head, device: torch.device) -> Head:
    """The head on ``device``."""
    moved = {name: getattr(head.features, name).to(device) for name in ("mean_Ld", "scale_Ld", "whitening_dd")}
    bias_J = None if head.bias_J is None else head.bias_J.to(device)
    feature_map = features.FeatureMap(head.features.layers, **moved)
    return Head(feature_map, head.project_dJ.to(device), head.output_VJ.to(device), head.top_k, bias_J)


def _task(run: Run) -> Task:
    if run.task is not None:
        return run.task
    if run.settings["history_k"]:
        raise ValueError(
            f"the run {run.url} quotes history in its prompts, but keeps no task.json: train its last stage again "
            "(remove its head folder)"
        )
    return Task("text", "text")
