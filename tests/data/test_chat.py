"""Chat templates: texts and ids of transformers, the tokens of the assistant, hostile templates, refusals."""

import json
import time

import numpy as np
import pytest

from mtp_jax.config import UserError
from mtp_jax.data import ByteTokenizer, load_tokenizer
from mtp_jax.data.chat import ChatError, ChatTemplate, encode_prompt
from tests import sentencepiece
from tests.data.chat_templates import CHATML, CHATS, GENERATION, SPECIAL, TEMPLATES, assistant, user
from tests.data.test_tokenizer import byte_level

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<é> & 'x'", "parameters": {"type": "object"}}}]


def template_of(source, **special_tokens):
    return ChatTemplate({"default": source}, special_tokens or TOKENS, "template")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tokenizer")
    byte_level(SPECIAL).save(str(made / "tokenizer.json"))
    return made


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def oracle(folder):
    """transformers' tokenizer with a template."""
    transformers = pytest.importorskip("transformers")

    def make(source):
        file = str(folder / "tokenizer.json")
        return transformers.PreTrainedTokenizerFast(tokenizer_file=file, chat_template=source, **TOKENS)

    return make


# ---------------------------------------------------------------------------------------------------------------
# the text and its ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_and_ids_are_those_of_transformers(oracle, tokenizer, name):
    ours, theirs = template_of(TEMPLATES[name]), oracle(TEMPLATES[name])
    for chat in CHATS.values():
        for prompt in (False, True):
            expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            assert ours.render(chat, add_generation_prompt=prompt) == expected
        ids, weights = ours.encode(tokenizer, chat, loss_on="all")
        assert ids.tolist() == theirs.apply_chat_template(chat)["input_ids"] and ids.dtype == np.int32
        assert weights.dtype == np.float32 and weights.tolist() == [1.0] * len(ids)
        is_kept = "</think>" not in chat[-1]["content"] or name in ("chatml", "generation", "llama", "mistral", "last")
        if (
            chat[-1]["role"] == "assistant" and is_kept
        ):  # transformers refuses to continue a content without its thinking
            expected = theirs.apply_chat_template(chat, tokenize=False, continue_final_message=True)
            assert ours.render(chat, continue_final_message=True) == expected


def test_tools_and_calls_are_rendered_as_by_transformers(oracle):
    call = {"type": "function", "function": {"name": "f", "arguments": {"b": "<é>", "a": [1, None, True]}}}
    chat = [user("?"), assistant("", tool_calls=[call]), {"role": "tool", "content": "5"}, assistant("It is 5.")]
    expected = oracle(CHATML).apply_chat_template(chat, tools=TOOLS, tokenize=False)
    assert template_of(CHATML).render(chat, tools=TOOLS) == expected and '"<é>"' in expected


def test_the_template_for_tools_is_the_one_named_tool_use():
    template = ChatTemplate({"default": "plain", "tool_use": "tools {{ tools[0].function.name }}"}, {}, "template")
    assert template.render([user("a")]) == "plain" and template.render([user("a")], tools=TOOLS) == "tools f"


def test_keys_without_a_value_and_names_of_reasoning_are_as_in_transformers(oracle):
    source = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
    for chat in (
        [{"role": "user", "content": "a", "name": None}, assistant("b", reasoning="r")],
        [user("a"), assistant("b", thinking="t", reasoning_content="c")],
        [user("a"), {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}],
    ):
        assert template_of(source).render(chat) == oracle(source).apply_chat_template(chat, tokenize=False)


def test_the_date_of_documents_is_fixed_and_that_of_prompts_is_today(tokenizer):
    template = template_of("{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}{{ m.content }}{% endfor %}")
    assert tokenizer.decode(template.encode(tokenizer, [user("a")])[0]) == "2024-07-26a"
    assert template.render([user("a")]) in (time.strftime("%Y-%m-%da"), time.strftime("%Y-%m-%da"))


# ---------------------------------------------------------------------------------------------------------------
# the tokens of the assistant


def answers(tokenizer, ids, weights):
    """The texts of consecutive tokens with weight 1, special tokens included."""
    out, last = [], 0.0
    for i, weight in zip(ids.tolist(), weights.tolist(), strict=True):
        if weight:
            text = SPECIAL[i] if i < len(SPECIAL) else tokenizer.decode([i])
            out = [*out[:-1], out[-1] + text] if last else [*out, text]
        last = weight
    return out


def test_generation_blocks_give_the_mask_of_transformers(oracle, tokenizer):
    """Tokens that begin before a block or end after it count as well."""
    theirs = [GENERATION, GENERATION.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\nde'")]
    theirs += ["{%- generation -%}{{ messages[0].content }}{% endgeneration %}{{ messages[-1].content }}"]
    for source in theirs:
        for chat in CHATS.values():
            chat = [*chat, assistant("f f(x):\n    return x  # é ü 漢")]
            found = template_of(source).encode(tokenizer, chat)
            expected = oracle(source).apply_chat_template(chat, return_assistant_tokens_mask=True)
            assert found[0].tolist() == expected["input_ids"]
            assert found[1].tolist() == expected["assistant_masks"]


EXPECTED = {
    "generation": ["Hello!  <|im_end|>", " Fine é\n\n<|im_end|>"],
    "chatml": ["Hello!  <|im_end|>\n", " Fine é\n\n<|im_end|>\n"],
    "thinking": ["Hello!  <|im_end|>\n", "<think>\n\n</think>\n\n Fine é\n\n<|im_end|>\n"],
    "opened": ["Hello!  </s>", " Fine é\n\n</s>"],
    "llama": ["Hello!<|eot_id|>", "Fine é<|eot_id|>"],
    "mistral": [" Hello!  </s>", "  Fine é\n\n</s>"],
    "glm": ["\n<think></think>\nHello!<|user|>", "\n<think></think>\nFine é"],
    "last": ["<|message|>Hello!  <|end|>", "<|message|> Fine é\n\n<|return|>"],
    "eos last": ["Hello!  <|end|>\n", " Fine é\n\n<|end|>\n</s>"],
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_with_their_end_of_turn_mark_have_weight_1(tokenizer, name):
    template = template_of(TEMPLATES[name])
    ids, weights = template.encode(tokenizer, CHATS["system, blanks, unicode"])
    expected = EXPECTED[name]
    if name == "mistral":  # the blank before the answer is the template's, and the first question moves
        assert [text.lstrip() for text in answers(tokenizer, ids, weights)] == [text.lstrip() for text in expected]
    else:
        assert answers(tokenizer, ids, weights) == expected
    assert set(weights.tolist()) == {0.0, 1.0} and weights.dtype == np.float32
    ids, weights = template.encode(tokenizer, CHATS["the same"])
    found = answers(tokenizer, ids, weights)
    assert len(found) == 3 and len(set(found[:2])) == 1 and all("a" in text for text in found)
    assert len(answers(tokenizer, *template.encode(tokenizer, CHATS["a question last"]))) == 1


def test_answers_with_thinking(tokenizer):
    found = {
        name: answers(tokenizer, *template_of(TEMPLATES[name]).encode(tokenizer, CHATS["thinking"]))
        for name in ("chatml", "thinking", "opened")
    }
    whole = ["<think>\neasy\n</think>\n\n2<|im_end|>\n", "<think>\nhm\n</think>\n\n4<|im_end|>\n"]
    assert found["chatml"] == whole
    assert found["thinking"] == ["2<|im_end|>\n", whole[1]]  # as the model reads the earlier turn
    assert found["opened"] == ["\n\n2</s>", "\n\n4</s>"]


def test_special_tokens_in_contents_do_not_end_an_answer(tokenizer):
    chat = CHATS["special tokens in contents"]
    for name in ("chatml", "thinking", "llama"):
        found = answers(tokenizer, *template_of(TEMPLATES[name]).encode(tokenizer, chat))
        assert found[0].startswith("it is <|eot_id|> or </s>.<|") and len(found) == 2


def test_calls_of_tools_are_answers(tokenizer):
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    chat = [user("?"), assistant("", tool_calls=[call]), {"role": "tool", "content": "5"}, assistant("It is 5.")]
    found = answers(tokenizer, *template_of(CHATML).encode(tokenizer, chat, tools=TOOLS))
    assert found[0].startswith('\n<tool_call>\n{"name": "f"') and found[0].endswith("</tool_call><|im_end|>\n")
    assert found[1] == "It is 5.<|im_end|>\n"


def test_contents_may_be_lists_of_parts(tokenizer):
    parts = [user([{"type": "text", "text": "q"}]), assistant([{"type": "text", "text": " ans "}])] * 2
    found = answers(tokenizer, *template_of(TEMPLATES["glm"]).encode(tokenizer, parts))
    assert found == ["\n<think></think>\nans<|user|>", "\n<think></think>\nans"]


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.role }}:{{ m.content | reverse }}\n{% endfor %}",
        "{% for m in messages %}{{ m.content | length }}{% endfor %}",
        "{{ messages[-1].content }}{% for m in messages %}:{{ m.role[0] }}:{{ m.content | upper }}{% endfor %}",
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",  # no answers at all
    ],
)
def test_answers_that_cannot_be_found_are_an_error_with_the_remedy(tokenizer, source):
    with pytest.raises(ChatError, match=r"tokens of message 1 .*generation.*data.chat_template.*loss_on=all"):
        template_of(source).encode(tokenizer, [user("abc"), assistant("Xyz"), user("abc")])


def test_answers_are_found_where_the_text_before_them_depends_on_later_messages(tokenizer):
    source = "{{ messages | length }}{% for m in messages %}:{{ m.role[0] }}:{{ m.content | upper }}{% endfor %}"
    ids, weights = template_of(source).encode(tokenizer, [user("abc"), assistant("Xyz"), user("other")])
    assert answers(tokenizer, ids, weights) == ["XYZ"]


def test_a_byte_tokenizer_has_the_bytes_of_the_text(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text("{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n\n{% endfor %}")
    template, tokenizer = ChatTemplate.load("bytes", str(path)), ByteTokenizer()
    ids, weights = template.encode(tokenizer, [user("hé"), assistant("漢"), user("x")])
    assert bytes(ids.tolist()).decode() == "u: hé\n\na: 漢\n\nu: x\n\n"
    assert bytes(ids[weights == 1].tolist()).decode() == "a: 漢\n\n"


# ---------------------------------------------------------------------------------------------------------------
# prompts with completions


def test_a_prompt_and_its_completion_are_one_text(folder, tokenizer):
    ids, weights = encode_prompt(ByteTokenizer(), "né ", "yés")
    assert ids.tolist() == [256, *"né yés".encode(), 257] and ids.dtype == np.int32
    assert weights.tolist() == [0.0] * 5 + [1.0] * 5 and weights.dtype == np.float32
    ids, weights = encode_prompt(tokenizer, "def f", "(x):\n    return</s>")
    assert ids.tolist() == [0, *tokenizer.encode("def f(x):\n    return</s>"), 1]
    assert tokenizer.decode(ids[weights == 1]) == "(x):\n    return</s>" and weights[-1] == 1


def test_a_token_of_both_prompt_and_completion_is_predicted(tokenizer):
    assert len(tokenizer.encode("aaaa")) == 1
    ids, weights = encode_prompt(tokenizer, "\naaa", "a")
    assert tokenizer.decode(ids[weights == 1]) == "aaaa"


def test_unusable_completions_are_refused():
    for prompt, completion, problem in [
        ("a", "", "completion: is empty"),
        (3, "b", "prompt: 3"),
        ("a", "\ud800", "half"),
    ]:
        with pytest.raises(ChatError, match=problem):
            encode_prompt(ByteTokenizer(), prompt, completion)


# ---------------------------------------------------------------------------------------------------------------
# generation: the frame of an answer


def test_the_frame_of_an_answer():
    frames = {name: template_of(source).answer_frame([user("q")]) for name, source in TEMPLATES.items()}
    assert frames["chatml"] == frames["generation"] == ("", "<|im_end|>\n")
    assert frames["mistral"] == (" ", "</s>") and frames["glm"][1] == ""
    assert frames["llama"] == ("", "<|eot_id|>") and frames["last"] == ("<|message|>", "<|return|>")
    assert template_of("x").answer_frame([user("q")]) == ("", "")


# ---------------------------------------------------------------------------------------------------------------
# hostile templates

HOSTILE = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('false') }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['json'] }}",
    "{{ ''|attr('__class__') }}{{ ''['__class__'].x }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends '/etc/passwd' %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({}) }}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x * 2 %}{% endfor %}",
    "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ 'x' * 10**12 }}",
    "{{ 10**12 * 'x' }}",
    "{{ 2 ** (10 ** 9) }}",
    "{{ '%999999999d' % 1 }}{{ '%*d' % (999999999, 1) }}",
    "{{ '%999999999d'|format(1) }}",
    "{{ 'x'.ljust(999999999) }}",
    "{{ 'x'|center(999999999) }}",
    "{{ 'x'|indent(999999999, true) }}",
    "{{ lipsum(n=999999999) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{% set x %}{% for i in range(99999) %}{{ messages[0].content * 999 }}{% endfor %}{% endset %}",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_a_hostile_template_is_refused_or_harmless(source):
    try:
        text = template_of(source).render([user("x")])
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert text == "" and "__" in source  # an undefined value


def test_long_chats_stay_within_the_limits(tokenizer):
    chat = [user("question " * 300), assistant("answer " * 300)] * 200
    ids, weights = template_of(TEMPLATES["thinking"]).encode(tokenizer, chat, loss_on="all")
    assert len(ids) > 100_000 and template_of(TEMPLATES["glm"]).render(chat)


# ---------------------------------------------------------------------------------------------------------------
# refusals


@pytest.mark.parametrize(
    "chat, problem",
    [
        ([], "messages: .* is not a list of messages"),
        ("text", "messages: 'text' is not a list"),
        ([user("a"), "b"], "message 1: 'b' is not a message"),
        ([{"content": "a"}], "message 0: role=None must be a text"),
        ([{"role": 3, "content": "a"}], "message 0: role=3"),
        ([{"role": "user"}], "message 0: has no content"),
        ([{"role": "user", "content": 3}], "message 0: content=3 must be a text or a list"),
        ([{"role": "user", "content": "a", "x": object()}], "is a object; give texts"),
        ([user("a\ud800")], "half of a surrogate pair"),
        ([assistant("a"), user("b")], "template: Roles must alternate user/assistant/user/assistant.; correct"),
        ([user("a"), {"role": "assistant", "tool_calls": [1]}], "template: 'dict object' has no attribute 'content'"),
        ([user([1]), assistant("a")], "template: can only concatenate str"),
    ],
)
def test_unusable_messages_are_one_line(tokenizer, chat, problem):
    with pytest.raises(ChatError, match=problem) as caught:
        template_of(TEMPLATES["mistral"]).encode(tokenizer, chat)
    assert "\n" not in str(caught.value)


def test_a_template_with_a_fault_names_its_line():
    with pytest.raises(UserError, match=r"template: is not a Jinja template \(.*line 2\); .*data.chat_template"):
        template_of("a\n{% for %}")


# ---------------------------------------------------------------------------------------------------------------
# files


def test_the_template_is_found_beside_the_tokenizer(tmp_path):
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": None, "chat_template": "c{{ bos_token }}"}
    named, path = tmp_path / "tokenizer.json", str(tmp_path)
    with pytest.raises(UserError, match=f"data.tokenizer={tmp_path}.*: has no chat template.*set data.chat_template"):
        ChatTemplate.load(str(named))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    first = ChatTemplate.load(str(named))
    assert first.render([user("x")]) == "c<s>" and first.source == "c{{ bos_token }}"
    several = [{"name": "default", "template": "d{{ eos_token }}"}, {"name": "rag", "template": "r"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": several}))
    second = ChatTemplate.load(path)
    assert second.render([user("x")]) == "d"
    (tmp_path / "chat_template.jinja").write_text("é{{ bos_token }}\n", encoding="utf-8")
    third = ChatTemplate.load(path)
    assert third.render([user("x")]) == "é<s>"
    (tmp_path / "other.jinja").write_text("o{{ bos_token }}")
    fourth = ChatTemplate.load(path, str(tmp_path / "other.jinja"))
    assert fourth.render([user("x")]) == "o<s>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<b>"}))
    fifth = ChatTemplate.load(path)
    assert len({t.fingerprint for t in (first, second, third, fourth, fifth)}) == 5
    assert ChatTemplate.load(path).fingerprint == fifth.fingerprint


def test_unusable_template_files_are_one_line(tmp_path):
    (tmp_path / "bos.jinja").write_text("{{ bos_token }}")
    (tmp_path / "binary.jinja").write_bytes(b"\xff\xfe\x00")
    for tokenizer, template, problem in [
        ("bytes", "", "data.tokenizer=bytes: has no chat template"),
        ("bytes", str(tmp_path / "no.jinja"), "data.chat_template=.*no.jinja: no such file"),
        ("bytes", str(tmp_path / "bos.jinja"), "bos.jinja: uses bos_token, which no tokenizer_config.json"),
        ("bytes", str(tmp_path / "binary.jinja"), "binary.jinja: cannot be read .* UTF-8"),
    ]:
        with pytest.raises(UserError, match=problem) as caught:
            ChatTemplate.load(tokenizer, template)
        assert "\n" not in str(caught.value)
    for value in (3, [], [{"name": "rag", "template": "r"}], [{"name": "default"}]):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value or [3]}))
        with pytest.raises(UserError, match="tokenizer_config.json: chat_template: .*data.chat_template"):
            ChatTemplate.load(str(tmp_path))


def test_tokens_of_sentencepiece_kinds_have_their_answers_too(tmp_path):
    made = sentencepiece.llama_style()
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    template = template_of(TEMPLATES["mistral"])
    ids, weights = template.encode(tokenizer, [user("the station is"), assistant("open → 漢"), user("Bob")])
    assert tokenizer.decode(ids[weights == 1]) == "open → 漢"
    assert ids[weights == 1][-1] == tokenizer.eos_id
