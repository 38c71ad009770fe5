"""A model card: README.md in a pipeline's folder, with settings, how to load it, and a picture."""

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from mhla_gen.errors import OccupiedError, UserError
from mhla_gen.files import write_text, written_whole
from mhla_gen.files.saved import read_json
from mhla_gen.hub import INDEX_NAME, find
from mhla_gen.sampling.manifest import MANIFEST_NAME
from mhla_gen.sampling.sample_files import SHEET_NAME

CARD_NAME, PICTURE_NAME = "README.md", "samples.png"
# By this line we know a card again, and write over no other.
_MARK = "<!-- written by mhla-gen sample card=true -->"


def check(pipeline: str) -> Path:
    """The folder that the card of a pipeline belongs to.

    Raises:
        ValueError: If the pipeline is not a folder here.
        OccupiedError: If there is a README.md or a samples.png that we did not write.
    """
    folder = Path(find(pipeline) or pipeline)
    if not (folder / INDEX_NAME).is_file():
        raise UserError(f"card=true needs a saved pipeline in a folder, found pipeline={pipeline}")
    card, picture = folder / CARD_NAME, folder / PICTURE_NAME
    ours = card.is_file() and _MARK in card.read_text(encoding="utf-8", errors="replace")
    for path in (card, picture):
        # A picture is ours where the card is.
        if path.exists() and not ours:
            what = "a card" if path == card else "a picture"
            raise OccupiedError(f"{path} is not {what} of ours; move it away or set card=false")
    return folder


def write(pipeline: str, samples: Path) -> Path:
    """Write the card of a pipeline, and its picture.

    Args:
        pipeline: Its folder, or the run that it is in.
        samples: Folder of a finished sample set of it.

    Returns:
        The card.

    Raises:
        ValueError: If the pipeline is not a folder here.
        OSError: If there is a README.md that we did not write.
    """
    folder = check(pipeline)
    made = read_json(samples / MANIFEST_NAME, "sample the set again")
    pictured = (samples / SHEET_NAME).is_file()
    card = ModelCard(f"---\n{_metadata(made).to_yaml()}\n---\n\n{_text(made, pictured)}")
    # First: by it the picture is known as ours.
    write_text(folder / CARD_NAME, str(card))
    if pictured:
        with written_whole(folder / PICTURE_NAME) as partial:
            shutil.copyfile(samples / SHEET_NAME, partial)
    return folder / CARD_NAME


def _metadata(made: dict[str, Any]) -> ModelCardData:
    of_prompts, video = "samples" in made, len(made["shape"]) == 4
    task = "text-to-video" if video else "text-to-image" if of_prompts else None
    task = task or "unconditional-image-generation"
    return ModelCardData(library_name="diffusers", pipeline_tag=task, tags=["diffusers", "mhla"])


def _text(made: dict[str, Any], pictured: bool) -> str:
    settings, transformer = made["settings"], made["transformer"]
    rows = {
        "transformer": transformer["class"],
        "attention": _attention(transformer),
        "scheduler": made["scheduler"]["class"],
        "steps": settings["num_inference_steps"],
        "guidance scale": settings["guidance_scale"],
        "arithmetic": settings["dtype"],
        "size": " × ".join(map(str, made["shape"])),
        "weights (SHA-256)": made["identity"]["weights"]["transformer"][:16],
        "versions": ", ".join(f"{name} {number}" for name, number in made["versions"].items()),
    }
    if made["pipeline"] == "ClassConditionalPipeline":
        load = (
            "from mhla_gen import ClassConditionalPipeline\n\n"
            "pipe = ClassConditionalPipeline.from_pretrained(FOLDER)\n"
            f"pipe([0], guidance_scale={settings['guidance_scale']}).images[0].save('sample.png')"
        )
    else:
        load = (
            "import mhla_gen  # registers its classes\nfrom diffusers import DiffusionPipeline\n\n"
            "pipe = DiffusionPipeline.from_pretrained(FOLDER)"
        )
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    picture = f"![samples]({PICTURE_NAME})\n\n" if pictured else ""
    return (
        f"{_MARK}\n\n# {made['pipeline']}\n\n{picture}"
        f"The samples were made with these settings and seed {settings['seed']}:\n\n"
        f"| | |\n|---|---|\n{table}\n\n```python\n{load}\n```\n\n"
        "FOLDER is this folder, or what `huggingface_hub.snapshot_download` returns for this "
        "repository.\n"
    )


def _attention(transformer: dict[str, Any]) -> str:
    mhla = transformer.get("mhla")
    if mhla is None:
        return "as in diffusers"
    given = ", ".join(f"{key} {value}" for key, value in mhla.items() if value is not None)
    return f"MHLA ({given})"
