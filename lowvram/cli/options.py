"""The command line's options, each declared once. How their text is read is in words.py."""

from pathlib import Path
from typing import Annotated

import typer

from lowvram.prepared import WEIGHTS as PREPARED_WEIGHTS
from lowvram.request.decode import DECODES
from lowvram.request.denoise import TRANSFORMER_WEIGHTS
from lowvram.request.encode import DTYPES, PADDINGS, WEIGHTS
from lowvram.request.schedulers import SIGMA_SPACINGS, SPACINGS

Prompts = Annotated[
    list[str], typer.Argument(metavar="PROMPT…", help="What the pictures shall show.")
]
PromptsOrNone = Annotated[
    list[str] | None,
    typer.Argument(metavar="PROMPT…", help="What the pictures shall show.", show_default=False),
]
PromptsFile = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="Instead of PROMPT: a list, as text (a prompt a line), CSV or JSON Lines; - for "
        "standard input.",
    ),
]
ModelName = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="Short name (pixart-sigma-1024, demo, …), repository or folder."
    ),
]
FileModel = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Checked against the model that the file was made for."),
]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Commit, branch or tag of a repository.")
]
_ELSEWHERE = "owner/name[@revision], a folder, or a short name"
Transformer = Annotated[
    str | None,
    typer.Option("--transformer", help=f"Another than the model's: {_ELSEWHERE}."),
]
Vae = Annotated[str | None, typer.Option("--vae", help=f"Another than the model's: {_ELSEWHERE}.")]
TextEncoder = Annotated[
    str | None,
    typer.Option(
        "--text-encoder",
        help=f"Another than the model's, with the tokenizer beside it: {_ELSEWHERE}.",
    ),
]
Negative = Annotated[
    str, typer.Option("--negative", "-n", help="What the pictures shall not show.")
]
Weights = Annotated[
    str,
    typer.Option("--weights", help=f"How the text encoder's weights sit: {', '.join(WEIGHTS)}."),
]
TransformerWeights = Annotated[
    str,
    typer.Option(
        "--weights", help=f"How the transformer's weights sit: {', '.join(TRANSFORMER_WEIGHTS)}."
    ),
]
Decode = Annotated[
    str, typer.Option("--decode", help=f"How the VAE decodes: {', '.join(DECODES)}.")
]
PreparedWeights = Annotated[
    str,
    typer.Option(
        "--weights",
        help=f"{', '.join(PREPARED_WEIGHTS)}; 8bit and 4bit are of the text encoder only.",
    ),
]
StageBudget = Annotated[
    str | None,
    typer.Option(
        "--stage-budget",
        help="What tensors of a stage may take on the device: 0.5GiB; counts instead of --vram.",
    ),
]
Vram = Annotated[
    str | None,
    typer.Option(
        "--vram",
        envvar="LOWVRAM_VRAM",
        help="What the process may take on the device: 4GiB; default: what is free now.",
    ),
]
CleanCaption = Annotated[
    bool | None,
    typer.Option(
        "--clean/--no-clean",
        help="Clean the prompt as the training captions were; default: where they were.",
    ),
]
Padding = Annotated[
    str | None,
    typer.Option(
        "--padding",
        help=f"Encode real tokens only, or pad as diffusers does: {', '.join(PADDINGS)}; default: "
        "none, where the model masks padding.",
    ),
]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", help="Where prompts are cut; default: the model's.")
]
Weighting = Annotated[
    bool,
    typer.Option(
        "--weighting/--no-weighting",
        help="Read (word:1.3), (word) and [word] as weights; else brackets are text.",
    ),
]
Cache = Annotated[
    bool,
    typer.Option(
        "--cache/--no-cache",
        help="Take embeddings of texts that were encoded before, and keep new ones.",
    ),
]
Embeds = Annotated[
    Path | None,
    typer.Option(
        "--embeds",
        help="Safetensors file with `prompt_embeds` and masks to take instead of encoding; "
        "the prompts are its labels.",
    ),
]
Seed = Annotated[
    str,
    typer.Option("--seed", "-s", help="Of the first picture; or a list or range: 7, 1,2,5, 3-6."),
]
Images = Annotated[
    int | None, typer.Option("--images", help="Pictures for each prompt; default: one a seed.")
]
Steps = Annotated[int | None, typer.Option("--steps", help="Default: the model's.")]
Timesteps = Annotated[
    str | None, typer.Option("--timesteps", help="Instead of --steps: 999,750,500,250.")
]
Sigmas = Annotated[
    str | None, typer.Option("--sigmas", help="Instead of --steps, for schedulers that take them.")
]
Guidance = Annotated[
    float | None, typer.Option("--guidance", "-g", help="Guidance scale; 1 or less turns it off.")
]
RefineStrength = Annotated[
    float | None,
    typer.Option(
        "--strength", help="How much of the picture is made anew, 0 to 1; default: the model's."
    ),
]
Aesthetic = Annotated[
    str | None,
    typer.Option(
        "--aesthetic",
        help="How beautiful, 0 to 10, the picture and what is negative shall be; default: 6,2.5.",
    ),
]
PictureSize = Annotated[
    str | None, typer.Option("--size", help="WIDTHxHEIGHT in px; default: the model's.")
]
Binning = Annotated[
    bool,
    typer.Option(
        "--binning/--no-binning",
        help="Compute at the nearest size the model knows, then resize and crop.",
    ),
]
Eta = Annotated[float, typer.Option("--eta", help="Noise added in each step (DDIM).")]
Scheduler = Annotated[
    str,
    typer.Option(
        "--scheduler",
        help="euler, unipc, dpm++2m-sde, …: see lowvram models --schedulers; default: the model's.",
    ),
]
Spacing = Annotated[
    str,
    typer.Option("--spacing", help=f"Of timesteps: {', '.join(SPACINGS)}; default: the model's."),
]
SigmaSpacing = Annotated[
    str,
    typer.Option(
        "--sigma-spacing",
        help=f"Of noise levels: {', '.join(SIGMA_SPACINGS)}; default: the model's.",
    ),
]
Karras = Annotated[
    bool | None,
    typer.Option("--karras/--no-karras", help="Short for --sigma-spacing karras, or plain."),
]
Latents = Annotated[
    Path | None,
    typer.Option("--latents", help="Safetensors file with `latents`: the noise, not drawn."),
]
Start = Annotated[
    Path | None,
    typer.Option("--start", help="Start from what encode-image or an earlier denoise wrote."),
]
Image = Annotated[
    Path | None,
    typer.Option("--image", help="A picture to start from: it goes through encode-image first."),
]
SampleSeed = Annotated[
    int | None,
    typer.Option(
        "--sample-seed",
        help="Draw the picture's latents from the VAE's posterior; default: take its mode.",
    ),
]
StartPicture = Annotated[
    int | None,
    typer.Option("--start-picture", help="Of a start with several, the one for all, from 0."),
]
Strength = Annotated[
    float | None,
    typer.Option(
        "--strength", help="How much of a start is made anew, 0 to 1; default: the model's."
    ),
]
Towards = Annotated[
    int | None,
    typer.Option("--towards", help="A second seed: noise between that of --seed and this one."),
]
At = Annotated[
    str | None,
    typer.Option("--at", help="Where between the two, a picture each; default: 0,0.25,0.5,0.75,1."),
]
CheckpointEvery = Annotated[
    int,
    typer.Option(
        "--checkpoint-every",
        metavar="STEPS",
        help="Save so often; the same command with the same -o goes on from there. 0: never.",
    ),
]
Preview = Annotated[
    int,
    typer.Option(
        "--preview",
        metavar="STEPS",
        help="Write a small x.preview.png beside the output so often. 0: never.",
    ),
]
Refine = Annotated[
    bool, typer.Option("--refine", help="Let a refiner work on the pictures afterwards.")
]
StrengthOfRefiner = Annotated[
    float | None,
    typer.Option(
        "--refine-strength", help="How much it makes anew, 0 to 1; default: the refiner's."
    ),
]
Refiner = Annotated[
    str, typer.Option("--refiner", help="Short name, repository or folder of the refiner.")
]
Dtype = Annotated[str, typer.Option("--dtype", help=f"To compute in: {', '.join(DTYPES)}.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, xpu, mps.")]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Pictures per call of the model.")]
InProcess = Annotated[
    bool, typer.Option("--in-process", help="All stages in one process, for debugging.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")]
