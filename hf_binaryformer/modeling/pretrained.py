"""Finds weights by name: a folder, a checkpoint of the package or of the checkout, or a repository on the Hub."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from hf_binaryformer.modeling.catalogue import how_to_get
from hf_binaryformer.modeling.checkpoint_files import CheckpointError, check_own, check_sizes, read_json, using
from hf_binaryformer.modeling.file_names import stays_below

__all__ = [
    "CheckpointError",
    "CheckpointMixin",
    "CheckpointNotFoundError",
    "DiffusersCheckpointMixin",
    "ProcessorCheckpointMixin",
    "known_checkpoints",
    "local_checkpoint",
    "published_checkpoints",
    "read_json",
    "resolve_checkpoint",
]

PACKAGED = Path(__file__).parent.parent / "checkpoints"
# In a checkout: weights whose licence or size keeps them out of the package.
PUBLISHED = Path(__file__).parents[2] / "published"
NAMESPACE_VARIABLE = "HF_BINARYFORMER_NAMESPACE"
DEFAULT_NAMESPACE = "hf-binaryformer"
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
# Weights that are mapped would change with their file as long as the network is used, or end the process if it is cut.
IN_MEMORY = {"disable_mmap": True}
# A folder with one of these files is a checkpoint, of a model or of a pipeline. A pipeline's components have their own
# folders.
MODEL_CONFIG, PIPELINE_CONFIG = "config.json", "model_index.json"


class CheckpointNotFoundError(FileNotFoundError):
    """No weights have this name. The message says what was tried, which names are known, and how to train them."""


def known_checkpoints() -> list[str]:
    """Names of the checkpoints that this installation ships."""
    return _checkpoints_in(PACKAGED)


def published_checkpoints() -> list[str]:
    """Names of the checkpoints in the checkout's ``published/``; none if the package is not used from a checkout."""
    return _checkpoints_in(PUBLISHED)


def _checkpoints_in(folder: Path) -> list[str]:
    return sorted(path.parent.name for kind in (MODEL_CONFIG, PIPELINE_CONFIG) for path in folder.glob(f"*/{kind}"))


def local_checkpoint(name: str) -> Path | None:
    """The folder of a checkpoint that the package ships, or that the checkout publishes; the package comes first."""
    if name in known_checkpoints():
        return PACKAGED / name
    return PUBLISHED / name if name in published_checkpoints() else None


def resolve_checkpoint(name: str | os.PathLike[str], **hub_options: Any) -> Path:
    """The folder that holds a checkpoint.

    Four places are tried in this order: an existing folder; a checkpoint in the package; a checkpoint in ``published/``,
    if the package is used from a checkout; ``<namespace>/<name>`` on the Hub. The namespace is
    ``HF_BINARYFORMER_NAMESPACE``, or the project's own if that is not set. A name with a slash is used as a Hub id without
    a change.

    Args:
        name: folder, short name, or Hub id.
        hub_options: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``.

    Raises:
        CheckpointNotFoundError: none of these places has it.
        CheckpointError: a revision is given for what is not on the Hub. (Transformers ignores it there, and loads
            something else than what was asked for.)
    """
    name = os.fspath(name)
    folder = Path(name)
    revision = hub_options.get("revision")
    repo_id = name if "/" in name else f"{os.environ.get(NAMESPACE_VARIABLE, DEFAULT_NAMESPACE)}/{name}"
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"revision '{revision}' was asked for, but '{name}' is a folder, which has no revisions: leave it out, or "
                f"give the name of a repository on the Hub"
            )
        return folder
    if local := local_checkpoint(name):
        if revision is not None:
            raise CheckpointError(
                f"revision '{revision}' was asked for, but '{name}' is installed with this package, and what is installed "
                f"has no revisions: leave it out, or load '{repo_id}' from the Hub"
            )
        return local
    if len(folder.parts) > 1 and folder.name == "model" and (folder.parent / "checkpoints").is_dir():
        raise CheckpointNotFoundError(
            f"no checkpoint '{name}': the training in '{folder.parent}' is not finished. Go on with --resume; with "
            f"--stop-after it ends earlier, and writes '{folder.name}'"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=["*.json", "*.safetensors", "*.md"], **hub_options))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise CheckpointNotFoundError(
            f"no checkpoint '{name}'. Tried: the folder '{folder.absolute()}'; the package's own "
            f"({', '.join(known_checkpoints()) or 'none'}); the checkout's ({', '.join(published_checkpoints()) or 'none'}); "
            f"'{repo_id}' on the Hub ({type(error).__name__}{_reason(error, revision)}). {how_to_get(name.rpartition('/')[2])}"
        ) from error


def _reason(error: Exception, revision: str | None) -> str:
    """What an error of the Hub's client means for the reader, if its name does not say it."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    reasons = {
        GatedRepoError: f"it is gated: ask for access on its page, then {log_in}",
        RepositoryNotFoundError: f"there is none, or it is private: if you may read it, {log_in}",
        RevisionNotFoundError: f"it has no revision '{revision}'",
        LocalEntryNotFoundError: "not in the cache, and the Hub is not asked or not reached: load it once with a network",
    }
    return next((f": {said}" for kind, said in reasons.items() if isinstance(error, kind)), "")


def _require_safetensors(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        found = ", ".join(sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt")))
        raise CheckpointError(
            f"{folder} has no .safetensors file{f' (only {found})' if found else ''}: convert it first"
        )


def _require_all_keys(folder: Path, report: dict[str, Any]) -> None:
    """Raise CheckpointError if a loading report lists missing or unexpected tensors."""
    wrong = {kind: sorted(map(str, report[kind])) for kind in ("missing_keys", "unexpected_keys") if report[kind]}
    if wrong:
        listed = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(keys[:5])}" for kind, keys in wrong.items())
        raise CheckpointError(f"the weights in {folder} do not fit its config.json: {listed}")


class CheckpointMixin:
    """Gives a transformers model a ``from_pretrained`` that knows short names and refuses weights that do not fit."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **options: Any) -> Any:
        """Load weights by short name, folder or Hub id (:func:`resolve_checkpoint`); safetensors only.

        Takes the options of transformers' ``from_pretrained``.

        Raises:
            CheckpointNotFoundError: no such checkpoint.
            CheckpointError: a pickle instead of safetensors, a damaged file, or tensors that do not fit the configuration
                (unless ``ignore_mismatched_sizes=True``).
        """
        hub_options = {key: options.pop(key) for key in HUB_OPTIONS if key in options}
        folder = resolve_checkpoint(pretrained_model_name_or_path, **hub_options)
        _require_safetensors(folder)
        config = read_json(folder / MODEL_CONFIG)
        check_own(folder, config)
        lenient = options.get("ignore_mismatched_sizes", False)
        report_wanted = options.pop("output_loading_info", False)
        with using(folder):
            check_sizes(folder, config, lambda: cls(cls.config_class.from_dict(config)))  # type: ignore[attr-defined,call-arg]
            model, report = super().from_pretrained(  # type: ignore[misc]
                folder, *args, **{**IN_MEMORY, **options, "use_safetensors": True, "output_loading_info": True}
            )
        if not lenient:
            _require_all_keys(folder, report)
        return (model, report) if report_wanted else model


class ProcessorCheckpointMixin:
    """Gives an image processor of transformers a ``from_pretrained`` that knows short names."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> Any:
        """Load by short name, folder or Hub id (:func:`resolve_checkpoint`), as the models do.

        Raises:
            CheckpointNotFoundError: no such checkpoint.
            CheckpointError: its configuration is damaged.
        """
        hub_options = {key: options.pop(key) for key in HUB_OPTIONS if key in options}
        folder = resolve_checkpoint(pretrained_model_name_or_path, **hub_options)
        with using(folder):
            return super().from_pretrained(folder, **options)  # type: ignore[misc]


class DiffusersCheckpointMixin:
    """The same for diffusers models and schedulers. A pipeline's checkpoint gives its component of this class."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        **options: Any,
    ) -> Any:
        """Load by short name, folder or Hub id (:func:`resolve_checkpoint`); safetensors only.

        Args:
            pretrained_model_name_or_path: a component's own checkpoint, or that of a pipeline with such a component.
            subfolder: the component's folder in a pipeline's checkpoint; None finds it by the class.
            options: those of diffusers' ``from_pretrained``.

        Raises:
            CheckpointNotFoundError: no such checkpoint.
            CheckpointError: a pickle instead of safetensors, a damaged file, the configuration of another class, or
                tensors that do not fit the configuration.
        """
        from torch import nn

        hub_options = {key: options.pop(key) for key in HUB_OPTIONS if key in options}
        folder = resolve_checkpoint(pretrained_model_name_or_path, **hub_options)
        if subfolder is None and (folder / PIPELINE_CONFIG).is_file():
            index = read_json(folder / PIPELINE_CONFIG)
            subfolder = next((n for n, v in index.items() if isinstance(v, list) and cls.__name__ in v[1:]), None)
            if subfolder is not None and not stays_below(subfolder):
                raise CheckpointError(f"{folder} has a component '{subfolder}', expected the name of a folder in it")
        folder = folder / (subfolder or "")
        is_model = issubclass(cls, nn.Module)
        config = read_json(folder / getattr(cls, "config_name", MODEL_CONFIG))
        if (saved_from := config.get("_class_name")) != cls.__name__:
            raise CheckpointError(f"{folder} holds a '{saved_from}', expected a '{cls.__name__}': load it as that")
        if not is_model:
            with using(folder):
                return super().from_pretrained(folder, **options)  # type: ignore[misc]
        _require_safetensors(folder)
        check_own(folder, config)
        report_wanted = options.pop("output_loading_info", False)
        with using(folder), warnings.catch_warnings():
            # diffusers leaves it to Python to close the file.
            warnings.simplefilter("ignore", ResourceWarning)
            check_sizes(folder, config, lambda: cls.from_config(config))  # type: ignore[attr-defined]
            model, report = super().from_pretrained(  # type: ignore[misc]
                folder, **{**options, **IN_MEMORY, "use_safetensors": True, "output_loading_info": True}
            )
        _require_all_keys(folder, report)
        return (model, report) if report_wanted else model
