"""Chat formats in code give the ids of the published templates, and roles cannot be forged."""

from pathlib import Path

import pytest
import transformers

from bench.support.small_tokenizer import sentencepiece_model
from model_parallel.errors import ConfigError
from serving.text.chat import ChatError, ChatMessage, render_chat
from serving.text.tokenizer import Tokenizer, load_tokenizer
from tests.support.converted import converted
from tests.support.llama_tokenizers import CONTROL_TEXTS, llama_directory, tokenizer_json

LLAMA_2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
DIALOGUES = [
    [("user", "What is the capital of France?")],
    [("user", "  spaces around \n")],
    [("user", "")],
    [("system", "Be brief."), ("user", "Hi")],
    [("system", "  Be\n\nbrief.  "), ("user", " Hi ")],
    [("system", ""), ("user", "Hi")],
    [("user", "Hi"), ("assistant", "Hello!"), ("user", "🙂 日本語")],
    [("user", "Hi"), ("assistant", "  Hello! \n"), ("user", "and"), ("assistant", ""), ("user", "def f():\n    pass")],
    [("system", "Élève"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
]
LATER_SYSTEMS = [
    [("system", "Be brief."), ("system", "Be kind."), ("user", "Hi")],
    [("system", "Be brief."), ("user", "Hi"), ("system", "  Now in French. "), ("user", "Hi")],
    [("user", "Hi"), ("assistant", "Hello!"), ("system", "Now in French.")],
]


def messages(dialogue: list[tuple[str, str]]) -> list[ChatMessage]:
    return [ChatMessage(role, content) for role, content in dialogue]


def as_dicts(dialogue: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in dialogue]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(llama_directory(tmp_path_factory.mktemp("spm"), tokenizer__model=sentencepiece_model()))


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return load_tokenizer(smollm2_path)


@pytest.mark.parametrize("dialogue", DIALOGUES)
def test_llama_2_is_the_published_template(llama: Tokenizer, tmp_path: Path, dialogue: list[tuple[str, str]]) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    expected = theirs.apply_chat_template(as_dicts(dialogue), chat_template=LLAMA_2_TEMPLATE, return_dict=False)
    ours = render_chat(messages(dialogue), chat_format="llama-2", default_system="", tokenizer=llama)
    assert ours == expected


@pytest.fixture(scope="module")
def smollm2_reference(smollm2_path: Path) -> "transformers.PreTrainedTokenizerFast":
    return transformers.AutoTokenizer.from_pretrained(converted(smollm2_path))


@pytest.mark.parametrize("dialogue", [*DIALOGUES, [("system", "Be brief.")], *LATER_SYSTEMS])
def test_chatml_is_the_template_of_smollm2(
    smollm2: Tokenizer, smollm2_reference: "transformers.PreTrainedTokenizerFast", dialogue: list[tuple[str, str]]
) -> None:
    expected = smollm2_reference.apply_chat_template(as_dicts(dialogue), add_generation_prompt=True, return_dict=False)
    ours = render_chat(messages(dialogue), chat_format="chatml", default_system=SMOLLM2_SYSTEM, tokenizer=smollm2)
    assert ours == expected


def test_default_system_is_a_first_message(llama: Tokenizer, smollm2: Tokenizer) -> None:
    for chat_format, tokenizer in (("llama-2", llama), ("chatml", smollm2)):
        given = [ChatMessage("system", "Be brief."), ChatMessage("user", "Hi")]
        expected = render_chat(given, chat_format=chat_format, default_system="other", tokenizer=tokenizer)
        ours = render_chat(given[1:], chat_format=chat_format, default_system="Be brief.", tokenizer=tokenizer)
        assert ours == expected
        none = render_chat(given[1:], chat_format=chat_format, default_system="", tokenizer=tokenizer)
        assert len(none) < len(ours)


@pytest.mark.parametrize("text", CONTROL_TEXTS)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_control_tokens_come_from_the_format_alone(llama: Tokenizer, smollm2: Tokenizer, text: str, role: str) -> None:
    for chat_format, tokenizer in (("llama-2", llama), ("chatml", smollm2)):
        if chat_format == "llama-2" and "[INST]" in text:
            continue
        plain = [("system", "x"), ("user", "x"), ("assistant", "x"), ("user", "x")]
        spoilt = [(r, text if r == role else content) for r, content in plain]
        counts = []
        for dialogue in (plain, spoilt):
            ids = render_chat(messages(dialogue), chat_format=chat_format, default_system="", tokenizer=tokenizer)
            counts.append([i for i in ids if i in tokenizer.control_token_ids])
        assert counts[0] == counts[1]


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_llama_2_marks_in_a_message_are_refused(llama: Tokenizer, tag: str, index: int) -> None:
    dialogue = [["system", "x"], ["user", "x"], ["assistant", "x"], ["user", "x"]]
    dialogue[index][1] = f"a {tag} b"
    with pytest.raises(ChatError, match="special tags are not allowed") as error:
        render_chat([ChatMessage(*m) for m in dialogue], chat_format="llama-2", default_system="", tokenizer=llama)
    assert error.value.index == index


BOTH, LLAMA_2 = ("llama-2", "chatml"), ("llama-2",)


@pytest.mark.parametrize(
    ("roles", "formats", "index", "message"),
    [
        ("", BOTH, 0, "at least one message"),
        ("s", LLAMA_2, 0, "must be the user's"),
        ("ua", BOTH, 1, "must be the user's"),
        ("usu", LLAMA_2, 1, "may only come first"),
        ("ssu", LLAMA_2, 1, "may only come first"),
        ("utu", BOTH, 1, "role is 'tool'; allowed: system, user, assistant"),
        ("uu", LLAMA_2, 1, "must alternate"),
        ("au", LLAMA_2, 0, "must alternate"),
        ("sau", LLAMA_2, 1, "must alternate"),
        ("uaau", LLAMA_2, 2, "must alternate"),
    ],
)
def test_wrong_roles(
    llama: Tokenizer, smollm2: Tokenizer, roles: str, formats: tuple[str, ...], index: int, message: str
) -> None:
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    for chat_format in formats:
        with pytest.raises(ChatError, match=message) as error:
            render_chat(
                [ChatMessage(names[role], "x") for role in roles],
                chat_format=chat_format,
                default_system="Be brief.",
                tokenizer=llama if chat_format == "llama-2" else smollm2,
            )
        assert error.value.index == index


def test_a_format_that_the_model_cannot_have(llama: Tokenizer) -> None:
    for chat_format in ("chatml", "alpaca", ""):
        with pytest.raises(ConfigError):
            render_chat([ChatMessage("user", "x")], chat_format=chat_format, default_system="", tokenizer=llama)
