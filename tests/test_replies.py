import json

import pytest

from hf_reflect.replies import (
    Rewrite,
    is_refusal,
    json_schema,
    parse_json,
    parse_markers,
    says_already_good,
    split_thinking,
    undress,
)


COMPLETE = """The instruction is vague.

[New Instruction]
Name three moons of Jupiter.
[End]
[New Response]
Io, Europa, Ganymede.
[End]"""
REWRITE = Rewrite("The instruction is vague.", "Name three moons of Jupiter.", "", "Io, Europa, Ganymede.")


def pair_of(text, phase="instruction"):
    """Instruction, input and response of a reply; null if there is no rewrite."""
    found = parse_markers(text, phase)
    return found and (found.instruction, found.input, found.response)


class TestMarkers:
    def test_a_reply_in_the_layout_asked_for_is_read_whole(self):
        assert parse_markers(COMPLETE, "instruction") == REWRITE

    def test_the_response_phase_reads_a_response_alone(self):
        assert parse_markers("Too short.\n[New Response]\nIo and Europa.\n[End]", "response") == Rewrite(
            "Too short.", response="Io and Europa."
        )

    @pytest.mark.parametrize(
        "text",
        [
            COMPLETE.replace("[End]", ""),
            COMPLETE.replace("\n[End]", " [End]"),
            COMPLETE.replace("[End]", "**[End]**"),
            COMPLETE.replace("[End]", "[END]"),
            COMPLETE.replace("[New", "[ new"),
            COMPLETE.replace("[New Instruction]", "1. **[New Instruction]**").replace("[New Resp", "2. [New Resp"),
            COMPLETE.replace("[New Instruction]", "### [New Instruction]:").replace("[New Resp", "### [New Resp"),
            COMPLETE.replace("[New Instruction]\n", "[New Instruction]: ").replace(
                "[New Response]\n", "[New Response] "
            ),
            COMPLETE.replace("[New Instruction]", "- `[New Instruction]`").replace("[New Resp", "> [New Resp"),
            COMPLETE.replace("[New Instruction]", "(1) __[New Instruction]__"),
            COMPLETE.replace("[New Instruction]", "[New Instruction]\n[New Instruction]"),
            COMPLETE.replace("\n", "\r\n"),
            COMPLETE + "\n\nI hope this helps!",
        ],
        ids=[
            "no end",
            "end on the last line",
            "bold end",
            "capitals",
            "blanks and small letters",
            "numbered and bold",
            "headings with colons",
            "text on the marker's line",
            "code and quote",
            "parenthesis and underscores",
            "marker twice",
            "windows lines",
            "prose after",
        ],
    )
    def test_dressed_up_layouts_are_forgiven(self, text):
        assert pair_of(text) == ("Name three moons of Jupiter.", "", "Io, Europa, Ganymede.")

    def test_markers_in_the_midst_of_a_line_are_found_where_there_are_no_others(self):
        text = "Critique. Here is the [New Instruction] Name a moon. [End] And the [New Response] Io. [End]"
        assert pair_of(text) == ("Name a moon.", "", "Io.")

    def test_windows_lines_do_not_hide_an_end_on_the_last_line_of_text(self):
        assert pair_of("[New Response]\r\nIo. [End]\r\nBye.", "response") == (None, "", "Io.")

    @pytest.mark.parametrize(
        "response",
        [
            "Endangered species need room.",
            "Ending well is all.\nEnd of story.\nThe End",
            "Use [Ending] and [End Tag], and close with [Enden] too.",
            "Write [End] to close a block; [end] is the same, they say.",
            "def f():\n    return x[End:]",
            "a[0] = {'[New]': 1}",
        ],
    )
    def test_a_response_is_not_cut_at_words_that_merely_look_like_an_end(self, response):
        assert pair_of(f"[New Response]\n{response}\n[End]", "response") == (None, "", response)
        assert pair_of(f"[New Response]\n{response}", "response") == (None, "", response)

    @pytest.mark.parametrize(
        "line",
        ["[New Response] *Hamlet* is a play.", "[New Response]: `ls` lists files.", "[New Response] _Io_ orbits."],
    )
    def test_markdown_that_opens_the_text_on_a_markers_line_belongs_to_the_text(self, line):
        assert pair_of(line, "response")[2] == line.split("]", 1)[1].lstrip(": ")

    def test_markers_mentioned_in_prose_before_the_block_are_passed_over(self):
        text = "I shall give a [New Instruction] and then a [New Response], as asked.\n\n" + COMPLETE
        assert pair_of(text) == ("Name three moons of Jupiter.", "", "Io, Europa, Ganymede.")

    def test_a_draft_that_is_written_again_gives_way_to_the_last_complete_pair(self):
        text = "[New Instruction]\nA?\n[New Response]\na\n[End]\nBetter still:\n" + COMPLETE
        assert pair_of(text) == ("Name three moons of Jupiter.", "", "Io, Europa, Ganymede.")

    def test_an_input_goes_with_its_instruction(self):
        text = "[New Instruction]\nSort.\n[New Input]\n3, 1\n[End]\n[New Response]\n1, 3\n[End]"
        assert pair_of(text) == ("Sort.", "3, 1", "1, 3")

    def test_an_input_of_an_abandoned_draft_is_not_carried_over(self):
        text = "[New Instruction]\nSort.\n[New Input]\n3, 1\n[New Instruction]\nName a moon.\n[New Response]\nIo."
        assert pair_of(text) == ("Name a moon.", "", "Io.")


class TestNoMismatchedPair:
    @pytest.mark.parametrize(
        "text",
        [
            "[New Instruction]\nName a moon.\n[End]",
            "[New Instruction]\nName a moon.\n[New Response]\n[End]",
            "[New Instruction]\n[End]\n[New Response]\nIo.\n[End]",
            "[New Response]\nIo.\n[End]",
            "[New Response]\nIo.\n[End]\n[New Instruction]\nName a planet.\n[End]",
            "[New Input]\n3, 1\n[New Response]\n1, 3",
            "no markers at all",
            "",
        ],
    )
    def test_half_a_pair_is_no_rewrite(self, text):
        assert parse_markers(text, "instruction") is None

    def test_a_second_instruction_without_response_does_not_take_the_first_ones(self):
        text = COMPLETE + "\n[New Instruction]\nName three moons of Saturn.\n[End]"
        assert pair_of(text) == ("Name three moons of Jupiter.", "", "Io, Europa, Ganymede.")

    def test_a_response_that_comes_before_is_not_taken_for_a_later_instruction(self):
        text = "[New Response]\nIo.\n[End]\n[New Instruction]\nName a planet.\n[End]\n[New Response]\nMars.\n[End]"
        assert pair_of(text) == ("Name a planet.", "", "Mars.")

    def test_an_instruction_has_one_response_the_first_that_follows_it(self):
        assert pair_of(COMPLETE + "\n[New Response]\nOf Saturn: Titan.") == (
            "Name three moons of Jupiter.",
            "",
            "Io, Europa, Ganymede.",
        )

    @pytest.mark.parametrize(
        ("text", "phase"),
        [
            ("I will write a [New Instruction] and a [New Response] below.", "instruction"),
            ("I would leave the [New Response] block out, as nothing is missing.", "response"),
            ("[New Instruction]\nName a moon.\n[End]\nThe [New Response] should list one.", "instruction"),
        ],
    )
    def test_a_reply_that_only_talks_about_a_block_has_none(self, text, phase):
        assert parse_markers(text, phase) is None

    def test_a_response_to_a_new_instruction_is_not_one_to_the_old_instruction(self):
        assert parse_markers(COMPLETE, "response") is None


class TestUnchanged:
    @pytest.mark.parametrize("phase", ["instruction", "response"])
    @pytest.mark.parametrize(
        "marker", ["[Unchanged]", "**[Unchanged]**", "[UNCHANGED]", "- [unchanged].", "[Unchanged]\n[End]"]
    )
    def test_unchanged_is_read_with_its_critique(self, phase, marker):
        assert parse_markers(f"Very good.\n{marker}", phase) == Rewrite("Very good.", unchanged=True)

    def test_unchanged_on_the_reviews_last_line_counts(self):
        assert parse_markers("Very good. [Unchanged]", "response") == Rewrite("Very good.", unchanged=True)

    def test_a_rewrite_counts_more_than_a_word_that_there_is_none(self):
        assert pair_of("[Unchanged]\n" + COMPLETE)[2] == "Io, Europa, Ganymede."

    @pytest.mark.parametrize("text", ["Unchanged", "The pair is left unchanged.", "[unchanged text]"])
    def test_the_word_without_its_brackets_is_only_a_word(self, text):
        assert parse_markers(text, "instruction") is None


ANSWER = {
    "critique": "vague",
    "already_good": False,
    "new_instruction": "Name a moon.",
    "new_input": "",
    "new_response": "Io.",
}
READ = Rewrite("vague", "Name a moon.", "", "Io.")


class TestJson:
    @pytest.mark.parametrize(
        "text",
        [
            json.dumps(ANSWER),
            json.dumps(ANSWER, indent=2),
            f"```json\n{json.dumps(ANSWER, indent=2)}\n```",
            f"```\n{json.dumps(ANSWER)}\n```",
            f"Here is my review:\n{json.dumps(ANSWER)}\nI hope it helps {{you}}!",
            f"{{not json}} {json.dumps(ANSWER)}",
            f"The pair uses {{}} as a placeholder. {json.dumps(ANSWER)}",
            f'The input was {{"a": 1}}; my review: {json.dumps(ANSWER)}',
            json.dumps({**ANSWER, "mood": "fine", "already_good": None}),
            json.dumps({**ANSWER, "new_input": None}),
        ],
        ids=[
            "bare",
            "indented",
            "fence",
            "plain fence",
            "prose",
            "braces",
            "empty object",
            "other object",
            "more",
            "null",
        ],
    )
    def test_the_object_is_found_in_whatever_is_around_it(self, text):
        assert parse_json(text, "instruction") == READ

    def test_line_breaks_that_were_not_escaped_are_forgiven(self):
        assert parse_json('{"critique": "c", "new_response": "one\ntwo"}', "response").response == "one\ntwo"

    def test_texts_with_braces_quotes_and_fences_come_through(self):
        text = 'Use `{"a": {}}`:\n```json\n{"b": "}"}\n```'
        assert parse_json(json.dumps({**ANSWER, "new_response": text}), "instruction").response == text

    def test_the_response_phase_needs_no_instruction(self):
        assert parse_json('{"critique": "short", "new_response": "Io."}', "response") == Rewrite(
            "short", response="Io."
        )

    @pytest.mark.parametrize("phase", ["instruction", "response"])
    def test_already_good_is_unchanged(self, phase):
        text = json.dumps({"critique": "fine", "already_good": True, "new_instruction": "", "new_response": ""})
        assert parse_json(text, phase) == Rewrite("fine", unchanged=True)

    @pytest.mark.parametrize("value", ["true", 1, "yes", [], None])
    def test_only_true_is_true(self, value):
        assert parse_json(json.dumps({**ANSWER, "already_good": value}), "instruction") == READ

    @pytest.mark.parametrize("key", ["new_instruction", "new_response"])
    @pytest.mark.parametrize("value", [None, 5, True, ["Io."], {"text": "Io."}, "", "   "])
    def test_half_a_pair_or_one_of_a_wrong_type_is_no_rewrite(self, key, value):
        assert parse_json(json.dumps({**ANSWER, key: value}), "instruction") is None

    @pytest.mark.parametrize("value", [["3", "1"], {"numbers": "3, 1"}, 31])
    def test_an_instruction_is_not_parted_from_an_input_that_can_not_be_read(self, value):
        assert parse_json(json.dumps({**ANSWER, "new_input": value}), "instruction") is None

    @pytest.mark.parametrize("key", ["new_instruction", "new_response"])
    def test_a_key_that_is_missing_is_no_rewrite(self, key):
        assert parse_json(json.dumps({k: v for k, v in ANSWER.items() if k != key}), "instruction") is None

    def test_a_critique_of_a_wrong_type_costs_only_the_critique(self):
        rewrite = parse_json(json.dumps({**ANSWER, "critique": ["a", "b"]}), "instruction")
        assert (rewrite.critique, rewrite.instruction, rewrite.response) == (None, "Name a moon.", "Io.")

    @pytest.mark.parametrize("cut", range(1, len(json.dumps(ANSWER))))
    def test_an_object_that_was_cut_off_anywhere_is_no_rewrite(self, cut):
        assert parse_json(json.dumps(ANSWER)[:cut], "instruction") is None

    @pytest.mark.parametrize("text", ["", "null", "[]", '"text"', "42", "no object", "{", "}{", '["new_response"]'])
    def test_what_is_no_object_is_no_rewrite(self, text):
        assert parse_json(text, "response") is None

    def test_absurd_nesting_is_no_rewrite(self):
        assert parse_json('{"a":' * 3000, "response") is None

    def test_a_response_to_a_new_instruction_is_not_one_to_the_old_instruction(self):
        assert parse_json(json.dumps(ANSWER), "response") is None

    @pytest.mark.parametrize(
        ("phase", "extra"), [("instruction", {"new_instruction", "new_input"}), ("response", set())]
    )
    def test_the_schema_asks_for_all_that_is_read_and_nothing_else(self, phase, extra):
        schema = json_schema(phase)
        assert set(schema["properties"]) == {"critique", "already_good", "new_response"} | extra
        assert set(schema["required"]) == set(schema["properties"])
        assert schema["additionalProperties"] is False
        assert next(iter(schema["properties"])) == "critique"  # it thinks before it writes


class TestRefusals:
    @pytest.mark.parametrize(
        "text",
        [
            "I'm sorry, but I can't assist with that request.",
            "I’m sorry, but I can’t help with that.",
            "I am very sorry, but I am unable to help.",
            "Sorry, I cannot do that.",
            "I cannot assist with this.",
            "I can't help with that.",
            "I won't write that.",
            "I must decline to answer.",
            "As an AI language model, I cannot have opinions.",
            "As an AI model I am not able to do so.",
            '"I cannot provide that."',
        ],
    )
    def test_a_text_that_opens_by_declining_is_a_refusal(self, text):
        assert is_refusal(text)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "Penguins can't fly.",
            "The clerk said: I'm sorry, but I can't help you.",
            "I'm sorry for your loss.",
            "I'm sorry to hear that you can't sleep. Here are some tips.",
            "I am sorry that your parcel cannot be found yet; we are looking for it.",
            "I can't help but smile when I think of that summer.",
            "I cannot recommend this book enough.",
            "I can help with that.",
            "As an AI language model, I can explain this well.",
        ],
    )
    def test_a_text_that_does_not_decline_is_none(self, text):
        assert not is_refusal(text)

    @pytest.mark.parametrize(
        "text", ["ALREADY GOOD", "Already good.", "**ALREADY GOOD**", '"Already  good"', "already good!"]
    )
    def test_the_agreed_phrase_for_a_good_pair_is_known_in_any_dress(self, text):
        assert says_already_good(text)

    @pytest.mark.parametrize(
        "text", ["It is not already good.", "Good.", "Already goodness knows", "The pair is too short."]
    )
    def test_other_critiques_are_not_that_phrase(self, text):
        assert not says_already_good(text)

    @pytest.mark.parametrize(
        "text", ["Already good, but it lacks any detail.", "Already good in tone; the facts are wrong."]
    )
    def test_a_critique_that_goes_on_to_find_fault_is_not_that_phrase(self, text):
        assert not says_already_good(text)


class TestUndress:
    @pytest.mark.parametrize(
        "text",
        [
            "Name a moon.",
            "  Name a moon.\n",
            '"Name a moon."',
            "“Name a moon.”",
            "'Name a moon.'",
            "«Name a moon.»",
            "New instruction: Name a moon.",
            "Rewritten Instruction:\n\nName a moon.",
            "**Improved instruction:** Name a moon.",
            "**Revised Instruction**: Name a moon.",
            "Here is the rewritten instruction: Name a moon.",
            "Here's a better version of the instruction:\nName a moon.",
            'Improved response: "Name a moon."',
        ],
    )
    def test_labels_and_quotation_marks_come_off(self, text):
        assert undress(text) == "Name a moon."

    @pytest.mark.parametrize(
        "text",
        [
            '"Yes" and "no"',
            '"Hello", she said',
            "“One” or “two”",
            "He said 'no'",
            "The new instruction: sit.",
            "New instructions arrived today.",
            "Response time: 5 ms",
            "'",
            '"',
            "",
            "A ratio of 3:1 is better.",
        ],
    )
    def test_a_text_that_only_looks_dressed_stays(self, text):
        assert undress(text) == text

    @pytest.mark.parametrize("text", ["New instruction:", "Here is the rewritten instruction:", '""', "“”", '" "'])
    def test_a_dress_with_nothing_in_it_is_nothing(self, text):
        assert undress(text) == ""


class TestThinking:
    @pytest.mark.parametrize(
        ("opening", "closing"),
        [
            ("<think>", "</think>"),
            ("<think>\n", "\n</think>\n\n"),
            ("\n\n<think>", "</think>\n"),
            ("<thinking>", "</thinking>"),
            ("<reasoning>\n", "</reasoning> "),
            ("<THINK>", "</Think>"),
            ("[THINK]", "[/THINK]"),
            ("[think]\n", "\n[/think]\n"),
        ],
    )
    def test_a_thought_in_tags_is_parted_from_the_answer(self, opening, closing):
        assert split_thinking(f"{opening}Mars? No: Io.{closing}Io.\n") == ("Mars? No: Io.", "Io.\n")

    @pytest.mark.parametrize("closing", ["</think>\n\n", "\n</think>\n", "</think>  \n", "\n[/THINK]\n"])
    def test_a_thought_that_the_template_opened_needs_only_its_close(self, closing):
        assert split_thinking(f"Mars? No: Io.{closing}Io.") == ("Mars? No: Io.", "Io.")

    @pytest.mark.parametrize("opening", ["<think>", " <thinking>\n", "[THINK]"])
    def test_a_reply_cut_off_in_mid_thought_has_no_answer(self, opening):
        assert split_thinking(f"{opening}Mars? No, it mu") == ("Mars? No, it mu", "")

    @pytest.mark.parametrize(
        "text", ["<think>Io.</think>", "<think>Io.</think>\n\n", "Io.\n</think>", "Io.</think>\n"]
    )
    def test_a_thought_that_no_answer_follows_is_all_there_is(self, text):
        assert split_thinking(text) == ("Io.", "")

    @pytest.mark.parametrize("text", ["<think></think>Io.", "<think>\n\n</think>\n\nIo."])
    def test_a_thought_of_nothing_leaves_the_answer(self, text):
        thought, answer = split_thinking(text)
        assert (thought or None, answer) == (None, "Io.")

    @pytest.mark.parametrize(
        "text",
        [
            "Io.",
            "",
            " \n Io.\n\n",
            "I think so, and [think] of it as <b>thinking</b>.",
            "Models wrap it in <think> and </think>, then answer.",
            "It opens with <think>\nand closes with\n</think>\nbefore the answer.",
            "A stray `</think>` may be left over.",
            "Remove </think> from the end.",
            "reply.split('</think>')[1]",
            "The tag <think> is not closed here.",
            "Use [THINK] to open a thought.",
        ],
    )
    def test_a_text_that_merely_mentions_the_tags_is_all_answer(self, text):
        assert split_thinking(text) == (None, text)

    def test_an_answer_that_mentions_the_tags_after_a_thought_is_whole(self):
        answer = "Write <think>\nfirst\n</think>\nand then answer."
        assert split_thinking(f"<think>Tags?</think>\n{answer}") == ("Tags?", answer)

    @pytest.mark.parametrize("reply", [COMPLETE, json.dumps(ANSWER)])
    def test_what_is_left_is_read_as_any_reply(self, reply):
        parse = parse_json if reply.startswith("{") else parse_markers
        thought = '<think>[New Instruction] {"new_response": 1}\n[New Response]\nno\n[End]</think>\n'
        assert parse(split_thinking(thought + reply)[1], "instruction") == parse(reply, "instruction")
        assert parse(reply, "instruction") is not None
