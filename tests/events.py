"""Reads what TensorBoard would show of a folder of event files."""

import struct
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog


def scalars(folder: Path, name: str) -> dict[int, float]:
    """step -> value of one curve; a start of the run voids what was there from its first step on."""
    values = {}
    for file in sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns):
        for event in _events(file.read_bytes()):
            if event.session_log.status == SessionLog.START:
                values = {step: value for step, value in values.items() if step < event.step}
            for value in event.summary.value:
                if value.tag == name:
                    values[event.step] = value.simple_value
    return values


def _events(content: bytes):
    """The whole records; a kill may have cut the last one. A record is its length, a checksum, itself, a checksum."""
    position = 0
    while position + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, position)
        if position + 16 + length > len(content):
            return
        yield Event.FromString(content[position + 12 : position + 12 + length])
        position += 16 + length
