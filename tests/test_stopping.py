"""SIGINT and SIGTERM: the first is answered, the second ends the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from qtrain.stopping import Stopped, answering, stoppable

BOTH = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", BOTH)
def test_the_first_is_raised_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in BOTH]
    with pytest.raises(Stopped, match=f"^{number.name}: ") as caught, stoppable():
        os.kill(os.getpid(), number)
        time.sleep(1)
    assert caught.value.status == 128 + number
    assert [signal.getsignal(each) for each in BOTH] == before


@pytest.mark.parametrize("second", BOTH)
def test_the_second_ends_the_process_at_once(second: signal.Signals) -> None:
    program = (
        "import os, signal, time\nfrom qtrain.stopping import answering\n"
        "with answering(print):\n    os.kill(os.getpid(), signal.SIGTERM)\n"
        f"    os.kill(os.getpid(), {int(second)})\n    print('too late')\n"
    )
    result = subprocess.run([sys.executable, "-uc", program], capture_output=True, text=True, timeout=30)
    assert (result.returncode, result.stdout) == (-second, "15\n")


def test_what_was_ignored_stays_ignored() -> None:
    """A job that a script put in the background is started so."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_worker_of_a_loader_leaves_sigint_to_its_parent() -> None:
    program = (
        "import os, signal, sys\nfrom qtrain.stopping import stoppable\nwith stoppable():\n    child = os.fork()\n"
        "    if child == 0:\n        os.kill(os.getpid(), signal.SIGINT)\n        os.write(1, b'goes on\\n')\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n        os.write(1, b'too late\\n')\n        os._exit(0)\n"
        "    print(os.waitpid(child, 0)[1])\n"
    )
    result = subprocess.run([sys.executable, "-uc", program], capture_output=True, text=True, timeout=30)
    assert (result.returncode, result.stdout) == (0, "goes on\n15\n")


def test_outside_of_the_main_thread_nothing_changes() -> None:
    found: list[object] = []

    def work() -> None:
        with answering(found.append):
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]
