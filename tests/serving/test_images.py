"""The thread that draws: batches, queue, LoRAs and people; and the models it draws with, as they come and go."""

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import toy_lists
from palate.artifacts import ArtifactMismatch
from palate.lpo.encoding import EncodeConfig
from palate.lpo.personal import ADAPTER
from palate.lpo.sampling import SampleConfig
from palate.lpo.stages import LpoConfig, PersonalConfig, pipeline
from palate.lpo.training import ObjectiveConfig, TuneConfig
from palate.models.diffusion import load_diffusion
from palate.serving import image_service
from palate.serving.answering import NotFinite
from palate.serving.image_service import ImageService, ImageSettings, ModelSource, load_hook
from palate.serving.images import Drawing, Drawn, ImageModel, ImageRequest, ImageWorker, Progress, Refused, ReviewFailed
from palate.serving.worker import EngineFailed, Load, Overloaded
from palate.training.parallel import World
from tiny_diffusion import save_tiny
from toy_images import PEOPLE, PROMPT, lora_run, person_run, pipeline_run, settings

QUICK = SampleConfig(sampler_steps=3, guidance=3.0)
PLAIN = Image.new("RGB", (16, 16), "blue")


@pytest.fixture(scope="module")
def shapes() -> ImageModel:
    return ImageModel(load_diffusion("shapes"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        "lora": lora_run(folder / "lora"),
        "other": lora_run(folder / "other", seed=1),
        "person": person_run(folder / "person"),
        "pipeline": pipeline_run(folder / "pipeline"),
        "person-edit": person_run(folder / "person-edit", base="shapes-edit"),
    }


def asked(model: ImageModel, seed: int = 0, prompt: str = PROMPT, **changes: Any) -> ImageRequest:
    values = {"size": (16, 16), "config": QUICK, **changes}
    return ImageRequest(model, prompt, seed, **values)


async def drawn(worker: ImageWorker, *requests: ImageRequest) -> list[Image.Image]:
    drawing, found = Drawing(worker, requests), {}
    try:
        while (item := await drawing.next()) is not None:
            if isinstance(item[1], Drawn):
                found[item[0]] = item[1].image
    finally:
        await drawing.close()
    return [found[place] for place in range(len(requests))]


def images(worker: ImageWorker, *requests: ImageRequest) -> list[np.ndarray]:
    return [np.asarray(image, dtype=int) for image in asyncio.run(drawn(worker, *requests))]


def vanilla(pipeline: Any, seed: int, **given: Any) -> np.ndarray:
    """What diffusers alone draws."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    made = pipeline(PROMPT, num_inference_steps=3, guidance_scale=3.0, generator=generator, **given)
    return np.asarray(made.images[0], dtype=int)


class Recorded:
    """Draws nothing; keeps the batches, and holds each until it is let on."""

    def __init__(self, *, held: bool = False, steps: int = 3) -> None:
        self.batches: list[list[int]] = []
        self.begun, self.go, self.steps = threading.Semaphore(0), threading.Event(), steps
        if not held:
            self.go.set()

    def __call__(self, requests: Sequence[ImageRequest], on_step: Any) -> list[Image.Image]:
        self.batches.append([request.seed for request in requests])
        self.begun.release()
        assert self.go.wait(10)
        for step in range(self.steps):
            on_step(step + 1, self.steps)
        if any(request.prompt == "bad" for request in requests):
            raise ValueError("this cannot be drawn")
        return [Image.new("RGB", (16, 16), request.prompt) for request in requests]


@pytest.fixture
def make_worker() -> Iterator[Any]:
    made: list[ImageWorker] = []

    def make(draw: Any = None, **changes: Any) -> ImageWorker:
        values = {"max_batch": 4, "max_waiting": 8, **({"draw": draw} if draw else {}), **changes}
        made.append(ImageWorker(**values))
        return made[-1]

    yield make
    for worker in made:
        worker.stop()


def until(condition: Any) -> None:
    """Wait for another thread, for ten seconds at most."""
    for _ in range(1000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never happened")


def test_an_image_does_not_depend_on_its_batch(shapes: ImageModel, make_worker: Any) -> None:
    worker = make_worker()
    together = images(worker, *(asked(shapes, seed) for seed in range(4)))
    for seed in range(4):
        assert abs(images(worker, asked(shapes, seed))[0] - together[seed]).max() <= 1
        assert abs(vanilla(load_diffusion("shapes").pipeline, seed) - together[seed]).max() <= 1
    assert abs(together[0] - together[1]).max() > 20


def test_equal_shapes_are_drawn_together_and_the_oldest_first(shapes: ImageModel, make_worker: Any) -> None:
    draw = Recorded(held=True)
    worker = make_worker(draw, max_batch=3)
    wide, long = {"size": (32, 16)}, {"config": SampleConfig(sampler_steps=9)}

    async def all_at_once() -> None:
        first = asyncio.create_task(drawn(worker, asked(shapes, 0, "red")))
        await asyncio.to_thread(draw.begun.acquire)  # the others wait behind it
        shaped = [wide, {}, wide, long, {}, {}, {}]
        rest = [
            asyncio.create_task(drawn(worker, asked(shapes, 1 + place, "red", **shape)))
            for place, shape in enumerate(shaped)
        ]
        while worker.load.waiting < len(shaped):
            await asyncio.sleep(0.01)
        assert worker.load == Load(1, 7, 0)
        draw.go.set()
        await asyncio.gather(first, *rest)

    asyncio.run(all_at_once())
    assert draw.batches == [[0], [1, 3], [2, 5, 6], [4], [7]]


def test_progress_comes_before_the_image(shapes: ImageModel, make_worker: Any) -> None:
    worker = make_worker()

    async def events() -> list[Any]:
        drawing, found = Drawing(worker, [asked(shapes)]), []
        while (item := await drawing.next()) is not None:
            found.append(item[1])
        await drawing.close()
        return found

    *steps, last = asyncio.run(events())
    assert steps == [Progress(1, 3), Progress(2, 3), Progress(3, 3)]
    assert last.image.size == (16, 16)


def test_what_does_not_fit_is_refused_whole_and_places_come_back(shapes: ImageModel, make_worker: Any) -> None:
    draw = Recorded(held=True)
    worker = make_worker(draw, max_batch=1, max_waiting=2)

    async def fill() -> None:
        first = asyncio.create_task(drawn(worker, asked(shapes, 0, "red")))
        await asyncio.to_thread(draw.begun.acquire)
        second = asyncio.create_task(drawn(worker, asked(shapes, 1, "red")))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="2 more do not fit"):
            await drawn(worker, asked(shapes, 2), asked(shapes, 3))
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        assert worker.load.waiting == 0
        third = asyncio.create_task(drawn(worker, asked(shapes, 4, "red"), asked(shapes, 5, "red")))
        await asyncio.sleep(0.05)
        draw.go.set()
        await asyncio.gather(first, third)

    asyncio.run(fill())
    assert draw.batches == [[0], [4], [5]]  # what was left is not drawn


def test_a_batch_that_nobody_waits_for_ends_at_its_next_step(shapes: ImageModel, make_worker: Any) -> None:
    draw = Recorded(held=True, steps=10**9)
    worker = make_worker(draw)

    async def leave() -> None:
        task = asyncio.create_task(drawn(worker, asked(shapes, 0, "red")))
        await asyncio.to_thread(draw.begun.acquire)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(leave())
    assert worker.load.running == 0
    draw.go.set()
    draw.steps = 1
    assert len(images(worker, asked(shapes, 1, "red"))) == 1


def test_an_image_that_cannot_be_drawn_fails_alone(shapes: ImageModel, make_worker: Any) -> None:
    worker = make_worker(Recorded())

    async def three() -> list[Any]:
        prompts = ("red", "bad", "blue")
        tasks = [drawn(worker, asked(shapes, seed, prompt)) for seed, prompt in enumerate(prompts)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, second, third = asyncio.run(three())
    assert first[0].getpixel((0, 0)) == (255, 0, 0)
    assert isinstance(second, ValueError)
    assert third[0].getpixel((0, 0)) == (0, 0, 255)


def test_failures_of_a_batch_and_of_the_device(shapes: ImageModel, make_worker: Any) -> None:
    def fails(error: Exception) -> Any:
        def draw(requests: Any, on_step: Any) -> Any:
            raise error

        return draw

    worker = make_worker(fails(RuntimeError("no memory")))
    for _ in range(3):
        with pytest.raises(EngineFailed, match="RuntimeError"):
            images(worker, asked(shapes))
    assert worker.failure is None  # the next may succeed
    broken = make_worker(fails(torch.AcceleratorError("illegal memory access")))
    with pytest.raises(EngineFailed, match="the device failed"):
        images(broken, asked(shapes))
    assert broken.failure is not None
    with pytest.raises(EngineFailed):
        images(broken, asked(shapes))


def test_stopping_fails_what_runs_and_waits(shapes: ImageModel, make_worker: Any) -> None:
    draw = Recorded(held=True, steps=10**9)
    worker = make_worker(draw, max_batch=1)

    async def stopped() -> list[Any]:
        tasks = [asyncio.create_task(drawn(worker, asked(shapes, seed, "red"))) for seed in range(2)]
        await asyncio.to_thread(draw.begun.acquire)
        draw.go.set()
        await asyncio.to_thread(worker.stop)
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(found) for found in asyncio.run(stopped())] == [EngineFailed, EngineFailed]
    with pytest.raises(EngineFailed):
        worker.run(lambda: 1).result(1)


def test_the_safety_hook_fails_closed(shapes: ImageModel, make_worker: Any) -> None:
    def review(image: Image.Image) -> Any:
        match image.getpixel((0, 0)):
            case (255, 0, 0):
                return "red"
            case (0, 0, 255):
                return False
            case (0, 128, 0):
                raise KeyError("weights")
        return None

    worker = make_worker(Recorded(), review=review)
    assert len(images(worker, asked(shapes, 0, "white"))) == 1
    for prompt, error in (("red", Refused), ("blue", ReviewFailed), ("green", ReviewFailed)):
        with pytest.raises(error):
            images(worker, asked(shapes, 0, prompt))


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_images_that_are_not_finite_are_not_returned(make_worker: Any) -> None:
    loaded = load_diffusion("shapes")
    with torch.no_grad():
        next(loaded.denoiser.parameters()).fill_(float("nan"))
    with pytest.raises(NotFinite):
        images(make_worker(), asked(ImageModel(loaded)))


@pytest.fixture
def service(tmp_path: Any, runs: dict[str, str]) -> Iterator[ImageService]:
    models = {
        "shapes": ModelSource(base="shapes"),
        "lora": ModelSource(run=runs["lora"]),
        "person": ModelSource(run=runs["person"], tenants=("acme",)),
        "edit": ModelSource(base="shapes-edit"),
    }
    made = ImageService(settings(tmp_path, models=models, registry=str(tmp_path / "models.json")))
    (tmp_path / "models.json").write_text("{}")
    made.tend()
    yield made
    made.stop()


def model_of(service: ImageService, name: str) -> ImageModel:
    return service.hosted[name].model


def test_loras_share_a_base_and_draw_what_diffusers_draws(service: ImageService, runs: dict[str, str]) -> None:
    base, lora = model_of(service, "shapes"), model_of(service, "lora")
    assert base.loaded is lora.loaded
    plain = load_diffusion("shapes").pipeline
    expected = vanilla(plain, 5)
    plain.load_lora_weights(f"{runs['lora']}/tuned/lora")
    tuned = vanilla(plain, 5)
    assert abs(tuned - expected).max() > 20
    for _ in range(2):  # in turn, on the same weights
        assert (images(service.worker, asked(base, 5))[0] == expected).all()
        assert abs(images(service.worker, asked(lora, 5))[0] - tuned).max() <= 1


def test_a_stranger_gets_the_base_models_image_bit_for_bit(service: ImageService, runs: dict[str, str]) -> None:
    base, person = model_of(service, "shapes"), model_of(service, "person")
    expected = images(service.worker, asked(base, 5))[0]
    for user in (None, "zoe"):
        assert (images(service.worker, asked(person, 5, user=user))[0] == expected).all()
    plain: Any = load_diffusion("shapes").pipeline
    plain.load_ip_adapter(f"{runs['person']}/tuned/person", "", ADAPTER, image_encoder_folder=None)
    assert person.people is not None
    row = person.people.embeddings_UJ[[PEOPLE.index("bob")], None].detach()
    theirs = vanilla(plain, 5, ip_adapter_image_embeds=[torch.cat([row, row])])
    assert abs(images(service.worker, asked(person, 5, user="bob"))[0] - theirs).max() <= 1
    assert abs(theirs - expected).max() > 20
    mixed = images(service.worker, *(asked(person, 5, user=user) for user in ("zoe", "bob", None)))
    assert abs(mixed[0] - expected).max() <= 1
    assert abs(mixed[1] - theirs).max() <= 1


def test_people_whom_no_training_saw(service: ImageService, tmp_path: Path) -> None:
    """From their examples to an image: what ``jobs/lpo.py --personal examples`` writes, served."""
    rows = [toy_lists.row(number, 3, split="train", user_id="ann") for number in range(4)]
    rows += [toy_lists.row(4 + n, 3, split="examples", user_id=user) for n, user in enumerate(("ann", "eve"))]
    run = LpoConfig(
        lists=toy_lists.write(tmp_path / "lists", rows).url,
        out=str(tmp_path / "run"),
        encode=EncodeConfig(resolution=16, latent_dtype="float32"),
        learn=ObjectiveConfig(kl_beta=50.0),
        tune=TuneConfig(steps=3, batch=4, learning_rate=0.3),
        personal=PersonalConfig(personal="examples"),
        grid=0,
    )
    pipeline(run, World())
    model = service.add("examples", ModelSource(run=run.out, tenants=("acme",))).model
    base = images(service.worker, asked(model_of(service, "shapes"), 5))[0]
    zoe, eve = (images(service.worker, asked(model, 5, user=user))[0] for user in ("zoe", "eve"))
    assert (zoe == base).all()
    assert (eve != base).any()


def test_a_lora_is_not_drawn_on_another_base(service: ImageService, runs: dict[str, str], tmp_path: Path) -> None:
    other = load_diffusion("shapes").pipeline
    other.unet.conv_out.weight.data.mul_(2)
    other.save_pretrained(tmp_path / "other")
    for name in ("lora", "person"):
        with pytest.raises(ArtifactMismatch, match="tuned from weights"):
            service.add("moved", ModelSource(run=runs[name], base=str(tmp_path / "other"), tenants=("acme",)))


def test_people_in_an_editing_pipeline(service: ImageService, runs: dict[str, str]) -> None:
    source = ModelSource(run=runs["person-edit"], tenants=("acme",))
    person, base = service.add("person-edit", source).model, model_of(service, "edit")
    assert person.editing
    given = {"source": PLAIN, "prompt": "make the circle red"}
    plain = images(service.worker, asked(base, 3, **given))[0]
    zoe, ann = images(service.worker, *(asked(person, 3, user=user, **given) for user in ("zoe", "ann")))
    assert (images(service.worker, asked(person, 3, user="zoe", **given))[0] == plain).all()
    assert abs(zoe - plain).max() <= 1
    assert abs(ann - plain).max() > 20


def test_full_weights_are_a_model_of_their_own(service: ImageService, runs: dict[str, str]) -> None:
    full = service.add("full", ModelSource(run=runs["pipeline"])).model
    plain = images(service.worker, asked(model_of(service, "shapes"), 1))[0]
    assert abs(images(service.worker, asked(full, 1))[0] - plain).max() > 20


def test_the_registry_is_followed_without_a_restart(
    service: ImageService, runs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Path(str(service.settings.registry))

    def write(content: str) -> None:
        registry.with_suffix(".new").write_text(content)
        registry.with_suffix(".new").replace(registry)
        service.tend()

    base = model_of(service, "shapes")
    before = images(service.worker, asked(base, 2))[0]
    write(json.dumps({"new": {"run": runs["lora"]}}))
    first = model_of(service, "new")
    one = images(service.worker, asked(first, 2))[0]
    write(json.dumps({"new": {"run": runs["other"]}, "lost": {"run": "/nowhere"}}))
    second = model_of(service, "new")
    assert (images(service.worker, asked(second, 2))[0] != one).any()
    assert (images(service.worker, asked(first, 2))[0] == one).all()  # a request that came before the change
    assert list(service.failed) == ["lost"]
    write("{")
    assert service.registry_error
    assert model_of(service, "new") is second
    monkeypatch.setattr(image_service, "GRACE_SECONDS", 0.0)
    write("{}")
    assert "new" not in service.hosted
    assert not service.failed
    until(lambda: set(base.loaded.denoiser.peft_config) == {model_of(service, "lora").adapter})
    assert (images(service.worker, asked(base, 2))[0] == before).all()
    write(json.dumps({"again": {"run": runs["lora"]}}))
    assert (images(service.worker, asked(model_of(service, "again"), 2))[0] == one).all()


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux"])
def test_other_families_draw_too(kind: str, tmp_path: Path, make_worker: Any) -> None:
    model = ImageModel(load_diffusion(str(save_tiny(kind, tmp_path))))
    width, height = model.size
    assert width % model.multiple == height % model.multiple == 0
    given = {"size": (32, 16), "config": SampleConfig(sampler_steps=2)}
    together = images(make_worker(), asked(model, 0, **given), asked(model, 1, **given))
    assert together[0].shape == (16, 32, 3)
    assert abs(images(make_worker(), asked(model, 1, **given))[0] - together[1]).max() <= 1


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_people_of_sdxl_in_half_precision(guidance: float, tmp_path: Path) -> None:
    base = str(save_tiny("sdxl", tmp_path))
    model = ModelSource(run=person_run(tmp_path / "run", base=base), tenants=("acme",))
    service = ImageService(settings(tmp_path, models={"person": model}, precision="bf16"))
    service.tend()
    person = model_of(service, "person")
    given = {"size": (32, 32), "config": SampleConfig(sampler_steps=2, guidance=guidance)}
    zoe, ann, bob = images(service.worker, *(asked(person, 1, user=user, **given) for user in ("zoe", "ann", "bob")))
    service.stop()
    assert abs(zoe - ann).max() > 5
    assert abs(ann - bob).max() > 5


def test_people_belong_to_somebody(service: ImageService, runs: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="say whose they are with 'tenants'"):
        service.add("everybodys", ModelSource(run=runs["person"]))
    assert service.find("person", "acme") is not None
    assert service.find("person", "rival") is None
    assert [hosted.name for hosted in service.visible("rival")] == ["edit", "lora", "shapes"]


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="needs 'base', 'run'"):
        ModelSource()
    with pytest.raises(ValueError, match="max_images"):
        ImageSettings(max_images=5, max_in_flight=4)
    for path in ("nowhere.at.all:check", "json:nothing", "json"):
        with pytest.raises(ValueError, match=r"package\.module:function"):
            load_hook(path)
