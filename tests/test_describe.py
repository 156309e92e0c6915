"""The statistics of a result, in Python and on the command line, against numbers computed from the raw rows."""

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from oracle_server import completion
from test_cards import HOSTILE, NASTY, NOTHING, recipe, reflection, row, score, summed
from test_extras import SCHEMA
from test_transforms import alpaca
from typer.testing import CliRunner

from hf_reflect import recycle
from hf_reflect.cli import app
from hf_reflect.describing import QUANTILES, Description, change_text, describe
from hf_reflect.errors import HfReflectError, RecipeError
from hf_reflect.measures import QUANTITIES, STAGES


# A result made by hand; other files of tests use it as well


def written(
    folder: Path, splits: dict[str, list[dict]], *, group: int | None = None, made: object = None, **names
) -> Path:
    """A folder as a run leaves it, of rows made by hand.

    Args:
        folder: Where to.
        splits: Rows of config `reflections` by split.
        group: Rows of a row group.
        made: The recipe, if not one of these names.
        **names: As for `test_cards.recipe`.
    """
    policy = names.get("keep", "all")
    for name, rows in splits.items():
        kept = [one for one in rows if policy == "all" or one["recycled"] in ("response", "both")]
        beside = [
            {"row_id": one["row_id"], "recycled": one["recycled"], "instruction": "", "output": ""} for one in kept
        ]
        for place, table in (
            ("reflections", pa.Table.from_pylist(rows, SCHEMA)),
            ("data", pa.Table.from_pylist(beside, pa.schema([(n, SCHEMA_OF_DATA[n]) for n in SCHEMA_OF_DATA]))),
        ):
            (folder / place).mkdir(parents=True, exist_ok=True)
            pq.write_table(table, folder / place / f"{name}-00000-of-00001-0.parquet", row_group_size=group)
    (folder / "recipe.yaml").write_text((made or recipe(**names)).to_yaml(), "utf-8")
    return folder


SCHEMA_OF_DATA = {"instruction": pa.string(), "output": pa.string(), "row_id": pa.int64(), "recycled": pa.string()}


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch):
    """Most of the time of a small result is its bootstrap, which `test_measures` looks at."""
    monkeypatch.setattr("hf_reflect.measures._RESAMPLES", 100)


def invoke(*words: object):
    """The command in this process; an error is still an exception."""
    return CliRunner().invoke(app, [str(word) for word in words])


def unreadable(row_id: int = 0) -> dict:
    """A row in which there was no pair."""
    skipped = reflection("skipped", reason="no text in 'output'", calls=[])
    made = row(row_id, **{**NOTHING, "on_instruction": skipped, "on_response": skipped})
    return {**made, "original": None}


def scored(row_id: int, before: float, after: float, response: str = "1234") -> dict:
    """A row with both phases kept, of this IFD and twice that r-IFD."""
    return row(
        row_id, True, True,
        original={"response": response, "ifd": score(before, 1), "rifd": score(2 * before, 1)},
        ifd=score(after, 1), rifd=score(2 * after, 1),
    )  # fmt: skip


def description(*rows: dict, **options) -> Description:
    return Description.of(summed(*rows), **options)


# Quantiles, correlation, growth, cost


def test_quantiles_are_those_of_the_raw_values():
    rng = random.Random(1)
    raw = [rng.lognormvariate(0, 1) for _ in range(101)]
    lengths = [rng.randint(0, 50) for _ in raw]
    found = description(*(scored(i, raw[i], 1, "x" * lengths[i]) for i in range(101))).distributions["original"]
    raw.sort()
    assert found["ifd"].n == 101
    assert found["ifd"].mean == pytest.approx(math.fsum(raw) / 101)
    # Of 101 values in order, the quantile of k percent is the value of index k.
    assert found["ifd"].quantiles == pytest.approx({p: raw[round(100 * p)] for p in QUANTILES})
    assert found["ifd"].median == pytest.approx(raw[50])
    assert found["response length"].quantiles == pytest.approx(
        dict(zip(QUANTILES, np.quantile(lengths, QUANTILES), strict=True))
    )


def test_a_quantile_between_two_rows_lies_between_their_values():
    assert description(scored(0, 0.2, 1), scored(1, 0.6, 1)).distributions["original"]["ifd"].quantiles == (
        pytest.approx({0.05: 0.22, 0.25: 0.3, 0.5: 0.4, 0.75: 0.5, 0.95: 0.58})
    )


def ranks(numbers: list[float]) -> list[float]:
    """Ranks; those that are equal share the mean of theirs."""
    return [sum(b < a for b in numbers) + (sum(b == a for b in numbers) + 1) / 2 for a in numbers]


def pearson(a: list[float], b: list[float]) -> float:
    x, y = np.array(a) - np.mean(a), np.array(b) - np.mean(b)
    return float(x @ y / math.sqrt((x @ x) * (y @ y)))


@pytest.mark.parametrize("seed", range(3))
def test_correlations_are_those_of_ranks_over_the_rows_that_have_both(seed):
    rng = random.Random(seed)
    rows, pairs = [], []
    for i in range(60):
        ifd, length = round(rng.random(), 1), rng.randint(1, 15)  # with ties
        one = scored(i, ifd + 0.1, 1, "x" * length)
        if rng.random() < 0.2:
            one["original"]["ifd"] = None
        else:
            pairs.append((ifd, length))
        rows.append(one)
    found = description(*rows).correlations["original"]["ifd"]["response length"]
    assert found == pytest.approx(pearson(*(ranks(list(side)) for side in zip(*pairs, strict=True))))


def test_a_score_that_goes_with_length_has_a_correlation_of_one():
    rows = [scored(i, 0.1 + i / 10, 1, "x" * 3**i) for i in range(5)]
    assert description(*rows).correlations["original"]["ifd"]["response length"] == pytest.approx(1)


@pytest.mark.parametrize("kind", ["two rows", "equal lengths", "equal scores"])
def test_where_there_is_no_correlation_none_is_said(kind):
    few = {
        "two rows": [scored(0, 0.1, 1, "1"), scored(1, 0.2, 1, "22")],
        "equal lengths": [scored(i, i + 0.1, 1, "1") for i in range(4)],
        "equal scores": [scored(i, 0.5, 1, "1" * i) for i in range(4)],
    }[kind]
    found = description(*few)
    assert "response length" not in found.correlations["original"].get("ifd", {})
    str(found)


def test_growth_is_over_the_rows_of_the_result_in_which_a_rewrite_was_kept():
    def grown(i: int, before: int, after: int) -> dict:
        return row(i, False, True, original={"response": "x" * before}, on_response=reflection(response="y" * after))

    rows = [grown(0, 10, 25), grown(1, 10, 20), grown(2, 10, 15), grown(3, 10, 5), grown(4, 0, 7), row(5)]
    inflation = description(*rows).summary.inflation
    assert (inflation.rows, inflation.longer, inflation.twice) == (5, 4, 3)
    assert (inflation.before, inflation.after) == (40, 72)
    (grew,) = [table for table in description(*rows).tables() if table.title == "Length"]
    ratio = "1.75 times as long"  # the median of 2.5, 2, 1.5 and 0.5
    assert [cells[1] for cells in grew.rows] == ["5", "4 (80%)", "3 (60%)", "1.80 times as long", ratio]


def test_growth_does_not_count_rows_that_are_left_out(tmp_path):
    rows = [row(0, True, False), row(1, False, True)]
    inflation = describe(written(tmp_path, {"train": rows}, keep="reflected")).summary.inflation
    assert inflation.rows == 1


def test_responses_that_were_all_empty_grew_by_no_factor():
    found = description(row(0, False, True, original={"response": ""}))
    (grew,) = [table for table in found.tables() if table.title == "Length"]
    assert grew.rows[-1][1] == "–"


def test_cost_is_that_of_all_replies_at_the_prices(tmp_path):
    calls = {"calls": [{"prompt_tokens": 1_000_000, "completion_tokens": 250_000, "attempts": 3}]}
    free = {"calls": []}
    rows = [
        row(0, True, True, on_instruction=reflection(instruction="?", **calls), on_response=reflection(**calls)),
        row(1, False, True, on_instruction=reflection("unchanged", **free), on_response=reflection(**free)),
        row(2, on_instruction=reflection("refused", **calls), on_response=reflection("empty", **free)),
    ]
    folder = written(tmp_path, {"train": rows})
    found = describe(folder, price_in=0.5, price_out=2)
    # Three calls, each one million tokens read and a quarter of one written; two rows have a rewrite.
    assert found.cost.total == pytest.approx(3 * (0.5 + 0.25 * 2))
    assert found.to_dict()["cost"] == {
        "calls": 3,
        "retries": 6,
        "prompt_tokens": 3_000_000,
        "completion_tokens": 750_000,
        "total": pytest.approx(3.0),
        "rows": 2,
        "per_kept_row": {
            "calls": 1.5,
            "prompt_tokens": 1_500_000,
            "completion_tokens": 375_000,
            "cost": pytest.approx(1.5),
        },
    }
    assert describe(folder).cost.total is None
    for half in ({"price_in": 4}, {"price_out": 4}):
        with pytest.raises(RecipeError, match="or neither"):
            describe(folder, **half)
    assert describe(folder, price_in=0, price_out=0).cost.total == 0


def test_tokens_that_a_server_did_not_count_are_none():
    uncounted = {"calls": [{"prompt_tokens": None, "completion_tokens": None, "attempts": None}]}
    asked = description(row(0, on_instruction=reflection(**uncounted), on_response=reflection("failed"))).cost.asked
    assert (asked.calls, asked.retries, asked.prompt_tokens, asked.completion_tokens) == (2, 0, 100, 20)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (None, "–"),
        ((3, 0.25, (0.125, 0.375)), "+0.250 [+0.125, +0.375] (n=3)"),
        ((3, -0.25, (-0.5, 0.0001)), "-0.250 [-0.500, +0.000] (n=3)"),
        ((3, -0.00001, (-0.0004, 0.0)), "+0.000 [+0.000, +0.000] (n=3)"),
        ((1, 0.25, None), "+0.250 (n=1)"),
    ],
)
def test_a_change_is_written_with_its_sign_and_interval(change, text):
    from hf_reflect.describing import Change

    assert change_text("ifd", change and Change(*change)) == text


# The way of the rows


def test_the_way_of_the_rows_is_counted():
    rows = [
        row(0, True, True),
        row(1, True, True),
        row(2, False, True),
        row(3),
        row(4, **NOTHING),
        row(5, reasons={"instruction": "not_scored", "response": "gated"}),
        unreadable(6),
    ]
    assert description(*rows).to_dict()["flows"] == [
        {"instruction": "no rewrite", "response": "no rewrite", "result": "original", "count": 2},
        {"instruction": "not scored", "response": "turned down", "result": "original", "count": 1},
        {"instruction": "rewritten", "response": "rewritten", "result": "both", "count": 2},
        {"instruction": "turned down", "response": "rewritten", "result": "response", "count": 1},
        {"instruction": "turned down", "response": "turned down", "result": "original", "count": 1},
    ]


@pytest.mark.parametrize("policy", ["reflected", "below-one"])
def test_rows_that_the_policy_leaves_out_are_left_out_of_the_result(tmp_path, policy):
    rows = [
        row(0, True, False, ifd=score(1, 2), rifd=score(1, 2)),
        row(1, False, True, ifd=score(1, 2), rifd=score(1, 2)),
        row(2, True, True, ifd=score(1, 2), rifd=score(2, 2)),
        row(3, True, True, ifd=None, rifd=score(1, 2)),
    ]
    found = describe(written(tmp_path, {"train": rows}, keep=policy)).summary.flows
    out = found["rewritten", "turned down", "left out"] + found["rewritten", "rewritten", "left out"]
    assert out == (1 if policy == "reflected" else 3)
    assert found["turned down", "rewritten", "response"] == 1


# Whatever there is


def every_kind() -> dict[str, list[dict]]:
    nulls = {**score(1, 1), "status": "too_short", "value": None, "conditioned_loss": None, "direct_loss": None}
    unscored = {"original": {"ifd": nulls, "rifd": nulls}, "ifd": nulls, "rifd": nulls}
    infinite = {**nulls, "status": "not_finite", "conditioned_loss": math.inf, "direct_loss": -math.inf}
    huge = {**score(1, 1), "value": 1e300, "conditioned_loss": 699.0}
    return {
        "nothing": [],
        "one row": [scored(0, 0.5, 0.6)],
        "one row without scores": [row(0)],
        "nothing to rewrite": [row(i, **NOTHING) for i in range(3)],
        "unreadable": [unreadable(i) for i in range(3)],
        "null scores": [row(i, True, True, **unscored) for i in range(3)],
        "infinite losses": [row(i, True, True, original={"ifd": infinite}, ifd=infinite) for i in range(3)],
        "not a number": [row(0, True, True, original={"ifd": {**nulls, "value": math.nan, "direct_loss": math.nan}})],
        "huge": [row(i, True, True, original={"ifd": huge, "rifd": huge}, ifd=huge) for i in range(3)],
        "equal": [scored(i, 0.5, 0.5) for i in range(5)],
        "outlier": [*(scored(i, 0.5 + i / 100, 0.6) for i in range(30)), scored(30, 1e6, 1e-6)],
        "empty responses": [row(i, False, True, original={"response": ""}) for i in range(3)],
        "empty texts": [
            row(i, True, original={"instruction": "", "response": ""}, on_instruction=reflection("ok", "", ""))
            for i in range(3)
        ],
    }  # fmt: skip


KINDS = [*every_kind()]


def rows_of(kind: str) -> list[dict]:
    return [{**one, "row_id": i} for i, one in enumerate(every_kind()[kind])]


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_the_rows_are_the_statistics_are_strict_json_and_tables(kind):
    found = description(*rows_of(kind))
    said = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert said["rows"] == len(rows_of(kind))
    for table in found.tables():
        assert table.rows
        assert {len(cells) for cells in table.rows} == {len(table.header)}
        assert table.to_text().startswith(table.title)
    assert "nan" not in str(found)
    assert found._repr_html_().count("<table>") == len(found.tables())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "nothing"])
def test_whatever_the_rows_are_the_command_prints_their_statistics(tmp_path, kind):
    done = invoke("stats", written(tmp_path, {"train": rows_of(kind)}))
    assert done.exit_code == 0, done.output
    assert "What became of the rows" in done.stdout


def test_an_infinite_score_is_not_written_as_json_that_nobody_reads(tmp_path):
    infinite = {**score(1, 1), "value": math.inf}
    found = describe(written(tmp_path, {"train": [row(0, original={"ifd": infinite})]}))
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_run_without_a_student_has_no_scores_and_all_the_rest(server, tmp_path):
    options = {"student": None, "method": "reflect", "progress": False, "journal": tmp_path / "journal"}
    result = recycle(Dataset.from_list(alpaca(12)), tmp_path / "out", oracle=server.url, **options)
    found = describe(tmp_path / "out")
    assert set(found.distributions["original"]) == {"instruction length", "response length"}
    assert found.correlations == {"original": {}, "recycled": {}}
    assert found.to_dict() == Description.of(result.summary).to_dict()
    lengths = [len(one["output"]) for one in alpaca(12)]
    assert found.distributions["original"]["response length"].mean == pytest.approx(sum(lengths) / 12)
    assert found.cost.asked.calls == len(server.completions)
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_large_result_has_the_exact_means(tmp_path):
    def cycle(base: int) -> list[dict]:
        """Lengths from base to base + 9 and IFDs from 0.5 to 2, each as often as any."""
        proposed = {
            "on_instruction": reflection(response="z" * 5, instruction="?"),
            "on_response": reflection(response="y" * 30),
        }
        return [
            row(i, i % 2 == 0, i % 3 == 0, **proposed,
                original={"response": "x" * (base + i % 10), "ifd": score(1 + i % 4, 2)})
            for i in range(60)
        ]  # fmt: skip

    splits = {"train": (200, 0), "test": (80, 7), "validation": (60, 20)}
    written(tmp_path, {name: cycle(base) for name, (_, base) in splits.items()})
    for name, (times, _) in splits.items():
        (file,) = (tmp_path / "reflections").glob(f"{name}-*")
        table = pa.concat_tables([pq.read_table(file)] * times)
        ids = pa.array(range(len(table)))
        pq.write_table(table.set_column(0, table.schema.field("row_id"), ids), file, row_group_size=1500)
    found = describe(tmp_path)
    assert found.summary.rows == found.summary.measures.rows == found.sampled == 20_400
    original, recycled = found.distributions["original"], found.distributions["recycled"]
    assert original["response length"].mean == pytest.approx((12_000 * 4.5 + 4_800 * 11.5 + 3_600 * 24.5) / 20_400)
    assert original["ifd"].mean == pytest.approx(1.25)
    assert original["ifd"].quantiles == pytest.approx({0.05: 0.5, 0.25: 0.875, 0.5: 1.25, 0.75: 1.625, 0.95: 2})
    # Of each sixty rows twenty have a new response, twenty more a new instruction, and of the others i is odd and no
    # multiple of 3: their lengths are base plus 1, 5, 7, 1, 3, 7, 9, 3, 5, 9 and so on, which is base + 5 on average.
    total = sum(times * (20 * 30 + 20 * 5 + 20 * (base + 5)) for times, base in splits.values())
    assert recycled["response length"].n == 20_400
    assert recycled["response length"].mean == pytest.approx(total / 20_400)
    assert found.summary.recycled == {"both": 3_400, "response": 3_400, "instruction": 6_800, "original": 6_800}


def test_a_sample_is_said_to_be_one(monkeypatch):
    monkeypatch.setattr("hf_reflect.measures.SAMPLE", 10)
    found = description(*(scored(i, 0.5, 0.6) for i in range(30)))
    assert found.sampled == 10
    (quantiles,) = [table for table in found.tables() if table.title == "Quantiles"]
    assert "sample of 10 rows" in quantiles.note
    assert found.distributions["original"]["ifd"].n == 30


def test_the_terminal_says_that_quantiles_are_of_a_sample(monkeypatch, tmp_path):
    monkeypatch.setattr("hf_reflect.measures.SAMPLE", 10)
    folder = written(tmp_path, {"train": [scored(i, 0.5, 0.6) for i in range(30)]})
    assert "sample of 10 rows" in invoke("stats", folder).stdout


# Text of others


CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029]")


def hostile(text: str) -> list[dict]:
    """A row with a text in all places that statistics show."""
    made = row(
        0, True, True,
        on_instruction=reflection(text or "?", reason=text, oracle=text),
        on_response=reflection(text or "?", reason=text),
        reasons={"instruction": text, "response": text},
    )  # fmt: skip
    for phase in ("instruction", "response"):
        made[f"{phase}_decision"]["candidate"] = None
    return [{**made, "recycled": text}, scored(1, 0.5, 0.6)]


RISKS = ("front matter", "lines", "control", "direction", "template", "long", "empty", "emoji")


@pytest.mark.parametrize("kind", RISKS)
def test_what_the_terminal_is_given_has_no_control_characters(tmp_path, kind):
    done = invoke("stats", written(tmp_path, {"train": hostile(NASTY[kind])}))
    assert done.exit_code == 0, done.output
    assert not CONTROL.search(done.stdout)
    done = invoke("stats", tmp_path, "--json")
    assert not CONTROL.search(done.stdout)
    assert NASTY[kind] in json.loads(done.stdout)["recycled"]


def test_a_reason_of_two_lines_is_one_row_of_a_table():
    plain, broken = (str(description(*hostile(text))) for text in ("one two", "one\ntwo"))
    assert len(broken.splitlines()) == len(plain.splitlines())


class Reader(HTMLParser):
    """Elements and texts, as a browser finds them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        else:
            assert {name for name, _ in attrs} <= {"class", "style"}
            assert dict(attrs).get("class", "number") == "number"
            assert dict(attrs).get("style", "text-align: left") in ("text-align: left", "text-align: right")

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_a_notebook_is_given_is_escaped(kind):
    page = Reader(description(*hostile(HOSTILE[kind]))._repr_html_())
    assert set(page.tags) <= {"table", "caption", "thead", "tbody", "tr", "th", "td", "p", "details", "summary"}
    # As itself: in the way of the rows, in the decisions of both phases, and as the status of two reflections.
    assert page.texts.count(HOSTILE[kind]) >= 5


# The command


def test_the_command_prints_the_papers_table_first(tmp_path):
    folder = written(tmp_path, {"train": [scored(0, 0.25, 0.5), scored(1, 0.75, 1.0)]})
    done = invoke("stats", folder)
    assert done.exit_code == 0, done.output
    head, *lines = done.stdout.split("\n\n")[0].splitlines()
    assert head == "Means"
    assert lines[0].split("  ")[1] == "mean"
    (ifd,) = [line for line in lines if line.split()[0] == "ifd"]
    cells = re.split(r"\s{2,}", ifd.strip())
    assert cells == ["ifd", "0.500 (n=2)", "–", "–", "0.750 (n=2)"]
    changes = done.stdout.split("\n\n")[1].splitlines()
    (ifd,) = [line for line in changes if line.split()[0] == "ifd"]
    assert re.split(r"\s{2,}", ifd.strip()) == ["ifd", "+0.250 [+0.250, +0.250] (n=2)"]


def test_the_command_prints_json_that_says_the_same(tmp_path):
    folder = written(tmp_path, {"train": [scored(0, 0.25, 0.5), scored(1, 0.75, 1.0)]})
    done = invoke("stats", folder, "--json", "--price-in", 1, "--price-out", 1)
    said = json.loads(done.stdout)
    assert said["distributions"]["original"]["ifd"]["mean"] == pytest.approx(0.5)
    assert said["distributions"]["original"]["ifd"]["quantiles"]["0.5"] == pytest.approx(0.5)
    assert said["changes"]["ifd"] == {"n": 2, "mean": pytest.approx(0.25), "interval": pytest.approx([0.25, 0.25])}
    assert said["recycled"] == {"both": 2}
    assert said["statuses"] == {"instruction": {"ok": 2}, "response": {"ok": 2}}
    assert said["decisions"] == {"instruction": {"higher_ifd": 2}, "response": {"lower_rifd": 2}}
    assert said["cost"]["total"] == pytest.approx(4 * 120 / 1e6)
    assert said == describe(folder, price_in=1, price_out=1).to_dict() | {
        name: json.loads(json.dumps(value)) for name, value in said.items()
    }
    assert set(said["distributions"]) == set(STAGES)
    assert set(said["changes"]) <= set(QUANTITIES)


def without(folder: Path, *gone: str) -> Path:
    for pattern in gone:
        for file in folder.glob(pattern):
            file.unlink()
    return folder


@pytest.mark.parametrize("kind", ["nothing", "empty", "no recipe", "no trail", "a file", "scored"])
def test_a_folder_that_is_no_result_is_a_line_of_error(tmp_path, kind):
    folder = tmp_path / "result"
    if kind == "a file":
        folder.write_text("hello")
    elif kind == "empty":
        folder.mkdir()
    elif kind != "nothing":
        written(folder, {"train": [row(0)]})
        without(folder, {"no recipe": "recipe.yaml", "no trail": "reflections/*"}.get(kind, "none"))
    if kind == "scored":
        (folder / "recipe.yaml").write_text("hf_reflect: 0.1.0\nhash: abc\ntask: score\n")
    for words in (["stats", folder], ["stats", folder, "--json"], ["diff", folder, folder]):
        done = invoke(*words)
        assert isinstance(done.exception, HfReflectError), done.exception
        assert "result" in str(done.exception) or "recipe" in str(done.exception)
        assert "\n" not in str(done.exception)
        assert done.stdout == ""


@pytest.mark.parametrize("content", [b"", b"PAR1 cut off"])
def test_a_damaged_file_is_a_line_of_error(tmp_path, content):
    written(tmp_path, {"train": [row(0)]})
    next((tmp_path / "reflections").glob("*.parquet")).write_bytes(content)
    with pytest.raises(HfReflectError, match=re.escape(str(tmp_path))):
        describe(tmp_path)


def test_the_statistics_do_not_depend_on_what_comes_first():
    rows = [row(0, True, True), row(1), row(2, **NOTHING), row(3, False, True), scored(4, 0.5, 0.7), unreadable(5)]
    first = description(*rows)
    for seed in range(5):
        random.Random(seed).shuffle(rows)
        again = description(*rows)
        assert again.to_dict() == first.to_dict()
        assert str(again) == str(first)


# What a notebook shows of a run


@pytest.mark.parametrize("where", ["in memory", "in a folder"])
def test_a_run_shows_itself_in_a_notebook(server, tmp_path, where):
    server.rule = lambda call: completion(
        call, "<script>x</script>\n[New Instruction]\n<b>q</b>\n[End]\n[New Response]\n<img src=x>\n[End]"
    )
    rows = [{"instruction": f"<i>{i}", "input": "", "output": "<u>short"} for i in range(4)]
    out = tmp_path / "a <b> & c" if where == "in a folder" else None
    options = {"student": None, "method": "reflect", "progress": False, "journal": tmp_path / "journal"}
    result = recycle(Dataset.from_list(rows), out, oracle=server.url, **options)
    page = result._repr_html_()
    for evil in ("<script", "<b>q", "<img src=x", "<i>", "<u>"):
        assert evil not in page
    body = re.sub(r'<img src="data:image/png;base64,[A-Za-z0-9+/=]+" alt="[^"<>]+" style="max-width: 100%">', "", page)
    assert "<img" not in body
    assert page.count("<img") == 2  # there are no scores to draw
    assert 'alt="The way of 4 rows' in page
    body = body.replace("<code>", "").replace("</code>", "")
    read = Reader(body)
    assert set(read.tags) <= {"table", "caption", "thead", "tbody", "tr", "th", "td", "p", "details", "summary"}
    assert read.tags.count("table") == len(Description.of(result.summary).tables())
    assert ("written to" in page) == (out is not None)
    assert out is None or f"written to {out}" in "".join(read.texts)
