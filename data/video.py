"""Video files of LeRobot datasets through PyAV: exact random access to frames, and small-GOP h264 writing.

Times are seconds, frames are uint8 arrays of shape (height, width, 3) in RGB order.
"""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter


class VideoReader:
    """Random access, by time, to the frames of one video file.

    The file stays open between calls: reading forward costs one decode per frame, and a jump costs one seek to the
    keyframe before the target plus the decoding from there. An instance belongs to one process and one thread.

    Args:
        path: the video file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a readable video (truncated, corrupt, or without a video stream).
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"Video file {self.path} does not exist. Download the dataset again.")
        try:
            self._container = av.open(str(self.path))
        except av.FFmpegError as error:
            raise ValueError(self._unreadable(error)) from error
        if not self._container.streams.video:
            raise ValueError(f"{self.path} has no video stream. Download or record the dataset again.")
        self._stream = self._container.streams.video[0]
        # One thread: data loader workers are the parallelism, and frame threads fight over the cores (6x slower).
        self._stream.codec_context.thread_count = 1
        self._seconds_per_tick = float(self._stream.time_base)
        rate = self._stream.average_rate
        self._half_frame = 0.5 / float(rate) if rate else 0.0
        self._reformatter = VideoReformatter()
        self._index = self._stream.index_entries  # of the container: decode times, in decoding order
        if len(self._index) == 0:
            raise ValueError(self._unreadable("it contains no frames"))
        # With B-frames decode times start below zero; the delay between decoding and showing a keyframe is constant.
        self._delay = (self._stream.start_time or 0) - self._index[0].timestamp
        self._frames = None  # the running decoder, None before the first seek and after the end of the file
        self._wanted = 0  # ticks: nothing is wanted of what is shown earlier, so the decoder may skip it
        self._current = None  # the newest decoded frame
        self._previous = None  # the one before it, since the newest seek

    def close(self):
        self._frames = self._current = self._previous = None
        self._container.close()

    def frame_at(self, time_s: float, tolerance_s: float) -> np.ndarray:
        """The frame shown at `time_s`.

        Args:
            time_s: presentation time in seconds.
            tolerance_s: largest accepted distance (seconds) between `time_s` and the nearest frame.

        Returns:
            uint8 array (height, width, 3), RGB.

        Raises:
            ValueError: no frame within the tolerance, or the file is damaged.
        """
        frame = self._nearest(time_s, tolerance_s)
        distance = abs(frame.pts * self._seconds_per_tick - time_s)
        if distance > tolerance_s:
            raise ValueError(
                f"{self.path}: the frame nearest to {time_s:.6f} s is {distance:.6f} s away; the tolerance is "
                f"{tolerance_s:.6f} s. Is the video truncated, or is its frame rate ({self._stream.average_rate}) not "
                "the dataset's?"
            )
        return self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()

    def _nearest(self, time_s: float, tolerance_s: float) -> av.VideoFrame:
        """Decode up to the first frame that is not earlier than `time_s`, but for a slack; return it or its
        predecessor. Frames further before `time_s` than the tolerance may be skipped."""
        slack_s = min(tolerance_s, self._half_frame)
        wanted = int((time_s - tolerance_s) / self._seconds_per_tick)
        try:
            can_continue = wanted >= self._wanted and self._can_continue_to(time_s)
            self._wanted = wanted
            if not can_continue:
                self._seek(time_s, slack_s)
            while self._current.pts * self._seconds_per_tick < time_s - slack_s:
                following = next(self._frames, None)
                if following is None:
                    last, self._frames, self._current, self._previous = self._current, None, None, None
                    return last
                self._previous, self._current = self._current, following
        except av.FFmpegError as error:
            self._frames = self._current = self._previous = None
            raise ValueError(self._unreadable(error)) from error
        candidates = [frame for frame in (self._current, self._previous) if frame is not None]
        return min(candidates, key=lambda frame: abs(frame.pts * self._seconds_per_tick - time_s))

    def _decode(self):
        """Frames from the current position on, without those before `self._wanted` that no other frame refers to."""
        for packet in self._container.demux(self._stream):
            is_early = packet.pts is not None and packet.pts < self._wanted
            self._stream.codec_context.skip_frame = "NONREF" if is_early else "DEFAULT"
            yield from packet.decode()

    def _can_continue_to(self, time_s: float) -> bool:
        """True when decoding forward from here reaches `time_s` at least as soon as a seek would."""
        if self._current is None:
            return False
        oldest = self._current if self._previous is None else self._previous
        tick = round(time_s / self._seconds_per_tick)
        return oldest.pts <= tick and self._keyframe_before(tick) + self._delay <= self._current.pts

    def _keyframe_before(self, tick: int) -> int:
        """Decode time of the last keyframe that is shown at or before `tick`; of the first one if there is none."""
        return self._index[max(self._index.search_timestamp(tick - self._delay, backward=True), 0)].timestamp

    def _seek(self, time_s: float, slack_s: float):
        """Decode the first frame at or after a keyframe from which `time_s` can be reached."""
        self._previous = None
        tick = round(time_s / self._seconds_per_tick)
        first = self._index[0].timestamp
        while True:
            # The demuxer's index is in decoding order, so its own decode time is the only exact address of a keyframe.
            keyframe = self._keyframe_before(tick)
            self._container.seek(keyframe, stream=self._stream, backward=True)
            self._frames = self._decode()
            self._current = next(self._frames, None)
            if self._current is None:
                raise ValueError(self._unreadable("no frame could be decoded"))
            if self._current.pts * self._seconds_per_tick <= time_s + slack_s or keyframe == first:
                return
            tick = keyframe + self._delay - 1  # frames before the keyframe in time follow it in the file: go back

    def _unreadable(self, reason) -> str:
        return (
            f"{self.path} ({self.path.stat().st_size} bytes) cannot be read as a video: {reason}. It is truncated, "
            "corrupt, or a Git LFS pointer; download the file again."
        )


class EpisodeEncoder:
    """Encodes the frames of one episode, one by one, into an mp4 in memory.

    Args:
        height, width: of the frames; both even (yuv420p halves the colour planes).
        fps: frames per second.
        crf: x264 quality, 0 (lossless) to 51; lower is better and larger.
        gop: distance between keyframes; small values make random access cheap.
        preset: x264 preset.
        threads: encoder threads; one is fastest for small frames and makes the bytes reproducible.
    """

    def __init__(self, height: int, width: int, fps: int, *, crf: int, gop: int, preset: str, threads: int):
        self._file = io.BytesIO()
        self._container = av.open(self._file, mode="w", format="mp4")
        # No B-frames: with keyframes this dense they save nothing, and without them decode time is show time, so that
        # episodes can be joined by adding an offset.
        options = {"crf": str(crf), "preset": preset, "bf": "0", "sc_threshold": "0"}
        self._stream = self._container.add_stream("libx264", rate=fps, options=options)
        self._stream.height, self._stream.width = height, width
        self._stream.pix_fmt = "yuv420p"
        self._stream.gop_size = gop
        self._stream.codec_context.thread_count = threads
        self._stream.codec_context.time_base = Fraction(1, fps)
        self._reformatter = VideoReformatter()
        self._num_frames = 0

    def add(self, pixels: np.ndarray):
        """Append one frame, uint8 (height, width, 3) RGB."""
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame = self._reformatter.reformat(frame, format="yuv420p", threads=1)
        frame.pts = self._num_frames
        frame.time_base = Fraction(1, self._stream.average_rate)
        self._container.mux(self._stream.encode(frame))
        self._num_frames += 1

    def finish(self) -> bytes:
        """The finished mp4."""
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._file.getvalue()

    def abort(self):
        """Drop everything encoded so far."""
        self._container.close()


class VideoFile:
    """One mp4 on disk that episodes are appended to without encoding them again.

    Args:
        path: file to create; its folder must exist.
        fps: frames per second of all episodes.
    """

    def __init__(self, path: Path, fps: int):
        self._fps = fps
        # faststart: the index comes first, so that a player or the Hub's viewer can start before the whole download.
        self._container = av.open(str(path), mode="w", format="mp4", options={"movflags": "faststart"})
        self._stream = None
        self.num_frames = 0
        self.num_bytes = 0

    def append(self, episode: bytes, num_frames: int) -> tuple[float, float]:
        """Append the mp4 of one episode; returns its first and past-the-end times (seconds) in this file."""
        with av.open(io.BytesIO(episode)) as source:
            template = source.streams.video[0]
            if self._stream is None:
                self._stream = self._container.add_stream_from_template(template)
                self._stream.time_base = template.time_base
            offset = round(Fraction(self.num_frames, self._fps) / template.time_base)
            for packet in source.demux(template):
                if packet.size == 0:  # the demuxer's end-of-file marker
                    continue
                packet.pts += offset
                packet.dts += offset
                packet.stream = self._stream
                self._container.mux(packet)
        start = self.num_frames
        self.num_frames += num_frames
        self.num_bytes += len(episode)
        return start / self._fps, self.num_frames / self._fps

    def close(self):
        self._container.close()
