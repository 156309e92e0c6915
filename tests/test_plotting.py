"""Pictures: valid, small, readable, the same each time; what is said of them; and where they go."""

import io
import json
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from hub_server import Hub
from oracle_server import completion
from test_cards import HOSTILE, NASTY, NOTHING, reflection, row, score, summed, tokens
from test_describe import KINDS, Reader, fewer_draws, invoke, rows_of, scored, written  # noqa: F401
from test_push import Pusher, push
from test_recycle import run as run_recycle
from test_transforms import alpaca

from hf_reflect import load_student
from hf_reflect.cards import CardData, render_card
from hf_reflect.describing import Description
from hf_reflect.errors import HfReflectError
from hf_reflect.plotting import AFTER, BEFORE, GROUND, INK, Picture, captions, draw


FOLDER = "pictures"
NAMES = ["scores", "ifd_by_length", "flow", "statuses"]


def description(*rows: dict) -> Description:
    return Description.of(summed(*rows))


def many(n: int = 40, seed: int = 0) -> list[dict]:
    """Rows of all kinds, with scores."""
    rng = random.Random(seed)
    made = []
    for i in range(n):
        one = row(i, rng.random() < 0.5, rng.random() < 0.5)
        one["original"] |= {
            "response": "x" * rng.randint(1, 3000),
            "ifd": score(rng.lognormvariate(0, 0.3), 1.3),
            "rifd": score(rng.lognormvariate(0, 0.3), 1.1),
        }
        one["ifd_score"] = score(rng.lognormvariate(0, 0.3), 1.2)
        one["rifd_score"] = score(rng.lognormvariate(0, 0.3), 1.3)
        made.append(one)
    return [*made, row(n, **NOTHING), row(n + 1, on_instruction=reflection("refused"))]


def alt(rows: list[dict]) -> dict[str, str]:
    return {caption.name: caption.alt for caption in captions(description(*rows))}


# The files


def pixels(png: bytes) -> np.ndarray:
    """Height by width by channels."""
    from PIL import Image

    Image.open(io.BytesIO(png)).verify()
    return np.asarray(Image.open(io.BytesIO(png)))


def size(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", png[16:24])


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def contrast(one: str, other: str) -> float:
    """Of two colours (WCAG 2.2)."""

    def luminance(colour: str) -> float:
        parts = [c / 255 for c in rgb(colour)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted(map(luminance, (one, other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.fixture(scope="module")
def drawn() -> list[Picture]:
    return draw(description(*many()))


def test_there_are_four_pictures_of_one_size_that_are_small_files(drawn):
    assert [picture.name for picture in drawn] == NAMES
    assert [picture.path for picture in drawn] == [f"{FOLDER}/{name}.png" for name in NAMES]
    assert len({size(picture.png) for picture in drawn}) == 1
    assert all(len(picture.png) <= 200_000 for picture in drawn)


def test_the_pictures_of_many_rows_are_small_as_well():
    rng = random.Random(3)
    base = many(30)
    summary = summed()
    for i in range(200):  # 6,000 dots
        for one in base:
            one["original"]["response"] = "x" * rng.randint(1, 200)
        summary.add([{**one, "row_id": 100 * i + one["row_id"]} for one in base])
    assert all(len(picture.png) <= 200_000 for picture in draw(Description.of(summary)))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_transparent_and_the_ground_and_the_ink_are_there(drawn, name):
    (picture,) = [picture for picture in drawn if picture.name == name]
    found = pixels(picture.png)
    assert found.dtype == np.uint8
    assert found.shape[:2][::-1] == size(picture.png)
    if found.shape[2] == 4:
        assert (found[:, :, 3] == 255).all()
    corners = {tuple(found[y, x, :3]) for y in (0, -1) for x in (0, -1)}
    assert corners == {rgb(GROUND)}
    assert (found[:, :, :3] == rgb(INK)).all(2).sum() > 20


def test_text_and_lines_stand_out_from_the_ground():
    assert contrast(INK, GROUND) >= 4.5
    assert contrast(BEFORE, GROUND) >= 4.5
    assert contrast(AFTER, GROUND) >= 4.5


def test_the_same_rows_give_the_same_bytes_in_any_order(drawn):
    assert [picture.png for picture in draw(description(*many()))] == [picture.png for picture in drawn]
    rows = many()
    random.Random(1).shuffle(rows)
    assert [picture.png for picture in draw(description(*rows))] == [picture.png for picture in drawn]


def test_another_process_without_a_display_draws_the_same_bytes_and_no_pyplot(drawn, tmp_path):
    script = (
        "import sys, json, hashlib; sys.path.insert(0, sys.argv[1])\n"
        "from test_plotting import description, many, draw\n"
        "before = 'matplotlib.pyplot' in sys.modules\n"
        "print(json.dumps([[hashlib.sha256(p.png).hexdigest() for p in draw(description(*many()))],\n"
        "                  before, 'matplotlib.pyplot' in sys.modules]))"
    )
    env = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")}
    words = [sys.executable, "-c", script, str(Path(__file__).parent)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    hashes, before, after = json.loads(done.stdout)
    from hashlib import sha256

    assert hashes == [sha256(picture.png).hexdigest() for picture in drawn]
    assert (before, after) == (False, False)


def test_drawing_leaves_the_settings_of_matplotlib_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw(description(*many(5)))
    assert dict(matplotlib.rcParams) == before


STYLES = {
    "savefig.facecolor": "black",  # as in the style dark_background
    "savefig.transparent": True,
    "savefig.dpi": 50,
    "axes.grid": True,
    "text.usetex": True,
    "font.size": 30,
}


@pytest.mark.parametrize("name", STYLES)
def test_the_style_that_a_user_has_set_changes_no_picture(drawn, name):
    """As a matplotlibrc sets it, or `plt.style.use("dark_background")` in a notebook."""
    import matplotlib

    rows = many()
    with matplotlib.rc_context({name: STYLES[name]}):
        again = draw(description(*rows))
    assert [picture.png for picture in again] == [picture.png for picture in drawn]


def test_scores_that_are_nearly_equal_are_seen():
    rows = [scored(i, 0.5013 + i * 1e-6, 0.2 + i / 20) for i in range(20)]
    found = pixels(next(picture.png for picture in draw(description(*rows)) if picture.name == "scores"))
    lines = (found[:, : found.shape[1] // 2, :3] == rgb(BEFORE)).all(2).any(1).sum()
    assert lines > 100  # of 495; the legend takes a few


@pytest.mark.filterwarnings("ignore:constrained_layout not applied")
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_the_rows_are_they_are_drawn(kind):
    found = description(*rows_of(kind))
    pictures = draw(found)
    assert [picture.name for picture in pictures] == [caption.name for caption in captions(found)]
    assert {"flow", "statuses"} <= {picture.name for picture in pictures} or kind == "nothing"
    for picture in pictures:
        assert size(picture.png) == (1200, 495)  # 8 by 3.3 inches of 150 dots
        assert picture.alt


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        ([], []),
        ([row(0)], ["flow", "statuses"]),
        ([scored(i, 0.5, 0.7, "xx") for i in range(4)], ["scores", "flow", "statuses"]),
        ([scored(i, 0.5 + i, 0.7, "x" * i) for i in range(4)], NAMES),
    ],
    ids=["nothing", "no score", "equal lengths", "all"],
)
def test_what_can_not_be_seen_is_not_drawn(rows, names):
    assert [caption.name for caption in captions(description(*rows))] == names


@pytest.mark.filterwarnings("ignore:Glyph")  # a control character has no picture
@pytest.mark.filterwarnings("ignore:constrained_layout not applied")
@pytest.mark.parametrize("kind", ["math", "control", "long", "lines", "empty", "blank", "direction", "template"])
def test_a_status_of_somebody_else_is_drawn_as_text(kind):
    text = NASTY[kind]
    assert (
        len(draw(description(row(0, on_instruction=reflection(text, reason=text), reasons={"response": text})))) == 2
    )


@pytest.mark.parametrize("kind", ["math", "lines"])
def test_an_outcome_of_somebody_else_is_drawn_as_text(kind):
    assert len(draw(description({**row(0), "recycled": NASTY[kind]}))) == 2


# What is said of them


def test_the_text_beside_the_scores_gives_their_medians():
    rows = [scored(i, before, after) for i, (before, after) in enumerate([(0.25, 0.5), (0.5, 1.0), (2.0, 3.0)])]
    assert alt(rows)["scores"] == (
        "Densities of the scores over the rows: median IFD 0.500 before, 1.000 after; "
        "median r-IFD 1.000 before, 2.000 after."
    )


def test_of_scores_that_are_not_there_nothing_is_said():
    rows = [row(i, original={"ifd": score(3, 4)}) for i in range(2)]
    assert alt(rows)["scores"] == "Densities of the scores over the rows: median IFD 0.750 before."


def test_the_text_beside_the_lengths_gives_the_rank_correlations():
    # Ranks of the scores before are 1 2 3 4, those of the lengths 1 2 4 3: the correlation is 1 - 6 * 2 / (4 * 15).
    lengths = [1, 5, 80, 20]
    rows = [scored(i, 0.1 + i, 5.0 - i, "x" * length) for i, length in enumerate(lengths)]
    for one, length in zip(rows, [40, 30, 20, 10], strict=True):
        one["response_reflections"][0]["response"] = "y" * length  # falls, as the scores after do
    said = alt(rows)["ifd_by_length"]
    assert said == (
        "IFD against the length of the response, a dot for a row: rank correlation +0.80 before, +1.00 after."
    )


def test_the_text_beside_the_way_of_the_rows_counts_them():
    rows = [row(0, True, True), row(1, True, True), row(2, False, True), row(3), row(4), row(5), row(6, **NOTHING)]
    assert alt(rows)["flow"] == (
        "The way of 7 rows: in the instruction phase 4 turned down, 2 rewritten, 1 no rewrite; "
        "in the response phase 3 rewritten, 3 turned down, 1 no rewrite; "
        "in the result 4 original, 2 both, 1 response."
    )


def test_the_text_beside_the_statuses_counts_them():
    rows = [row(0), row(1), row(2, on_instruction=reflection("refused")), row(3, on_response=reflection("empty"))]
    assert alt(rows)["statuses"] == (
        "How reflections ended: of the instruction 3 ok, 1 refused; of the response 3 ok, 1 empty."
    )


def test_what_is_said_does_not_depend_on_the_order_of_the_rows():
    rows = [row(0, True, True), row(1), row(2, **NOTHING)]
    assert alt(rows) == alt(rows[::-1])


def test_the_card_made_again_says_the_same_of_pictures_whatever_the_order_of_splits(server, tmp_path):
    server.rule = lambda call: completion(call, "[Unchanged]") if "zebra" in call.user else None
    splits = {
        name: Dataset.from_list([{"prompt": f"Say {word} {i}", "completion": "x"} for i in range(3)])
        for name, word in (("test", "zebra"), ("train", "horse"))
    }
    run_recycle(DatasetDict(splits), server, None, tmp_path / "out", method="reflect")
    before = images(tmp_path / "out")
    assert invoke("card", tmp_path / "out").exit_code == 0
    assert images(tmp_path / "out") == before


@pytest.mark.parametrize("kind", HOSTILE)
def test_in_a_page_what_is_said_is_escaped(kind):
    for one in captions(description(row(0, on_instruction=reflection(HOSTILE[kind])))):
        shown = Picture(one.name, one.title, one.alt, b"abc").to_html()
        assert shown.count("<") == shown.count(">") == 1
        (image,) = Reader(shown).images
        assert (image["src"], image["alt"]) == ("data:image/png;base64,YWJj", one.alt)


# Without matplotlib


@pytest.fixture
def without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def test_without_the_extra_drawing_says_which_it_is(without_matplotlib):
    with pytest.raises(HfReflectError, match=r"hf-reflect\[plots\]"):
        draw(description(*many(3)))


OPTIONS = {"student": None, "method": "reflect", "progress": False}


def run(server, out: Path, rows: int = 8, **options):
    return run_recycle(Dataset.from_list(alpaca(rows)), server, None, out, method="reflect", **options)


def images(out: Path) -> dict[str, str]:
    """Text by path of the pictures on a card, as a Markdown reader finds them."""
    found = {}
    for token in tokens((out / "README.md").read_text("utf-8")):
        for child in token.children or ():
            if child.type == "image":
                assert {inner.type for inner in child.children} == {"text"}
                found[child.attrs["src"]] = "".join(inner.content for inner in child.children)
    return found


def files(out: Path) -> list[str]:
    return sorted(str(file.relative_to(out)) for file in (out / FOLDER).glob("*"))


def test_without_the_extra_a_run_has_no_pictures_and_its_card_names_none(without_matplotlib, server, tmp_path):
    result = run(server, tmp_path / "out")
    assert not (tmp_path / "out" / FOLDER).exists()
    assert images(tmp_path / "out") == {}
    assert "<img" not in result._repr_html_()
    assert "<table>" in result._repr_html_()
    assert invoke("card", tmp_path / "out").exit_code == 0
    assert images(tmp_path / "out") == {}


def test_without_the_extra_the_pictures_of_another_result_do_not_stay(monkeypatch, server, tmp_path):
    out = tmp_path / "out"
    run(server, out, 8)
    assert files(out)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run(server, out, 5, overwrite=True)
    assert CardData.of_folder(out).pictures == ()


# Where they go


@pytest.fixture(scope="module")
def judge(student):
    return load_student(student)


@pytest.fixture
def result(server, judge, tmp_path) -> Path:
    """A run with a student, which has all pictures."""
    run_recycle(Dataset.from_list(alpaca(20)), server, judge, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.filterwarnings("ignore:.*have an IFD of 1 or more")
def test_a_run_writes_its_pictures_and_its_card_says_what_is_on_them(result):
    paths = [f"{FOLDER}/{name}.png" for name in NAMES]
    assert files(result) == sorted(paths)
    assert images(result) == {caption.path: caption.alt for caption in CardData.of_folder(result).pictures}
    assert list(images(result)) == paths
    assert "The way of 20 rows" in images(result)[f"{FOLDER}/flow.png"]
    text = (result / "README.md").read_text("utf-8")
    places = {name: text.index(f"({FOLDER}/{name}.png)") for name in NAMES}
    assert text.index("## What changed") < places["scores"] < places["ifd_by_length"] < text.index("## Decisions")
    assert text.index("## Decisions") < places["flow"] < places["statuses"] < text.index("## Examples")

    # `card` draws what is missing, to the byte, and the card stays as it was.
    card, first = text, {path: (result / path).read_bytes() for path in paths}
    (result / paths[0]).unlink()
    (result / paths[1]).write_bytes(b"damaged")
    assert invoke("card", result).exit_code == 0
    assert {path: (result / path).read_bytes() for path in paths} == first
    assert (result / "README.md").read_text("utf-8") == card
    shutil.rmtree(result / FOLDER)
    assert invoke("card", result).exit_code == 0
    assert {path: (result / path).read_bytes() for path in paths} == first
    assert (result / "README.md").read_text("utf-8") == card
    assert [path.name for path in (result / FOLDER).glob(".*")] == []


def test_a_card_names_only_the_pictures_that_are_there(server, tmp_path):
    out = tmp_path / "out"
    run(server, out)
    assert set(images(out)) == {f"{FOLDER}/flow.png", f"{FOLDER}/statuses.png"}
    (out / FOLDER / "flow.png").unlink()
    (out / FOLDER / "holiday.png").write_bytes(b"mine")
    assert [picture.name for picture in CardData.of_folder(out).pictures] == ["statuses"]


@pytest.mark.parametrize("kind", NASTY)
def test_what_a_card_says_of_a_picture_is_read_as_text(tmp_path, kind):
    text = NASTY[kind]
    rows = [row(0, on_instruction=reflection(text)), row(1)]
    folder = written(tmp_path, {"train": rows})
    (folder / FOLDER).mkdir()
    for name in NAMES:
        (folder / FOLDER / f"{name}.png").write_bytes(b"")
    data = CardData.of_folder(folder)
    (folder / "README.md").write_text(render_card(data), "utf-8")
    found = images(folder)
    assert list(found) == [f"{FOLDER}/flow.png", f"{FOLDER}/statuses.png"]
    said = " ".join(next(picture.alt for picture in data.pictures if picture.name == "statuses").split())
    if len(said) < 700 and said.isprintable():
        assert found[f"{FOLDER}/statuses.png"] == said


@pytest.fixture
def hub(tmp_path):
    with Hub(tmp_path / "hub") as running:
        client = Pusher(running.env(tmp_path / "home"))
        yield running, client
        client.close()


def test_a_push_brings_the_pictures_and_takes_away_those_that_are_gone(hub, server, tmp_path):
    there, client = hub
    out = tmp_path / "out"
    run(server, out)
    (out / FOLDER / "holiday.png").write_bytes(b"mine")

    def on_the_hub() -> dict[str, bytes]:
        repo = there.repo("alice/drawn")
        return {path: repo.read(path) for path in repo.files() if path.startswith(f"{FOLDER}/")}

    assert client(push, str(out), "alice/drawn", {})["changed"]
    ours = [f"{FOLDER}/flow.png", f"{FOLDER}/statuses.png"]
    assert on_the_hub() == {path: (out / path).read_bytes() for path in ours}
    card = there.repo("alice/drawn").card()
    assert all(f"]({path})" in card for path in ours)

    assert not client(push, str(out), "alice/drawn", {})["changed"]

    there.repo("alice/drawn").commit({f"{FOLDER}/by_hand.png": b"theirs"}, author="bob")
    (out / ours[0]).unlink()
    assert client(push, str(out), "alice/drawn", {})["changed"]
    left = {ours[1]: (out / ours[1]).read_bytes(), f"{FOLDER}/by_hand.png": b"theirs"}
    assert on_the_hub() == left  # what somebody else added is not ours to delete
    card = there.repo("alice/drawn").card()
    assert f"]({ours[0]})" not in card
    assert f"]({ours[1]})" in card
    assert not client(push, str(out), "alice/drawn", {})["changed"]
