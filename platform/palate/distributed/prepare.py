"""Corpus preparation on a Ray cluster: the tasks of ``palate.corpora.preparation``, run by Ray Data.

On retry: Ray may run a task twice, on another node too. Every task writes an artifact of its own under a name that
depends on the task alone, so the second run finds it or writes the same files again. ``--out`` must be storage that
all nodes see: a shared folder or a URL.
"""

import json
from typing import Any

import ray
from ray.data import DataContext

from palate.corpora.preparation import Step
from palate.corpora.streams import CorpusError
from palate.progress import track


def run_with_ray(step: Step) -> list[dict[str, Any]]:
    """The results of the tasks in their order, a Ray task each; starts or joins a cluster where none is joined.

    Raises:
        CorpusError: a task found that the input is not what the command says.
    """
    if not ray.is_initialized():
        ray.init()
    DataContext.get_current().enable_progress_bars = False
    rows = [{"position": position, "task": task} for position, task in enumerate(step.tasks)]

    def run(row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"position": row["position"], "result": json.dumps(step.run(row["task"])), "error": ""}
        except CorpusError as error:  # a finding about the input, not a failure to retry
            return {"position": row["position"], "result": "", "error": str(error)}

    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(run)
    finished = sorted(track(dataset.iter_rows(), step.label, len(rows)), key=lambda row: row["position"])
    for row in finished:
        if row["error"]:
            raise CorpusError(row["error"])
    return [json.loads(row["result"]) for row in finished]
