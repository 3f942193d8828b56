"""Pictures for servers: an image and the limits of training in; a data URI of the pixels that the model was trained on out."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_dft.as_trained import Asking
from vlm_dft.media import open_image
from vlm_dft.sources import DEFAULT_ACCESS, MediaAccess

if TYPE_CHECKING:
    from vlm_dft.qwen_images import QwenImages

QWEN = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 3136, "max_pixels": 12_845_056}


def resizer(asking: Asking, model: str) -> QwenImages | None:
    """What brings pictures to the sizes of training; None where nothing limits them, so that the server does as it does.

    A server resizes too: to the same size, since one in whole tokens and within its own limits stays as it is.
    """
    if not (asking.min_pixels or asking.max_pixels):
        return None
    from vlm_dft.qwen_images import QwenImages

    own: dict[str, Any] = {}
    for folder in (Path(model), *(sorted(asking.run.glob("checkpoint-*")) if asking.run else ())):
        for name in ("preprocessor_config.json", "processor_config.json"):
            if not own and (folder / name).is_file():
                own = json.loads((folder / name).read_text(encoding="utf-8"))
                own = own.get("image_processor", own)
    sizes = {name: own.get(name, QWEN[name]) for name in ("patch_size", "temporal_patch_size", "merge_size")}
    return QwenImages(
        **sizes, min_pixels=asking.min_pixels or QWEN["min_pixels"], max_pixels=asking.max_pixels or QWEN["max_pixels"],
        mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), resize=asking.resize,  # type: ignore[arg-type]
    )  # fmt: skip


def data_uri(image: Any, rule: QwenImages | None, *, where: str, access: MediaAccess = DEFAULT_ACCESS) -> str:
    """The picture as the collator opens it, resized by `rule`, as a data URI: PNG, or the JPEG file that it is. Raises ImageError."""
    picture = open_image(image, where=where, access=access)
    if rule is None and (content := _plain_jpeg(image)) is not None:
        return _uri("jpeg", content)
    if rule is not None:
        from PIL import Image

        from vlm_dft.qwen_images import resized

        (pixels,) = resized(rule, [picture], [{}], rule.resize)
        picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return _uri("png", file.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _plain_jpeg(image: Any) -> bytes | None:
    """The bytes of a file that any decoder reads as open_image does: a JPEG in colour, not turned."""
    if not isinstance(image, (str, Path)) or len(str(image)) > 4096 or not Path(image).is_file():
        return None
    from PIL import Image

    with Image.open(image) as opened:
        plain = opened.format == "JPEG" and opened.mode == "RGB" and opened.getexif().get(0x0112, 1) == 1
    return Path(image).read_bytes() if plain else None
