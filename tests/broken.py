"""Photo files broken in many ways, the same on every machine; for tests."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 64
HUGE = 30_000  # side of a decompression bomb


def picture(number: int) -> np.ndarray:
    """A gradient with noise, uint8 [SIDE, SIDE, 3]."""
    ramp = np.linspace(0, 160, SIDE)
    smooth = ramp[:, None, None] * 0.5 + ramp[None, :, None] * 0.5 + [0, 20, 40]
    return (smooth + np.random.default_rng(number).integers(0, 50, (SIDE, SIDE, 3))).astype(np.uint8)


def encode(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def good() -> dict[str, bytes]:
    """Photos that can be used, of every kind that is read, by file name."""
    images = [Image.fromarray(picture(number)) for number in range(10)]
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a photo"
    wide = (picture(8)[..., 0].astype(np.uint16) * 200).astype(np.uint16)
    return {
        "plain.jpg": encode(images[0], "JPEG", quality=90),
        "progressive.jpg": encode(images[1], "JPEG", quality=80, progressive=True, exif=exif),
        "grey.jpeg": encode(images[2].convert("L"), "JPEG"),
        "cmyk.jpg": encode(images[3].convert("CMYK"), "JPEG"),
        "colour.png": encode(images[4], "PNG"),
        "palette.png": encode(images[5].quantize(32), "PNG"),
        "alpha.png": encode(images[6].convert("RGBA"), "PNG"),
        "deep.png": encode(Image.fromarray(wide), "PNG"),
        "plain.bmp": encode(images[7], "BMP"),
        "plain.webp": encode(images[9], "WEBP", quality=80),
    }


def mutations(data: bytes, seed: int) -> list[bytes]:
    """Fifty-one ways to damage a file: cut, bits flipped, blocks lost."""
    rng, found = np.random.default_rng(seed), []
    quarters = [len(data) * part // 4 for part in (1, 2, 3)]
    for length in (1, 2, 10, 30, *quarters, len(data) - 20, len(data) - 1):
        found.append(data[:length])
    for number in range(36):  # the first ones in the header, where they matter most
        bad = np.frombuffer(data, np.uint8).copy()
        end = 200 if number < 18 else len(bad)
        at = rng.integers(0, min(end, len(bad)), (1, 2, 8)[number % 3])
        bad[at] ^= (1 << rng.integers(0, 8, len(at))).astype(np.uint8)
        found.append(bad.tobytes())
    for value in (0x00, 0xFF):
        for share in (0.1, 0.4, 0.8):
            start = int(share * len(data))
            found.append(data[:start] + bytes([value]) * 64 + data[start + 64 :])
    return found


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(side: int, rows: bytes, depth: int = 8, colour: int = 0) -> bytes:
    """A PNG whose header says side x side, with these compressed rows."""
    header = struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0)
    parts = [png_chunk(b"IHDR", header), png_chunk(b"IDAT", rows), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def constant_rows(side: int) -> bytes:
    """Compressed rows of a whole black image of one bit a pixel."""
    return zlib.compress(bytes(side * (side // 8 + 1)), 1)


def bombs() -> dict[str, bytes]:
    """Files of a few kilobytes that would be 900 million pixels; the first one is whole."""
    files, few = good(), zlib.compress(bytes(10_000))
    jpeg, bmp = bytearray(files["plain.jpg"]), bytearray(files["plain.bmp"])
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", HUGE, HUGE)
    bmp[18:26] = struct.pack("<ii", HUGE, HUGE)
    canvas = (HUGE - 1).to_bytes(3, "little") * 2
    extended = b"VP8X" + struct.pack("<I", 10) + b"\x00\x00\x00\x00" + canvas
    body = b"WEBP" + extended + files["plain.webp"][12:]
    return {
        "whole.png": png(HUGE, constant_rows(HUGE), depth=1),
        "header.png": png(HUGE, few, colour=2),
        "header16.png": png(HUGE, few, depth=16, colour=6),
        "header.jpg": bytes(jpeg),
        "header.bmp": bytes(bmp),
        "header.webp": b"RIFF" + struct.pack("<I", len(body)) + body,
        "called.jpg": png(HUGE, few),
    }


def odd() -> dict[str, bytes]:
    """Names and contents that do not fit; those after tagged.png can be used."""
    image = Image.fromarray(picture(20))
    return {
        "empty.jpg": b"",
        "empty.png": b"",
        "page.jpg": b"<html>404 Not Found</html>",
        "zeros.jpg": bytes(5000),
        "script.jpg": encode(image, "EPS"),
        "tagged.png": encode(image, "TIFF"),
        "tiny.png": png(8, zlib.compress(bytes(72))),
        "png.jpg": encode(image, "PNG"),
        "jpeg.bmp": encode(image, "JPEG"),
        "gif.jpg": encode(image, "GIF"),
        "größe 日本\n🌄.JPG": encode(image, "JPEG"),
    }


def write(root: Path) -> list[str]:
    """A tree of well over 500 such files below root, in nested folders; the paths of all that are listed."""
    for number, (name, data) in enumerate(good().items()):
        stem, end = name.split(".")
        for i, bad in enumerate(mutations(data, number)):
            put(root / stem / f"{i // 10}" / f"{i:02d}.{end}", bad)
        put(root / "good" / name, data)
    for name, data in (bombs() | odd()).items():
        put(root / "odd" / name, data)
    put(root.joinpath(*["deep"] * 40) / "down.png", good()["colour.png"])
    links(root / "links", root)
    return sorted(str(path) for path in _files(root))


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def links(folder: Path, root: Path) -> None:
    """What is no regular file, or not there at all."""
    folder.mkdir()
    (folder / "up").symlink_to(root)
    (folder / "self").symlink_to(folder / "self")
    (folder / "self.jpg").symlink_to(folder / "self.jpg")
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "endless.jpg").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.jpg")
    put(folder / "folder.jpg" / "inside.jpg", good()["plain.jpg"])
    with open(os.fsencode(folder) + b"/\xff\xfe.jpg", "wb") as file:  # not UTF-8
        file.write(good()["plain.jpg"])
    with open(folder / "sparse.jpg", "wb") as file:
        file.truncate(20 * 2**30)


def _files(root: Path):
    """By another way than the program's: no links to folders are followed."""
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".bmp", ".webp"):
                yield path
