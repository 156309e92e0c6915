"""How a pair is laid out for the student."""

import pytest
from tiny import save_tiny_model
from transformers import AutoTokenizer

from hf_reflect.errors import StudentError
from hf_reflect.pairs import Pair, Turn
from hf_reflect.student.templates import REQUEST, ChatTemplate, load_template


PAIR = Pair("Add them.", "3", input="1 and 2")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_model(tmp_path_factory.mktemp("llama"), "llama"))
    tokenizer.chat_template = CHATML
    return tokenizer


def test_without_a_template_texts_stand_on_lines_of_their_own():
    none = load_template("none")
    assert none.forward(PAIR).prefix == "Add them.\n1 and 2\n"
    assert none.forward(PAIR.replace(input="")).prefix == "Add them.\n"
    assert none.reverse(PAIR).prefix == f"3\n{REQUEST}\n"


@pytest.mark.parametrize("name", ["none", "alpaca", "vicuna"])
def test_the_target_is_the_response_and_in_reverse_the_instruction_with_its_input(name):
    template = load_template(name)
    assert template.forward(PAIR).target == "3"
    assert template.reverse(PAIR).target == "Add them.\n1 and 2"


@pytest.mark.parametrize("name", ["none", "alpaca", "vicuna"])
def test_earlier_turns_condition_the_response_and_not_the_instruction(name):
    pair = PAIR.replace(context=(Turn("user", "Do you count?"), Turn("assistant", "I do.")))
    template = load_template(name)
    assert template.forward(pair).prefix == "Do you count?\nI do.\n" + template.forward(PAIR).prefix
    assert template.reverse(pair) == template.reverse(PAIR)


def test_the_alpaca_template_has_a_section_for_the_input_where_there_is_one():
    alpaca = load_template("alpaca")
    end = "### Instruction:\nAdd them.\n\n### Input:\n1 and 2\n\n### Response:\n"
    assert alpaca.forward(PAIR).prefix.endswith(end)
    assert "Input" not in alpaca.forward(PAIR.replace(input="")).prefix


def test_the_chat_template_is_the_tokenizers_own(tokenizer):
    chat = ChatTemplate(tokenizer, bos=True)
    asked = "<|im_start|>user\nAdd them.\n1 and 2<|im_end|>\n<|im_start|>assistant\n"
    assert (chat.forward(PAIR).prefix, chat.forward(PAIR).target) == (asked, "3")
    assert chat.reverse(PAIR).prefix == f"<|im_start|>user\n3\n{REQUEST}<|im_end|>\n<|im_start|>assistant\n"


def test_earlier_turns_of_sharegpt_get_the_roles_that_chat_templates_know(tokenizer):
    pair = PAIR.replace(context=(Turn("human", "Hi"), Turn("gpt", "Hello")))
    prefix = ChatTemplate(tokenizer, bos=True).forward(pair).prefix
    assert prefix.startswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n")


def test_what_a_template_writes_before_every_answer_belongs_to_the_prefix(tokenizer):
    thinks = "{% if m.role == 'assistant' %}<think></think>{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]" + thinks + "{{ m.content }}{% endfor %}"
    try:
        prefix = ChatTemplate(tokenizer, bos=True).forward(PAIR).prefix
    finally:
        tokenizer.chat_template = CHATML
    assert prefix == "[user]Add them.\n1 and 2[assistant]<think></think>"


def test_a_bos_that_the_chat_template_writes_is_not_put_in_front_twice(tokenizer):
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}|{% endfor %}"
    try:
        with_bos, without = (ChatTemplate(tokenizer, bos=bos).forward(PAIR).prefix for bos in (True, False))
    finally:
        tokenizer.chat_template = CHATML
    assert with_bos == "Add them.\n1 and 2|"
    assert without == tokenizer.bos_token + with_bos


def test_a_model_without_a_chat_template_is_refused(tokenizer):
    tokenizer.chat_template = None
    try:
        with pytest.raises(StudentError, match="no chat template"):
            ChatTemplate(tokenizer, bos=True)
    finally:
        tokenizer.chat_template = CHATML


def test_a_users_template_is_text_and_what_it_inserts_is_not_read_again(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        'prompt: "Q {instruction} {unknown} {{x}}: "\nprompt_input: "{input}/{instruction}: "\nreverse: "{output}?"\n'
    )
    mine = load_template(file)
    hostile = Pair("{output} {input}", "{instruction}")
    assert mine.forward(hostile).prefix == "Q {output} {input} {unknown} {{x}}: "
    assert mine.forward(PAIR).prefix == "1 and 2/Add them.: "
    assert mine.reverse(hostile).prefix == "{instruction}?"


def test_another_text_is_another_template_by_name(tmp_path):
    file = tmp_path / "mine.yaml"
    names = []
    for prompt in ("a", "a", "b"):
        file.write_text(f'prompt: "{prompt}"\nprompt_input: "i"\nreverse: "r"\n')
        names.append(load_template(file).name)
    assert names[0] == names[1] != names[2]
    assert names[0].startswith("mine/")


@pytest.mark.parametrize("text", ["", "prompt: x\nreverse: y\n", "prompt: 1\nprompt_input: x\nreverse: y\n", "- a\n"])
def test_a_template_file_that_lacks_a_text_says_which(tmp_path, text):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(StudentError, match="missing or not text"):
        load_template(file)


def test_an_unknown_template_is_named_with_those_that_exist():
    with pytest.raises(StudentError, match="none, alpaca, vicuna, chat"):
        load_template("llama-7")
