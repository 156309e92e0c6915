"""`hf-reflect push`, `card`, `list`, `info`, `register` and `verify`: to the Hub and back."""

from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_reflect.cli.output import printable, quieten_datasets
from hf_reflect.errors import HfReflectError


Folder = Annotated[Path, typer.Argument(help="The folder that a run wrote.")]
Name = Annotated[str, typer.Argument(help="A Hub id, a folder, or a short name.")]
Revision = Annotated[str | None, typer.Option(help="A branch, tag or commit.")]
CardTemplate = Annotated[Path | None, typer.Option("--card-template", help="Another Jinja template for the card.")]


def push(
    out: Folder,
    repo: Annotated[str, typer.Argument(help="The dataset on the Hub, as NAMESPACE/NAME; made if it isn't there.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request in place of a commit.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch; made if it isn't there.")] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    preference: Annotated[
        bool, typer.Option("--preference", help="Also a config for preference tuning: prompt, chosen, rejected.")
    ] = False,
    selected: Annotated[
        str | None, typer.Option(help="Also a config with the top share of rows by IFD.", metavar="10%")
    ] = None,
    card_template: CardTemplate = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a dataset with another recipe.")] = False,
) -> None:
    """Push a result to the Hub in one commit, open it again, and compare.

    \b
    hf-reflect push recycled me/alpaca-recycled --private
    hf-reflect push recycled me/alpaca-recycled --preference --selected 10%
    """
    from hf_reflect.cli.score import fraction
    from hf_reflect.hub import push_recycled

    quieten_datasets()
    pushed = push_recycled(
        out,
        repo,
        private=private,
        create_pr=create_pr,
        revision=revision,
        message=message,
        preference=preference,
        selected=None if selected is None else fraction(selected, "--selected"),
        overwrite=overwrite,
        template=_read(card_template),
    )
    say_pushed(pushed, pushed.commit if create_pr else revision)


def check_target(repo: str | None) -> None:
    """Refuses a place to push to before the work is done for it."""
    if repo is not None:
        from hf_reflect.hub import check_target as check

        check(repo)


def push_result(out: Path, repo: str | None, private: bool) -> None:
    """Pushes what a command has just written, if that was asked for."""
    if repo is not None:
        from hf_reflect.hub import push_recycled

        say_pushed(push_recycled(out, repo, private=private))


def say_pushed(pushed: Any, revision: str | None = None) -> None:
    """Prints where a result is on the Hub."""
    where = f', revision="{revision}"' if revision else ""
    if not pushed.changed:
        typer.echo("nothing changed; there is no new commit")
    typer.echo(f"{pushed.url}\ncommit {pushed.commit}, loaded again and compared")
    typer.echo(f'load it:  datasets.load_dataset("{pushed.repo_id}"{where})')


def card(
    out: Folder,
    location: Annotated[str | None, typer.Option(help="What load_dataset finds it by.  [default: the folder]")] = None,
    card_template: CardTemplate = None,
) -> None:
    """Write the card of a result again, and its pictures. What was changed in it by hand stays.

    \b
    hf-reflect card recycled --location me/alpaca-recycled
    """
    from hf_reflect.cards import CardData, render_card
    from hf_reflect.merging import merge, sign
    from hf_reflect.output import README, write_whole
    from hf_reflect.plotting import can_draw, draw

    data = CardData.of_folder(out, location)
    if can_draw():
        pictures = draw(data.description)
        for picture in pictures:
            write_whole(out / picture.path, [picture.png])
        data = replace(data, pictures=tuple(pictures))
    file = out / README
    new = sign(render_card(data, _read(card_template)))
    write_whole(file, [merge(new, file.read_text("utf-8") if file.is_file() else None).encode()])
    typer.echo(f"written to {file}")


def list_datasets(
    author: Annotated[str | None, typer.Option(help="Only of this user or organisation.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="The most to list.")] = 100,
) -> None:
    """List recycled datasets on the Hub, and the short names that are known here.

    \b
    hf-reflect list --author me
    """
    from hf_reflect.loading import PUBLISHED, list_recycled, registered

    for found in list_recycled(author, limit):
        typer.echo(f"{found.repo_id}  {found.downloads} downloads, {found.likes} likes, changed {found.modified}")
    if author is None:
        for title, names in (("your names", registered()), ("published by the papers' authors", PUBLISHED)):
            for name, location in names.items():
                typer.echo(f"{name}  {location}  ({title})")


def info(name: Name, revision: Revision = None) -> None:
    """Print recipe, statistics and provenance of a recycled dataset without downloading its data.

    \b
    hf-reflect info me/alpaca-recycled
    """
    from hf_reflect.loading import info as known_of
    from hf_reflect.merging import sections

    known = known_of(name, revision)
    typer.echo(f"{known.name}" + (f", commit {known.revision}" if known.revision else ""))
    if known.recipe is not None:
        recipe = known.recipe
        source = ", ".join(f"{key} {value}" for key, value in recipe.source.items() if value is not None)
        lines = [
            ("recipe", f"{recipe.hash}, hf_reflect {recipe.version}"),
            ("source", source),
            ("method", f"{recipe.method}, keep {recipe.keep}"),
            ("oracle", ", ".join(str(oracle["identity"].get("model")) for oracle in recipe.oracles)),
            ("student", str(recipe.student["identity"]["model"]) if recipe.student else "none"),
        ]
        for title, value in lines:
            typer.echo(f"{title:<10}{printable(value)}")
    licence = known.metadata.get("license", "unknown")
    typer.echo(f"{'licence':<10}{printable(str(licence))}")
    for title, text in sections(known.body).items():
        if title.strip() in ("## What changed", "## Decisions"):
            words = "\n".join(line for line in text.splitlines() if not line.startswith("!["))
            typer.echo(f"\n{printable(unescape(words)).strip()}")


def register(
    name: Annotated[str, typer.Argument(help="The short name.")],
    location: Annotated[str | None, typer.Argument(help="The Hub id or folder; left out to forget the name.")] = None,
) -> None:
    """Give a recycled dataset a short name for `load_recycled`.

    \b
    hf-reflect register mine me/alpaca-recycled
    """
    from hf_reflect.loading import register as write_down

    write_down(name, location)
    typer.echo(f"{name}: forgotten" if location is None else f"{name}: {location}")


def verify(
    name: Name,
    student: Annotated[str, typer.Option(help="The student of the recipe, wherever it lies.")],
    sample: Annotated[int, typer.Option(min=1, help="Rows to score again.")] = 50,
    revision: Revision = None,
) -> None:
    """Score a sample of a recycled dataset again, and say exactly what does not agree.

    \b
    hf-reflect verify me/alpaca-recycled --student Qwen/Qwen2.5-0.5B
    """
    from hf_reflect.verifying import verify as check

    quieten_datasets()
    found = check(name, student=student, sample=sample, revision=revision)
    typer.echo(f"{found.rows} rows, of which {found.sampled} were checked; {found.scores} scores made again")
    typer.echo(f"largest difference {found.largest:.2g}")
    for finding in found.findings:
        typer.echo(f"  {printable(finding)}")
    if found.findings:
        raise HfReflectError(f"{name}: {len(found.findings)} things do not agree.")
    typer.echo("everything agrees")


def _read(template: Path | None) -> str | None:
    try:
        return None if template is None else template.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HfReflectError(f"{template}: can't be read: {error}") from error
