"""Ids and loss weights of documents, in this process or, for a large source, in one process per CPU."""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from mtp_jax.config import UserError
from mtp_jax.data import tokenizer as tokenizers
from mtp_jax.data.chat import ChatTemplate, LossOn, encode_prompt
from mtp_jax.data.documents import Chat, Document, Prompt, Text, Tokens
from mtp_jax.data.records import BadRecord
from mtp_jax.data.tokenizer import Tokenizer

_BATCH_SIZE = 2**20  # characters or ids of the documents that are encoded at one time
_BATCHES_HERE = 32  # encoded in this process before others are started


class Encoded(NamedTuple):
    """One document as it is stored.

    ids: int32[n], bos and eos included.
    weights: float32[n], loss weight of each token; None: 1.
    key: a hash of the content, uint64.
    num_bytes: UTF-8 bytes of the text; for chats and ids without the special tokens.
    """

    ids: np.ndarray
    weights: np.ndarray | None
    key: int
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Encoding of the documents of a source. Pickles by the names of its files.

    Attributes:
      tokenizer: data.tokenizer.
      template: data.chat_template; None: chats are not expected.
      loss_on: see `encode`.
    """

    tokenizer: str
    template: str | None = None
    loss_on: LossOn = "assistant"

    def encode(self, documents: Iterable[Document | BadRecord]) -> Iterator[Encoded | BadRecord]:
        """Yields the documents in their order, without those that have no tokens.

        A document that cannot be encoded is a `BadRecord`.

        Raises:
          UserError: the tokenizer cannot be used, or has no chat template for chats.
        """
        batches, encode_here = _batches(documents), self.load()
        for _, batch in zip(range(_BATCHES_HERE), batches, strict=False):
            yield from encode_here(batch)
        num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        results = map(encode_here, batches) if num_cpus == 1 else _in_processes(self, batches, num_cpus)
        for encoded in results:
            yield from encoded

    def load(self) -> Callable[[Iterable[Document | BadRecord]], list[Encoded | BadRecord]]:
        """Returns `encode` with the tokenizer and the template."""
        template = None if self.template is None else ChatTemplate.load(self.tokenizer, self.template)
        tokenizer = tokenizers.load(self.tokenizer)
        return functools.partial(encode, tokenizer=tokenizer, template=template, loss_on=self.loss_on)


def encode(
    documents: Iterable[Document | BadRecord],
    tokenizer: Tokenizer,
    template: ChatTemplate | None = None,
    loss_on: LossOn = "assistant",
) -> list[Encoded | BadRecord]:
    """Returns the documents in their order.

    Args:
      documents: the documents, and records that could not be read, which are returned as they are.
      tokenizer: provides ids, and bos and eos around texts if it has them.
      template: that of the chats; None: there are none.
      loss_on: "assistant" for weight 0 on the prompts of `Chat` and `Prompt`, "all" for weight 1.
    """
    documents = list(documents)
    ids_of_texts = iter(tokenizer.encode_batch([each.text for each in documents if isinstance(each, Text)]))
    out: list[Encoded | BadRecord] = []
    for document in documents:
        match document:
            case BadRecord():
                encoded: Encoded | BadRecord = document
            case Text():
                encoded = _encode_text(document, next(ids_of_texts), tokenizer)
            case Prompt():
                ids, weights = encode_prompt(tokenizer, document.prompt, document.completion)
                text = f"{document.prompt}{document.completion}"
                encoded = _encoded(ids, weights if loss_on == "assistant" else None, text)
            case Chat():
                encoded = _encode_chat(document, tokenizer, template, loss_on)
            case Tokens():
                encoded = _encode_tokens(document, tokenizer)
        if isinstance(encoded, BadRecord) or len(encoded.ids):
            out.append(encoded)
    return out


def _encode_text(document: Text, ids: np.ndarray, tokenizer: Tokenizer) -> Encoded:
    if len(ids):  # a tokenizer that strips may leave nothing
        bos, eos = ([] if i is None else [i] for i in (tokenizer.bos_id, tokenizer.eos_id))
        ids = np.concatenate([bos, ids, eos]).astype(np.int32)
    return _encoded(ids, None, document.text)


def _encode_chat(
    document: Chat, tokenizer: Tokenizer, template: ChatTemplate | None, loss_on: LossOn
) -> Encoded | BadRecord:
    if template is None:
        problem = "has lists of messages, and data.tokenizer has no chat template"
        return BadRecord(document.origin, problem, "set data.chat_template to the path of a Jinja template")
    try:
        ids, weights = template.encode(tokenizer, document.messages, loss_on, document.tools, document.num_context)
    except UserError as error:  # of the template
        return BadRecord(document.origin, str(error), "correct the record or remove it")
    return _of_ids(ids, weights, tokenizer)


def _encode_tokens(document: Tokens, tokenizer: Tokenizer) -> Encoded | BadRecord:
    ids, size = document.ids, tokenizer.vocab_size
    if len(ids) and ids.max() >= size:
        problem = f"has the id {ids.max()}, and the ids of data.tokenizer are below {size}"
        return BadRecord(document.origin, problem, "name the tokenizer of these ids")
    return _of_ids(ids, document.weights, tokenizer)


def _of_ids(ids: np.ndarray, weights: np.ndarray | None, tokenizer: Tokenizer) -> Encoded:
    return Encoded(ids, weights, _hash(ids.tobytes(), weights), int(tokenizer.token_bytes[ids].sum()))


def _encoded(ids: np.ndarray, weights: np.ndarray | None, text: str) -> Encoded:
    content = text.encode()
    return Encoded(ids, weights, _hash(content, weights), len(content))


def _hash(content: bytes, weights: np.ndarray | None) -> int:
    weighted = content if weights is None else content + weights.tobytes()
    return int.from_bytes(hashlib.blake2b(weighted, digest_size=8).digest(), "little")


def _batches(documents: Iterable[Document | BadRecord]) -> Iterator[list[Document | BadRecord]]:
    batch: list[Document | BadRecord] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += _size(document)
        if size >= _BATCH_SIZE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _size(document: Document | BadRecord) -> int:
    match document:
        case Text():
            return len(document.text)
        case Prompt():
            return len(document.prompt) + len(document.completion)
        case Chat():
            return sum(len(str(message.get("content"))) for message in document.messages)
        case Tokens():
            return len(document.ids)
    return 1


def _in_processes(
    encoder: Encoder, batches: Iterator[list[Document | BadRecord]], num: int
) -> Iterator[list[Encoded | BadRecord]]:
    """Yields the encoded batches in order; at most 2 per process are in memory."""
    workers: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    started = [_Worker(encoder) for _ in range(num)]
    for worker in started:
        workers.put(worker)

    def in_worker(batch: list[Document | BadRecord]) -> list[Encoded | BadRecord]:
        worker = workers.get()
        try:
            return worker(batch)
        finally:
            workers.put(worker)

    waiting: collections.deque[concurrent.futures.Future[list[Encoded | BadRecord]]] = collections.deque()
    try:
        with concurrent.futures.ThreadPoolExecutor(num) as threads:
            for batch in batches:
                waiting.append(threads.submit(in_worker, batch))
                if len(waiting) >= 2 * num:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        for worker in started:
            worker.close()


class _Worker:
    """A process that encodes batches, given and returned as pickles through pipes.

    It is started as a command, since the start methods of multiprocessing run the user's main file again.
    """

    def __init__(self, encoder: Encoder):
        own = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from mtp_jax.data.encoding import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **own, "JAX_PLATFORMS": "cpu"},
            start_new_session=True,  # an interrupt is for the parent, which closes the pipes
        )
        self._send(encoder)

    def __call__(self, batch: list[Document | BadRecord]) -> list[Encoded | BadRecord]:
        assert self._process.stdout is not None
        try:
            self._send(batch)
            result = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            raise RuntimeError(f"a process that encodes documents ended with code {self._process.wait()}") from error
        if isinstance(result, Exception):
            raise result
        return result

    def _send(self, value: object) -> None:
        assert self._process.stdin is not None
        pickle.dump(value, self._process.stdin, pickle.HIGHEST_PROTOCOL)
        self._process.stdin.flush()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def serve() -> None:
    """Encodes the batches on standard input, the `Encoder` first, until it ends. The main function of a worker."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not be mixed with the results
    encode_batch = None
    while True:
        try:
            value = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        if encode_batch is None:
            encode_batch = value.load()
            continue
        try:
            result: object = encode_batch(value)
        except Exception as error:
            result = error
        pickle.dump(result, out, pickle.HIGHEST_PROTOCOL)
        out.flush()
