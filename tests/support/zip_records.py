"""Bytes of records in zip files: where they lie, and one of them flipped."""

import zipfile


def flip(path, position, mask=4):
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(data)


def place_of(path, name):
    """Where the bytes of a record begin, from the local header of the zip format."""
    with zipfile.ZipFile(path) as archive:
        start = next(i.header_offset for i in archive.infolist() if i.filename.endswith(f"/{name}"))
    header = path.read_bytes()[start : start + 30]
    name_length, extra_length = header[26:28], header[28:30]
    return start + 30 + sum(int.from_bytes(b, "little") for b in (name_length, extra_length))
