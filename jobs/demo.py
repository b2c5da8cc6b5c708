"""A small CARD run from nothing to answers in two people's manner, with a report, then over HTTP; a small image
generator, trained from nothing and tuned on ranked lists, with a grid of the same seeds before and after; and a small
unified model, trained from nothing, that answers questions about a scene.

`make demo` runs it.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import httpx
import openai

from palate import config as configs
from palate import progress
from palate.artifacts import ArtifactError, join
from palate.card.adaptation import AdaptConfig
from palate.card.heads import PreferConfig
from palate.card.stages import CardConfig, PromptConfig, pipeline, start_over
from palate.config import scale
from palate.corpora import captions
from palate.corpora.captions import CaptionsConfig
from palate.corpora.pictures import decode_image
from palate.corpora.questions import read_tsv
from palate.corpora.worlds import personas, scenes, shapes
from palate.distributed.launch import launch
from palate.evaluation import vision
from palate.evaluation.cases import Case
from palate.evaluation.comparison import Comparison, TextConfig
from palate.evaluation.subject import read_run
from palate.evaluation.text_report import make_report
from palate.evaluation.vision import Benchmark
from palate.lpo import stages as lpo
from palate.lpo.encoding import EncodeConfig
from palate.lpo.networks import WeightsConfig
from palate.lpo.sampling import SampleConfig
from palate.lpo.stages import LpoConfig
from palate.lpo.training import ObjectiveConfig, TuneConfig
from palate.serving.answers import sample_answers
from palate.training.guards import TrainingStopped
from palate.unihetero import stages as unihetero
from palate.unihetero.generation import say
from palate.unihetero.parts import MERGE, TOKENS, PartsConfig, make_parts
from palate.unihetero.stages import TrainConfig
from palate.unihetero.training import PretrainConfig
from palate.users.keys import create_key
from palate.users.store import open_store

START_SECONDS = 300


@dataclass(frozen=True)
class DemoConfig:
    """Sized for two cores and about a quarter of an hour; a GPU, or patience, takes more of everything."""

    out: str = scale("runs/demo")
    """Folder of the corpus, the run and the evaluation."""
    model: str = "smollm2"
    """Base model."""
    people: int = 40
    """Writers in the synthetic corpus."""
    items: int = 12
    """Texts that each has written before."""
    epochs: int = 1
    """Passes of the adapters over half of these texts."""
    asked: int = 10
    """People who are asked two questions each in the evaluation."""
    serve: bool = scale(True)
    """Start a server, with a request for each of two people."""
    images: bool = scale(True)
    """End with images: Diffusion-LPO on simulated annotators who like large, contrasting shapes."""
    image_steps: int = 800
    """Of training the image generator from nothing."""
    scenes: bool = scale(True)
    """And with scenes of one object: UniHetero on questions about coloured shapes."""
    scene_steps: int = 320
    """Of training the unified model, 8 scenes each."""
    fresh: bool = scale(False)
    """Discard what --out holds and begin anew."""


def main() -> None:
    config = configs.parse(DemoConfig, __doc__)
    if config.asked < 1:
        raise SystemExit(f"demo: --asked must be at least 1, got {config.asked}")
    grid = None
    try:
        with progress.stage("demo"):
            comparison = run(config)
            with progress.stage("evaluate"):
                report = make_report(comparison)
            show(comparison)
            if config.serve:
                with progress.stage("serve"):
                    ask_a_server(config, comparison)
            if config.images:
                with progress.stage("images"):
                    grid = tune_images(config)
            if config.scenes:
                with progress.stage("scenes"):
                    ask_about_a_scene(config)
    except (ArtifactError, TrainingStopped, ValueError, OSError, openai.OpenAIError, httpx.HTTPError) as error:
        raise SystemExit(f"demo: {error}") from None
    print(f"\nreport: {report.url}/report.md")
    if grid:
        print(f"the same seeds before and after tuning on ranked lists (blobs, after a minute of training): {grid}")


def run(config: DemoConfig) -> Comparison:
    """Corpus, CARD and what the evaluation compares."""
    with progress.stage("corpus"):
        corpus = personas.prepare(
            personas.PersonasConfig(
                out=join(config.out, "corpus"),
                people=config.people,
                items=config.items,
                questions=2,
                fresh=config.fresh,
            )
        )
    card = CardConfig(
        corpus=corpus.url,
        out=join(config.out, "card"),
        model=config.model,
        prompt=PromptConfig(max_prompt_tokens=160, max_answer_tokens=48),
        adapt=AdaptConfig(epochs=config.epochs, learning_rate=2e-3),
        prefer=PreferConfig(head_precision=(60.0,), vector_deviation=(1.0,)),
        fresh=config.fresh,
    )
    launch(partial(pipeline, sampler=sample_answers), card, launcher="local", folder=card.out, once=start_over)
    text = TextConfig(
        run=card.out,
        corpus=corpus.url,
        out=join(config.out, "evaluation"),
        users="all",
        systems=("base", "cluster", "card", "card-permuted"),
        max_users=config.asked,
        generation_draws=1,
        negatives=2,
        max_new_tokens=48,
        fresh=config.fresh,
    )
    return Comparison(text, corpus, read_run(card.out, corpus))


def two_people(comparison: Comparison) -> list[Case]:
    """A question of each of two people."""
    return list({case.question.user_id: case for case in comparison.cases}.values())[:2]


def show(comparison: Comparison) -> None:
    """Print what the base model and CARD answer two people, beside what they themselves wrote."""
    answers = {spec.name: comparison.answers(spec)[0] for spec in comparison.specs}
    for case in two_people(comparison):
        question = case.question
        print(f"\n{question.user_id} was asked: {question.input}")
        for label, text in (
            ("base model", answers["base"][question.question_id]),
            ("personalized", answers["card"][question.question_id]),
            ("wrote", case.gold),
        ):
            print(f"  {label:>12}: {' '.join(text.split())}")


def ask_a_server(config: DemoConfig, comparison: Comparison) -> None:
    """Start the server on the run, tell it what two people wrote, and ask their questions with the OpenAI client."""
    folder = Path(config.out).absolute()
    database = f"sqlite:///{folder}/palate.db"
    with open_store(database) as store:
        key = create_key(store, "demo", "make demo")
    settings = {"database": database, "run": str(folder / "card"), "slots": 4, "max_length": 512}
    with server(folder, settings) as url:
        http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=120)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=key)
        for case in two_people(comparison):
            person = case.question.user_id
            texts = [
                {"input": item.input, "output": item.output} for item in comparison.items if item.user_id == person
            ]
            http.put(f"/v1/users/{person}", params={"wait": True}, json={"texts": texts}).raise_for_status()
            answer = client.chat.completions.with_raw_response.create(
                model="palate",
                user=person,
                messages=[{"role": "user", "content": case.question.input}],
                temperature=0,
                max_completion_tokens=48,
            )
            state = answer.headers["x-palate-personalization"]
            text = answer.parse().choices[0].message.content or ""
            print(f"\n{url} answered {person} ({state}): {' '.join(text.split())}")


def tune_images(config: DemoConfig) -> Path:
    """Train a generator of coloured shapes from nothing, and tune it on ranked lists; the grid of before and after."""
    corpus = shapes.prepare(
        shapes.ShapesConfig(
            out=join(config.out, "shapes"),
            scenes=3000,
            pool=10,
            lists=240,
            groups=("bold",),
            users=4,
            held_out=0,
            fresh=config.fresh,
        )
    )
    base = LpoConfig(
        lists=corpus.url,
        out=join(config.out, "shapes-base"),
        train_on="images",
        encode=EncodeConfig(resolution=shapes.SIDE, latent_dtype="float32", encode_batch=256),
        learn=ObjectiveConfig(objective="denoising"),
        weights=WeightsConfig(weights="full"),
        tune=TuneConfig(
            steps=config.image_steps,
            batch=16,
            micro_batch=16,
            learning_rate=2e-3,
            schedule="cosine",
            checkpoint_every=config.image_steps,
        ),
        grid=0,
        fresh=config.fresh,
    )
    launch(lpo.pipeline, base, launcher="local", folder=base.out, once=lpo.start_over)
    tuned = replace(
        base,
        out=join(config.out, "shapes-lpo"),
        model=join(base.out, "tuned", "pipeline"),
        train_on="lists",
        learn=ObjectiveConfig(kl_beta=2000),
        tune=TuneConfig(steps=40, batch=8, micro_batch=8, learning_rate=4e-4),
        sample=SampleConfig(sampler_steps=20, guidance=2.0),
        grid=6,
    )
    made = launch(lpo.pipeline, tuned, launcher="local", folder=tuned.out, once=lpo.start_over)
    return made.local("grid.png")


def ask_about_a_scene(config: DemoConfig) -> None:
    """Train a small unified model on captioned scenes with questions, and ask it about one that it has not seen."""
    folder = partial(join, config.out)
    corpus = scenes.prepare(
        scenes.ScenesConfig(
            out=folder("scenes"),
            encoder=600,
            train=8 * config.scene_steps,
            validation=1,
            test=60,
            objects=1,
            fresh=config.fresh,
        )
    )
    index = captions.prepare(
        CaptionsConfig(
            input=(f"{corpus.url}/train/*.tar",),
            out=folder("scenes-index"),
            duplicate_distance=None,
            fresh=config.fresh,
        )
    )
    parts = make_parts(
        PartsConfig(
            corpus=corpus.url, out=folder("scene-parts"), encoder_steps=50, autoencoder_steps=20, fresh=config.fresh
        )
    )
    settings = TrainConfig(
        corpus=(index.url,),
        out=folder("unihetero"),
        language=str(parts.local_folder("language")),
        vision=str(parts.local_folder("vision")),
        image_tokens=TOKENS,
        merge=MERGE,
        train=PretrainConfig(
            steps=config.scene_steps, batch=8, micro_batch=8, learning_rate=2e-3, checkpoint_every=config.scene_steps
        ),
        fresh=config.fresh,
    )
    run = launch(unihetero.pipeline, settings, launcher="local", folder=settings.out, once=unihetero.start_over)
    model, processor = vision.load(run, "cpu")
    benchmark = Benchmark("scenes", tuple(read_tsv(str(corpus.local("questions.tsv")))))
    answers = vision.ask(model, processor, benchmark, batch=32)
    right = sum(answer.right for answer in answers) / len(answers)
    image, choices = benchmark.images[0]
    file = Path(config.out) / "scene.png"
    file.write_bytes(image)
    print(f"\nof {len(answers)} questions about {len(benchmark.images)} new scenes {right:.0%} are answered, ", end="")
    print(f"where guessing answers {benchmark.chance:.0%}; about {file}:")
    features = model.encode(processor.pixels([decode_image(image)]))
    words = processor.phrasing
    for choice in choices:
        ids = [*words.image(), *words.asked(choice.question)]
        said = "".join(processor.tokenizer.decode(p.ids) for p in say(model, ids, features, end=words.end, most=4))
        print(f"  {choice.question}? {said} (it is {choice.options[choice.answer]})")


@contextmanager
def server(folder: Path, settings: Mapping[str, object]) -> Iterator[str]:
    """``serve run`` in a process of its own, until the end of the context; its URL.

    Raises:
        ValueError: it did not start; its log says why.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    application = {"name": "text", "route_prefix": "/", "import_path": "serve.text:app", "args": settings}
    content = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
    (folder / "serve.json").write_text(json.dumps(content, indent=2))  # every JSON is YAML, too
    log, url = folder / "serve.log", f"http://127.0.0.1:{port}"
    command = [str(Path(sys.executable).parent / "serve"), "run", str(folder / "serve.json")]
    root = Path(__file__).resolve().parents[1]
    # On a Ray of its own: on a cluster it would replace what is served there, and end Serve at the end.
    environment = {name: value for name, value in os.environ.items() if name != "RAY_JOB_CONFIG_JSON_ENV_VAR"}
    environment |= {"RAY_ADDRESS": "local", "PYTHONPATH": os.pathsep.join([str(root / "platform"), str(root)])}
    # Ray gives its workers little of a busy machine unless told otherwise, and Serve's proxy 5 s to start.
    environment |= {"RAY_worker_niceness": "0", "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=root, stdout=output, stderr=output, env=environment)
    try:
        started = time.monotonic()
        while not _healthy(url):
            if process.poll() is not None or time.monotonic() - started > START_SECONDS:
                raise ValueError(f"the server did not start within {START_SECONDS} s: see {log}")
            time.sleep(0.5)
        print(f"the server answers at {url}", flush=True)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


if __name__ == "__main__":
    main()
