"""Videos: an open file or a list of frames in, sampled frames out, by the rules of qwen-vl-utils 0.0.14."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlm_dft.chat import VIDEO_SETTINGS
from vlm_dft.errors import ImageError, RowError
from vlm_dft.media import diagnosis, open_image
from vlm_dft.sources import DEFAULT_ACCESS, MediaAccess, content_of, why

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

log = logging.getLogger(__name__)
CONTAINERS = "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,ogg,flv,asf,gif,h264,hevc,ivf,m4v"  # FFmpeg's names


@dataclass(frozen=True, slots=True)
class Video:
    """Sampled frames, and what a processor's VideoMetadata wants to know of them."""

    frames: Tensor  # uint8 [T, 3, H, W]; T is even
    metadata: dict[str, Any]  # fps of the file, frames_indices, total_num_frames, video_backend
    sample_fps: float  # sampled frames a second


_MOV_FAMILY = "mov,mp4"  # FFmpeg's name of the container whose frame count is exact


def open_video(
    source: Any, *, where: str = "video", access: MediaAccess = DEFAULT_ACCESS, keys: Mapping[str, Any] | None = None
) -> Video:
    """Sample a video file (a path, URI, bytes: as open_image) or a list of frames (whatever open_image takes).

    `keys` of a file: fps (default 2) with min_frames and max_frames, or nframes; video_start and video_end in seconds.
    Of a list: sample_fps, raw_fps; an odd number repeats its last frame. A file is decoded in order with PyAV, because
    seeking gives wrong frames of some files (decord 0.6 and AVI). Raises ImageError or RowError naming `where`.
    """
    keys = _checked_keys(keys, where)
    if not isinstance(source, (list, tuple)):
        return _decoded(source, where, access, keys)
    frames = _frame_list(source, where, access)
    sizes = sorted({frame.size for frame in frames})
    if len(sizes) > 1:
        raise RowError(f"{where}: the frames of a video have one size, found {sizes}. Resize them, or use qwen_video.")
    return _video_of(frames, keys)


def qwen_video(
    source: Any,
    *,
    where: str = "video",
    access: MediaAccess = DEFAULT_ACCESS,
    keys: Mapping[str, Any] | None = None,
    patch_size: int = 14,
) -> Video:
    """open_video resized as qwen_vl_utils.fetch_video does: frames are float [T, 3, h, w] of 0..255.

    Further keys: min_pixels, max_pixels, total_pixels, or resized_height with resized_width. `patch_size`: 14 for
    Qwen2-VL and Qwen2.5-VL, 16 for Qwen3-VL. The variable MODEL_SEQ_LEN is not read; give total_pixels instead.
    """
    from PIL.Image import Resampling
    from torchvision.transforms import InterpolationMode  # type: ignore[import-untyped]
    from torchvision.transforms.functional import resize  # type: ignore[import-untyped]

    keys, factor = _checked_keys(keys, where), patch_size * 2
    if isinstance(source, (list, tuple)):
        # fetch_video passes the factor on as a patch size, so that single frames become multiples of twice the factor
        unit = factor * 2
        bounds = keys.get("min_pixels", 4 * unit**2), keys.get("max_pixels", 16384 * unit**2)
        resized = []
        for frame in _frame_list(source, where, access):
            height, width = _target_size(frame.height, frame.width, unit, keys, bounds, (4, 16384), where)
            resized.append(frame.resize((width, height), Resampling.BICUBIC))
        if len({frame.size for frame in resized}) > 1:
            raise RowError(
                f"{where}: the frames differ in size. Give resized_height and resized_width, or resize them."
            )
        video = _video_of(resized, keys)
    else:
        video = _decoded(source, where, access, keys)
    n_frames, _, height, width = video.frames.shape
    least = keys.get("min_pixels", 128 * factor**2)
    total = keys.get("total_pixels", 128000 * factor**2 * 0.9)
    most = max(min(768 * factor**2, total / n_frames * 2), int(least * 1.05))
    if keys.get("max_pixels", most) > most:
        log.warning(
            "%s: max_pixels %s is over the limit of %s frames and is lowered to %s.",
            where,
            keys["max_pixels"],
            n_frames,
            most,
        )
    bounds = least, min(keys.get("max_pixels", most), most)
    size = _target_size(height, width, factor, keys, bounds, (4, 16384), where)
    frames = resize(video.frames, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True).float()
    return Video(frames, video.metadata, video.sample_fps)


def _checked_keys(keys: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    keys = {k: v for k, v in (keys or {}).items() if k not in ("type", "video") and v is not None}
    if unknown := sorted(set(keys) - set(VIDEO_SETTINGS)):
        raise RowError(f"{where}: unknown video keys {unknown}. Known: {', '.join(VIDEO_SETTINGS)}.")
    for key, value in keys.items():
        least = 0 if key == "video_start" else 1e-9
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < math.inf:
            raise RowError(f"{where}: expected a positive number as the video's {key}, found {value!r}.")
    if "fps" in keys and "nframes" in keys:
        raise RowError(f"{where}: a video takes either fps or nframes, found both. Drop one.")
    return keys


def _frame_list(source: Sequence[Any], where: str, access: MediaAccess) -> list[Image]:
    if not source:
        raise RowError(f"{where}: the video's list of frames is empty. Give at least one frame.")
    frames = [open_image(frame, where=f"{where}, frame {k}", access=access) for k, frame in enumerate(source)]
    return frames + frames[-1:] * (len(frames) % 2)


def _video_of(frames: list[Image], keys: Mapping[str, Any]) -> Video:
    import numpy as np
    import torch

    sample_fps = keys.get("sample_fps", 2.0)
    raw_fps = keys.get("raw_fps", sample_fps)
    count = len(frames)
    metadata = {"fps": raw_fps, "frames_indices": list(range(count)), "total_num_frames": count / sample_fps * raw_fps}
    return Video(torch.stack([torch.from_numpy(np.array(f)) for f in frames]).permute(0, 3, 1, 2), metadata, sample_fps)


def _decoded(source: Any, where: str, access: MediaAccess, keys: Mapping[str, Any]) -> Video:
    import torch

    try:
        import av
    except ImportError as error:
        raise RowError(f"{where}: videos are decoded with PyAV, which is not installed. pip install av") from error
    content, name = content_of(source, where, access, "video")
    if not isinstance(content, io.IOBase):
        raise ImageError(f"{where}: expected a video file or a list of frames, found {name}.")
    with content:
        what = diagnosis(content, "video")  # before FFmpeg sees it: a playlist would make it open other files
        if what:
            raise ImageError(f"{where}: {name} is not a readable video: it is {what}.")
        try:
            fps, total = _count(av, content, where, name, access)
            first, last, total = _frame_range(keys, total, fps, where)
            count = _smart_nframes(keys, total, fps, where)
            wanted: list[int] = torch.linspace(first, last, count).round().long().tolist()
            frames = _frames_at(av, content, set(wanted))
        except (av.FFmpegError, OSError, ValueError, IndexError) as error:
            if isinstance(error, RowError):
                raise
            raise ImageError(
                f"{where}: {name} is not a readable video: damaged or cut short ({why(error)}). Restore the file, or drop the row."
            ) from error
    if missing := sorted(set(wanted) - set(frames)):
        raise ImageError(
            f"{where}: {name} announces {last + 1} frames or more, but frame {missing[0]} could not be decoded. "
            "Restore the file, or drop the row."
        )
    metadata = {"fps": fps, "frames_indices": wanted, "total_num_frames": total, "video_backend": "pyav"}
    stacked = torch.stack([torch.from_numpy(frames[k]) for k in wanted]).permute(0, 3, 1, 2)
    return Video(stacked, metadata, count / max(total, 1e-6) * fps)


def _container(av: Any, content: Any) -> Any:
    """The opened file, if it is a container that holds its own pictures: a playlist or a session description, which FFmpeg
    would follow to other files and hosts, is none of them."""
    return av.open(content, container_options={"format_whitelist": CONTAINERS, "protocol_whitelist": "pipe"})


def _count(av: Any, content: Any, where: str, name: str, access: MediaAccess) -> tuple[float, int]:
    """(frames a second, number of frames), by counting packets: headers of some containers leave the number out."""
    content.seek(0)
    with _container(av, content) as container:
        if not container.streams.video:
            if container.streams.audio:
                raise ImageError(f"{where}: {name} holds no pictures, only sound. Expected a video.")
            raise ValueError("no stream could be read")
        stream = container.streams.video[0]
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        if (stream.width or 0) * (stream.height or 0) > access.max_image_pixels:
            raise ImageError(
                f"{where}: {name} announces frames of {stream.width} x {stream.height} pixels; max_image_pixels = "
                f"{access.max_image_pixels}. Shrink the video, or drop the row."
            )
        flags = [(p.is_discard, p.is_corrupt) for p in container.demux(stream) if p.size]
        short = _MOV_FAMILY in container.format.name and len(flags) < stream.frames
        if short or any(corrupt for _, corrupt in flags):
            raise ImageError(
                f"{where}: {name} is not a readable video: cut short, {len(flags)} whole frames of {stream.frames}. "
                "Restore the file, or drop the row."
            )
    total = sum(not discard for discard, _ in flags)
    if total == 0 or fps <= 0:
        raise ImageError(f"{where}: {name} holds {total} frames at {fps} a second. Expected a video; drop the row.")
    return fps, total


def _frames_at(av: Any, content: Any, wanted: set[int]) -> dict[int, Any]:
    """{index: uint8 [H, W, 3]}, upright, decoding in order up to the last one wanted."""
    import numpy as np

    found: dict[int, Any] = {}
    content.seek(0)
    with _container(av, content) as container:
        container.streams.video[0].thread_type = "AUTO"
        for k, frame in enumerate(container.decode(video=0)):
            if k in wanted:
                found[k] = np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))
                if len(found) == len(wanted):
                    break
    return found


def _frame_range(keys: Mapping[str, Any], total: int, fps: float, where: str) -> tuple[int, int, int]:
    """(first frame, last frame, their number) of video_start..video_end: calculate_video_frame_range's rule."""
    longest = total / fps
    start, end = keys.get("video_start"), keys.get("video_end")
    first = 0 if start is None else math.ceil(min(start, longest) * fps)
    last = total - 1 if end is None else min(math.floor(min(end, longest) * fps), total - 1)
    if (start is not None or end is not None) and first >= last:
        raise RowError(
            f"{where}: video_start {start} to video_end {end} seconds holds no two frames of a video of {longest:.2f} "
            f"seconds ({total} frames at {fps:.3f} a second). Move them."
        )
    return first, last, last - first + 1


def _smart_nframes(keys: Mapping[str, Any], total: int, fps: float, where: str) -> int:
    """How many frames to sample: smart_nframes's rule; an even number."""
    if "nframes" in keys:
        count: int = round(keys["nframes"] / 2) * 2
    else:
        least = math.ceil(keys.get("min_frames", 4) / 2) * 2
        most = math.floor(keys.get("max_frames", min(768, total)) / 2) * 2
        wished = total / fps * keys.get("fps", 2.0)
        count = math.floor(min(max(wished, least), most, total) / 2) * 2
    if not 2 <= count <= total:
        raise RowError(
            f"{where}: expected 2 to {total} sampled frames, found {count}. Change nframes, fps or max_frames."
        )
    return count


def _target_size(
    height: int,
    width: int,
    unit: int,
    keys: Mapping[str, Any],
    bounds: tuple[float, float],
    usual: tuple[int, int],
    where: str,
) -> tuple[int, int]:
    """(height, width), multiples of `unit` with a number of pixels within bounds: smart_resize's rule."""
    least, most = bounds
    if "resized_height" in keys and "resized_width" in keys:
        height, width, least, most = (
            keys["resized_height"],
            keys["resized_width"],
            usual[0] * unit**2,
            usual[1] * unit**2,
        )
    if most < least:
        raise RowError(f"{where}: max_pixels {most} is less than min_pixels {least}. Raise it.")
    if max(height, width) > 200 * min(height, width):
        raise RowError(f"{where}: {height} x {width} is longer than 200 times its width. Crop it, or drop the row.")
    tall, wide = max(unit, round(height / unit) * unit), max(unit, round(width / unit) * unit)
    if tall * wide > most:
        shrink = math.sqrt(height * width / most)
        return math.floor(height / shrink / unit) * unit, math.floor(width / shrink / unit) * unit
    if tall * wide < least:
        grow = math.sqrt(least / (height * width))
        return math.ceil(height * grow / unit) * unit, math.ceil(width * grow / unit) * unit
    return tall, wide
