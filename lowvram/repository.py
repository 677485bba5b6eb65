"""Models: short names, Hub repositories and local folders, one source per component.

Nothing here loads weights or imports torch. `resolve` turns what the user named into a `Model`,
which says for each component which commit of which repository, or which folder, it comes from.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lowvram.errors import ModelError, RequestError
from lowvram.families import all_families
from lowvram.families.family import Config, Family, Published
from lowvram.files import (
    Source,
    absolute,
    commit,
    download,
    find,
    fingerprint,
    missing_weights,
    read_json,
)
from lowvram.pickled import unpickled
from lowvram.unavailable import download_command

DEFAULT_MODEL = "pixart-sigma-1024"

_RARE = ("timesteps", "swapped")  # fields that a model's record has only where they say something


@dataclass(frozen=True)
class Model:
    """A model with every component placed.

    Attributes:
        name: as the user gave it (a short name, a repository, a folder).
        family: name of its family.
        sources: by component role.
        steps, guidance_scale: its defaults.
        timesteps: that it starts from by default, instead of `steps`; empty for none.
        swapped: roles of the components that do not come with it: see swaps.py.
    """

    name: str
    family: str
    sources: Mapping[str, Source]
    steps: int
    guidance_scale: float
    timesteps: tuple[int, ...] = ()
    swapped: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """What artifacts say of the model, JSON types only."""
        record = asdict(self)
        rare = {name: list(record.pop(name)) for name in _RARE}
        return record | {name: value for name, value in rare.items() if value}

    def public_record(self) -> dict[str, Any]:
        """The same for a picture that may be shared: no path of this machine."""
        record: dict[str, Any] = {
            "name": _public(self.name),
            "family": self.family,
            "revisions": {role: source.revision for role, source in self.sources.items()},
        }
        if self.swapped:
            record["swapped"] = {role: _public(self.sources[role].place) for role in self.swapped}
        return record

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> "Model":
        """The model that `record()` described.

        Raises:
            ModelError: the record is not one, or names a family that is not known here.
        """
        try:
            sources = {role: Source(**source) for role, source in record["sources"].items()}
            rare = {name: tuple(record.get(name, ())) for name in _RARE}
            model = Model(**{**record, "sources": sources, **rare})
        except (KeyError, TypeError, AttributeError):
            raise ModelError("the file names no usable model: name it with -m") from None
        if model.family not in all_families():
            raise ModelError(f"model family {model.family!r} is not known here: update lowvram")
        return model

    def get_family(self) -> Family:
        """Its family."""
        return all_families()[self.family]

    def config(self, role: str) -> Config:
        """The component's configuration, fetched singly."""
        name = "scheduler_config.json" if role == "scheduler" else "config.json"
        name = f"{self.subfolder(role)}/{name}".removeprefix("/")
        path = find(self.sources[role], name)
        if path is None:
            place = self.sources[role].place
            raise ModelError(f"{place} has no {name}, or not in the cache: {_check(self, role)}")
        return read_json(path)

    @property
    def vae_upcasts(self) -> bool:
        """Whether its VAE overflows in fp16, and computes in float32; diffusers' default is so."""
        return bool(self.config("vae").get("force_upcast", True))

    def fetch(self, role: str) -> Path:
        """The component's folder, downloaded first if need be.

        Raises:
            ModelError: not to be had, no safetensors in it, or changed since the artifact was made.
        """
        source, subfolder = self.sources[role], self.subfolder(role)
        if source.kind == "hub":
            folder = download(source, subfolder)
            if missing_weights(folder) and self.is_pickled(role):
                folder = unpickled(source, subfolder, folder)
        else:
            folder = source.folder / subfolder
            if not folder.is_dir():
                raise ModelError(f"{folder} does not exist: {_check(self, role)}")
            if fingerprint(folder) != source.revision:
                raise ModelError(
                    f"{folder} has changed since this file was made from it: "
                    "encode again, or name the model with -m to use it as it is now"
                )
        component = self.get_family().component(role)
        missing = missing_weights(folder) if component.dtype else ""
        if component.needs and not any((folder / name).is_file() for name in component.needs):
            missing = " or ".join(component.needs)
        if missing:
            raise ModelError(f"{folder} has no {missing}: {_check(self, role)}")
        return folder

    def is_pickled(self, role: str) -> bool:
        """Whether the component's weights are known to be published as a pickle only."""
        place = self.sources[role].place
        entries = (entry for family in all_families().values() for entry in family.models.values())
        return any(role in entry.pickled and entry.repository == place for entry in entries)

    def subfolder(self, role: str) -> str:
        """Where the component lies in its source; "" for one saved on its own."""
        subfolder = self.get_family().component(role).subfolder
        may_be_alone = role == "transformer" or (role in self.swapped and role != "tokenizer")
        if may_be_alone and not find(self.sources[role], f"{subfolder}/config.json"):
            return ""
        return subfolder


def resolve(name: str, revision: str | None = None) -> Model:
    """Find a model by short name, repository id or folder.

    Args:
        name: e.g. "pixart-sigma-1024", "owner/repository" or a folder in diffusers layout.
        revision: commit, branch or tag on the Hub; None for the pinned or the newest one.

    Raises:
        ModelError: no such model, not to be had, or of no family known here.
    """
    for family in all_families().values():
        for entry in family.models.values():
            if name == entry.repository and not entry.bundled:
                # What it lacks, and its defaults, are known; the newest revision counts.
                return _published(family, name, replace(entry, revision="main"), revision)
        if name in family.models:
            if revision is not None and family.models[name].bundled:
                raise RequestError(f"--revision {revision}: {name} has none, leave it out")
            return _published(family, name, family.models[name], revision)
    folder = absolute(name)
    if name and os.path.isdir(folder):
        if revision is not None:
            raise RequestError(f"--revision {revision}: a folder has none, leave it out")
        return _unpublished(name, Source(str(folder.resolve()), "", "folder"))
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _unpublished(name, Source(name, revision or "main", "hub"))
    known = ", ".join(name for family in all_families().values() for name in family.models)
    raise ModelError(
        f"no model {name!r}: use one of {known}, an existing folder, or a repository owner/name"
    )


def _published(family: Family, name: str, entry: Published, revision: str | None) -> Model:
    if entry.bundled:
        source = Source(entry.repository, "", "bundled")
    else:
        source = Source(entry.repository, revision or entry.revision, "hub")
    own = entry.own if entry.base else [component.role for component in family.components]
    return _placed(name, family, source, set(own), entry)


def _unpublished(name: str, source: Source) -> Model:
    """A repository or folder, whole or with a transformer only."""
    index = find(source, "model_index.json")
    if index is not None:
        listed = read_json(index)
        for family in all_families().values():
            if listed.get("_class_name") in family.pipelines:
                _check_foreign(name, family, listed)
                roles = {c.role for c in family.components if c.subfolder in listed}
                return _placed(name, family, source, roles, None)
        raise ModelError(
            f"{name} is a {listed.get('_class_name')}, which no family here can run: "
            f"families are {', '.join(all_families())}"
        )
    path = find(source, "transformer/config.json") or find(source, "config.json")
    config = read_json(path) if path else {}
    for family in all_families().values():
        if family.claims(config):
            return _placed(name, family, source, {"transformer"}, None)
    raise ModelError(
        f"{name} holds neither model_index.json nor a transformer that is known here: "
        "give a folder or repository in diffusers layout"
    )


def _check_foreign(name: str, family: Family, listed: Mapping[str, Any]) -> None:
    """Refuse a model that has the family's pipeline, but other parts."""
    for part in family.foreign:
        if any(listed.get(part) or ()):
            raise ModelError(
                f"{name} has a {part}, which {family.name} has not: it is another model, and "
                f"families here are {', '.join(all_families())}"
            )


def _placed(
    name: str, family: Family, source: Source, roles: set[str], entry: Published | None
) -> Model:
    """A model whose `roles` come from `source` and the rest from the family's base."""
    missing = {c.role for c in family.components} - roles
    base = (entry.base if entry else "") or family.base
    sources = dict(resolve(base).sources) if missing else {}
    for role in sorted(roles):
        sources[role] = pinned(source, family.component(role).subfolder)
    return Model(
        name=str(source.folder) if source.kind == "folder" else name,
        family=family.name,
        sources=sources,
        steps=(entry.steps if entry else 0) or family.default_steps,
        guidance_scale=(entry.guidance_scale if entry else 0) or family.default_guidance_scale,
        timesteps=entry.timesteps if entry else (),
    )


def pinned(source: Source, subfolder: str) -> Source:
    """The source with its revision made exact: a commit, or a folder's fingerprint."""
    if source.kind == "hub":
        found = commit(source.place, source.revision, f"{subfolder}/config.json")
        return Source(source.place, found, "hub")
    folder = source.folder / subfolder
    folder = folder if folder.is_dir() else source.folder
    return Source(source.place, fingerprint(folder), source.kind)


def _public(name: str) -> str:
    """Without the folders of this machine that lead to it."""
    return Path(name).name if Path(name).is_absolute() else name


def _check(model: Model, role: str) -> str:
    source = model.sources[role]
    if source.kind == "hub":
        return f"run {download_command(source)} where there is a network"
    return f"check that {model.name} is complete, in diffusers layout"
