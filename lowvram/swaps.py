"""One component of a model taken from elsewhere: another repository, folder or short name.

`swap` looks at configuration files only, and refuses what cannot work together. The model that it
returns is written into the artifacts as any other: later stages need not be told again.
"""

import logging
import os
from dataclasses import replace
from pathlib import Path

from lowvram.errors import ModelError, RequestError
from lowvram.families import all_families
from lowvram.families.family import Component, Config, scaling_factor
from lowvram.files import Source, absolute, find, read_json
from lowvram.repository import DEFAULT_MODEL, Model, pinned, resolve

log = logging.getLogger(__name__)


def resolve_with(
    name: str = DEFAULT_MODEL,
    revision: str | None = None,
    *,
    transformer: str | Path | None = None,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
) -> Model:
    """A model by name, with components swapped. See `repository.resolve` and `swap`."""
    model = resolve(name, revision)
    return swap(model, transformer=transformer, vae=vae, text_encoder=text_encoder)


def swap(
    model: Model,
    *,
    transformer: str | Path | None = None,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
) -> Model:
    """The model with components from elsewhere.

    Args:
        transformer, vae, text_encoder: a repository (owner/name, or owner/name@revision), a folder
            (of a whole pipeline, or of the component alone) or a short name; None for the model's
            own. A text encoder brings the tokenizer that lies beside it.

    Raises:
        ModelError: there is no such component, or it is of another class.
        RequestError: its configuration does not go with those of the others.
    """
    places = {"transformer": transformer, "vae": vae, "text_encoder": text_encoder}
    for role, place in places.items():
        if place is not None:
            model = _swapped(model, role, str(place))
    return model


def refreshed(model: Model, old: Model) -> Model:
    """The model with the components that were swapped in `old`; folders as they are now."""
    sources = dict(model.sources)
    for role in old.swapped:
        source = old.sources[role]
        subfolder = model.get_family().component(role).subfolder
        sources[role] = source if source.kind == "hub" else pinned(source, subfolder)
    return replace(model, sources=sources, swapped=old.swapped)


def _swapped(model: Model, role: str, place: str) -> Model:
    component = model.get_family().component(role)
    source = _source(place, role)
    path = _config(source, component)
    option = f"--{role.replace('_', '-')} {place}"
    if path is None:
        raise ModelError(
            f"{option} has neither {component.subfolder}/config.json nor config.json: "
            "give a folder or repository in diffusers layout"
        )
    config = read_json(path)
    if not _is_of(model, component, config):
        found = config.get("_class_name") or ", ".join(config.get("architectures") or ()) or "none"
        wanted = component.class_name.rpartition(".")[2]
        why = "its configuration is of another family" if found == wanted else f"its class: {found}"
        raise ModelError(f"{option} is no {wanted} for {model.family} ({why})")
    taken = {role: pinned(source, component.subfolder)}
    tokenizer = model.get_family().component("tokenizer")
    if role == "text_encoder" and any(
        find(source, f"{tokenizer.subfolder}/{name}") for name in tokenizer.needs
    ):
        taken["tokenizer"] = pinned(source, tokenizer.subfolder)
    swapped = tuple(sorted({*model.swapped, *taken}))
    new = replace(model, sources={**model.sources, **taken}, swapped=swapped)
    _check_together(model, new, role, option)
    return new


def _source(place: str, role: str) -> Source:
    """Where a component shall come from; its revision not yet exact."""
    for family in all_families().values():
        if place in family.models:
            return resolve(place).sources[role]
    folder = absolute(place)
    if place and os.path.isdir(folder):
        return Source(str(folder.resolve()), "", "folder")
    name, _, revision = place.partition("@")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return Source(name, revision or "main", "hub")
    raise ModelError(
        f"--{role.replace('_', '-')} {place} is neither a folder that exists, a repository "
        "owner/name, nor a short name"
    )


def _config(source: Source, component: Component) -> Path | None:
    return find(source, f"{component.subfolder}/config.json") or find(source, "config.json")


def _is_of(model: Model, component: Component, config: Config) -> bool:
    """Whether a configuration is of the component's class."""
    if component.role == "transformer":
        return model.get_family().claims(config)
    name = component.class_name.rpartition(".")[2]
    # Of transformers "t5" or "clip_text_model", whatever class of that network it was saved from.
    kind = str(config.get("model_type") or "-").replace("_", "")
    return config.get("_class_name") == name or name.lower().startswith(kind)


def _check_together(old: Model, new: Model, role: str, option: str) -> None:
    configs = {each: new.config(each) for each in ("text_encoder", "transformer", "vae")}
    mismatch = new.get_family().mismatch(configs)
    if mismatch:
        raise RequestError(f"{option} does not go with {new.name}: {mismatch}")
    scale, own = scaling_factor(configs["vae"]), scaling_factor(old.config("vae"))
    if role == "vae" and scale != own:
        log.warning(
            "%s scales latents by %s and the model's own VAE by %s: it may have been trained on "
            "others",
            option,
            scale,
            own,
        )
