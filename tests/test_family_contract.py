"""Every file in families/ fulfils the contract that families/family.py states."""

import pytest
import torch
from torch import nn

from lowvram.families import all_families
from lowvram.families.family import Family
from lowvram.weights.checkpoint import find_class
from lowvram.weights.layout import find_blocks

FAMILIES = list(all_families().values())


def build(family: Family, role: str) -> torch.nn.Module:
    """The tiny network of that role, with random weights."""
    model_class, config = find_class(family.component(role).class_name), family.tiny_configs[role]
    torch.manual_seed(0)
    if hasattr(model_class, "from_config"):
        return model_class.from_config(dict(config)).eval()
    return model_class(model_class.config_class(**config)).eval()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_contract(family: Family) -> None:
    roles = [component.role for component in family.components]
    assert len(set(roles)) == len(roles)
    assert set(family.tiny_configs) == set(family.published_configs)
    assert family.base in family.models
    for published in family.models.values():
        assert published.base in ("", *family.models)
    assert set(family.paddings) <= {"none", "max"} and len(family.aesthetic_scores) in (0, 2)
    assert family.max_tokens > 1 and family.default_steps > 0 and family.default_guidance_scale > 0

    for configs in (family.tiny_configs, family.published_configs):
        assert family.mismatch(configs) == ""
        for name in family.transformers:  # one that comes alone is of one family
            alone = {"_class_name": name, **configs["transformer"]}
            assert [each.name for each in FAMILIES if each.claims(alone)] == [family.name]

    networks = {role: build(family, role) for role in ("text_encoder", "transformer", "vae")}
    for role, network in networks.items():
        component = family.component(role)
        assert hasattr(torch, component.dtype)
        if component.blocks:  # the repeated blocks hold most of the weights
            blocks = find_blocks(network, component.blocks)
            inside = {id(p): p.numel() for block in blocks for p in block.parameters()}
            tables = sum(m.weight.numel() for m in network.modules() if type(m) is nn.Embedding)
            rest = sum(p.numel() for p in network.parameters()) - tables - sum(inside.values())
            assert len(blocks) >= 2 and sum(inside.values()) > rest

    with torch.inference_mode():
        ids = torch.tensor([[5, 6, 7, 1]])
        text, short = (
            {name: each[0] for name, each in encoded.items()}
            for encoded in (
                family.encode(networks["text_encoder"], some, torch.ones_like(some))
                for some in (ids, ids[:, -1:] if "none" in family.paddings else ids.flip(1))
            )
        )
        assert set(text) == set(family.text_tensors)
        assert text["prompt_embeds"].shape[:1] == ids.shape[1:]
        assert ("prompt_attention_mask" in text) == ("none" in family.paddings)
        channels = family.text_channels(family.tiny_configs["transformer"])
        assert text["prompt_embeds"].shape[1:] == (channels,)
        configs = {role: family.tiny_configs[role] for role in ("transformer", "vae")}
        asked, rendered = family.render_size(configs, None, True)
        assert asked == rendered
        shape = family.latent_shape(configs, rendered)
        latents = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0))
        transformer, timestep = networks["transformer"], torch.tensor(500)

        positive, negative = family.picture_conditions(rendered, family.aesthetic_scores)
        assert positive.keys() == negative.keys()
        text, short = text | positive, short | negative
        guided = family.conditions([text, text], [short, short])
        assert all(tensor.shape[0] == 4 for tensor in guided.values())
        with_text = family.conditions([text, text], [])
        without = family.conditions([short, short], [])
        towards = family.predict(transformer, latents, timestep, with_text, 1.0)
        away = family.predict(transformer, latents, timestep, without, 1.0)
        both = family.predict(transformer, latents, timestep, guided, 3.0)
        assert both.shape == latents.shape
        torch.testing.assert_close(both, away + 3 * (towards - away), rtol=1e-4, atol=1e-4)

        pixels = networks["vae"].decode(family.unscale(latents, networks["vae"].config))
        assert pixels.sample.shape == (2, 3, rendered.height, rendered.width)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_text_is_cleaned_as_upstream_does(family: Family) -> None:
    if not family.cleans_captions:
        assert family.clean("  A Cat, <b>bold</b>  ", False) == "  A Cat, <b>bold</b>  "
        return
    assert family.clean("  A Cat, <b>bold</b> https://a.com  ", True) == "a cat, bold"
    assert family.clean("  A Cat  ", False) == "a cat"
