"""A trained model: logits, generation and log-likelihoods.

Shape letters: B rows, N tokens, D extra depths, T = N - D positions, K = 1 + D depths, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from mtp_jax import data, sharding, targets
from mtp_jax.config import Architecture, Config, UserError
from mtp_jax.decoding import draft_length as draft_lengths
from mtp_jax.decoding import scoring, shared_context
from mtp_jax.decoding.generator import Generation, Generator, check_drafts, check_integer
from mtp_jax.decoding.samplers import Sampler, make_sampler
from mtp_jax.errors import warn_once
from mtp_jax.language_model import texts as texts_of
from mtp_jax.model import Tree, abstract_model
from mtp_jax.mtp import kind_of

SHORTEST_SHARED = 16  # tokens of a context below which sharing its forward pass among continuations saves nothing


@dataclasses.dataclass(frozen=True)
class Completions(Generation):
    """A `Generation` with its texts.

    Attributes:
      texts: the text generated after each prompt, up to the stop string or token. The prompt's text followed by this is
        the text of all tokens. Empty without a tokenizer.
    """

    texts: list[str]


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """Weights on their devices, with the tokenizer they were trained with.

    Attributes:
      tokenizer: None where a Hugging Face folder has no tokenizer.json, or had none when it was imported.
      step: the training step of the checkpoint; None for a Hugging Face folder.
      eos_ids: end-of-text ids of a Hugging Face folder beside the tokenizer's, such as a chat model's end of a turn.
      draft_vocabulary: int32[V'], increasing ids of the tokens that may be drafted; None: all.
    """

    config: Config
    params: Tree
    biases: Tree
    tokenizer: data.Tokenizer | None
    mesh: jax.sharding.Mesh
    step: int | None = None
    eos_ids: tuple[int, ...] = ()
    draft_vocabulary: np.ndarray | None = None

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Ids that end a text: the tokenizer's eos and `eos_ids`."""
        return end_tokens_of(self.tokenizer, self.eos_ids)

    def logits(self, tokens: ArrayLike) -> np.ndarray:
        """Returns the logits of every depth.

        Args:
          tokens: int[B, N], rows of one document each, N > D.

        Returns:
          float32[B, N - D, 1 + D, V]; [..., k, :] predicts tokens[i + 1 + k] from tokens[:i + 1] (k = 0) or, by the
          sequential module k, from tokens[:i + 1 + k].

        Raises:
          UserError: another shape, or tokens outside the vocabulary.
        """
        tokens_BN = self._checked(tokens)
        num_rows, length = len(tokens_BN), tokens_BN.shape[1] - kind_of(self.config).depth
        with jax.set_mesh(self.mesh):
            row_shards, length_shards = sharding.num_shards("batch"), sharding.num_shards("length")
            # The mesh requires equal shards; the padding comes after every token that is read.
            tokens_BN = np.pad(tokens_BN, ((0, -num_rows % row_shards), (0, -length % length_shards)))
            logits_BTKV = _logits(self.config.architecture, self.params, self.biases, jnp.asarray(tokens_BN))
        return np.asarray(jax.device_get(logits_BTKV))[:num_rows, :length]

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        speculative: bool = False,
        num_speculative_tokens: int | Literal["auto"] | None = None,
        min_confidence: float | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        stop_tokens: Sequence[int] | None = None,
        special_tokens: bool = False,
        batch_size: int | None = None,
        progress: Callable[[int], None] | None = None,
        draft_length: int | None = None,
    ) -> Completions:
        """Generates continuations of prompts.

        Args:
          prompts: texts, which begin as documents do in training (with the tokenizer's bos, if it has one), or token
            ids, which are used unchanged.
          max_new_tokens: fewer where the model's context (`config.data.sequence_length`) ends before.
          temperature: 0 is greedy.
          top_k, top_p: limits to the likeliest tokens; see `decoding.samplers`.
          speculative: draft with the extra depths. Greedy text is the same up to rounding in low precision, where
            matrix products of three tokens differ from those of one; sampled text has the same distribution.
          num_speculative_tokens: tokens drafted before each forward pass; None: the trained depth. Sequential modules
            can draft more. "auto": as many as give the largest speed-up at this batch size, 0 included, by the
            acceptance on these prompts and the costs on this machine; measured once per power of two of prompts, which
            takes a minute or so.
          min_confidence: in [0, 1]; a row verifies its drafts only while the product of their confidences, each the
            probability of the likeliest token, is at least this. None: all. Texts do not depend on it.
          seed: of the samples.
          stop: a text ends before the first of these strings; one that names a special token is that token.
          stop_tokens: ids that end a text; None: `end_tokens`.
          special_tokens: special tokens that a prompt spells are encoded as such; False: as text.
          batch_size: number of prompts generated from at the same time; further ones enter where texts are done. None:
            all prompts.
          progress: called with the number of texts done since the last call.
          draft_length: deprecated name of num_speculative_tokens.

        Raises:
          UserError: a prompt that is empty or leaves no room in the context, a token outside the vocabulary, numbers
            outside their range, speculation with a model that has no extra depths, texts without a tokenizer.
        """
        sampler = make_sampler(temperature, top_k, top_p)
        if draft_length is not None:
            warn_once("generate: draft_length is now num_speculative_tokens; the next release drops the old name")
            num_speculative_tokens = draft_length
        if num_speculative_tokens is not None and not speculative:
            given = f"num_speculative_tokens={num_speculative_tokens}"
            raise UserError(f"{given}: is for speculative decoding; add speculative=True")
        if min_confidence is not None and not speculative:
            raise UserError(f"min_confidence={min_confidence}: is for speculative decoding; add speculative=True")
        is_auto = num_speculative_tokens == "auto"
        if num_speculative_tokens is None or is_auto:
            num_speculative_tokens = max(1, kind_of(self.config).depth)
        check_integer("num_speculative_tokens", num_speculative_tokens, 1)
        num_speculative_tokens = int(num_speculative_tokens) if speculative else 0
        check_drafts(self.config.architecture, num_speculative_tokens)
        if isinstance(stop_tokens, int):
            stop_tokens = (stop_tokens,)
        if stop_tokens is None:
            stop_tokens = self.end_tokens
        stops = [texts_of.checked("stop", text) for text in ([stop] if isinstance(stop, str) else stop or ())]
        special = [self.needs_tokenizer().special_id(text) for text in stops]
        vocab = self.config.model.vocab_size or 0  # a tokenizer may have more ids than the model predicts
        stop_tokens = list(stop_tokens) + [token for token in special if token is not None and token < vocab]
        for token in stop_tokens:
            check_integer("stop_tokens", token, 0, (self.config.model.vocab_size or 1) - 1)
        befores = self.prompt_ids(prompts, special_tokens)
        if is_auto:
            num_speculative_tokens = self._best_draft_length(befores[:batch_size], sampler)
        written = self.decoder.generate(
            befores,
            max_new_tokens,
            sampler=sampler,
            num_speculative_tokens=num_speculative_tokens,
            seed=seed,
            stop_tokens=stop_tokens,
            ends=self._finder(befores, stops) if stops else None,
            min_confidence=min_confidence if num_speculative_tokens else None,
            batch_size=batch_size,
            progress=progress,
        )
        parts = {f.name: getattr(written, f.name) for f in dataclasses.fields(written)}
        return Completions(**parts, texts=self._texts(befores, written.tokens, stops, stop_tokens))

    def chat(
        self,
        conversations: Sequence[data.Message] | Sequence[Sequence[data.Message]],
        max_new_tokens: int = 64,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        stop: str | Sequence[str] = (),
        **options: Any,
    ) -> Completions:
        """Generates the answer to a conversation, or to each of several, as one batch.

        The prompt is the text of the chat template, up to the beginning of an answer. An answer ends at the template's
        end-of-turn mark, or where one of `generate` does; blanks that the template writes before answers are left out.

        Args:
          conversations: messages {"role": ..., "content": ...}, as `data.ChatTemplate.render` describes them, or a list
            of such lists.
          max_new_tokens, stop, options: as of `generate`.
          tools: JSON schemas of functions, for templates that describe them.

        Raises:
          UserError: as `generate`; a model without a chat template, or messages that it refuses.
        """
        is_one = bool(conversations) and isinstance(conversations[0], Mapping)
        chats: list[Any] = [conversations] if is_one else list(conversations)
        template, tokenizer = self.chat_template, self.needs_tokenizer()
        texts = [template.render(chat, add_generation_prompt=True, tools=tools) for chat in chats]
        marks = dict.fromkeys(template.end_mark(tokenizer, chat, tools) for chat in chats)
        stops = [*([stop] if isinstance(stop, str) else stop), *filter(None, marks)]
        prompts = [self._template_ids(text).tolist() for text in texts]
        out = self.generate(prompts, max_new_tokens, stop=stops, **options)
        leads = [template.answer_frame(chat, tools)[0] for chat in chats]
        pairs = zip(out.texts, leads, strict=True)
        return dataclasses.replace(
            out, texts=[text.removeprefix(lead) if lead.isspace() else text for text, lead in pairs]
        )

    def chat_ids(
        self, messages: Sequence[data.Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> np.ndarray:
        """Returns token ids of a conversation up to the beginning of an answer, int32[N]; for the errors see `chat`."""
        return self._template_ids(self.chat_template.render(messages, add_generation_prompt=True, tools=tools))

    def _template_ids(self, text: str) -> np.ndarray:
        return self.needs_tokenizer().encode(texts_of.checked("chat", text), special_tokens=True)

    @functools.cached_property
    def chat_template(self) -> data.ChatTemplate:
        """The chat template of `data.chat_template`, else of the folder of the tokenizer; read on first use.

        Raises:
          UserError: no template, or one that cannot be used.
        """
        return data.ChatTemplate.load(self.config.data.tokenizer, self.config.data.chat_template)

    @functools.cached_property
    def decoder(self) -> Generator:
        """The generator of `generate`, with a copy of the weights in the compute dtype; created on first use."""
        return Generator(self.config, self.params, self.biases, self.mesh, self.draft_vocabulary)

    @functools.cached_property
    def _best_draft_lengths(self) -> dict[int, int]:
        """Number of drafts by number of rows, as measured so far."""
        return {}

    def _best_draft_length(self, prompts: list[np.ndarray], sampler: Sampler) -> int:
        num_rows = 1 << (len(prompts) - 1).bit_length() if prompts else 1
        if num_rows not in self._best_draft_lengths:
            batch = [prompts[b % len(prompts)] for b in range(num_rows)]
            self._best_draft_lengths[num_rows] = draft_lengths.choose(
                self.decoder, batch, sampler
            ).num_speculative_tokens
        return self._best_draft_lengths[num_rows]

    def loglikelihood(
        self, pairs: Sequence[tuple[str, str]], progress: Callable[[int], None] = lambda num: None
    ) -> list[tuple[float, bool]]:
        """Returns the log-likelihood of continuations, given their contexts.

        A context begins as documents do in training. Blanks at its end are tokenised with the continuation, since
        tokenizers join them to the next word. A context too long for the model loses its beginning, and a continuation
        too long for it is scored in several windows. A context with several continuations is processed once.

        Args:
          pairs: (context, continuation) texts. An empty context is replaced by the tokenizer's bos, or eos.
          progress: called with the number of windows done since the last call.

        Returns:
          for each pair, the sum of log p of the continuation's tokens, in nats, and whether they are the greedy ones.

        Raises:
          UserError: no tokenizer, or an empty continuation.
        """
        return self.token_loglikelihood(*self.pair_ids(pairs), progress)

    def pair_ids(
        self, pairs: Sequence[tuple[str, str]], special_tokens: bool = False
    ) -> tuple[list[np.ndarray], list[int]]:
        """Returns token ids of the pairs of `loglikelihood`, and the index in each at which the continuation begins.

        Args:
          special_tokens: the texts are those of a chat template: special tokens that they spell are encoded as such,
            and no bos is added.
        """
        tokenizer, found = self.needs_tokenizer(), []

        @functools.lru_cache(maxsize=2)  # the answers to a question share its context
        def encode(text: str) -> np.ndarray:
            return tokenizer.encode(text, special_tokens)

        for n, pair in enumerate(pairs):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise UserError(f"pair {n}: {pair!r} is not (context, continuation); give a list of such pairs")
            found.append(texts_of.pair(tokenizer, encode, n, *pair, add_bos=not special_tokens))
        return [ids for ids, _ in found], [start for _, start in found]

    def loglikelihood_rolling(
        self, texts: Sequence[str], progress: Callable[[int], None] = lambda num: None
    ) -> list[float]:
        """Returns the log-likelihood of whole texts, nats: over all tokens, the first after the tokenizer's bos or eos.

        A text longer than the model's context is split into windows as in lm-evaluation-harness: each token is
        predicted once, the first of a window after one token; the last window starts as early as the context allows.

        Args:
          progress: called with the number of windows done since the last call.

        Raises:
          UserError: no tokenizer, or one with neither bos nor eos.
        """
        tokenizer = self.needs_tokenizer()
        ids = [texts_of.whole(tokenizer, n, text)[0] for n, text in enumerate(texts)]
        return [log_p for log_p, _ in self.token_loglikelihood(ids, [1] * len(ids), progress)]

    def token_loglikelihood(
        self,
        texts: Sequence[np.ndarray],
        starts: Sequence[int],
        progress: Callable[[int], None] = lambda num: None,
    ) -> list[tuple[float, bool]]:
        """Returns `loglikelihood` of token ids: for each text, of its tokens from its start >= 1 on."""
        pieces, owners = [], []
        for n, (ids, start) in enumerate(zip(texts, starts, strict=True)):
            windows = texts_of.windows(ids, start, self.config.data.sequence_length)
            pieces += windows
            owners += [n] * len(windows)
        out = [(0.0, True)] * len(texts)
        for n, (log_p, is_greedy) in zip(owners, self._scores(pieces, progress), strict=True):
            out[n] = out[n][0] + log_p, out[n][1] and is_greedy
        return out

    def _scores(
        self, pieces: list[tuple[np.ndarray, int]], progress: Callable[[int], None]
    ) -> list[tuple[float, bool]]:
        """Returns the scores of windows that fit the context. A prefix that several windows share is processed once."""
        same: dict[bytes, list[int]] = {}
        for i, (ids, start) in enumerate(pieces):
            same.setdefault(ids[:start].tobytes(), []).append(i)
        shared = [each for each in same.values() if len(each) > 1 and pieces[each[0]][1] >= SHORTEST_SHARED]
        alone = sorted(set(range(len(pieces))) - {i for each in shared for i in each})
        out: dict[int, tuple[float, bool]] = {}
        if shared:
            contexts = [pieces[each[0]][0][: pieces[each[0]][1]] for each in shared]
            continuations = [[pieces[i][0][pieces[i][1] :] for i in each] for each in shared]
            scored = shared_context.score(self.decoder, contexts, continuations, progress)
            for each, scores in zip(shared, scored, strict=True):
                out |= dict(zip(each, scores, strict=True))
        with jax.set_mesh(self.mesh):
            texts, starts = [pieces[i][0] for i in alone], [pieces[i][1] for i in alone]
            architecture = self.config.architecture
            scored_alone = scoring.score(architecture, self.params, self.biases, texts, starts, progress)
        out |= dict(zip(alone, scored_alone, strict=True))
        return [out[i] for i in range(len(pieces))]

    def prompt_ids(
        self, prompts: str | Sequence[str] | Sequence[Sequence[int]], special_tokens: bool = False
    ) -> list[np.ndarray]:
        """Returns token ids of every prompt: texts begin with the tokenizer's bos, if it has one; ids are unchanged.

        Args:
          special_tokens: special tokens that a text spells are encoded as such; a bos at its beginning is not repeated.

        Raises:
          UserError: an empty text, texts without a tokenizer, or prompts of another type.
        """
        ids = []
        for b, prompt in enumerate([prompts] if isinstance(prompts, str) else prompts):
            if isinstance(prompt, str):
                if not prompt:
                    raise UserError(f"prompt {b}: is empty; give it at least one character")
                tokenizer = self.needs_tokenizer()
                found = tokenizer.encode(texts_of.checked(f"prompt {b}", prompt), special_tokens)
                has_bos = tokenizer.bos_id is None or (special_tokens and found[:1].tolist() == [tokenizer.bos_id])
                ids.append(found if has_bos else np.concatenate([[tokenizer.bos_id], found]).astype(np.int32))
                continue
            tokens = np.asarray(prompt)
            if tokens.ndim != 1 or (tokens.size and not np.issubdtype(tokens.dtype, np.integer)):
                shape = f"{tokens.dtype}{list(tokens.shape)}"
                raise UserError(f"prompt {b}: {shape} is neither a text nor a list of token ids")
            ids.append(tokens)
        return ids

    def _finder(self, befores: list[np.ndarray], stops: list[str]) -> Callable[[int, np.ndarray], int | None]:
        """Returns (row, tokens) -> the number of tokens up to the one that completes a stop string, or None."""
        decode_after = self.needs_tokenizer().decode_after
        if not all(stops):
            raise UserError("stop='': an empty string stops nothing; leave it out")

        def ends(b: int, tokens: np.ndarray) -> int | None:
            def is_complete(num: int) -> bool:
                text = decode_after(befores[b], tokens[:num])
                return any(s in text for s in stops)

            if not is_complete(len(tokens)):
                return None
            low, high = 1, len(tokens)  # a longer prefix contains every stop string of a shorter one
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if is_complete(middle) else (middle + 1, high)
            return low

        return ends

    def _texts(
        self, befores: list[np.ndarray], rows: list[np.ndarray], stops: list[str], stop_tokens: Sequence[int]
    ) -> list[str]:
        if self.tokenizer is None:
            return []
        texts = []
        for before, tokens in zip(befores, rows, strict=True):
            text = self.tokenizer.decode_after(before, tokens)
            ends = [text.index(s) for s in stops if s in text]
            if ends:
                text = text[: min(ends)]
            elif len(tokens) and tokens[-1] in list(stop_tokens):
                text = self.tokenizer.decode_after(before, tokens[:-1])
            texts.append(text)
        return texts

    def needs_tokenizer(self) -> data.Tokenizer:
        """Returns the tokenizer; raises UserError if there is none."""
        if self.tokenizer is None:
            raise UserError(
                "the model came without a tokenizer.json: give token ids, or put the file beside its weights"
            )
        return self.tokenizer

    def _checked(self, tokens: ArrayLike) -> np.ndarray:
        tokens_BN, depth, vocab = np.asarray(tokens), kind_of(self.config).depth, self.config.model.vocab_size or 0
        if tokens_BN.ndim != 2 or not np.issubdtype(tokens_BN.dtype, np.integer):
            raise UserError(f"tokens {tokens_BN.dtype}{list(tokens_BN.shape)}: give integers of shape [B, N]")
        if not len(tokens_BN) or tokens_BN.shape[1] <= depth:
            raise UserError(f"tokens {list(tokens_BN.shape)}: at depth {depth} a row has at least {depth + 1} tokens")
        if tokens_BN.min() < 0 or tokens_BN.max() >= vocab:
            bad = int(tokens_BN.min() if tokens_BN.min() < 0 else tokens_BN.max())
            raise UserError(f"tokens: {bad} is outside the vocabulary of {vocab}")
        return tokens_BN.astype(np.int32)


def end_tokens_of(tokenizer: data.Tokenizer | None, eos_ids: Sequence[int]) -> tuple[int, ...]:
    """Returns the tokenizer's eos, if there is one, and `eos_ids`, each once."""
    eos = None if tokenizer is None else tokenizer.eos_id
    return tuple(dict.fromkeys(i for i in (eos, *eos_ids) if i is not None))


@functools.partial(jax.jit, static_argnums=0)
def _logits(architecture: Architecture, params: Tree, biases: Tree, tokens_BN: jax.Array) -> jax.Array:
    model = abstract_model(architecture).merge(params, biases)
    hidden_KBTD = model(targets.one_document_rows(tokens_BN, kind_of(architecture).depth)).hidden
    head_DV = model.head().astype(hidden_KBTD.dtype)
    # Depths first and transposed afterwards: XLA's CPU backend has no bfloat16 dot with the other output order.
    logits_KBTV = jnp.einsum("kbtd,dv->kbtv", hidden_KBTD, head_DV, preferred_element_type=jnp.float32)
    return jnp.moveaxis(logits_KBTV, 0, 2)
