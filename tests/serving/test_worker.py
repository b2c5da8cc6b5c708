"""The thread that owns an engine: streams, cancellation, a bounded queue, jobs beside, and failures."""

import asyncio
import threading
from contextlib import aclosing

import pytest

from palate.models.causal_lm import LoadedModel, load_causal_lm
from palate.serving.engine import Engine, Event, Request
from palate.serving.worker import EngineFailed, EngineWorker, Load, Overloaded


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_causal_lm("tiny")


@pytest.fixture
def worker(loaded):
    made = EngineWorker(Engine(loaded, slots=2, max_length=256), max_waiting=3)
    yield made
    made.stop()


def asked(prompt: int, tokens: int = 20, **changes) -> Request:
    return Request([5 + prompt, 9, 40 + prompt], max_new_tokens=tokens, temperature=1.0, seed=prompt, **changes)


async def gathered(worker: EngineWorker, request: Request) -> list[Event]:
    async with aclosing(worker.stream(request)) as events:
        return [event async for event in events]


def until(condition) -> None:
    """Wait for another thread, for ten seconds at most."""
    deadline = threading.Event()
    for _ in range(1000):
        if condition():
            return
        deadline.wait(0.01)
    raise AssertionError("it never happened")


def test_streams_give_what_the_engine_alone_gives(loaded, worker):
    requests = [asked(number) for number in range(5)]
    expected = Engine(loaded, slots=5, max_length=256).generate(requests)

    async def all_at_once() -> list[list[Event]]:
        return await asyncio.gather(*(gathered(worker, request) for request in requests))

    for events, completion in zip(asyncio.run(all_at_once()), expected, strict=True):
        assert [event.token_id for event in events] == completion.token_ids
        assert "".join(event.text for event in events) == completion.text
        assert events[-1].completion.text == completion.text
    assert worker.load == Load(0, 0, 0)


def test_what_does_not_fit_into_the_queue_is_refused_and_the_rest_goes_on(worker):
    async def six() -> list:
        return await asyncio.gather(*(gathered(worker, asked(n)) for n in range(6)), return_exceptions=True)

    results = asyncio.run(six())  # two slots and three places
    assert [type(result) for result in results] == [list] * 5 + [Overloaded]
    assert len(asyncio.run(gathered(worker, asked(1)))) > 0


def test_a_closed_stream_frees_its_slot_and_its_place(worker):
    async def leave_early() -> None:
        for number in range(20):  # more than slots and places together
            async with aclosing(worker.stream(asked(number, 200))) as events:
                await anext(events)

    asyncio.run(leave_early())
    until(lambda: worker.engine.idle)
    assert worker.load.running == 0


def test_a_cancelled_task_frees_what_waits_too(worker):
    async def cancel_all() -> None:
        tasks = [asyncio.create_task(gathered(worker, asked(n, 200))) for n in range(5)]
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(cancel_all())
    until(lambda: worker.engine.idle)
    assert worker.load.running == worker.load.waiting == 0


def test_a_request_that_cannot_be_served_is_refused_to_its_own_stream(worker):
    with pytest.raises(ValueError, match="max_length"):
        asyncio.run(gathered(worker, asked(0, 1000)))
    assert len(asyncio.run(gathered(worker, asked(1)))) > 0


def test_jobs_run_between_steps_and_give_their_result(worker):
    slices = []

    def job():
        for number in range(3):
            slices.append((number, threading.current_thread().name))
            yield
        return "done"

    assert worker.run_beside(job()).result(10) == "done"
    assert slices == [(number, "palate-engine") for number in range(3)]

    def broken():
        yield
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        worker.run_beside(broken()).result(10)
    assert len(asyncio.run(gathered(worker, asked(1)))) > 0


def test_a_job_takes_no_more_than_its_share_while_requests_run(loaded, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("palate.serving.worker.time.perf_counter", lambda: clock[0])
    engine = Engine(loaded, slots=1, max_length=256)
    order = []

    step = engine.step

    def timed_step():
        clock[0] += 1.0
        order.append("step")
        return step()

    def job():
        for _ in range(4):
            clock[0] += 2.0
            order.append("slice")
            yield

    monkeypatch.setattr(engine, "step", timed_step)
    worker = EngineWorker(engine, max_waiting=0, job_share=0.2)

    async def both() -> None:
        async with aclosing(worker.stream(Request([5, 9], max_new_tokens=60, stop=()))) as events:
            await anext(events)
            worker.run_beside(job())
            async for _ in events:
                pass

    asyncio.run(both())
    worker.stop()
    inside = order[order.index("slice") : len(order) - order[::-1].index("step")]
    between = "".join("." if what == "step" else "|" for what in inside).split("|")[1:-1]
    assert between
    assert all(len(steps) >= 8 for steps in between)  # two seconds of five times two


def test_a_failing_engine_fails_its_requests_and_takes_no_more(loaded, monkeypatch):
    engine = Engine(loaded, slots=1, max_length=256)
    calls = []
    step = engine.step

    def breaks():
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return step()

    monkeypatch.setattr(engine, "step", breaks)
    worker = EngineWorker(engine, max_waiting=1)

    async def two() -> list:
        return await asyncio.gather(gathered(worker, asked(0)), gathered(worker, asked(1)), return_exceptions=True)

    assert [type(result) for result in asyncio.run(two())] == [EngineFailed, EngineFailed]
    until(lambda: worker.failure is not None)
    with pytest.raises(EngineFailed):
        asyncio.run(gathered(worker, asked(2)))
    with pytest.raises(EngineFailed):
        worker.run_beside(iter(())).result(1)
    worker.stop()


def test_stopping_fails_what_runs(loaded):
    worker = EngineWorker(Engine(loaded, slots=1, max_length=256), max_waiting=1)

    async def stopped() -> list:
        tasks = [asyncio.create_task(gathered(worker, asked(n, 200))) for n in range(2)]
        await asyncio.sleep(0.05)
        await asyncio.to_thread(worker.stop)
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert {type(result) for result in asyncio.run(stopped())} == {EngineFailed}
