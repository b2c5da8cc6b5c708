"""PostgreSQL ends under a store, in order or as in a crash, and comes back: nothing that was committed is lost."""

import signal
import threading
import time

import pytest
from sqlalchemy.exc import DBAPIError

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
    answered, failed, stop = [], [], threading.Event()
    with open_store(postgres_url(str(server.folder), "people")) as store:

        def write() -> None:
            number = 0
            while not stop.is_set():
                try:
                    store.put_history("acme", f"user-{number}", [PastText("", f"text {number}")])
                    answered.append(number)
                except DBAPIError:
                    failed.append(number)
                    time.sleep(0.01)
                number += 1

        writer = threading.Thread(target=write)
        writer.start()
        for _ in range(2):
            before = len(answered)
            while len(answered) < before + 20:
                time.sleep(0.005)
            server.stop(ending)
            gone = len(failed)
            while len(failed) < gone + 3:  # it is away, and says so at once
                time.sleep(0.005)
            server.start()
        before = len(answered)
        while len(answered) < before + 20:  # the same store, without being opened again
            time.sleep(0.005)
        stop.set()
        writer.join()
        for number in answered:
            exported = store.export("acme", f"user-{number}")
            assert exported is not None
            assert [text["output"] for text in exported["texts"]] == [f"text {number}"]
    assert len(failed) >= 6
