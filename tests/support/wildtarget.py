"""An iSCSI target that does what tgtd does not: it is busy, resets itself, answers in part, or closes in the middle.

It knows as much of RFC 7143 as one LUN needs that is read. What it does next is a list of moods, one for each READ.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress

__all__ = ["WildTarget"]

BLOCK = 512
HEADER = 48  # bytes of each PDU, before its data
NOP_OUT, COMMAND, LOGIN, LOGOUT = 0x00, 0x01, 0x03, 0x06
NOP_IN, RESPONSE, LOGIN_RESPONSE, DATA_IN, LOGOUT_RESPONSE = 0x20, 0x21, 0x23, 0x25, 0x26
INQUIRY, READ_CAPACITY, READ = 0x12, 0x9E, 0x88
FINAL, WITH_STATUS, UNDERFLOW = 0x80, 0x01, 0x02
CHECK_CONDITION, BUSY, RESERVED, TASK_SET_FULL = 0x02, 0x08, 0x18, 0x28
KEYS = "HeaderDigest=None\0DataDigest=None\0AuthMethod=None\0"


class Closed(Exception):
    """The connection is closed, by one side or the other."""


class WildTarget:
    """One LUN with `content`, a multiple of BLOCK bytes.

    Attributes:
        moods: of the next READs: "busy", "full", "reserved", "attention", "medium", "none" (no such LUN), "short",
            "close" (after half of the data); none left: it answers as it should.
        reads: commands that there were.
        logins: connections that logged in.
        serial: what VPD 0x80 says.
        bend: what is done to each PDU before it is sent.
    """

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.moods: deque[str] = deque()
        self.reads = self.logins = 0
        self.serial = b"one"
        self.bend: Callable[[bytes], bytes] = bytes
        self._connections: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def url(self) -> str:
        return f"iscsi://127.0.0.1:{self._listener.getsockname()[1]}/iqn.2024-01.example:wild/1"

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # accept() ends
        self._threads[0].join()
        self._listener.close()
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:  # each closes its own
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            self._threads.append(threading.Thread(target=self._serve, args=(connection,), daemon=True))
            self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        session = Session(self, connection)
        try:
            while True:
                session.answer()
        except (Closed, OSError):
            connection.close()


class Session:
    """One connection of an initiator."""

    def __init__(self, target: WildTarget, connection: socket.socket) -> None:
        self.target = target
        self.connection = connection
        self.numbers = [1, 0]  # StatSN, ExpCmdSN

    def receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            part = self.connection.recv(length - len(data))
            if not part:
                raise Closed
            data += part
        return data

    def answer(self) -> None:
        header = self.receive(HEADER)
        length = int.from_bytes(header[5:8], "big")
        self.receive(-(-length // 4) * 4)
        code, self.itt = header[0] & 0x3F, header[16:20]
        self.numbers[1] = int.from_bytes(header[24:28], "big") + (0 if header[0] & 0x40 else 1)
        if code == LOGIN:
            self.log_in(header)
        elif code == COMMAND:
            self.command(header[32:48], int.from_bytes(header[20:24], "big"))
        elif code == LOGOUT:
            self.send(LOGOUT_RESPONSE, FINAL)
        elif code == NOP_OUT:
            self.send(NOP_IN, FINAL, ttt=b"\xff" * 4)

    def send(self, code: int, flags: int, *, third: int = 0, ttt: bytes = bytes(4), tail: bytes = bytes(12),
             data: bytes = b"", sent: int | None = None) -> None:  # fmt: skip
        """Send one PDU, or `sent` bytes of it and no more ever."""
        status, expected = self.numbers
        self.numbers[0] += 1
        header = struct.pack(">BBBB", code, flags, 0, third) + len(data).to_bytes(4, "big") + bytes(8) + self.itt + ttt
        header += struct.pack(">III", status, expected, expected + 31) + tail
        pdu = self.target.bend(header + data + bytes(-len(data) % 4))
        self.connection.sendall(pdu[:sent])
        if sent is not None:
            raise Closed

    def log_in(self, header: bytes) -> None:
        done = header[1] & 0x83 == 0x83
        self.target.logins += done
        status, expected = self.numbers
        self.numbers[0] += 1
        keys = KEYS.encode()
        reply = struct.pack(">BBBB", LOGIN_RESPONSE, header[1], 0, 0) + len(keys).to_bytes(4, "big") + header[8:14]
        reply += b"\0\1" + self.itt + bytes(4) + struct.pack(">III", status, expected, expected + 31) + bytes(12)
        self.connection.sendall(self.target.bend(reply + keys + bytes(-len(keys) % 4)))

    def command(self, cdb: bytes, wanted: int) -> None:
        if cdb[0] == READ:
            self.read(cdb)
        elif cdb[0] == INQUIRY:
            self.data(self.inquiry(cdb)[:wanted])
        elif cdb[0] == READ_CAPACITY:
            self.data(struct.pack(">QI", len(self.target.content) // BLOCK - 1, BLOCK) + bytes(20))
        else:
            self.send(RESPONSE, FINAL)

    def inquiry(self, cdb: bytes) -> bytes:
        if not cdb[1] & 1:
            return bytes((0, 0, 5, 2, 31)) + bytes(3) + b"WILD    TARGET          0001"
        page = self.target.serial if cdb[2] == 0x80 else b""
        return bytes((0, cdb[2], 0, len(page))) + page

    def read(self, cdb: bytes) -> None:
        self.target.reads += 1
        first, count = struct.unpack(">QI", cdb[2:14])
        data = self.target.content[first * BLOCK : (first + count) * BLOCK]
        mood = self.target.moods.popleft() if self.target.moods else ""
        if mood in ("busy", "full", "reserved"):
            self.send(RESPONSE, FINAL, third={"busy": BUSY, "full": TASK_SET_FULL, "reserved": RESERVED}[mood])
        elif mood in ("attention", "medium", "none"):
            self.sense(*{"attention": (6, 0x29, 0), "medium": (3, 0x11, 0), "none": (5, 0x25, 0)}[mood])
        elif mood == "short":
            self.data(data[:-BLOCK], UNDERFLOW, BLOCK)
        elif mood == "close":
            self.send(DATA_IN, FINAL | WITH_STATUS, data=data, sent=HEADER + len(data) // 2)
        else:
            self.data(data)

    def data(self, data: bytes, flags: int = 0, residual: int = 0) -> None:
        tail = bytes(8) + residual.to_bytes(4, "big")
        self.send(DATA_IN, FINAL | WITH_STATUS | flags, ttt=b"\xff" * 4, tail=tail, data=data)

    def sense(self, key: int, code: int, qualifier: int) -> None:
        sense = bytes((0x70, 0, key, 0, 0, 0, 0, 10, 0, 0, 0, 0, code, qualifier, 0, 0, 0, 0))
        self.send(RESPONSE, FINAL, third=CHECK_CONDITION, data=len(sense).to_bytes(2, "big") + sense)
