"""A card that is generated again, over one that people have worked on."""

import random

import pytest
import yaml

from hf_reflect.merging import merge, sections, sign, split


HEAD = {
    "license": "mit",
    "tags": ["reflection-tuning"],
    "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/a.parquet"}]}],
    "hf_reflect": {"recipe": "1"},
}
BODY = {
    "# Recycled": "7 rows.",
    "## Use": "```sh\n# this is no heading\n## nor this\ntrl sft\n```",
    "## Examples": "### Row 3\n\n    # code\n    ## more code",
    "## Limits": "- Nobody has checked.",
}


def text_of(metadata: dict, body: dict[str, str]) -> str:
    head = yaml.safe_dump(metadata, sort_keys=False)
    return f"---\n{head}---\n\n" + "\n\n".join(f"{title}\n\n{text}" for title, text in body.items()) + "\n"


def generated(metadata: dict | None = None, **changed: str) -> str:
    """A signed card; `Use="..."` is another text of a section, null leaves it out."""
    body = {title: changed.pop(title.lstrip("# "), text) for title, text in BODY.items()}
    body |= {f"## {title}": text for title, text in changed.items()}
    return sign(text_of({**HEAD, **(metadata or {})}, {title: text for title, text in body.items() if text}))


OLD = generated()
NEW = generated({"license": "apache-2.0", "hf_reflect": {"recipe": "2"}}, Recycled="8 rows.", Limits="- Somebody has.")


def edited(old: str, new: str, card: str = OLD) -> str:
    assert old in card
    return card.replace(old, new, 1)


def without_section(title: str, card: str = OLD) -> str:
    return edited(sections(split(card)[1].partition("<!--")[0])[title], "", card)


def order(card: str) -> list[str]:
    return [title.strip() for title in sections(split(card)[1]) if title.strip()]


def test_where_there_is_no_card_the_new_one_is_written():
    assert merge(NEW, None) == NEW


def test_a_card_that_nobody_touched_is_replaced_by_the_new_one():
    assert merge(NEW, OLD) == NEW
    assert merge(OLD, OLD) == OLD


def test_fingerprints_do_not_show():
    last = OLD.rstrip().splitlines()[-1]
    assert last.startswith("<!-- ")
    assert last.endswith(" -->")
    assert OLD.count("<!--") == 1


# The body


def test_an_edited_section_stays_and_the_others_are_updated():
    merged = merge(NEW, edited("7 rows.", "Seven rows, which I like."))
    assert "Seven rows, which I like." in merged
    assert "8 rows." not in merged
    assert "- Somebody has." in merged
    assert "- Nobody has checked." not in merged


def test_an_added_section_stays_where_it_was_put():
    merged = merge(NEW, edited("## Examples", "## Thanks\n\nTo all.\n\n## Examples"))
    assert order(merged) == ["# Recycled", "## Use", "## Thanks", "## Examples", "## Limits"]
    assert "To all." in merged


def test_a_section_added_at_the_end_stays_there():
    merged = merge(NEW, edited("\n\n<!-- hf_reflect", "\n\n## Thanks\n\nTo all.\n\n<!-- hf_reflect"))
    assert order(merged)[-1] == "## Thanks"
    assert "- Somebody has." in merged


def test_what_stands_behind_the_fingerprints_stays():
    merged = merge(NEW, f"{OLD}\n## Thanks\n\nTo all.\n")
    assert "To all." in merged
    assert "- Somebody has." in merged


@pytest.mark.parametrize("title", ["## Use", "## Examples", "## Limits"])
def test_a_removed_section_stays_away(title):
    merged = merge(NEW, without_section(title))
    assert order(merged) == [other for other in BODY if other != title]
    assert "8 rows." in merged


def test_sections_that_were_moved_stay_where_they_were_moved_to_and_are_updated():
    moved = sections(split(OLD)[1].partition("<!--")[0])["## Limits"]
    merged = merge(NEW, edited("## Use", f"{moved}\n\n## Use", without_section("## Limits")))
    assert order(merged) == ["# Recycled", "## Limits", "## Use", "## Examples"]
    assert "- Somebody has." in merged


def test_a_renamed_section_is_not_brought_back_under_its_old_name():
    merged = merge(NEW, edited("# Recycled\n", "# My own name\n"))
    assert order(merged) == ["# My own name", "## Use", "## Examples", "## Limits"]
    assert "7 rows." in merged


@pytest.mark.parametrize("existing", [OLD, edited("7 rows.", "Seven.")])
def test_a_section_that_is_new_comes_after_what_it_follows(existing):
    body = dict(zip(BODY, BODY.values(), strict=True))
    new = sign(text_of(HEAD, {"# Recycled": body.pop("# Recycled"), "## Statistics": "| a |\n|---|", **body}))
    assert order(merge(new, existing)) == ["# Recycled", "## Statistics", "## Use", "## Examples", "## Limits"]


def test_a_section_that_is_generated_no_longer_goes_unless_somebody_edited_it():
    new = generated(Examples=None)
    assert "### Row 3" not in merge(new, OLD)
    assert "### Row four" in merge(new, edited("### Row 3", "### Row four"))


def test_headings_in_code_are_no_sections():
    assert [title for title in sections(split(OLD)[1]) if title] == list(BODY)


@pytest.mark.parametrize(
    "block",
    [
        "```python\n# comment\n## comment\n```",
        "~~~\n# comment\n~~~",
        "````md\n```sh\n# comment\n```\n````",
        "~~~\n```\n# comment\n~~~",
        "- a list\n  ```sh\n  # comment\n  ```",
        "    # indented",
        "```one line```",
    ],
    ids=["python", "tildes", "nested", "odd", "list", "indented", "inline"],
)
def test_a_block_of_code_that_somebody_added_hides_no_section_behind_it(block):
    merged = merge(NEW, edited("7 rows.", f"7 rows.\n\n{block}"))
    assert block in merged
    assert "- Somebody has." in merged
    assert "- Nobody has checked." not in merged


def test_headings_of_the_same_name_are_told_apart():
    old = edited("\n\n## Limits", "\n\n## Use\n\nAs you like.\n\n## Limits")
    merged = merge(NEW, old)
    assert order(merged) == ["# Recycled", "## Use", "## Examples", "## Use", "## Limits"]
    assert "As you like." in merged
    assert merge(NEW, merged) == merged


# The metadata


def test_an_edited_key_stays_and_the_others_are_updated():
    metadata, _ = split(merge(NEW, edited("- reflection-tuning", "- reflection-tuning\n- german")))
    assert metadata["tags"] == ["reflection-tuning", "german"]
    assert metadata["license"] == "apache-2.0"


def test_an_added_key_stays():
    metadata, _ = split(merge(NEW, edited("license: mit", "license: mit\npretty_name: Mine\ndate: 2024-01-02")))
    assert metadata["pretty_name"] == "Mine"
    assert str(metadata["date"]) == "2024-01-02"


def test_a_removed_key_stays_away():
    metadata, _ = split(merge(NEW, edited("license: mit\n", "")))
    assert "license" not in metadata


def test_what_says_how_it_was_made_is_always_true():
    for change in ("recipe: 'forged'", "other: x"):
        metadata, _ = split(merge(NEW, edited("recipe: '1'", change)))
        assert metadata["hf_reflect"] == {"recipe": "2"}
    removed = edited("hf_reflect:\n  recipe: '1'\n", "")
    assert split(merge(NEW, removed))[0]["hf_reflect"] == {"recipe": "2"}


MINE = {"config_name": "mine", "data_files": "mine.csv"}


def test_configs_of_others_stay_beside_ours_and_ours_are_updated():
    new_files = [{"config_name": "default", "data_files": [{"split": "train", "path": "data/b.parquet"}]}]
    existing = text_of({**HEAD, "configs": [MINE, *HEAD["configs"]]}, BODY)
    merged = merge(generated({"configs": new_files}), existing)
    assert split(merged)[0]["configs"] == [*new_files, MINE]


def test_a_config_that_is_gone_is_listed_no_longer():
    existing = text_of({**HEAD, "configs": [MINE, {"config_name": "selected"}, *HEAD["configs"]]}, BODY)
    merged = merge(NEW, existing, frozenset({"selected"}))
    assert split(merged)[0]["configs"] == [*HEAD["configs"], MINE]


@pytest.mark.parametrize(
    "configs",
    [None, "all", 3, {"config_name": "default"}, ["x", None], [{"data_files": "x"}], [{"config_name": ["a"]}]],
    ids=str,
)
def test_configs_that_are_none_break_nothing(configs):
    merged = merge(NEW, text_of({**HEAD, "configs": configs}, BODY))
    assert split(merged)[0]["configs"][0] == HEAD["configs"][0]


# Cards that are not as we left them


def test_a_card_by_hand_keeps_its_body_and_its_metadata_and_gets_what_it_lacks():
    existing = "---\nlicense: cc-by-4.0\nlanguage: de\n---\n\n# Von Hand\n\nText.\n\n```sh\n# code\n```\n"
    merged = merge(NEW, existing)
    metadata, body = split(merged)
    assert (metadata["license"], metadata["language"]) == ("cc-by-4.0", "de")
    assert metadata["configs"] == HEAD["configs"]
    assert metadata["tags"] == HEAD["tags"]
    assert body.partition("<!--")[0].strip() == existing.split("---\n")[2].strip()
    assert merge(NEW, merged) == merged


def test_a_card_by_hand_without_metadata_gets_all_of_ours():
    merged = merge(NEW, "# Von Hand\n\nText.\n")
    assert split(merged)[0] == split(NEW)[0]
    assert "Text." in merged
    assert "8 rows." not in merged


def test_an_empty_card_is_no_reason_to_fail():
    assert split(merge(NEW, ""))[0] == split(NEW)[0]


@pytest.mark.parametrize("mark", ["<!-- hf_reflect {} -->", "<!-- hf_reflect {broken} -->", "<!-- hf_reflect [1] -->"])
def test_fingerprints_that_cannot_be_read_are_none(mark):
    merged = merge(NEW, f"{OLD.partition('<!--')[0]}{mark}\n")
    assert "7 rows." in merged
    assert "8 rows." not in merged


def test_fingerprints_of_the_wrong_shape_are_none():
    merged = merge(NEW, f'{OLD.partition("<!--")[0]}<!-- hf_reflect {{"keys": [1], "sections": "x"}} -->\n')
    assert "7 rows." in merged


UNREADABLE = {
    "broken": "license: [mit",
    "a list": "- a\n- b",
    "a text": "just words",
    "an impossible date": "license: mit\ndate: 2024-13-45",
    "an endless number": f"license: mit\nnumber: {'1' * 5000}",
    "a tag of Python": "license: !!python/object/apply:os.system ['true']",
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_metadata_that_cannot_be_read_is_replaced_and_the_body_is_merged(kind):
    body = edited("7 rows.", "Seven.").partition("---\n\n")[2]
    merged = merge(NEW, f"---\n{UNREADABLE[kind]}\n---\n\n{body}")
    assert split(merged)[0] == split(NEW)[0]
    assert "Seven." in merged
    assert "- Somebody has." in merged


def test_a_card_with_the_line_ends_of_windows_is_no_card_that_somebody_edited():
    merged = merge(NEW, edited("7 rows.", "Seven.").replace("\n", "\r\n"))
    assert "Seven." in merged
    assert "- Somebody has." in merged
    assert "- Nobody has checked." not in merged
    assert split(merged)[0]["license"] == "apache-2.0"


def test_a_card_with_a_byte_order_mark_is_read_as_one_without():
    assert merge(NEW, f"\ufeff{OLD}") == NEW


# However people edit, generating twice is generating once


def tampered(card: str, chance: random.Random) -> str:
    """A card after some edits as people make them."""
    lines = card.split("\n")
    for _ in range(chance.randint(0, 6)):
        at = chance.randrange(len(lines))
        match chance.randrange(6):
            case 0:
                del lines[at]
            case 1:
                lines.insert(
                    at, chance.choice(["", "text", "## Mine", "# Mine", "```", "~~~", "key: 1", "---", "## Use"])
                )
            case 2:
                lines[at] += chance.choice([" ", " more", "\r", "\u2028", " -->", "|"])
            case 3:
                start, end = sorted((at, chance.randrange(len(lines))))
                block = lines[start:end]
                del lines[start:end]
                goal = chance.randint(0, len(lines))
                lines[goal:goal] = block
            case 4:
                lines[at:at] = lines[at : at + 5]
            case 5:
                lines[at] = lines[at][::-1]
    return "\n".join(lines)


@pytest.mark.parametrize("seed", range(300))
def test_merging_again_changes_nothing(seed):
    chance = random.Random(seed)
    once = merge(NEW, tampered(OLD, chance))
    merged = merge(NEW, once)
    assert merged.split() == once.split()  # white space at the end of a line may go
    assert merge(NEW, merged) == merged
    assert merged.endswith("-->\n")
    assert split(merged)[0]["hf_reflect"] == {"recipe": "2"}


@pytest.mark.parametrize("seed", range(50))
def test_a_line_that_somebody_wrote_into_the_text_is_never_lost(seed):
    chance = random.Random(seed)
    head, _, body = OLD.partition("---\n\n")
    lines = body.partition("\n\n<!--")[0].split("\n")
    lines.insert(chance.randint(0, len(lines)), "I wrote this.")
    mark = OLD[OLD.index("\n\n<!--") :]
    merged = merge(NEW, merge(NEW, f"{head}---\n\n" + "\n".join(lines) + mark))
    assert merged.count("I wrote this.") == 1
