"""What stands behind the HTTP routes of one replica: the runs in memory, who a request is for, and the fits of people.

The database is what replicas share: people and their texts, vectors by head version, keys, and the registry of runs.
Two threads tend it. One loads runs that the registry lists and lets go of those that are retired; the other claims
people whose vector is older than their texts (new ones, edited ones, and everybody after a new head) and fits them
beside the decoding. A replica that dies leaves its claims to the others, which take them when the lease ends.
Unified models, which read images, are named in the settings and know no people.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import torch

from palate.card.adapters import RowMask
from palate.card.correction import Head
from palate.card.runs import open_run
from palate.models.causal_lm import LoadedModel
from palate.serving.engine import Engine
from palate.serving.served_run import Personal, ServedRun, Written, fit_person, load_run, prepare_fit
from palate.serving.settings import Settings
from palate.serving.unified import ServedUnified, load_unified
from palate.serving.worker import EngineFailed, EngineWorker
from palate.users.cache import VectorCache
from palate.users.records import Fitted, Person
from palate.users.runs import Run, RunState, add_run, live_run, promote, runs
from palate.users.store import Store, open_store

State = Literal["pending", "population", "personal", "base"]

LEASE_SECONDS = 300.0  # a replica that dies in a fit keeps the person for so long
RETRY_SECONDS = 10.0  # until a run that could not be loaded is tried again
GRACE_SECONDS = 10.0  # how long a retired run is still served to requests that have just asked for it
LOOK_SECONDS = 0.5  # how often the database is looked at, by each thread

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Hosted:
    """A run in memory with the thread that decodes on it."""

    name: str
    run: ServedRun
    worker: EngineWorker


@dataclass(frozen=True, eq=False)
class HostedUnified:
    """A unified model in memory with the thread that decodes on it, and the one that reads images."""

    name: str
    run: ServedUnified
    worker: EngineWorker
    reader: ThreadPoolExecutor


@dataclass(frozen=True)
class Served:
    """Whom a request is answered for: cluster and vector, where these come from, and the history that prompts quote."""

    personal: Personal
    state: State
    history: tuple[Written, ...] = ()


class Service:
    """One replica. ``ready`` says whether it has a live run; ``healthy`` whether it should go on.

    Raises:
        ValueError: the database cannot be used.
    """

    def __init__(self, settings: Settings, *, store: Store | None = None) -> None:
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.settings = settings
        self.store = store or open_store(settings.database)
        self.cache = VectorCache(self.store, settings.cache_bytes)
        self.owner = secrets.token_hex(8)
        self.hosted: dict[str, Hosted] = {}
        self.unified: dict[str, HostedUnified] = {}
        self.live: str | None = None
        self.wanted: str | None = None  # the registry's live run; another than ours while it cannot be loaded
        self.failed: dict[str, float] = {}  # runs that could not be loaded, and when to try again
        self._leaving: list[tuple[Hosted, float]] = []  # retired or replaced, and since when
        self._refitting: dict[str, datetime] = {}  # since when each run waits for everybody's vector
        self._stopping = threading.Event()
        self._fit_now = threading.Event()
        self._people_pause = LOOK_SECONDS
        self._threads = [
            threading.Thread(target=self._repeat, args=(work, wait), name=f"palate-{work.__name__}", daemon=True)
            for work, wait in ((self.tend_runs, self._stopping.wait), (self._tend_people, self._wait_for_people))
        ]

    def start(self) -> "Service":
        """Load what the registry lists, then keep tending in the background."""
        self.tend_runs()
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        """End the threads; what still decodes fails with ``EngineFailed``."""
        self._stopping.set()
        self._fit_now.set()
        for thread in self._threads:  # first, lest one of them starts another engine
            if thread.is_alive():
                thread.join()
        for hosted in [*self.hosted.values(), *(hosted for hosted, _ in self._leaving)]:
            hosted.worker.stop()
        for unified in self.unified.values():
            unified.worker.stop()
            unified.reader.shutdown()
        self.store.release(self.owner)
        self.store.close()

    def register(self, url: str, name: str | None = None) -> str:
        """Put a run into the registry, live where none is; its name, by default the last part of ``url``."""
        run = open_run(url)
        name = name or default_name(url)
        add_run(self.store, name, url, run.version, run.model)
        if live_run(self.store) is None:
            promote(self.store, name)
        return name

    @property
    def ready(self) -> bool:
        return self.live is not None or (self.wanted is None and bool(self.unified))

    @property
    def healthy(self) -> bool:
        """False once an engine has failed: the replica must be replaced."""
        return all(hosted.worker.failure is None for hosted in self.all_hosted)

    @property
    def all_hosted(self) -> list[Hosted | HostedUnified]:
        return [*list(self.hosted.values()), *list(self.unified.values())]

    @property
    def names(self) -> list[str]:
        """Of all that is served, the alias of the live run first."""
        return [*([self.settings.alias] if self.live else []), *sorted(one.name for one in self.all_hosted)]

    def find(self, model: str) -> Hosted | HostedUnified | None:
        """What a request's ``model`` names: the live run by the alias, or any run or model by its own name."""
        name = self.live if model == self.settings.alias else model
        return None if name is None else self.unified.get(name) or self.hosted.get(name)

    def serve(self, hosted: Hosted, tenant: str, user_id: str | None) -> Served:
        """Whom to answer for. Reads the database where the cache is older than a second."""
        run = hosted.run
        if user_id is None:
            return Served(run.population, "population")
        fitted = self.cache.get(tenant, user_id, run.version)
        history: tuple[Written, ...] = ()
        if run.history_k and (person := self.store.person(tenant, user_id)) is not None:
            history = written(person)
        if fitted is not None:
            state: State = "personal" if fitted.texts else "population"
            return Served(Personal(fitted.cluster, torch.from_numpy(fitted.vector_J.copy())), state, history)
        version, _ = self.store.current(tenant, user_id, run.version)
        return Served(run.population, "population" if version is None else "pending", history)

    def delete_person(self, tenant: str, user_id: str) -> bool:
        """Delete all that is kept of a person; False if there is nobody. An image server removes what files of theirs
        nobody else needs."""
        found = self.store.delete(tenant, user_id)
        self.cache.forget(tenant, user_id)
        return found

    def fit_soon(self) -> None:
        """Have the fitting thread look at the database now."""
        self._fit_now.set()

    def fitted_version(self, tenant: str, user_id: str) -> tuple[int | None, int | None]:
        """Version of the person's history, and of their vector for the live run."""
        live = self.hosted.get(self.live or "")
        return self.store.current(tenant, user_id, live.run.version if live else "")

    def tend_runs(self) -> None:
        """Load what the settings name and the registry lists, switch to the live run, let go of the retired."""
        for name, url in self.settings.unified.items():
            self._host_unified(name, url)
        listed = {run.name: run for run in runs(self.store)}
        for run in listed.values():
            self._host(run)
        live = live_run(self.store)
        self.wanted = live.name if live else None
        if self.wanted in self.hosted:
            self.live = self.wanted
        self._promote_refitted(listed)
        for name in [name for name in self.hosted if name != self.live]:
            if name not in listed or listed[name].state is RunState.RETIRED:
                self._leave(name)
        self._stop_idle()

    def _host_unified(self, name: str, url: str) -> None:
        """Load a model of the settings, unless it is there or has just failed."""
        if name in self.unified or time.monotonic() < self.failed.get(name, 0.0):
            return
        start = time.perf_counter()
        try:
            run = load_unified(url, device=self.settings.device, dtype=self._dtype)
            worker = self._worker(run.loaded)
        except Exception as error:  # of any library: what cannot be loaded must not stop what is served
            self._note_failure(f"unified model {name}", name, error)
            return
        self.failed.pop(name, None)
        # One image at a time: reading is bound by the cores, and so is decoding beside it.
        self.unified[name] = HostedUnified(name, run, worker, ThreadPoolExecutor(1, f"palate-images-{name}"))
        log.info("%s loaded from %s in %.1f s", name, url, time.perf_counter() - start)

    def _note_failure(self, what: str, name: str, error: Exception) -> None:
        log.error("%s cannot be served, and is tried again in %.0f s: %s", what, RETRY_SECONDS, error)
        self.failed[name] = time.monotonic() + RETRY_SECONDS

    def _host(self, run: Run) -> None:
        """Load a run that the registry lists, unless this very run is there or has just failed."""
        before = self.hosted.get(run.name)
        if run.state is RunState.RETIRED or (before is not None and before.run.version == run.head):
            return
        if time.monotonic() < self.failed.get(run.name, 0.0):
            return
        try:
            if run.name == self.settings.alias:
                raise ValueError("its name is the alias of whatever run is live: add it by another name")
            if run.name in self.settings.unified:
                raise ValueError("its name is that of a unified model of the settings: add it by another name")
            made = self._load(run.name, run.url)
            if made.run.version != run.head:
                made.worker.stop()
                raise ValueError(f"{run.url} is another run than was added: it was trained again. Add it by a new name")
        except Exception as error:  # of any library: a run that cannot be loaded must not stop what is served
            self._note_failure(f"run {run.name}", run.name, error)
            return
        self.failed.pop(run.name, None)
        if before is not None:  # the name was given to another run
            self._leave(run.name)
        self.hosted[run.name] = made

    def _leave(self, name: str) -> None:
        self._leaving.append((self.hosted.pop(name), time.monotonic()))

    def _stop_idle(self) -> None:
        """Stop engines of runs that have left, once nothing runs on them and nothing can be about to."""
        staying = []
        for hosted, since in self._leaving:
            load = hosted.worker.load
            if load.running or load.waiting or time.monotonic() - since < GRACE_SECONDS:
                staying.append((hosted, since))
            else:
                hosted.worker.stop()
        self._leaving = staying

    def _promote_refitted(self, listed: dict[str, Run]) -> None:
        """Make a refitting run live when everybody who was there at its start has a vector for it.

        A vector that is a little out of date will do: people who write all the time would hold up everybody else.
        """
        for run in listed.values():
            if run.state is not RunState.REFITTING or run.name not in self.hosted:
                self._refitting.pop(run.name, None)
            elif not self.store.missing(run.head, known_before=self._refitting.setdefault(run.name, datetime.now(UTC))):
                log.info("everybody is fitted to run %s: it goes live", run.name)
                promote(self.store, run.name)
                self.live = self.wanted = run.name

    def _load(self, name: str, url: str) -> Hosted:
        start = time.perf_counter()
        run = load_run(url, device=self.settings.device, dtype=self._dtype)
        worker = self._worker(run.loaded, run.rows, run.head)
        log.info("run %s loaded from %s in %.1f s", name, url, time.perf_counter() - start)
        return Hosted(name, run, worker)

    def _worker(self, loaded: LoadedModel, rows: RowMask | None = None, head: Head | None = None) -> EngineWorker:
        settings = self.settings
        limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
        engine = Engine(
            loaded,
            rows,
            head,
            slots=settings.slots,
            max_length=min(settings.max_length, limit or settings.max_length),
            prefill_tokens=settings.prefill_tokens,
            gather_steps=settings.gather_steps,
        )
        return EngineWorker(engine, max_waiting=settings.max_waiting)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.settings.precision == "bf16" else torch.float32

    def _tend_people(self) -> None:
        """Fit people whose vector is missing or older than their texts, those of the live run first."""
        busy = True
        while busy and not self._stopping.is_set():
            start, busy = time.perf_counter(), False
            for hosted in sorted(self.hosted.copy().values(), key=lambda one: one.name != self.live):
                if hosted.worker.failure is not None:
                    continue
                for person in self.store.claim_stale(hosted.run.version, self.owner, seconds=LEASE_SECONDS):
                    busy = True
                    self._fit(hosted, person)
        # Looking at a large store takes a while: it may take a twentieth of the time, and no more.
        self._people_pause = max(LOOK_SECONDS, 20 * (time.perf_counter() - start))

    def _fit(self, hosted: Hosted, person: Person) -> None:
        """Fit one person whom this replica has claimed. Somebody whose texts cannot be fitted gets the population's
        vector, so that nobody waits for them; it says that it is fitted to no text."""
        run, texts = hosted.run, len(person.texts)
        if not texts:  # of whom only rankings of images are known
            self._save(run, person, run.population, 0)
            return
        try:
            prepared = prepare_fit(run, written(person))
            personal = hosted.worker.run_beside(fit_person(run, prepared)).result()
        except EngineFailed:
            self.store.release_one(person.tenant, person.user_id, run.version, self.owner)
            return
        except Exception as error:
            log.error("the texts of one person cannot be fitted: %s", type(error).__name__)
            personal, texts = run.population, 0
        self._save(run, person, personal, texts)

    def _save(self, run: ServedRun, person: Person, personal: Personal, texts: int) -> None:
        vector_J = personal.vector_J.float().numpy()
        fitted = Fitted(run.version, person.version, personal.cluster, vector_J, texts)
        self.store.save_fitted(person.tenant, person.user_id, fitted)
        self.cache.forget(person.tenant, person.user_id)

    def _repeat(self, work: Callable[[], None], wait: Callable[[float], object]) -> None:
        while not self._stopping.is_set():
            try:
                work()
            except Exception as error:  # the database may be away for a while
                log.exception("%s failed, and is tried again: %s", work.__name__, error)
            wait(LOOK_SECONDS)

    def _wait_for_people(self, seconds: float) -> None:
        self._fit_now.wait(max(seconds, self._people_pause))
        self._fit_now.clear()


def default_name(url: str) -> str:
    """What a run is called where nobody says: the last part of its folder or URL."""
    return url.rstrip("/").rpartition("/")[2]


def written(person: Person) -> tuple[Written, ...]:
    """A person's texts as they are fitted to."""
    return tuple(Written(text.input, text.output) for text in person.texts)
