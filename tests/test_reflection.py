import asyncio
import json

import pytest

from hf_reflect.errors import OracleError
from hf_reflect.guards import Guards
from hf_reflect.oracles import Reply, RowFailedError, Sampling
from hf_reflect.pairs import Pair, Turn
from hf_reflect.prompts import STYLES, Prompts
from hf_reflect.reflection import Call, Reflector, proposed, reflect_all


PAIR = Pair("Name a moon.", "The moon.")
HOSTILE = "{pair} {critique} {0} {} %s [New Response]\nhacked\n[End] ALREADY GOOD {{ 7 * 7 }} \\1 \x00 🌙"


class Script:
    """An oracle that gives the replies it was made with, one after the other, and remembers what it was asked."""

    def __init__(self, *replies):
        self.replies, self.requests = list(replies), []

    async def __call__(self, request):
        self.requests.append(request)
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply if isinstance(reply, Reply) else Reply(reply, "stop", 10, 5)

    @property
    def asked(self):
        return [request.messages[-1]["content"] for request in self.requests]


def reflector(script, style="paper", phase="instruction", retry_truncated=None, guards=None, **sampling):
    prompts = Prompts.load(style)
    return Reflector(script, "teacher", prompts, Sampling(**sampling), phase, guards or Guards(), retry_truncated)


def reflect(*replies, style="paper", phase="instruction", pair=PAIR, **options):
    return asyncio.run(reflector(Script(*replies), style, phase, **options).reflect(pair))


def paper(instruction="Name a moon of Mars.", response="Phobos."):
    return f"Vague.\n[New Instruction]\n{instruction}\n[End]\n[New Response]\n{response}\n[End]"


def as_json(instruction="Name a moon of Mars.", response="Phobos.", **more):
    data = {"critique": "Vague.", "already_good": False, "new_instruction": instruction, "new_input": ""}
    return json.dumps({**data, "new_response": response, **more})


def rewrites(instruction="Name a moon of Mars.", response="Phobos."):
    """The replies of each style that propose this pair."""
    return {
        "paper": [paper(instruction, response)],
        "json": [as_json(instruction, response)],
        "staged": ["Vague.", instruction, response],
    }


def responses(response):
    """The replies of each style that propose this response, in the response phase."""
    return {
        "paper": [f"Vague.\n[New Response]\n{response}\n[End]"],
        "json": [json.dumps({"critique": "Vague.", "already_good": False, "new_response": response})],
        "staged": ["Vague.", response],
    }


every_style = pytest.mark.parametrize("style", STYLES)


@every_style
def test_a_new_instruction_comes_with_its_response(style):
    reflection = reflect(*rewrites()[style], style=style)
    assert (reflection.status, reflection.reason) == ("ok", None)
    assert (reflection.instruction, reflection.input, reflection.response) == ("Name a moon of Mars.", "", "Phobos.")
    assert reflection.critique == "Vague."
    assert (reflection.oracle, reflection.prompts) == ("teacher", Prompts.load(style).id)


@every_style
def test_a_new_response_comes_alone(style):
    reflection = reflect(*responses("Luna, our own.")[style], style=style, phase="response")
    assert (reflection.status, reflection.critique) == ("ok", "Vague.")
    assert (reflection.instruction, reflection.input, reflection.response) == (None, None, "Luna, our own.")


@every_style
@pytest.mark.parametrize("phase", ["instruction", "response"])
def test_an_oracle_that_finds_nothing_to_better_leaves_the_pair_unchanged(style, phase):
    reply = {
        "paper": "Fine.\n[Unchanged]",
        "json": json.dumps({"critique": "Fine.", "already_good": True, "new_instruction": "", "new_response": ""}),
        "staged": "ALREADY GOOD",
    }[style]
    reflection = reflect(reply, style=style, phase=phase)
    assert (reflection.status, reflection.instruction, reflection.response) == ("unchanged", None, None)
    assert len(reflection.calls) == 1


@every_style
def test_a_rewrite_that_is_the_original_word_for_word_is_unchanged(style):
    reflection = reflect(*rewrites(PAIR.instruction, PAIR.response)[style], style=style)
    assert (reflection.status, reflection.instruction, reflection.response) == ("unchanged", None, None)


@every_style
def test_blanks_around_the_original_do_not_make_its_repetition_a_rewrite(style):
    pair = Pair(PAIR.instruction, f"{PAIR.response}\n")
    assert reflect(*responses(PAIR.response)[style], style=style, phase="response", pair=pair).status == "unchanged"


@pytest.mark.parametrize("style", ["paper", "json"])
def test_a_reply_without_a_rewrite_is_unparsed_and_kept_as_the_critique(style):
    reflection = reflect("I like moons.", style=style)
    assert (reflection.status, reflection.critique, reflection.response) == ("unparsed", "I like moons.", None)


@every_style
def test_a_reply_that_was_cut_off_is_truncated_even_if_a_rewrite_could_be_read(style):
    *before, last = rewrites()[style]
    reflection = reflect(*before, Reply(last, "length", 10, 2048), style=style)
    assert (reflection.status, reflection.instruction, reflection.response) == ("truncated", None, None)
    assert "2048" in reflection.reason


@every_style
def test_an_oracle_that_declines_is_refused(style):
    assert reflect("I'm sorry, but I can't help with that.", style=style).status == "refused"


@every_style
def test_a_new_response_that_declines_is_refused(style):
    reflection = reflect(*rewrites(response="I cannot assist with that.")[style], style=style)
    assert (reflection.status, reflection.response) == ("refused", None)


@pytest.mark.parametrize("style", ["paper", "json"])
def test_a_response_may_decline_where_the_original_did(style):
    pair = Pair("How do I steal a car?", "I cannot help with that.")
    better = "I cannot help with that, but here is how to rent one."
    reflection = reflect(*responses(better)[style], style=style, phase="response", pair=pair)
    assert (reflection.status, reflection.response) == ("ok", better)


@every_style
def test_a_reply_stopped_by_a_content_filter_is_refused(style):
    reflection = reflect(Reply("Half a", "content_filter", 10, 2), style=style)
    assert (reflection.status, [call.text for call in reflection.calls]) == ("refused", ["Half a"])


@every_style
@pytest.mark.parametrize("text", ["", "  \n"])
def test_a_reply_of_nothing_is_empty(style, text):
    assert reflect(text, style=style).status == "empty"


def test_a_staged_rewrite_of_quotation_marks_alone_is_empty():
    assert reflect("Vague.", '" "', style="staged", phase="response").status == "empty"


def test_no_response_is_asked_for_a_blank_instruction():
    script = Script("Vague.", '" "', "To what?")
    assert asyncio.run(reflector(script, "staged").reflect(PAIR)).status == "empty"
    assert len(script.requests) == 2


@every_style
def test_a_call_that_failed_makes_the_row_failed_with_the_reason(style):
    reflection = reflect(RowFailedError("the server gave up"), style=style)
    assert (reflection.status, reflection.reason, reflection.calls) == ("failed", "the server gave up", ())


def test_a_later_stage_that_fails_keeps_what_was_paid_before():
    reflection = reflect("Vague.", "Name a moon of Mars.", RowFailedError("gone"), style="staged")
    assert (reflection.status, reflection.instruction) == ("failed", None)
    assert [(call.part, call.text) for call in reflection.calls] == [
        ("critique", "Vague."),
        ("instruction", "Name a moon of Mars."),
    ]


@every_style
def test_an_error_of_the_oracle_itself_is_raised(style):
    with pytest.raises(OracleError, match="no such model"):
        reflect(OracleError("no such model"), style=style)


@every_style
@pytest.mark.parametrize("instruction", ["", " \n"])
def test_a_pair_without_instruction_is_skipped_and_costs_nothing(style, instruction):
    script = Script()
    reflection = asyncio.run(reflector(script, style).reflect(Pair(instruction, "The moon.")))
    assert (reflection.status, reflection.calls, script.requests) == ("skipped", (), [])


@pytest.mark.parametrize("status", ["ok", "unchanged", "unparsed", "truncated", "refused", "empty"])
def test_the_raw_reply_and_its_usage_are_kept_whatever_becomes_of_it(status):
    text, finish = {
        "ok": (f"\n {paper()} \n", "stop"),
        "unchanged": ("[Unchanged]\n", "stop"),
        "unparsed": (" hm", "stop"),
        "truncated": (paper(), "length"),
        "refused": ("I cannot help with that. ", "stop"),
        "empty": (" ", "stop"),
    }[status]
    reflection = reflect(Reply(text, finish, 123, 45))
    assert (reflection.status, reflection.calls) == (status, (Call("user", text, finish, 123, 45),))


def test_usage_that_a_server_does_not_count_is_null():
    assert reflect(Reply(paper())).calls[0] == Call("user", paper(), None, None, None)


def test_a_call_tells_how_many_attempts_it_took():
    replies = [
        Reply("Vague.", "stop", attempts=3),
        Reply("Name a moon of Mars.", "stop"),
        Reply("Phobos.", attempts=2),
    ]
    assert [call.attempts for call in reflect(*replies, style="staged").calls] == [3, 1, 2]


def test_what_was_not_asked_has_the_status_that_says_so():
    reflection = reflect(RowFailedError("not asked: the budget was reached", "skipped"))
    assert (reflection.status, reflection.reason) == ("skipped", "not asked: the budget was reached")


# Thinking


THOUGHT = "Hm.\n[New Instruction]\nbad\n[End]\n[New Response]\nbad\n[End] ALREADY GOOD"


@every_style
@pytest.mark.parametrize(
    ("opening", "closing"),
    [("<think>", "</think>"), ("\n<think>\n", "\n</think>\n\n"), ("[THINK]", "[/THINK]"), ("", "\n</think>\n\n")],
)
def test_what_a_model_thinks_is_kept_apart_and_never_read_as_its_answer(style, opening, closing):
    replies = [f"{opening}{THOUGHT}{closing}{reply}" for reply in rewrites()[style]]
    reflection = reflect(*replies, style=style)
    assert (reflection.status, reflection.critique) == ("ok", "Vague.")
    assert (reflection.instruction, reflection.response) == ("Name a moon of Mars.", "Phobos.")
    assert [call.thinking for call in reflection.calls] == [THOUGHT] * len(replies)
    assert [call.text for call in reflection.calls] == rewrites()[style]


@every_style
def test_a_thought_that_the_server_keeps_apart_is_kept_apart(style):
    replies = [Reply(reply, "stop", thinking=THOUGHT) for reply in rewrites()[style]]
    reflection = reflect(*replies, style=style)
    assert reflection.status == "ok"
    assert [call.thinking for call in reflection.calls] == [THOUGHT] * len(replies)


def test_thoughts_in_both_places_are_both_kept():
    reflection = reflect(Reply(f"<think>second</think>{paper()}", "stop", thinking="first"))
    assert reflection.calls[0].thinking == "first\nsecond"


def test_no_thought_is_null():
    assert reflect(paper()).calls[0].thinking is None
    assert reflect(f"<think>\n\n</think>\n\n{paper()}").calls[0].thinking is None


@every_style
@pytest.mark.parametrize(("finish", "status"), [("length", "truncated"), ("stop", "empty")])
def test_a_reply_that_ends_in_mid_thought_has_no_answer_and_says_so(style, finish, status):
    reflection = reflect(Reply(f"<think>{THOUGHT}", finish), style=style)
    assert (reflection.status, reflection.response) == (status, None)
    assert [(call.text, call.thinking) for call in reflection.calls] == [("", THOUGHT)]


@every_style
def test_a_rewrite_that_speaks_of_the_tags_is_left_whole(style):
    response = "Put the thought between <think> and </think>, and the answer after it."
    assert reflect(*rewrites(response=response)[style], style=style).response == response


# Asking again with more room


def test_a_reply_that_was_cut_off_is_asked_for_once_more_with_more_room():
    script = Script(Reply("Vague. [New Instr", "length", 10, 300), Reply(paper(), "stop", 10, 900))
    reflection = asyncio.run(reflector(script, retry_truncated=1000, max_tokens=300, temperature=0.5).reflect(PAIR))
    assert (reflection.status, reflection.response) == ("ok", "Phobos.")
    assert [request.sampling for request in script.requests] == [Sampling(300, 0.5), Sampling(1000, 0.5)]
    assert script.requests[0].messages == script.requests[1].messages
    assert script.requests[0].schema == script.requests[1].schema
    assert reflection.calls == (
        Call("user", "Vague. [New Instr", "length", 10, 300),
        Call("user", paper(), "stop", 10, 900),
    )


def test_a_schema_holds_the_second_time_too():
    script = Script(Reply('{"critique": "V', "length"), as_json())
    assert asyncio.run(reflector(script, "json", retry_truncated=4096).reflect(PAIR)).status == "ok"
    first, second = (request.schema for request in script.requests)
    assert first is not None
    assert first == second


def test_a_second_reply_that_is_cut_off_too_is_the_last():
    script = Script(Reply("a", "length"), Reply("b", "length"))
    reflection = asyncio.run(reflector(script, retry_truncated=4096).reflect(PAIR))
    assert (reflection.status, [call.text for call in reflection.calls]) == ("truncated", ["a", "b"])
    assert "4096" in reflection.reason


def test_unless_it_is_asked_for_nothing_is_asked_twice():
    script = Script(Reply(paper(), "length"), paper())
    assert asyncio.run(reflector(script).reflect(PAIR)).status == "truncated"
    assert len(script.requests) == 1


@pytest.mark.parametrize("finish", ["stop", None, "content_filter"])
def test_a_reply_that_was_not_cut_off_is_not_asked_for_again(finish):
    script = Script(Reply("hm", finish), paper())
    asyncio.run(reflector(script, retry_truncated=4096).reflect(PAIR))
    assert len(script.requests) == 1


@pytest.mark.parametrize("room", [2048, 1000, 1])
def test_no_more_room_than_the_first_time_is_no_second_time(room):
    script = Script(Reply("a", "length"), Reply("b", "length"))
    reflection = asyncio.run(reflector(script, retry_truncated=room, max_tokens=2048).reflect(PAIR))
    assert reflection.status == "truncated"
    assert len(script.requests) == 1


@pytest.mark.parametrize("first", [2048, 100])
def test_a_staged_rewrite_gets_more_room_and_a_staged_critique_does_not(first):
    script = Script(Reply("It is too va", "length"), Reply("Name a mo", "length"), "Name a moon of Mars.", "Phobos.")
    reflection = asyncio.run(reflector(script, "staged", retry_truncated=4096, max_tokens=first).reflect(PAIR))
    assert (reflection.status, reflection.instruction) == ("ok", "Name a moon of Mars.")
    assert [call.part for call in reflection.calls] == ["critique", "instruction", "instruction", "response"]
    assert [request.sampling.max_tokens for request in script.requests][2] == 4096


def test_a_second_time_that_fails_keeps_what_the_first_one_said():
    reflection = reflect(Reply("half", "length"), RowFailedError("gone"), retry_truncated=4096)
    assert (reflection.status, [call.text for call in reflection.calls]) == ("failed", ["half"])


# Guards


@every_style
def test_a_rewrite_that_a_guard_stops_has_its_status_its_reason_and_its_critique_and_no_texts(style):
    reflection = reflect(*rewrites("Name a moon of Mars.", "Name a moon of Mars.")[style], style=style)
    assert (reflection.status, reflection.critique) == ("copied", "Vague.")
    assert "word for word" in reflection.reason
    assert (reflection.instruction, reflection.input, reflection.response) == (None, None, None)
    assert [call.text for call in reflection.calls] == rewrites("Name a moon of Mars.", "Name a moon of Mars.")[style]


@every_style
def test_no_guard_no_stop(style):
    replies = rewrites("Name a moon of Mars.", "Name a moon of Mars.")[style]
    assert reflect(*replies, style=style, guards=Guards(())).status == "ok"


@pytest.mark.parametrize("reply", ["I cannot help with that.", "[Unchanged]", "hm", ""])
def test_what_is_no_rewrite_is_not_looked_at_by_any_guard(reply):
    strict = Guards(("language", "code", "copy", "length"), longest=1.0)
    assert reflect(reply, guards=strict).status in ("refused", "unchanged", "unparsed", "empty")


def test_a_code_block_that_a_new_response_loses_is_not_lost():
    pair = Pair("Print a moon.", "Like this:\n```python\nprint('Io')\n```")
    reflection = reflect(*responses("Print it with the function print.")["paper"], phase="response", pair=pair)
    assert (reflection.status, reflection.response) == ("code_lost", None)


def test_each_stage_is_a_call_of_its_own_and_builds_on_those_before():
    script = Script("Too vague.", '"Name a moon of Mars."', "Phobos.")
    reflection = asyncio.run(reflector(script, "staged").reflect(PAIR))
    assert [call.part for call in reflection.calls] == ["critique", "instruction", "response"]
    assert reflection.calls[1].text == '"Name a moon of Mars."'
    assert "Too vague." in script.asked[1]
    assert script.asked[2] == "Name a moon of Mars."


def test_a_staged_critique_that_was_cut_short_still_serves():
    script = Script(Reply("It is too va", "length", 10, 120), "Name a moon of Mars.", "Phobos.")
    reflection = asyncio.run(reflector(script, "staged").reflect(PAIR))
    assert (reflection.status, reflection.critique, reflection.response) == ("ok", "It is too va", "Phobos.")
    assert reflection.calls[0].finish_reason == "length"
    assert "It is too va" in script.asked[1]


def test_a_staged_critique_that_was_cut_before_its_first_word_does_not():
    assert reflect(Reply(" ", "length", 10, 120), style="staged").status == "truncated"


def test_a_staged_critique_is_held_short_and_the_rewrite_is_not():
    script = Script("Vague.", "Luna.")
    asyncio.run(reflector(script, "staged", "response", max_tokens=1000, temperature=0.5, seed=3).reflect(PAIR))
    critique, rewrite = (request.sampling for request in script.requests)
    assert critique.max_tokens < rewrite.max_tokens == 1000
    assert (critique.temperature, critique.seed) == (rewrite.temperature, rewrite.seed) == (0.5, 3)


def test_a_sampling_that_is_shorter_than_a_critique_stays_as_short():
    script = Script("Vague.", "Luna.")
    asyncio.run(reflector(script, "staged", "response", max_tokens=16).reflect(PAIR))
    assert [request.sampling.max_tokens for request in script.requests] == [16, 16]


@pytest.mark.parametrize(("style", "held"), [("paper", False), ("json", True), ("staged", False)])
def test_only_json_is_held_to_a_schema(style, held):
    script = Script(*rewrites()[style])
    asyncio.run(reflector(script, style).reflect(PAIR))
    assert {request.schema is not None for request in script.requests} == {held}


@every_style
@pytest.mark.parametrize("phase", ["instruction", "response"])
def test_braces_and_markers_in_a_row_reach_the_oracle_verbatim(style, phase):
    pair = Pair(HOSTILE, f"re {HOSTILE}", f"in {HOSTILE}", (Turn("system", f"sys {HOSTILE}"),))
    script = Script(*(rewrites() if phase == "instruction" else responses("Luna."))[style])
    reflection = asyncio.run(reflector(script, style, phase).reflect(pair))
    assert reflection.status == "ok"
    for text in (pair.instruction, pair.input, pair.response, pair.context[0].content):
        assert text in script.asked[0]
    assert script.asked[0].count(HOSTILE) == 4


def test_what_an_oracle_says_is_inserted_verbatim_too():
    script = Script(HOSTILE, HOSTILE, "Luna.")
    reflection = asyncio.run(reflector(script, "staged").reflect(PAIR))
    assert HOSTILE in script.asked[1]
    assert script.asked[2] == HOSTILE
    assert (reflection.critique, reflection.instruction) == (HOSTILE, HOSTILE)


def test_an_input_that_json_brings_is_part_of_the_rewrite():
    reflection = reflect(as_json("Sort.", "1, 3", new_input="3, 1"), style="json")
    assert (reflection.instruction, reflection.input, reflection.response) == ("Sort.", "3, 1", "1, 3")


def test_a_proposed_instruction_replaces_the_input_and_keeps_the_context():
    pair = Pair("Sort.", "1, 3", "3, 1", (Turn("system", "Be brief."),))
    assert proposed(pair, "Sort 5, 4.", None, "4, 5") == Pair("Sort 5, 4.", "4, 5", "", pair.context)
    assert proposed(pair, None, None, "one, three") == Pair("Sort.", "one, three", "3, 1", pair.context)


def test_a_reflection_as_a_dictionary_is_json():
    reflection = reflect(paper())
    call = {"part": "user", "text": paper(), "finish_reason": "stop", "prompt_tokens": 10, "completion_tokens": 5}
    assert json.loads(json.dumps(reflection.to_dict()))["calls"] == [{**call, "thinking": None, "attempts": 1}]


def test_many_reflections_come_in_the_order_of_their_pairs_however_late_each_is():
    async def ask(request):
        late = "first" in request.messages[-1]["content"]
        for _ in range(20 if late else 1):
            await asyncio.sleep(0)
        return Reply(f"[New Response]\n{'slow' if late else 'fast'}\n[End]", "stop")

    done = []
    pairs = [Pair("first", "a"), "messages is empty", Pair("second", "b")]
    found = asyncio.run(reflect_all([reflector(ask, phase="response")], pairs, done.append))
    assert [(r.status, r.response) for (r,) in found] == [("ok", "slow"), ("skipped", None), ("ok", "fast")]
    assert found[1][0].reason == "messages is empty"
    assert sum(done) == 3


def test_several_reflect_on_each_pair_in_their_own_order():
    def answers(text, waits):
        async def ask(request):
            for _ in range(waits):
                await asyncio.sleep(0)
            return Reply(f"[New Response]\n{text}\n[End]", "stop")

        return ask

    done = []
    several = [reflector(answers(f"by {n}", 30 // n), phase="response") for n in (1, 2, 3)]
    found = asyncio.run(reflect_all(several, [Pair("first", "a"), "no pair", Pair("second", "b")], done.append))
    assert [[r.response for r in each] for each in found] == [
        ["by 1", "by 2", "by 3"],
        [None] * 3,
        ["by 1", "by 2", "by 3"],
    ]
    assert {r.reason for r in found[1]} == {"no pair"}
    assert sum(done) == 3  # pairs, not reflections


def test_one_of_several_that_fails_takes_nothing_from_the_others():
    several = [reflector(Script(RowFailedError("gone"))), reflector(Script(paper())), reflector(Script("hm"))]
    [found] = asyncio.run(reflect_all(several, [PAIR], lambda n: None))
    assert [r.status for r in found] == ["failed", "ok", "unparsed"]


def test_an_error_of_the_oracle_stops_the_calls_in_flight():
    stopped = []

    async def ask(request):
        if "first" in request.messages[-1]["content"]:
            await asyncio.sleep(0)
            raise OracleError("wrong key")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            stopped.append(True)
            raise

    async def run():
        with pytest.raises(OracleError, match="wrong key"):
            await reflect_all([reflector(ask)], [Pair("first", "a"), Pair("second", "b")], lambda n: None)
        await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(run(), 10))
    assert stopped == [True]
