"""A growing .npy file. NumPy leaves room in the header, so that the first axis can become longer."""

import io
import os
import pathlib

import numpy as np

from jaxgpt.data import DataError


class GrowingArray:
    """A one-dimensional .npy file that can be appended to; its header is correct after `finish`."""

    def __init__(self, path: pathlib.Path, dtype: np.dtype, length: int):
        """Open the file, and cut it back to `length`.

        Args:
            path: the .npy file.
            dtype: dtype of its elements.
            length: number of elements that an earlier `sync` wrote; 0 for a new file.

        Raises:
            DataError: the file is shorter.
        """
        self.dtype, self.length = np.dtype(dtype), length
        self._file = open(path, "r+b" if length else "w+b")  # noqa: SIM115
        header = self._header()
        end = len(header) + length * self.dtype.itemsize
        if length and os.path.getsize(path) < end:
            self._file.close()
            raise DataError(f"the file lost data ({path}, {length:,} elements were written): delete the folder")
        self._file.write(header)
        self._file.seek(end)
        self._file.truncate()

    def append(self, array: np.ndarray) -> None:
        """Append an (N,) array."""
        self._file.write(np.ascontiguousarray(array, self.dtype).data)
        self.length += len(array)

    def sync(self) -> None:
        """Flush everything to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> int:
        """Write the header with the final length and close the file; return the byte offset of the first element."""
        header = self._header()
        self._file.seek(0)
        self._file.write(header)
        self.sync()
        self._file.close()
        return len(header)

    def close(self) -> None:
        """Close the file without finishing it, so that it can be opened again."""
        self._file.close()

    def _header(self) -> bytes:
        buffer = io.BytesIO()
        facts = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(buffer, facts)
        return buffer.getvalue()
