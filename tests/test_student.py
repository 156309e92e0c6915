"""The student's scores against a plain loop: one token at a time, full logits, no batch, no mask, no cache."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import HEADS, KINDS, MAX_POSITIONS, TOKENIZERS, save_tiny_model, save_tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_reflect import Journal, Student, load_student
from hf_reflect.embedded import embedded_model
from hf_reflect.errors import StudentError
from hf_reflect.pairs import Pair, Turn
from hf_reflect.student import Score
from hf_reflect.student.encoding import Encoder, Tokens
from hf_reflect.student.head import Head
from hf_reflect.student.model import CausalLM
from hf_reflect.student.templates import Scored


def load(spec, **options):
    """Agreement to many digits is a matter of float32; bfloat16 is compared elsewhere."""
    return load_student(spec, dtype="float32", **options)


PREPENDED = {"llama": "<|begin_of_text|>", "sentencepiece": "<s>"} | dict.fromkeys(HEADS, "<|begin_of_text|>")
TOLERANCE = 1e-4

PAIRS = {
    "plain": Pair("What is the capital of France?", "The capital of France is Paris."),
    "input": Pair("Name a prime number.", "13", input="between 10 and 20"),
    "earlier turns": Pair("And you?", "fine", context=(Turn("user", "How are you?"), Turn("assistant", "I am fine."))),
    "line break first": Pair("What is the capital of France?", "\nParis is"),
    "space first": Pair("What is the capital of France?", "  Paris"),
    "emoji": Pair("How are you? 🙂", "🙂🦊 thank you 🙂"),
    "response repeats the question": Pair("Paris is", "Paris is\nParis is"),
    "several lines": Pair("Write a function.\n\n", "def add(a, b):\n    return a + b\n"),
    "long": Pair("Give three tips.", "Eat a balanced diet, sleep enough and move every day. " * 6),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These models are so small that threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model") / f"tiny-{kind}", kind)


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "journal.sqlite3")
    yield journal
    journal.close()


@pytest.fixture
def llama(tmp_path):
    return save_tiny_model(tmp_path / "student", "llama")


class PlainLoop:
    """What a score is by definition, written for reading and not for speed."""

    def __init__(self, folder, bos, **options):
        self.tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
        self.front = [self.tokenizer.convert_tokens_to_ids(bos)] if bos else []

    def score(self, prefix, target, max_length=10**6) -> Score:
        encoding = self.tokenizer.backend_tokenizer.encode(prefix + target, add_special_tokens=False)
        start = encoding.char_to_token(len(prefix))
        room = max_length - len(self.front)
        before, inside = encoding.ids[:start], encoding.ids[start:room]
        unscored = 0 if self.front else 1
        conditioned = self.losses(self.front + before + inside, len(inside) - unscored)
        direct = self.losses(self.front + inside, len(inside) - unscored)
        means = [math.fsum(losses) / len(losses) for losses in (conditioned, direct)]
        status = "truncated" if len(encoding.ids) > room else "ok"
        return Score(status, math.exp(means[0] - means[1]), *means, len(conditioned), len(direct))

    @torch.no_grad()
    def losses(self, ids, count):
        """The losses of the last `count` tokens, in nats: what the model says after all ids before each."""
        result = []
        for t in range(len(ids) - count, len(ids)):
            logits = self.model(input_ids=torch.tensor([ids[:t]])).logits[0, -1]
            result.append(-torch.log_softmax(logits.double(), 0)[ids[t]].item())
        return result


@pytest.fixture(scope="module")
def plain(kind, folder):
    return PlainLoop(folder, PREPENDED.get(kind))


def same(score, expected, tolerance=TOLERANCE):
    assert score.status == expected.status
    assert (score.conditioned_tokens, score.direct_tokens) == (expected.conditioned_tokens, expected.direct_tokens)
    assert score.conditioned_loss == pytest.approx(expected.conditioned_loss, abs=tolerance)
    assert score.direct_loss == pytest.approx(expected.direct_loss, abs=tolerance)
    assert score.value == pytest.approx(expected.value, rel=2 * tolerance)


def test_ifd_is_the_ratio_of_perplexities_that_a_plain_loop_gives(folder, plain, journal):
    scores = load(str(folder)).ifd(list(PAIRS.values()), journal)
    for pair, score in zip(PAIRS.values(), scores, strict=True):
        earlier = "".join(turn.content + "\n" for turn in pair.context)
        asked = pair.instruction + ("\n" + pair.input if pair.input else "")
        same(score, plain.score(earlier + asked + "\n", pair.response))


def test_reversed_ifd_is_the_ratio_of_perplexities_that_a_plain_loop_gives(folder, plain, journal):
    scores = load(str(folder)).reversed_ifd(list(PAIRS.values()), journal)
    for pair, score in zip(PAIRS.values(), scores, strict=True):
        asked = pair.instruction + ("\n" + pair.input if pair.input else "")
        same(score, plain.score(f"{pair.response}\nWhat instruction was this text written for?\n", asked))


def test_a_score_is_the_exponential_of_the_difference_of_its_losses(folder, journal):
    for score in load(str(folder)).ifd(list(PAIRS.values()), journal):
        assert score.value == pytest.approx(math.exp(score.conditioned_loss - score.direct_loss))
        assert abs(score.conditioned_loss - score.direct_loss) > 1e-3  # else these models would show nothing


def test_a_score_depends_neither_on_order_nor_on_neighbours(folder, tmp_path):
    student, pairs = load(str(folder)), list(PAIRS.values())
    batches = {
        "together": pairs,
        "backwards": pairs[::-1],
        "long neighbours": [pair.replace(response=pair.response * 3) for pair in pairs] + pairs,
        "many": pairs * 9,
    }
    alone = {pair: student.ifd([pair], Journal(tmp_path / f"alone-{i}"))[0] for i, pair in enumerate(pairs)}
    for name, batch in batches.items():
        for pair, score in zip(batch, student.ifd(batch, Journal(tmp_path / name)), strict=True):
            if pair in alone:
                same(score, alone[pair], 1e-5)


def packs(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Head(model)


def test_sequences_packed_into_one_row_have_the_losses_they_have_alone(folder):
    head = packs(folder)
    batch = [Tokens((5, 9, 2, 7, 7, 1), 3), Tokens((4, 8), 1), Tokens(tuple(range(3, 40)), 10), Tokens((5, 9, 6), 2)]
    with torch.inference_mode():
        alone = [loss for tokens in batch for loss in head.mean_losses([tokens])]
        assert not head.packs
        head.packs = True
        packed = head.mean_losses(batch)
    assert packed == pytest.approx(alone, abs=1e-5)


def test_packing_is_tried_before_it_is_trusted(folder, monkeypatch):
    head = packs(folder)
    assert head.packs_exactly()
    packed = head._packed

    def run_on(batch):
        made = packed(batch)
        return made._replace(positions=torch.arange(made.ids.shape[1])[None])

    monkeypatch.setattr(head, "_packed", run_on)
    assert not head.packs_exactly()


def test_a_response_of_one_token_has_a_score_only_after_a_bos(kind, folder, plain, journal):
    [score] = load(str(folder)).ifd([Pair("Name a letter.", "a")], journal)
    if kind in PREPENDED:
        assert (score.conditioned_tokens, score.direct_tokens) == (1, 1)
        same(score, plain.score("Name a letter.\n", "a"))
    else:
        assert score == Score("too_short", None, None, None, None, None)


def test_an_empty_target_has_no_score(folder, journal):
    student, nothing = load(str(folder)), Score("empty", None, None, None, None, None)
    assert student.ifd([Pair("How are you?", ""), Pair("How are you?", " \n")], journal) == [nothing, nothing]
    assert student.reversed_ifd([Pair("", "I am fine."), Pair("\n", "I am fine.")], journal) == [nothing, nothing]


def test_rows_without_a_score_leave_their_neighbours_alone(folder, journal):
    student, good = load(str(folder)), PAIRS["plain"]
    endless = Pair("tips " * 2 * MAX_POSITIONS, "thank you")
    scores = student.ifd([Pair("a", ""), good, endless, good.replace(response=" "), good], journal)
    assert [score.status for score in scores] == ["empty", "ok", "truncated", "empty", "ok"]
    assert scores[1] == scores[4] == student.ifd([good], journal)[0]


def test_no_pairs_have_no_scores(folder, journal):
    assert load(str(folder)).ifd([], journal) == []


def test_a_response_that_reaches_the_limit_is_scored_up_to_it(folder, plain, journal):
    pair = PAIRS["long"]
    [score] = load(str(folder), max_length=40).ifd([pair], journal)
    expected = plain.score(pair.instruction + "\n", pair.response, max_length=40)
    assert expected.status == "truncated"
    same(score, expected)


def test_the_limit_is_the_one_the_model_was_made_with(folder, plain, journal):
    pair = Pair("a " * (MAX_POSITIONS - 30), "Eat a balanced diet, sleep enough and move every day. " * 3)
    [score] = load(str(folder)).ifd([pair], journal)
    same(score, plain.score(pair.instruction + "\n", pair.response, max_length=MAX_POSITIONS))
    assert score.status == "truncated"


@pytest.mark.parametrize("options", [{}, {"max_length": 30}])
def test_a_prompt_longer_than_the_limit_leaves_nothing_to_score(options, folder, journal):
    pair = Pair("thank you " * MAX_POSITIONS, "The capital of France is Paris.")
    [score] = load(str(folder), **options).ifd([pair], journal)
    assert score == Score("truncated", None, None, None, None, None)


def test_a_second_scoring_comes_from_the_journal_and_loads_no_weights(llama, journal, monkeypatch):
    pairs = list(PAIRS.values())
    first = Student(CausalLM(str(llama))).ifd(pairs, journal)

    def refuse(*args, **options):
        raise AssertionError("the weights were asked for")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    again = Student(CausalLM(str(llama)))
    assert again.ifd(pairs, Journal(journal.path)) == first
    with pytest.raises(AssertionError, match="weights were asked for"):
        again.ifd([Pair("Name a prime number", "that was never scored")], journal)


def test_a_journal_that_knows_some_scores_completes_the_others(llama, tmp_path):
    pairs, student = list(PAIRS.values()), load(str(llama))
    whole = student.ifd(pairs, Journal(tmp_path / "whole"))
    partly = Journal(tmp_path / "partly")
    student.ifd(pairs[::2], partly)
    for score, expected in zip(student.ifd(pairs, partly), whole, strict=True):
        same(score, expected, 1e-5)


def test_the_scores_of_one_model_are_never_taken_for_those_of_another(tmp_path, journal):
    # Same folder name, same pairs, same journal: only the weights differ.
    folders = [save_tiny_model(tmp_path / str(seed) / "student", "llama", seed=seed) for seed in (1, 2)]
    pair = PAIRS["plain"]
    for folder in folders:
        [score] = load(str(folder)).ifd([pair], journal)
        same(score, PlainLoop(folder, PREPENDED["llama"]).score(pair.instruction + "\n", pair.response))


def test_other_weights_in_the_same_folder_are_another_student(tmp_path, journal):
    folder, pair = tmp_path / "student", PAIRS["plain"]
    identities = []
    for seed in (1, 2):
        save_tiny_model(folder, "llama", seed=seed)
        student = load(str(folder))
        identities.append(student.identity)
        [score] = student.ifd([pair], journal)
        same(score, PlainLoop(folder, PREPENDED["llama"]).score(pair.instruction + "\n", pair.response))
    assert identities[0] != identities[1]


def test_the_same_weights_elsewhere_are_the_same_student(tmp_path):
    folders = [save_tiny_model(tmp_path / place / "student", "llama") for place in ("here", "there")]
    one, other = (load(str(folder)).identity for folder in folders)
    assert one == other


def test_what_changes_a_score_changes_the_identity(llama):
    assert load(str(llama)).identity != load(str(llama), max_length=64).identity


def fails_with_one_line(spec, journal):
    with pytest.raises(StudentError) as caught:
        load(str(spec)).ifd([PAIRS["plain"]], journal)
    message = str(caught.value)
    assert message.startswith("student")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("spec", ["no such thing!", "/no/such/folder", "a/b/c/d", "", "/no/such/file.gguf"])
def test_a_spec_that_names_no_model_is_refused_before_any_work(spec):
    with pytest.raises(StudentError) as caught:
        load(spec)
    assert "\n" not in str(caught.value)
    assert spec in str(caught.value)


def test_a_hub_id_that_can_not_be_had_is_one_line_of_advice(journal, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "no-such-org/no-such-model" in fails_with_one_line("no-such-org/no-such-model", journal)


def test_an_empty_folder_is_refused(tmp_path, journal):
    assert str(tmp_path) in fails_with_one_line(tmp_path, journal)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_a_folder_with_a_broken_file_is_refused(name, llama, journal):
    content = (llama / name).read_bytes()
    (llama / name).write_bytes(content[: len(content) // 2])
    assert str(llama) in fails_with_one_line(llama, journal)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_folder_without_its_tokenizer_is_refused(kind, tmp_path, journal):
    folder = save_tiny_model(tmp_path / "student", kind)
    (folder / "tokenizer.json").unlink()
    assert str(folder) in fails_with_one_line(folder, journal)


def test_a_tokenizer_in_the_older_files_of_its_family_gives_the_same_scores(tmp_path, journal):
    folder = save_tiny_model(tmp_path / "student", "gpt2")
    expected = load(str(folder)).ifd(list(PAIRS.values()), journal)
    older = save_tiny_model(tmp_path / "older", "gpt2")
    bpe = json.loads((older / "tokenizer.json").read_text())["model"]
    (older / "tokenizer.json").unlink()
    (older / "vocab.json").write_text(json.dumps(bpe["vocab"]))
    (older / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in bpe["merges"]))
    settings = json.loads((older / "tokenizer_config.json").read_text())
    (older / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "GPT2Tokenizer"}))
    assert load(str(older)).ifd(list(PAIRS.values()), journal) == expected


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_without_a_model_is_refused(name, llama, journal):
    (llama / name).unlink()
    assert str(llama) in fails_with_one_line(llama, journal)


def test_a_folder_without_config_is_refused_whatever_its_name_suggests(tmp_path, journal):
    # transformers 4 guesses a family from the path, and would fill a model of default size with random numbers.
    folder = save_tiny_model(tmp_path / "my-gpt2", "gpt2")
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
        assert str(folder) in fails_with_one_line(folder, journal)


def test_a_folder_with_a_model_of_an_unknown_type_is_refused(llama, journal):
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "model_type": "no_such_type"}))
    assert str(llama) in fails_with_one_line(llama, journal)


def test_a_folder_where_weights_are_missing_is_refused_rather_than_scored_at_random(llama, journal):
    weights = load_file(llama / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, llama / "model.safetensors", {"format": "pt"})
    assert str(llama) in fails_with_one_line(llama, journal)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path, journal):
    folder = save_tiny_model(tmp_path / "student", "gpt2")
    save_tiny_tokenizer(folder, "sentencepiece")
    assert str(folder) in fails_with_one_line(folder, journal)


@pytest.mark.model
def test_the_embedded_model_gets_no_bos_because_its_own_metadata_says_so():
    from gguf import GGUFReader

    assert GGUFReader(embedded_model()).get_field("tokenizer.ggml.add_bos_token").contents() is False
    student = load("local")
    encoder = Encoder(student.model.tokenizer, student.model.bos, 100)
    [passes] = encoder.encode([Scored("Hello\n", "Hello there")])
    assert passes.conditioned.ids[0] == passes.direct.ids[0] == 19556


@pytest.mark.model
def test_the_embedded_model_scores_as_a_plain_loop_does_and_alike_on_both_stacks(journal):
    pair = PAIRS["plain"]
    [score] = load("local").ifd([pair], journal)
    file = embedded_model()
    same(score, PlainLoop(file.parent, None, gguf_file=file.name).score(pair.instruction + "\n", pair.response), 1e-3)
    # Printed by the plain loop with transformers 5.23.0 and, equal in all digits, with 4.57.6.
    same(score, Score("ok", 0.1599003, 0.7342542, 2.5674589, 6, 6), 1e-3)
