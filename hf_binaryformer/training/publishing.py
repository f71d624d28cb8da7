"""python -m hf_binaryformer.training.publishing runs/hippocampus/model namespace/name

In a clone: ``scripts/publish.py``. Uploads a finished checkpoint and the card in its folder to the Hub, in one commit.
The training scripts do so themselves with ``--push-to-hub namespace/name``; this program is for a push that failed.
"""

from __future__ import annotations

import inspect
import json
import shlex
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_binaryformer import __version__
from hf_binaryformer.pipelines.whole_files import write_text
from hf_binaryformer.training.cards import TEMPLATES, render_card
from hf_binaryformer.training.recipes import KEPT
from hf_binaryformer.training.remote_code import FILE, flat_source, save_remote_code

# Only these files of a folder and its subfolders are uploaded; of code, only what this package has written.
PUBLISHED = ("README.md", "*.json", "*.safetensors", FILE)
MAIN = "main"
GATES = ("auto", "manual")
UNKNOWN_SOURCE = {"name": "a folder of data without a name", "licence": "not stated"}


def check_target(repo_id: str | None, private: bool, stop_after: int | None = None) -> None:
    """Check before the training that its result can be pushed afterwards; create the repository if needed.

    Args:
        repo_id: "namespace/name"; None: nothing will be pushed, and the Hub is not contacted.
        private: the repository must be private.
        stop_after: the iteration after which the training ends early, if it does.

    Raises:
        typer.BadParameter: the training will not be finished, the name is invalid, there is no valid token, no
            permission to write or no connection, or the repository is public although ``private`` is set.
    """
    if repo_id is None:
        if private:
            raise typer.BadParameter("--private is about the repository of --push-to-hub: give that too, or neither")
        return
    if stop_after is not None:
        raise typer.BadParameter(
            "--stop-after ends the training early, and half a training is not pushed: leave one out"
        )
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise typer.BadParameter(f"'{repo_id}' is no Hub repository, expected namespace/name: {error}") from error
    if "/" not in repo_id:
        raise typer.BadParameter(f"'{repo_id}' is no Hub repository, expected namespace/name: it has no namespace")
    api = HfApi()
    try:
        api.whoami()
        # If private is False, the default applies and not "public": an organisation may have another default.
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        is_public = not api.model_info(repo_id).private
        # create_repo accepts an existing repository of someone else. Older releases cannot check for write permission.
        if "write" in inspect.signature(api.auth_check).parameters:
            api.auth_check(repo_id, write=True)
    # Network errors have no common class across the releases of huggingface_hub.
    except Exception as error:
        raise typer.BadParameter(
            f"cannot push to '{repo_id}' ({explain(error)}): log in with `hf auth login` or set HF_TOKEN to a token that may "
            "write there, or train without --push-to-hub"
        ) from error
    if private and is_public:
        raise typer.BadParameter(f"--private, but '{repo_id}' is there and public: make it private, or name another")


def explain(error: BaseException) -> str:
    """An error's class and the first line of its message that is not blank, then the same for its cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return f"{said} <- {explain(error.__cause__)}" if error.__cause__ else said


def published_files(folder: Path) -> dict[str, Path]:
    """The files of a folder that are uploaded, by their name in the repository.

    Raises:
        typer.BadParameter: the folder holds no checkpoint in safetensors, or a link to a file outside.
    """
    names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    chosen = {name: path for name, path in names.items() if any(fnmatch(name, pattern) for pattern in PUBLISHED)}
    if FILE in chosen and chosen[FILE].read_text(encoding="utf-8") != flat_source():
        del chosen[FILE]
    if not any(name.endswith(".safetensors") for name in chosen):
        raise typer.BadParameter(f"{folder} has no .safetensors file; expected a folder made by save_pretrained")
    if linked := [name for name, path in chosen.items() if not path.resolve().is_relative_to(folder.resolve())]:
        raise typer.BadParameter(
            f"{folder} has links to files outside ({', '.join(linked[:5])}), which would be published: push a copy with the "
            f"files that are meant, made by `cp -rL`"
        )
    return chosen


def push(folder: Path, repo_id: str, revision: str = MAIN, *, remote_code: bool = True) -> str:
    """Upload a checkpoint's folder in one commit; afterwards the branch holds this checkpoint and no other.

    Configurations and weights of an earlier push that are not replaced are deleted in that commit. Otherwise a
    pipeline's files beside a model's would be loaded as the pipeline. Files of other kinds stay. If an upload breaks off,
    call it again: files of weights that the Hub has received are not sent a second time.

    Args:
        folder: made by ``save_pretrained``.
        repo_id: "namespace/name"; the repository exists.
        revision: a branch; it is made from the main branch if there is none of that name.
        remote_code: first write the networks' code into the folder (:func:`save_remote_code`), so that transformers loads
            them where this package is missing.

    Returns:
        The commit's address.

    Raises:
        typer.BadParameter: the folder holds no checkpoint in safetensors.
        HfHubHTTPError: the Hub refuses the branch, an upload or the commit.
    """
    api = HfApi()
    published_files(folder)
    if remote_code:
        save_remote_code(folder)
    files = published_files(folder)
    if revision != MAIN:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    before = api.list_repo_files(repo_id, revision=revision)
    stale = [n for n in before if n not in files and any(fnmatch(n, pattern) for pattern in PUBLISHED[1:])]
    # Not upload_folder, which may divide a folder into several commits.
    operations = [CommitOperationAdd(name, path) for name, path in files.items()]
    deletions = [CommitOperationDelete(name) for name in stale]
    message = f"Checkpoint of hf-binaryformer {__version__}"
    return api.create_commit(repo_id, [*operations, *deletions], commit_message=message, revision=revision).commit_url


def gate(repo_id: str, how: str) -> None:
    """Make readers of a repository ask for access.

    Args:
        repo_id: "namespace/name".
        how: "auto": whoever asks gets it; "manual": you decide each time, on the repository's page.

    Raises:
        typer.BadParameter: another word, or the Hub refuses.
    """
    if how not in GATES:
        raise typer.BadParameter(f"--gated is '{how}', expected one of {', '.join(GATES)}")
    try:
        HfApi().update_repo_settings(repo_id, gated=how)  # type: ignore[arg-type]
    except HfHubHTTPError as error:
        raise typer.BadParameter(f"cannot gate '{repo_id}' ({explain(error)}): only who may write there can") from error


def publish(
    kind: str,
    folder: Path,
    repo_id: str,
    output: Path,
    recipe: str,
    data: list[Path],
    results: dict[str, Any] | None = None,
) -> None:
    """Write the card of a finished run into its checkpoint's folder, and push both; called on the main process alone.

    Args:
        kind: "segmentation", "classification", "autoencoder", "transformer" or "pipeline", a kind in
            ``card_templates/trained.yaml``.
        folder: the folder that ``save_pretrained`` wrote.
        repo_id: "namespace/name", already checked by :func:`check_target`.
        output: the run's folder, with ``recipe.yaml`` and ``training.json``.
        recipe: its name or path, as given on the command line.
        data: the folders that it was trained on.
        results: results of an evaluation, if there was one.

    Raises:
        typer.Exit: the card or the upload failed; a message says where the checkpoint is and how to push it.
    """
    try:
        write_text(folder / "README.md", card_text(kind, folder, repo_id, output, recipe, data, results))
        url = push(folder, repo_id)
    # All errors are caught: after hours of training, the user must learn where the result is.
    except Exception as error:
        command = shlex.join(["python", "-m", "hf_binaryformer.training.publishing", str(folder), repo_id])
        typer.echo(f"publishing to '{repo_id}' failed ({explain(error)})", err=True)
        typer.echo(f"the checkpoint is safe in {folder}; push it later with: {command}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"pushed to {url}")


def card_text(
    kind: str,
    folder: Path,
    repo_id: str,
    output: Path,
    recipe: str,
    data: list[Path],
    results: dict[str, Any] | None,
) -> str:
    """The card's text; arguments as in :func:`publish`."""
    words = yaml.safe_load((TEMPLATES / "trained.yaml").read_text())
    chosen = words["kinds"][kind]
    config = json.loads((folder / ("transformer" if kind == "pipeline" else "") / "config.json").read_text())
    settings = without_paths(yaml.safe_load((output / KEPT).read_text()))
    records = {
        "repo_id": repo_id,
        "recipe_name": Path(recipe).stem,
        "recipe": yaml.safe_dump(settings, sort_keys=False, default_flow_style=None).rstrip(),
        "training": json.loads((output / "training.json").read_text()),
        "config": config,
        "labels": [
            name for label, name in sorted(config.get("id2label", {}).items(), key=lambda x: int(x[0])) if label != "0"
        ],
        "data": [describe_source(source) for source in data],
        "results": results,
        "version": __version__,
    }
    merged = {**chosen, "tags": words["tags"], "sections": words["sections"] | chosen["sections"]}
    return str(render_card(repo_id.rpartition("/")[2], merged, records, licence=None))


def describe_source(folder: Path) -> dict[str, str]:
    """Name and licence from the manifest of a data folder, as far as it has them."""
    manifest = folder / "manifest.json"
    stated = json.loads(manifest.read_text()) if manifest.is_file() else {}
    return {key: str(stated.get(key) or unknown) for key, unknown in UNKNOWN_SOURCE.items()}


def without_paths(value: Any) -> Any:
    """Settings with each path reduced to its last part; Hub ids, which also have one slash, are kept."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and "/" in value:
        local = value.startswith(("/", ".", "~")) or value.count("/") > 1 or Path(value).exists()
        return Path(value).name if local else value
    return value


def main(
    folder: Annotated[Path, typer.Argument(help="Checkpoint: a folder made by save_pretrained.")],
    repo_id: Annotated[str, typer.Argument(help="namespace/name on the Hub.")],
    private: Annotated[bool, typer.Option(help="Create the repository as a private one.")] = False,
    revision: Annotated[str, typer.Option(help="Branch to push to; made from the main branch if it is new.")] = MAIN,
    gated: Annotated[str | None, typer.Option(help="Readers must ask for access: auto or manual.")] = None,
    remote_code: Annotated[bool, typer.Option(help="Add the code for trust_remote_code=True.")] = True,
) -> None:
    """Check and push."""
    published_files(folder)
    check_target(repo_id, private)
    if gated:
        gate(repo_id, gated)
    typer.echo(f"pushed to {push(folder, repo_id, revision, remote_code=remote_code)}")


if __name__ == "__main__":
    typer.run(main)
