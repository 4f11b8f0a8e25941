import os
import signal

import pytest

from cwdm.signals import deferred, handled


def test_signals_are_handled_inside_and_put_back_behind() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    came: list[int] = []

    def fail_after_a_signal() -> None:
        with handled(lambda number, _: came.append(number)):
            os.kill(os.getpid(), signal.SIGTERM)
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail_after_a_signal()
    assert came == [signal.SIGTERM]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with handled(lambda number, _: pytest.fail("heard")):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_foreign_code_may_take_the_signals() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with handled():
        signal.signal(signal.SIGTERM, lambda *_: None)
    assert signal.getsignal(signal.SIGTERM) == before


def test_deferred_signals_come_when_the_block_has_ended() -> None:
    came: list[int] = []

    def end_by_an_error() -> None:
        with deferred() as stopped_by:
            assert not stopped_by()
            os.kill(os.getpid(), signal.SIGTERM)
            assert stopped_by() == signal.SIGTERM
            assert came == []
            raise KeyboardInterrupt

    with handled(lambda number, _: came.append(number)):
        with pytest.raises(KeyboardInterrupt):
            end_by_an_error()
        assert came == [signal.SIGTERM]
