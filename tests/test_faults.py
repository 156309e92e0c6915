"""What a failed call means, and how long a server asks to wait."""

import time
from email.utils import formatdate

import pytest
from huggingface_hub.errors import InferenceTimeoutError, OfflineModeIsEnabled

from hf_reflect.errors import OracleError
from hf_reflect.oracles.base import PassingError, RowFailedError
from hf_reflect.oracles.faults import Fault, failure, raised, read_fault, redact, wait_in


class TestWaiting:
    @pytest.mark.parametrize(
        ("headers", "seconds"),
        [
            ({"Retry-After": "7"}, 7.0),
            ({"Retry-After": "0"}, 0.0),
            ({"Retry-After": " 1.5 "}, 1.5),
            ({"retry-after-ms": "1500"}, 1.5),
            ({"retry-after-ms": "0"}, 0.0),
            ({"retry-after-ms": "250", "Retry-After": "1"}, 0.25),  # the finer of the two
            ({"RateLimit": '"default";r=0;t=30'}, 30.0),
            ({"RateLimit": '"api"; r=0; pk=:cHs=:; t=12'}, 12.0),
            ({"RateLimit": '"minute";r=5;t=10, "day";r=0;t=3600'}, 3600.0),
            ({"x-ratelimit-reset": "30"}, 30.0),
            ({"x-ratelimit-reset-requests": "1s"}, 1.0),
            ({"x-ratelimit-reset-tokens": "6m0s"}, 360.0),
            ({"x-ratelimit-reset-tokens": "20ms"}, 0.02),
            ({"x-ratelimit-reset-tokens": "1m30.5s"}, 90.5),
            ({"x-ratelimit-reset-tokens": "1h2m3s"}, 3723.0),
            ({"Retry-After": "3", "RateLimit": '"a";r=0;t=30', "x-ratelimit-reset": "60"}, 3.0),
            ({"RateLimit": '"a";r=0;t=30', "x-ratelimit-reset": "60"}, 30.0),
        ],
    )
    def test_every_header_that_names_a_time_is_read(self, headers, seconds):
        assert wait_in(headers) == pytest.approx(seconds)

    def test_of_several_limits_the_longest_that_is_used_up_counts(self):
        headers = {
            "x-ratelimit-remaining-requests": "12",
            "x-ratelimit-reset-requests": "5m0s",
            "x-ratelimit-remaining-tokens": "0",
            "x-ratelimit-reset-tokens": "8s",
            "x-ratelimit-remaining-day": "0",
            "x-ratelimit-reset-day": "20s",
        }
        assert wait_in(headers) == 20.0

    def test_where_nobody_says_what_remains_the_longest_counts(self):
        assert wait_in({"x-ratelimit-reset-requests": "2s", "x-ratelimit-reset-tokens": "9s"}) == 9.0

    @pytest.mark.parametrize(
        ("header", "seconds"),
        [
            ('"minute";r=0;t=10, "day";r=0;t=3600', 3600.0),
            ('"day";r=0;t=3600, "minute";r=0;t=10', 3600.0),
            ('"default";t=30;r=0', 30.0),
            ('"burst";r=0, "day";r=7;t=99', None),
        ],
    )
    def test_the_ietf_header_is_a_list_of_limits_with_parameters_in_any_order(self, header, seconds):
        assert wait_in({"RateLimit": header}) == seconds

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"Content-Type": "application/json"},
            {"RateLimit": '"default";r=5;t=30'},
            {"RateLimit": '"default";r=10;t=30'},
            {"RateLimit-Policy": '"default";q=100;w=60'},
            {"x-ratelimit-remaining": "3", "x-ratelimit-reset": "30"},
            {"x-ratelimit-reset": "1893456000"},  # a moment, in seconds since 1970
            {"x-ratelimit-reset": "1893456000000"},
            {"x-ratelimit-reset": "2030-01-01T00:00:00Z"},
            {"x-ratelimit-limit": "100"},
        ],
    )
    def test_what_asks_for_no_wait_is_none(self, headers):
        assert wait_in(headers) is None

    @pytest.mark.parametrize("value", ["", "soon", "nan", "inf", "1e999", "٣ ساعات", "\x00", "Mon", "1 2 3 4 5", "-"])
    @pytest.mark.parametrize(
        "name", ["Retry-After", "retry-after-ms", "RateLimit", "x-ratelimit-reset", "x-ratelimit-reset-tokens"]
    )
    def test_nonsense_is_none(self, name, value):
        assert wait_in({name: value}) is None

    @pytest.mark.parametrize(
        "name", ["Retry-After", "retry-after-ms", "x-ratelimit-reset", "x-ratelimit-reset-tokens"]
    )
    def test_a_wait_is_never_negative(self, name):
        assert (wait_in({name: "-5"}) or 0.0) >= 0.0

    def test_a_date_is_as_far_away_as_it_is(self):
        assert wait_in({"Retry-After": formatdate(time.time() + 3600, usegmt=True)}) == pytest.approx(3600, abs=60)

    @pytest.mark.parametrize(
        "date",
        ["Sun, 06 Nov 1994 08:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994"],
        ids=["now", "RFC 850", "asctime"],
    )
    def test_a_date_that_is_past_is_now(self, date):
        assert wait_in({"Retry-After": date}) == 0.0

    @pytest.mark.parametrize("name", ["retry-after", "RETRY-AFTER", "Retry-After"])
    def test_names_are_read_in_any_case(self, name):
        assert wait_in({name: "4"}) == 4.0
        assert wait_in({"X-RateLimit-Reset-Tokens": "4s", "X-RATELIMIT-REMAINING-TOKENS": "9"}) is None


class TestStatuses:
    @pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 529])
    def test_a_server_in_trouble_may_recover(self, status):
        error = raised(Fault.of_status(status, "busy", {"Retry-After": "3"}), "http://here/v1")
        assert isinstance(error, PassingError)
        assert (error.retry_after, str(error)) == (3.0, f"HTTP {status}: busy")

    @pytest.mark.parametrize("status", [400, 413, 415, 422])
    def test_a_request_that_is_wrong_fails_its_row(self, status):
        assert isinstance(raised(Fault.of_status(status, ""), "http://here/v1"), RowFailedError)

    @pytest.mark.parametrize("status", [401, 403, 404])
    def test_what_is_wrong_for_every_request_stops_the_run_and_says_where(self, status):
        error = raised(Fault.of_status(status, "no"), "http://here/v1")
        assert isinstance(error, OracleError)
        assert f"oracle http://here/v1: HTTP {status}: no. " in str(error)

    @pytest.mark.parametrize(
        ("status", "throttled"), [(429, True), (503, True), (529, True), (500, False), (502, False)]
    )
    def test_a_server_with_too_much_to_do_is_told_from_one_that_is_broken(self, status, throttled):
        assert raised(Fault.of_status(status, ""), "x").throttled is throttled

    def test_a_page_of_html_becomes_a_short_line(self):
        fault = Fault.of_status(502, "<html>\n\n  <h1>Bad gateway</h1>\n" + "x" * 5000)
        assert fault.message.startswith("HTTP 502: <html> <h1>Bad gateway</h1> x")
        assert "\n" not in fault.message
        assert len(fault.message) < 400


class TestExceptions:
    @pytest.mark.parametrize(
        "bug", [KeyError("x"), TypeError("x"), AttributeError("x"), ValueError("x"), MemoryError()]
    )
    def test_a_bug_of_ours_is_none_of_the_failures_of_a_call(self, bug):
        assert failure(bug, "http://here/v1") is None

    @pytest.mark.parametrize("late", [TimeoutError(), InferenceTimeoutError("late")])
    def test_a_reply_that_is_late_may_come_the_next_time_if_less_is_asked(self, late):
        error = failure(late, "http://here/v1")
        assert isinstance(error, PassingError)
        assert error.slow
        assert not error.of_server

    def test_a_server_that_can_not_be_reached_may_come_back_and_the_advice_is_to_look(self):
        error = failure(ConnectionRefusedError("refused"), "http://here/v1")
        assert isinstance(error, PassingError)
        assert "Is the server running" in error.advice

    def test_offline_mode_stops_the_run(self):
        error = failure(OfflineModeIsEnabled("offline"), "http://here/v1")
        assert isinstance(error, OracleError)
        assert "HF_HUB_OFFLINE" in str(error)

    @pytest.mark.parametrize("error", [OracleError("a"), PassingError("b"), RowFailedError("c")])
    def test_what_is_said_already_is_not_said_again(self, error):
        assert failure(error, "http://here/v1") is error

    @pytest.mark.parametrize("status", [400, 401, 500])
    def test_no_message_has_the_key_in_it(self, status):
        error = raised(Fault.of_status(status, "who is sk-marked?"), "http://here/v1", ["sk-marked"])
        assert "sk-marked" not in str(error)
        assert "who is ***?" in str(error)

    def test_without_a_secret_a_message_stays_as_it_is(self):
        assert redact("a b c", ()) == "a b c"

    def test_what_is_no_fault_has_none(self):
        assert read_fault(KeyError("x")) is None
