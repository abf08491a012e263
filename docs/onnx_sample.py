"""Inspect an image with an exported model; needs onnxruntime, numpy and pillow, and nothing of this program.

    python docs/onnx_sample.py tile.onnx image.png [image_threshold pixel_threshold]

Prints the verdict and writes the mask to the current folder, as the new file image_mask.png.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

WHITE = {"I": 65535, "F": 1}  # of gray images with 16 or 32 bits, and of floating-point ones


def main() -> None:
    if len(sys.argv) not in (3, 5):
        sys.exit(__doc__)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it would warn that thresholds can be given
    session = onnxruntime.InferenceSession(sys.argv[1], options)
    metadata = session.get_modelmeta().custom_metadata_map
    path = Path(sys.argv[2])
    original = ImageOps.exif_transpose(Image.open(path))
    if white := WHITE.get(original.mode[0]):
        original = np.asarray(original, np.float32) * 255 / white
        original = Image.fromarray(original.clip(0, 255).round().astype(np.uint8))
    original = original.convert("RGB")
    image = original
    if metadata["any_image_size"] == "false":
        size = int(metadata["image_width"]), int(metadata["image_height"])
        image = original.resize(size, Image.Resampling.BILINEAR)

    inputs = {"image": np.asarray(image)[None]}  # uint8 (1,h,w,3)
    names = ("image_threshold", "pixel_threshold")
    for name, value in zip(names, sys.argv[3:], strict=False):  # the model's own where they are left out
        inputs[name] = np.array([value], np.float32)
    score, defective, mask = session.run(["score", "defective", "mask"], inputs)

    threshold = inputs.get("image_threshold", [float(metadata["image_threshold"])])[0]
    verdict = "defective" if defective[0] else "good"
    target = Path(f"{path.stem}_mask.png")
    if target.exists():
        sys.exit(f"{target} exists; change to another folder")
    print(f"{path}: {verdict}, score {score[0]:.4g}, threshold {threshold:.4g}; mask in {target}")
    full = Image.fromarray(mask[0]).resize(original.size, Image.Resampling.NEAREST)
    full.save(target)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:  # of PIL, of onnxruntime, or of a threshold that is no number
        sys.exit(f"{sys.argv[0]}: {error}")
