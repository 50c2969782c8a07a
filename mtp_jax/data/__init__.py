"""The data pipeline from documents to rows: tokenizer, sources, token store, packing, batches.

    corpus = prepare(config)                       # tokenised once, memory-mapped from the cache afterwards
    batches = corpus.batches("train", start_step)  # batches.batch_at(n), or iterate with read-ahead
    with iter(batches) as iterator:
        batch = next(iterator)                     # tokens, segment_ids, positions: int32[B, T + 1 + D]

The batch of step n depends on the config, the seed and n alone: not on the number of processes or workers, nor on
where a run was interrupted. Models of different depth D read the same T + 1 tokens per row.

    messages.py    messages of a chat          chat_template_files.py  the template beside a tokenizer
    tokenizer/     bytes, a Hugging Face tokenizer.json, a SentencePiece .model
    files.py       names of files              formats/        files to records, one format per file
    tfds_source.py, huggingface.py  datasets   records.py      the records of all of them
    documents.py   records to documents        synthetic.py    texts made up
    sources.py     values of data.source       chat.py         chats as ids and loss weights, rendered by
                                               template_sandbox.py
    encoding.py    documents to ids, weights   store.py        the ids and weights of all documents
    cache.py       folders that are created atomically
    packing.py     the stream, its rows, FIM   mixture.py      order of the rows of several sources
    pipeline.py    rows to batches             corpus.py       all of these from a config
"""

from mtp_jax.data.chat import ChatError, ChatTemplate, Message
from mtp_jax.data.corpus import Corpus, prepare, tokenise
from mtp_jax.data.packing import Row
from mtp_jax.data.pipeline import Batch, Batches, BatchIterator
from mtp_jax.data.tokenizer import ByteTokenizer, HFTokenizer, SentencePieceTokenizer, Tokenizer
from mtp_jax.data.tokenizer import find as find_tokenizer
from mtp_jax.data.tokenizer import load as load_tokenizer
