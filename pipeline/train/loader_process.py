"""Batches made in a process of their own, whose Python does not wait for the trainer's, nor the
trainer's for it.

    loader process:  loader → batches → work counted ── socket ──→ trainer: `LoaderProcess.batches`

A batch crosses as one buffer, behind a header that says where each column lies. The trainer reads
it into memory that its tensors are views of, pinned where they go on to a GPU: one copy takes all
of them there.
"""

import multiprocessing
import os
import pickle
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess

import torch
from torch import Tensor

from pipeline.batches.collate import Filling, SequenceBatch
from pipeline.batches.packing import Column, Packed, pack_tensors
from pipeline.model.flops import Flops

Counted = tuple[SequenceBatch, Flops]  # a batch and the work of one forward pass over it
MakeBatches = Callable[[int, int], Iterator[Counted]]  # from an epoch and a step of it on

LENGTHS = struct.Struct("<QQ")  # bytes of a message's header and of its buffer
ENDS_IN_S = 5.0  # for the process to end by itself, before it is ended


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before a batch's buffer; an `error` or the `end` has none."""

    columns: tuple[Column, ...] = ()
    max_seq_len: int = 0
    filling: Filling | None = None
    work: Flops | None = None
    error: Exception | None = None
    end: bool = False


class LoaderProcess:
    """A process that makes the rest of a run's batches, started at once.

    It ends when the last batch was read, with the block, and when this process is gone.

        with LoaderProcess(make_batches, epoch, step) as loader:
            for batch, work in loader.batches(): ...

    Args:
        make_batches: called in the new process, so it must be picklable.
        epoch, step: where the run stands.
        pin_memory: batches lie in pinned memory, from which a GPU copies without its host waiting.
    """

    def __init__(
        self, make_batches: MakeBatches, epoch: int, step: int, *, pin_memory: bool = False
    ) -> None:
        self.pin_memory = pin_memory
        self._ours, theirs = socket.socketpair()
        # not forked: this process has threads, and locks that they may hold
        context = multiprocessing.get_context("spawn")
        self.process: BaseProcess = context.Process(
            target=send_batches,
            args=(theirs, make_batches, epoch, step),
            name="loader",
            daemon=True,
        )
        self.process.start()
        theirs.close()

    def __enter__(self) -> "LoaderProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def batches(self) -> Iterator[Counted]:
        """The batches in order.

        Raises:
            Exception: what the loader raised, as it was where it can be sent.
            RuntimeError: the process is gone.
        """
        while True:
            header = self._read_header()
            if header.error is not None:
                self.close()
                raise header.error
            if header.end:
                self.close()
                return
            yield self._read_batch(header)

    def close(self) -> None:
        """End the process, which sees that nobody reads any more."""
        self._ours.close()
        self.process.join(ENDS_IN_S)
        if self.process.is_alive():  # in the middle of a long read
            self.process.kill()
            self.process.join()

    def _read_header(self) -> Header:
        lengths = bytearray(LENGTHS.size)
        self._fill(memoryview(lengths))
        num_header, self._num_buffer = LENGTHS.unpack(lengths)

        header = bytearray(num_header)
        self._fill(memoryview(header))
        return pickle.loads(header)

    def _read_batch(self, header: Header) -> Counted:
        buffer = torch.empty(self._num_buffer, dtype=torch.uint8, pin_memory=self.pin_memory)
        self._fill(buffer.numpy().data)
        assert header.work is not None
        packed = Packed(header.columns, buffer)
        batch = SequenceBatch(
            **packed.views(),  # pyright: ignore[reportArgumentType]
            max_seq_len=header.max_seq_len,
            packed=packed,
            filling=header.filling,
        )
        return batch, header.work

    def _fill(self, rest: memoryview) -> None:
        """Read until `rest` is full. Raises RuntimeError where the other side has closed."""
        while len(rest):
            try:
                count = self._ours.recv_into(rest)
            except ConnectionResetError:
                count = 0
            if count == 0:
                raise self._death()
            rest = rest[count:]

    def _death(self) -> RuntimeError:
        """What ended the process, which may be in the middle of a batch."""
        self.process.join(ENDS_IN_S)
        code = self.process.exitcode
        why = ": killed, as one is that takes too much memory" if code == -9 else ""
        return RuntimeError(f"the process that makes batches is gone, exit code {code}{why}")


def send_batches(to: socket.socket, make_batches: MakeBatches, epoch: int, step: int) -> None:
    """The loader's process: batches one after another, then the end or what went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to answer
    torch.set_num_threads(1)
    for header, buffer in messages(make_batches, epoch, step):
        try:
            send_message(to, header, buffer)
        except (BrokenPipeError, ConnectionResetError):
            break  # the trainer needs no more
    to.close()
    # threads may still be making batches that nobody waits for
    os._exit(0)


def messages(make_batches: MakeBatches, epoch: int, step: int) -> Iterator[tuple[Header, Tensor]]:
    """What is sent: batches, then the end or an error of the loader."""
    nothing = torch.empty(0, dtype=torch.uint8)
    try:
        for batch, work in make_batches(epoch, step):
            packed = pack_tensors(batch.tensors)
            yield Header(packed.columns, batch.max_seq_len, batch.filling, work), packed.buffer
    except Exception as error:
        yield Header(error=sendable(error)), nothing
        return
    yield Header(end=True), nothing


def sendable(error: Exception) -> Exception:
    """The error itself where it can be pickled, else one with its message."""
    try:
        again = pickle.loads(pickle.dumps(error))
    except Exception:  # whatever pickling somebody's error raises: its message goes across
        again = None
    if type(again) is type(error) and str(again) == str(error):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


def send_message(to: socket.socket, header: Header, buffer: Tensor) -> None:
    """A header and the buffer, uint8, of the columns that it places."""
    packed = pickle.dumps(header)
    to.sendall(LENGTHS.pack(len(packed), len(buffer)) + packed)
    to.sendall(buffer.numpy().data)
