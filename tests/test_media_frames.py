"""Frames are those that a player shows, whatever the container and its metadata."""

import subprocess

import imageio_ffmpeg
import numpy as np
import pytest

from mhla_gen.config import ClipsConfig, DataConfig
from mhla_gen.data.clip_files import find_clips
from mhla_gen.data.clips import Clips, place
from mhla_gen.evaluation.video import ClipRule, read_clip
from mhla_gen.media import Decoder
from mhla_gen.media.frames import VIDEO_SUFFIXES, Crop, clip_facts, read_frames
from mhla_gen.media.hdr import to_sdr
from mhla_gen.media.pictures import UnreadableImageError

HEIGHT, WIDTH = 48, 64
X264 = "-c:v libx264 -g 12 -pix_fmt yuv420p"
X265 = "-c:v libx265 -g 12 -pix_fmt yuv420p -x265-params log-level=none:open-gop=1:min-keyint=12"


def ffmpeg(*arguments, **options):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, **options).stdout


def make(path, options=X264, seconds=2, size=f"{WIDTH}x{HEIGHT}"):
    source = f"testsrc2=s={size}:r=24:d={seconds}"
    ffmpeg("-f", "lavfi", "-i", source, *options.split(), path)
    return path


def shown(path, height=HEIGHT, width=WIDTH):
    raw = ffmpeg(
        *("-i", f"file:{path}", "-map", "0:V:0", "-fps_mode", "passthrough"),
        *("-f", "rawvideo", "-pix_fmt", "rgb24", "-"),
    )
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)


def check_frames(path, expected):
    facts, count = clip_facts(path), len(expected)
    assert (len(facts.times), facts.height, facts.width) == expected.shape[:3]
    assert facts.times[0] == 0 and (np.diff(facts.times) > 0).all()
    orders = [[count // 2], [count - 1, 0, count // 3, 0], range(count), range(count - 1, -1, -7)]
    for indices in orders:
        np.testing.assert_array_equal(read_frames(path, indices), expected[list(indices)])


CONTAINERS = {
    ".mp4": X265,
    ".avi": "-c:v mpeg4 -bf 2 -g 12",
    ".mpg": "-c:v mpeg2video -bf 2 -g 12",
    ".mpeg": "-c:v mpeg1video -bf 2 -g 12",
    ".wmv": "-g 12",
    ".ogv": "-c:v libtheora",
    ".3gp": X264,
    ".webm": "-c:v libvpx-vp9 -auto-alt-ref 1 -lag-in-frames 16 -b:v 200k -cpu-used 8",
}


@pytest.mark.parametrize("suffix", sorted(VIDEO_SUFFIXES))
def test_every_container_gives_the_frames_of_a_player(suffix, tmp_path):
    path = make(tmp_path / f"a{suffix}", CONTAINERS.get(suffix, X264))
    check_frames(path, shown(path))


@pytest.mark.parametrize(
    ("suffix", "options"),
    [(suffix, X264) for suffix in (".mp4", ".mov", ".ts", ".avi")]
    + [(".mp4", f"{X264} -bf 0"), (".mp4", X265), (".mkv", X265)],
)
def test_clips_cut_without_encoding_show_what_a_player_shows(suffix, options, tmp_path):
    path = tmp_path / f"cut{suffix}"
    make(tmp_path / "long.mp4", options, seconds=3)
    ffmpeg("-ss", 0.7, "-i", tmp_path / "long.mp4", "-t", 1.5, "-c", "copy", path)
    check_frames(path, shown(path))


@pytest.mark.parametrize(
    ("options", "suffix"),
    [
        ("-display_rotation 90", ".mp4"),
        ("-display_rotation 180", ".mp4"),
        ("-display_rotation 270", ".mkv"),
        ("-display_hflip", ".mp4"),
        ("-display_vflip", ".mkv"),
        ("-display_rotation 90 -display_hflip", ".mp4"),
    ],
)
def test_rotations_and_flips_are_applied(options, suffix, tmp_path):
    plain, path = make(tmp_path / "plain.mp4"), tmp_path / f"turned{suffix}"
    ffmpeg(*options.split(), "-i", plain, "-c", "copy", path)
    turned = "90" in options or "270" in options
    expected = shown(path, *((WIDTH, HEIGHT) if turned else (HEIGHT, WIDTH)))
    assert not np.array_equal(expected[0], shown(plain)[0])
    check_frames(path, expected)


def circle(path, turn=()):
    """A circle of 100 pixels in 320 × 180 as shown, stored with pixels twice as wide as high."""
    disc = "lum='if(lt(hypot(X-160,Y-90),50),235,16)':cb=128:cr=128"
    source = ["-f", "lavfi", "-i", "color=black:s=320x180:r=16:d=1"]
    ffmpeg(*source, "-vf", f"geq={disc},scale=160:180,setsar=2/1", *X264.split(), path)
    if turn:
        plain = path.rename(path.with_name("plain.mp4"))
        ffmpeg(*turn, "-i", plain, "-c", "copy", path)
        plain.unlink()
    return path


def extent(frame):
    rows, columns = np.where(frame[..., 0] > 128)
    return np.ptp(rows) + 1, np.ptp(columns) + 1


@pytest.mark.parametrize("turn", [(), ("-display_rotation", 90)])
def test_pixels_are_squared(turn, tmp_path):
    path = circle(tmp_path / "a.mp4", turn)
    facts = clip_facts(path)
    assert (facts.height, facts.width) == ((320, 180) if turn else (180, 320))
    assert extent(read_frames(path, [3])[0]) == pytest.approx((100, 100), abs=2)
    half = Crop(facts.height // 2, facts.width // 2, facts.height // 2, facts.width // 2)
    assert extent(read_frames(path, [3], half)[0]) == pytest.approx((50, 50), abs=2)
    files = find_clips(DataConfig(source="clips", path=str(tmp_path)), "empty")
    config = ClipsConfig(buckets=[[9, 144, 256], [9, 256, 144]])
    with Decoder(20) as decoder:
        found = place(files, 0, config, decoder)
        assert found.bucket == (1 if turn else 0)
        tall, wide = extent(Clips(files, config, (found,), decoder).pixels(0)[0])
    assert tall == pytest.approx(wide, abs=2)


def test_the_reader_of_fvd_is_the_same(tmp_path):
    make(tmp_path / "long.mp4", seconds=4)
    path = tmp_path / "cut.mp4"
    ffmpeg("-ss", 0.7, "-i", tmp_path / "long.mp4", "-c", "copy", path)
    found = read_clip(path, ClipRule(frames=8, stride=4))
    np.testing.assert_array_equal(found, shown(path)[:32:4])
    with pytest.raises(UnreadableImageError, match=r"has \d+ frames, .* needs 100"):
        read_clip(path, ClipRule(frames=100))


def test_covers_and_odd_names_do_no_harm(tmp_path):
    plain = make(tmp_path / "plain.mp4")
    ffmpeg("-f", "lavfi", "-i", "color=red:s=400x400:d=1", "-frames:v", 1, tmp_path / "cover.jpg")
    path = tmp_path / "-http:x %03d\n.mp4"
    ffmpeg(
        *("-i", tmp_path / "cover.jpg", "-i", plain, "-map", 0, "-map", 1, "-c", "copy"),
        *("-disposition:v:0", "attached_pic", f"file:{path}"),
    )
    check_frames(path, shown(plain))


def test_a_list_of_segments_leads_nowhere(tmp_path):
    plain, path = make(tmp_path / "plain.ts"), tmp_path / "list.mp4"
    path.write_text(f"ffconcat version 1.0\nfile {plain}\n")
    with pytest.raises(UnreadableImageError, match="cannot be decoded"):
        clip_facts(path)


def test_other_kinds_of_files_are_not_guessed_at(tmp_path):
    for name in ("photo.heic", "clip"):
        (tmp_path / name).write_bytes(make(tmp_path / "a.mp4").read_bytes())
        with pytest.raises(UnreadableImageError, match="an unsupported kind"):
            clip_facts(tmp_path / name)


@pytest.mark.parametrize("suffix", [".ts", ".avi", ".mpg"])
def test_damage_is_not_patched_up(suffix, tmp_path):
    path = make(tmp_path / f"a{suffix}", CONTAINERS.get(suffix, X264))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = bytes(3000)
    path.write_bytes(content)
    try:
        facts = clip_facts(path)
        found = read_frames(path, range(len(facts.times)))
    except UnreadableImageError as error:
        assert "cannot be decoded" in str(error)
    else:
        np.testing.assert_array_equal(found, shown(path))


@pytest.mark.parametrize(
    ("name", "options", "opaque"),
    [
        ("a.webm", "-c:v libvpx-vp9 -pix_fmt yuva420p -auto-alt-ref 0", False),
        ("b.webm", "-c:v libvpx-vp9 -pix_fmt yuva420p -auto-alt-ref 0", True),
        ("a.mov", "-c:v qtrle -pix_fmt argb", False),
        ("b.mov", "-c:v qtrle -pix_fmt argb", True),
    ],
)
def test_transparent_video_is_refused_like_transparent_images(name, options, opaque, tmp_path):
    source = "testsrc2=s=64x48:r=24:d=0.5,format=rgba"
    alpha = "" if opaque else ",geq=r='r(X,Y)':g='g(X,Y)':b='b(X,Y)':a='if(lt(X,9),0,255)'"
    ffmpeg("-f", "lavfi", "-i", source + alpha, *options.split(), tmp_path / name)
    if opaque:
        check_frames(tmp_path / name, shown(tmp_path / name))
    else:
        with pytest.raises(UnreadableImageError, match="transparent pixels"):
            clip_facts(tmp_path / name)


CARD = np.array([200, 100, 50])


def card(path, transfer):
    """The colour of the card in light of BT.2020, white at 203 cd/m² or 75 % of the signal."""
    signal = CARD / 255
    linear = np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)
    to_2020 = [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]
    light = np.array(to_2020) @ linear
    if transfer == "smpte2084":
        y = (light * 203 / 10000) ** 0.1593017578125
        coded = ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375
    else:
        scene = light * 0.2650
        high = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
        coded = np.where(scene <= 1 / 12, np.sqrt(3 * scene), high)
    raw = np.broadcast_to((coded * 65535).round().astype("<u2"), (8, 48, 64, 3)).tobytes()
    colours = f"colorprim=bt2020:transfer={transfer}:colormatrix=bt2020nc"
    ffmpeg(
        *["-f", "rawvideo", "-pix_fmt", "rgb48le", "-s", "64x48", "-r", "16", "-i", "-"],
        *["-vf", "scale=out_color_matrix=bt2020:out_range=tv", "-c:v", "libx265"],
        *("-x265-params", f"log-level=none:{colours}", "-pix_fmt", "yuv420p10le", path),
        input=raw,
    )
    return path


@pytest.mark.parametrize(
    ("transfer", "name"), [("smpte2084", "PQ"), ("arib-std-b67", "HLG"), ("bt2020-10", "")]
)
def test_hdr_is_named_or_mapped(transfer, name, tmp_path):
    path = card(tmp_path / "a.mp4", transfer)
    for read in (clip_facts, lambda path: read_clip(path, ClipRule(2))):
        with pytest.raises(UnreadableImageError, match=f"is HDR .{name}" if name else "BT.2020"):
            read(path)
    for hdr in ("leave_out", "tone_map"):
        config = ClipsConfig(buckets=[[5, 48, 64]], hdr=hdr)
        files = find_clips(
            DataConfig(source="clips", path=str(tmp_path)), "empty", hdr == "tone_map"
        )
        with Decoder(20) as decoder:
            found = place(files, 0, config, decoder)
            if hdr == "leave_out" or not name:
                assert found.unreadable and "convert it" in found.left_out
                continue
            pixels = Clips(files, config, (found,), decoder).pixels(0)
        np.testing.assert_allclose(pixels[2, 24, 32], CARD, atol=4)


def test_tone_mapping_is_monotonic_and_keeps_white():
    grey = np.repeat(np.arange(0, 65536, 15, dtype=np.uint16)[:, None, None], 3, axis=2)
    for transfer, white in (("PQ", 0.5807), ("HLG", 0.75)):
        found = to_sdr(grey, transfer).astype(int)
        assert (np.diff(found[:, 0], axis=0) >= 0).all() and found.min() == 0
        assert np.abs(np.diff(found, axis=2)).max() <= 1
        level = np.full((1, 1, 3), round(white * 65535), np.uint16)
        assert to_sdr(level, transfer).min() >= 254
