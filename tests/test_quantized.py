"""8-bit and 4-bit through real bitsandbytes, and the budgets of T5-XXL by a count."""

from pathlib import Path

import bitsandbytes
import pytest
import torch
import transformers
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from safetensors.torch import load_file

import lowvram
from lowvram import errors
from lowvram.families.pixart import FAMILY
from lowvram.memory.count import LiveBytes
from lowvram.weights.checkpoint import counted_bytes
from lowvram.weights.quantized import Quantized, _leave_unpacked
from lowvram.weights.whole import Whole

CPU = torch.device("cpu")


def skeleton(config: dict[str, object]) -> torch.nn.Module:
    """A T5 encoder without storage."""
    with torch.device("meta"):
        return transformers.T5EncoderModel(transformers.T5Config(**config))


@pytest.mark.parametrize(("bits", "budget"), [(8, 5.905e9), (4, 4.35e9)])
def test_t5_xxl_keeps_its_budget(bits: int, budget: float) -> None:
    model = skeleton(FAMILY.published_configs["text_encoder"])
    assert sum(p.numel() for p in model.parameters()) == 4_762_310_656
    found = sum(Quantized(bits, torch.bfloat16).sizes(model))
    assert 0.95 * budget < found <= budget


@pytest.mark.parametrize(
    ("width", "height", "packed"),
    [(32, 64, False), (96, 64, False), (64, 48, False), (64, 32, True)],
)
def test_layers_that_cpu_kernels_cannot_pack_are_left(
    width: int, height: int, packed: bool
) -> None:
    """As on a CPU with AVX512-BF16, where bitsandbytes repacks in the first product."""
    layer = bitsandbytes.nn.Linear4bit(width, height)
    layer.support_avx512bf16_for_cpu = True
    _leave_unpacked(torch.nn.Sequential(layer))
    assert layer.support_avx512bf16_for_cpu is packed


@pytest.mark.parametrize("packs", [True, False])
def test_what_laying_a_matrix_out_anew_takes_is_foretold(
    packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes does it on CPUs with AVX512-BF16, in the first product."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: packs)
    network = skeleton(FAMILY.published_configs["text_encoder"] | {"num_layers": 1})
    strategy, most = Quantized(4, torch.bfloat16), 4096 * 10240  # wi_0
    assert strategy.workspace(network, 20, "cpu") == (7 if packs else 2) * most
    assert strategy.workspace(network, 20, "cuda") == 2 * most
    weight = torch.randn(1280, 512, dtype=torch.bfloat16)
    given = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to("cpu")
    with torch.inference_mode(), LiveBytes("cpu") as live:
        _convert_weight_packed_for_cpu(given.data, given.quant_state)
    assert live.peak == 7 * 1280 * 512


@pytest.mark.parametrize("bits", [8, 4])
def test_the_count_is_what_loading_takes(bits: int, tiny: Path) -> None:
    strategy = Quantized(bits, torch.bfloat16)
    model = strategy.load(transformers.T5EncoderModel, tiny / "text_encoder", CPU).model
    kind = {8: "Linear8bitLt", 4: "Linear4bit"}[bits]
    quantised = [name for name, module in model.named_modules() if type(module).__name__ == kind]
    layers = FAMILY.tiny_configs["text_encoder"]["num_layers"]
    assert len(quantised) == 6 * layers  # q, k, v, o, wi_0 and wi_1; never wo
    assert not any(name.endswith(".wo") for name in quantised)
    assert model.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.bfloat16
    counted = sum(strategy.sizes(skeleton(FAMILY.tiny_configs["text_encoder"])))
    assert counted == counted_bytes(model)


def test_smaller_strategies_are_smaller_and_close(tiny: Path, tmp_path: Path) -> None:
    sizes, embeds = [], []
    for weights in ("whole", "8bit", "4bit"):
        path = tmp_path / f"{weights}.embeds.safetensors"
        result = lowvram.encode("a red circle", str(tiny), output=path, weights=weights)
        assert (result.report.weights, result.report.dtype) == (weights, "bfloat16")
        assert result.report.left_behind == []
        sizes.append(result.report.weights_bytes)
        embeds.append(load_file(path)["0.prompt_embeds"].float())
    assert sizes[0] > sizes[1] > sizes[2]
    for other, least in zip(embeds[1:], (0.99, 0.9), strict=True):
        assert not torch.equal(other, embeds[0])
        assert torch.cosine_similarity(other.flatten(), embeds[0].flatten(), dim=0) > least


def test_quantised_folders_are_not_taken_for_something_else(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "8bit"
    model = (
        Quantized(8, torch.bfloat16)
        .load(transformers.T5EncoderModel, tiny / "text_encoder", CPU)
        .model
    )
    model.save_pretrained(folder)
    for strategy in (Quantized(4, torch.bfloat16), Whole(torch.bfloat16)):
        with pytest.raises(errors.ModelError, match="is quantised already"):
            strategy.load(transformers.T5EncoderModel, folder, CPU)
    again = Quantized(8, torch.bfloat16).load(transformers.T5EncoderModel, folder, CPU)
    assert counted_bytes(again.model) == counted_bytes(model)


def test_missing_weights_are_an_error_and_not_random(tiny: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import save_file

    folder = tmp_path / "vae"
    shutil.copytree(tiny / "vae", folder)
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    del tensors["decoder.conv_in.weight"]
    save_file(tensors, path)
    from diffusers import AutoencoderKL

    with pytest.raises(errors.ModelError, match=r"lacks 1 weights.*decoder.conv_in.weight"):
        Whole(torch.float32).load(AutoencoderKL, folder, CPU)
