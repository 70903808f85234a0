import numpy as np
import pytest

from jaxgpt.text.npy import GrowingArray


def test_a_file_that_grew_is_what_numpy_would_have_written(tmp_path):
    array = GrowingArray(tmp_path / "a.npy", np.dtype(np.uint16), 0)
    for n in (3, 0, 1000):
        array.append(np.arange(n))
    offset = array.finish()
    expected = np.concatenate([np.arange(3), np.arange(1000)]).astype(np.uint16)
    np.save(tmp_path / "b.npy", expected)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    assert (tmp_path / "a.npy").read_bytes()[offset:] == expected.tobytes()


def test_what_was_not_synced_is_dropped_when_the_file_is_opened_again(tmp_path):
    array = GrowingArray(tmp_path / "a.npy", np.dtype(np.int64), 0)
    array.append(np.arange(10))
    array.sync()
    array.append(np.arange(10_000))
    array.close()
    again = GrowingArray(tmp_path / "a.npy", np.dtype(np.int64), 10)
    again.append(np.array([7]))
    again.finish()
    np.save(tmp_path / "b.npy", np.array([*range(10), 7]))
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def test_a_file_that_lost_data_is_refused(tmp_path):
    array = GrowingArray(tmp_path / "a.npy", np.dtype(np.int64), 0)
    array.append(np.arange(10))
    array.close()
    with pytest.raises(ValueError, match=r"lost data \(.*a.npy, 11 elements"):
        GrowingArray(tmp_path / "a.npy", np.dtype(np.int64), 11)


def test_the_header_has_room_for_any_length(tmp_path):
    array = GrowingArray(tmp_path / "a.npy", np.dtype(np.uint8), 0)
    short = len(array._header())
    array.length = 2**60
    assert len(array._header()) == short
    array.close()
