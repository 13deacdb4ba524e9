import threading
import time

import pytest

from minigpt.generation.scheduler import RefusedError, Scheduler


def steps(count, log=None, name="", gate=None):
    """Count to ``count``, after ``gate`` is open; append ``name`` to ``log`` at each step."""
    if gate:
        gate.wait()
    for _ in range(count):
        if log is not None:
            log.append(name)
        yield
    return name


def endless():
    while True:
        yield


def start(function, *arguments):
    """Call a function in a thread; return the thread and a list with its error, if there is one."""
    errors = []

    def target():
        try:
            function(*arguments)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread, errors


def wait_for_jobs(scheduler, count):
    while len(scheduler._jobs) < count:
        time.sleep(0.001)


def test_small_requests_run_first_and_equal_ones_in_order():
    scheduler, log, gate = Scheduler(10), [], threading.Event()
    threads = []
    for name, work in (("first", 1), ("large", 1000), ("small", 10), ("small too", 11)):
        threads.append(start(scheduler.run, steps(2, log, name, gate if name == "first" else None), work)[0])
        wait_for_jobs(scheduler, len(threads))
    gate.set()
    for thread in threads:
        thread.join(30)
    assert log == ["first"] * 2 + ["small"] * 2 + ["small too"] * 2 + ["large"] * 2


def test_small_request_is_answered_while_large_ones_run():
    scheduler = Scheduler(100)
    large = [start(scheduler.run, endless(), 10**6, 60) for _ in range(50)]
    wait_for_jobs(scheduler, 50)
    assert scheduler.run(steps(100, name="text"), 100, 30) == "text"
    assert all(thread.is_alive() for thread, _ in large)
    scheduler.stop()


def test_late_request_ends_and_frees_the_thread():
    scheduler = Scheduler(10)
    closed = threading.Event()

    def heavy():
        try:
            yield from endless()
        finally:
            closed.set()

    with pytest.raises(TimeoutError):
        scheduler.run(heavy(), 1, 0.1)
    assert closed.wait(30)
    assert scheduler.run(steps(1, name="text"), 1, 30) == "text"


def test_error_of_a_request_is_raised_to_its_caller_only():
    def fail():
        yield
        raise ZeroDivisionError

    scheduler = Scheduler(10)
    with pytest.raises(ZeroDivisionError):
        scheduler.run(fail(), 1)
    assert scheduler.run(steps(1, name="text"), 1, 30) == "text"


def test_requests_above_the_limit_and_after_the_stop_are_refused():
    scheduler = Scheduler(2)
    running = [start(scheduler.run, endless(), 1) for _ in range(2)]
    wait_for_jobs(scheduler, 2)
    with pytest.raises(RefusedError, match="2 requests are waiting already"):
        scheduler.run(steps(1), 1)
    scheduler.stop()
    for thread, errors in running:
        thread.join(30)
        assert [str(error) for error in errors] == ["the server is stopping"]
    with pytest.raises(RefusedError, match="the server is stopping"):
        scheduler.run(steps(1), 1)
