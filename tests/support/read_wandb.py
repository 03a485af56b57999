"""Reading back what W&B wrote offline."""

import json
import struct
import zlib

from wandb.proto import wandb_internal_pb2


def records(path):
    """The records of a .wandb file: blocks of 32 KiB, chunks of (crc, length, type) and data."""
    data = path.read_bytes()
    position, record = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        crc, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if left < 7 or kind == 0:
            position += left
            continue
        chunk = data[position + 7 : position + 7 + length]
        position += 7 + length
        assert zlib.crc32(bytes([kind]) + chunk) == crc
        record += chunk
        if kind in (1, 4):  # whole, or its last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def values(items):
    return {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}


class Fragment:
    """What one process wrote of one W&B run."""

    def __init__(self, path):
        self.folder = path.parent
        kinds = {}
        for record in records(path):
            kind = record.WhichOneof("record_type")
            kinds.setdefault(kind, []).append(getattr(record, kind))
        self.run = kinds["run"][0]
        self.config = values(self.run.config.update)
        self.axes = {m.glob_name or m.name: m.step_metric for m in kinds.get("metric", [])}
        self.history = [values(row.item) for row in kinds.get("history", [])]
        self.summary = {}
        for update in kinds.get("summary", []):
            self.summary |= values(update.update)
        self.artifacts = kinds.get("artifact", [])
        self.exit_code = kinds["exit"][0].exit_code if "exit" in kinds else None


def fragments(folder, key):
    """The fragments of a stage's or probe's run, oldest first."""
    identity = json.loads((folder / "wandb_ids.json").read_text())[key]
    return [
        Fragment(path)
        for path in sorted((folder / "wandb").glob(f"offline-run-*/run-{identity}.wandb"))
    ]
