"""PostgreSQL ends under a store, in order or as in a crash, and comes back: nothing that was committed is lost."""

import signal
import threading
import time

import pytest
from sqlalchemy import text

from palate.users import database
from palate.users.database import DatabaseUnavailable
from palate.users.store import PastText, open_store
from toy_postgres import Server, admin, postgres_url


@pytest.fixture
def server():
    own = Server()
    yield own
    own.close()


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGQUIT], ids=["in-order", "crash"])
def test_what_was_answered_is_there_after_a_restart_and_the_store_goes_on(server, ending):
    admin(str(server.folder), "CREATE DATABASE people")
    answered, failed, other, stop = [], [], [], threading.Event()

    def wait_for(numbers: list[int], more: int) -> None:
        most, end = len(numbers) + more, time.monotonic() + 60
        while len(numbers) < most:
            assert not other, repr(other[0])
            assert time.monotonic() < end, f"{len(numbers)} of {most} after a minute"
            time.sleep(0.005)

    with open_store(postgres_url(str(server.folder), "people")) as store:

        def write() -> None:
            number = 0
            while not stop.is_set():
                try:
                    store.put_history("acme", f"user-{number}", [PastText("", f"text {number}")])
                    answered.append(number)
                except DatabaseUnavailable:
                    failed.append(number)
                    time.sleep(0.01)
                except BaseException as error:
                    other.append(error)
                    return
                number += 1

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(2):
                wait_for(answered, 20)
                server.stop(ending)
                wait_for(failed, 3)  # it is away, and says so at once
                server.start()
            wait_for(answered, 20)  # the same store, without being opened again
        finally:
            stop.set()
            writer.join()
        for number in answered:
            exported = store.export("acme", f"user-{number}")
            assert exported is not None
            assert [text["output"] for text in exported["texts"]] == [f"text {number}"]
    assert len(failed) >= 6


@pytest.mark.timeout(60)
def test_a_silent_server_is_away_and_what_it_says_later_is_nobodys_answer(server, monkeypatch):
    monkeypatch.setattr(database, "WAIT_S", 0.3)
    admin(str(server.folder), "CREATE DATABASE people")
    with open_store(postgres_url(str(server.folder), "people")) as store:
        store.put_history("acme", "ann", [PastText("", "kept")])
        with server.frozen(), pytest.raises(DatabaseUnavailable):
            store.put_history("acme", "ben", [PastText("", "never written")])
        with pytest.raises(DatabaseUnavailable), store.write() as connection, server.frozen():
            connection.execute(text("DELETE FROM people"))
        with store.read() as connection:
            assert connection.execute(text("SELECT 41 + 1")).scalar_one() == 42
        assert store.export("acme", "ann")["texts"][0]["output"] == "kept"
        assert store.export("acme", "ben") is None


@pytest.mark.timeout(60)
def test_an_operator_waits_as_long_as_it_takes(server, monkeypatch):
    monkeypatch.setattr(database, "WAIT_S", 0.3)
    admin(str(server.folder), "CREATE DATABASE people")
    with open_store(postgres_url(str(server.folder), "people"), patient=True) as store, store.read() as connection:
        assert connection.execute(text("SELECT 42 FROM pg_sleep(0.8)")).scalar_one() == 42
    hurried = open_store(postgres_url(str(server.folder), "people"))
    with hurried, pytest.raises(DatabaseUnavailable), hurried.read() as connection:
        connection.execute(text("SELECT 42 FROM pg_sleep(0.8)"))
