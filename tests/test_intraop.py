"""Eager's operations in one thread, for one caller."""

import threading
import time

import pytest
import torch
from checks import same

from ovshim import intraop
from ovshim.modes import Writes, harmless

pytestmark = pytest.mark.skipif(not intraop.can_be_one(), reason="this torch has no MKL")


@pytest.fixture(autouse=True)
def _two_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def never() -> bool:
    return False


def in_another_thread() -> int:
    """What a thread begins with that torch has never met."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_it_is_said_of_the_calling_thread_alone() -> None:
    with intraop.one_thread(never):
        assert torch.get_num_threads() == 1
        assert in_another_thread() == 2
    assert torch.get_num_threads() == in_another_thread() == 2


def test_a_thread_that_torch_has_not_met_yet_keeps_its_number() -> None:
    found = []

    def run() -> None:
        with intraop.one_thread(never):
            found.append(torch.get_num_threads())
        found.append(torch.get_num_threads())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [1, 2]


def test_an_error_leaves_the_number_as_it_was() -> None:
    with pytest.raises(ZeroDivisionError), intraop.one_thread(never):
        raise ZeroDivisionError
    assert torch.get_num_threads() == 2


def test_all_threads_again_when_it_is_time() -> None:
    over, seen = [False], []
    with intraop.one_thread(lambda: over[0]), Writes([]):
        for now in (False, True, False):
            over[0] = now
            torch.ones(3).add_(1)
            seen.append(torch.get_num_threads())
    assert seen == [1, 2, 2]
    intraop.look_up()
    assert torch.get_num_threads() == 2


def test_it_is_asked_in_copies_too() -> None:
    seen = []

    def call() -> None:
        seen.append(torch.get_num_threads())
        torch.ones(3).add(1)
        seen.append(torch.get_num_threads())

    with intraop.one_thread(lambda: True):
        harmless(call, ())
    assert seen == [1, 2]


def test_products_come_out_alike_and_no_other_thread_works_on_them() -> None:
    a, b = torch.randn(2000, 600), torch.randn(600, 900)
    whole = a @ b
    with intraop.one_thread(never):
        same(a @ b, whole)
        before = _time_of_others()
        for _ in range(30):
            a @ b
        alone = _time_of_others() - before
    before = _time_of_others()
    for _ in range(30):
        a @ b
    assert alone < 0.2 * (_time_of_others() - before)


def _time_of_others() -> float:
    """Seconds of the processors that this process took in all threads but this one."""
    return time.process_time() - time.thread_time()


def test_a_number_that_is_set_meanwhile_stays() -> None:
    with intraop.one_thread(never):
        torch.set_num_threads(3)
    assert torch.get_num_threads() == 3
