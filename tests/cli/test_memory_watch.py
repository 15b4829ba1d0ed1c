"""The most memory in use while something runs."""

import time

import pytest

from flashjax.cli.memory_watch import MemoryWatch


class Device:
    used: int | None = 1

    def memory_stats(self):
        return None if self.used is None else {"bytes_in_use": self.used}


@pytest.fixture
def devices():
    return [Device(), Device()]


def test_peak_is_of_the_device_that_had_most(devices):
    devices[0].used = 5
    with MemoryWatch(devices) as memory:
        devices[1].used = 7
        while memory.peak != 7:  # read by another thread
            time.sleep(0.001)
        devices[1].used = 2
    devices[0].used = 9  # too late
    assert (memory.before, memory.peak) == (5, 7)


def test_devices_that_do_not_count(devices):
    devices[0].used = devices[1].used = None
    with MemoryWatch(devices) as memory:
        pass
    assert memory.peak is None


def test_ends_with_the_block_that_fails(devices):
    with pytest.raises(ValueError, match="inside"), MemoryWatch(devices) as memory:
        raise ValueError("inside")
    devices[0].used = 9
    time.sleep(0.01)
    assert memory.peak == 1
